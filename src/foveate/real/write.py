"""Writes questions about real pictures and documents to disk, for training and for tests, in the LLaVA format.

OUT/images/<split>/000000.jpg   scenes; documents and charts are .png; train/000000-0.jpg: close-up of a label of train/000000.jpg
OUT/masks/<split>/000000.png    of scenes: the number of the thing at each pixel, in the order of the record, 0 where there is none
OUT/records/<split>.jsonl       what was drawn, a line a picture: from it every answer follows
OUT/train.json                  about six questions a training picture, one conversation
OUT/captions.json               what a training picture shows, one turn; `boxes` says where, in shares of the side
OUT/closeups.json               what the labels in a close-up say and what lies where, two or three turns; `boxes` of things and letters
OUT/words.json                  captions of scenes, with boxes of things alone, and close-ups, as a stage of kind `align` takes them
OUT/test/<split>-<family>.json  one question a row: id, image, question, answers, category
OUT/licences.txt                where the pictures, fonts and words are from
OUT/real.json                   how it was made, how many questions there are, and what one constant answer would score
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from foveate.errors import FoveateError
from foveate.files import build, write, write_json
from foveate.jobs import spread
from foveate.real import closeups
from foveate.real.charts import make_chart, render_chart
from foveate.real.legible import can_judge, illegible
from foveate.real.pages import KINDS, make_facts, make_page, render_page
from foveate.real.questions import (
    FAMILIES,
    METRICS,
    Question,
    caption,
    chart_questions,
    constant,
    page_questions,
    scene_questions,
    transcript,
)
from foveate.real.scenes import SIZE, Box, Pairs, Scene, make_scene, render
from foveate.real.stock import HELD_STYLES, Font, Stock, held_names, said
from foveate.real.things import held_out

VERSION = 5  # raised whenever the same seed would give other pictures or texts
TRIES = 20  # drawings of one picture until all of its text is legible

LICENCES = """Pictures, fonts and words come from these packages. Pictures were scaled, turned and pasted; who passes the scenes on
keeps to the licences of all they show (CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/).

"""

_PICTURED = ("naming", "relation", "presence", "counting", "locating", "boxes")


@dataclass(frozen=True)
class Split:
    """What pictures of a split are made of. `shares`: of scenes, documents and charts among them."""

    name: str
    stock: Stock
    fonts: tuple[Font, ...]
    pairs: Pairs
    shares: tuple[float, float, float] = (0.6, 0.25, 0.15)
    families: tuple[str, ...] = FAMILIES

    def kind(self, index: int, count: int) -> str:
        """Of picture number `index` out of `count`: scenes come first."""
        scenes, pages = round(count * self.shares[0]), round(count * (self.shares[0] + self.shares[1]))
        return "scene" if index < scenes else KINDS[index % len(KINDS)] if index < pages else "chart"


@dataclass(frozen=True)
class Job:
    """One picture to be made."""

    split: int
    index: int
    kind: str


def splits(stock: Stock) -> list[Split]:
    """The training split, then the test splits that the stock has pictures for."""
    apart = held_names()
    drawn = stock.only(lambda name, picture: picture.style not in HELD_STYLES and name not in apart)
    styles = {name: {picture.style for picture in pictures} for name, pictures in drawn.pictures.items()}
    both = held_out((name for name in styles if "photograph" in styles[name] and len(styles[name]) > 1), 2)
    learnt = drawn.only(lambda name, picture: picture.style != "photograph" or name not in both)
    learnt = replace(learnt, words=stock.words.part(held=False))
    fonts, others = (tuple(font for font in stock.fonts if font.held == held) for held in (False, True))
    style = stock.only(lambda name, picture: picture.style in HELD_STYLES and name in learnt.pictures)
    new = stock.only(lambda name, picture: picture.style not in HELD_STYLES and name in apart)
    photographs = drawn.only(lambda name, picture: picture.style == "photograph" and name in both)
    scenes = (1.0, 0.0, 0.0)
    found = [
        Split("train", learnt, fonts, "seen", (0.75, 0.175, 0.075)),
        Split("compositions", learnt, fonts, "unseen"),
        Split("style", replace(style, words=learnt.words), fonts, "unseen", scenes, _PICTURED),
        Split("fonts", learnt, others, "unseen", (0.4, 0.4, 0.2), ("reading", "documents", "charts")),
        Split("names", replace(new, words=stock.words.part(held=True)), fonts, "any"),
        Split("photographs", replace(photographs, words=learnt.words), fonts, "any", scenes, _PICTURED),
    ]
    return [split for split in found if split.stock.pictures and split.fonts]


def write_real(
    out: Path, stock: Stock, train: int = 4000, test: int = 300, seed: int = 0, progress: bool = True, processes: int | None = None
) -> dict[str, Any]:
    """Writes `train` pictures for training and `test` for each test split, and returns what real.json says.

    The files are the same for any number of processes. A folder that holds the same data already is left as it is; nothing is left of
    one that was interrupted. Raises FoveateError for bad numbers and for a folder that holds anything else.
    """
    for name, value in (("train", train), ("test", test)):
        if value < 1:
            raise FoveateError(f"{name}={value}: at least one picture is needed")
    judged = can_judge(stock.ocr)
    parameters = {
        "version": VERSION,
        "train": train,
        "test": test,
        "seed": seed,
        "styles": sorted(stock.styles()),
        "judged": judged,
        "packages": dict(stock.versions) | {name: importlib.metadata.version(name) for name in ("pillow", "matplotlib")},
    }
    out = Path(out)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if not out.exists():
        build(out, partial(_fill, stock=stock, parameters=parameters, progress=progress, processes=processes))
    try:
        found = json.loads((out / "real.json").read_text(encoding="utf-8"))
        there = dict(found["parameters"])
    except (OSError, ValueError, KeyError, TypeError):
        raise FoveateError(f"{out} holds something else than questions about real pictures; choose an empty or new folder") from None
    if there != parameters:
        differs = [key for key in {**there, **parameters} if there.get(key) != parameters.get(key)]
        told = ", ".join(f"{key} {there.get(key)}, wanted {parameters.get(key)}" for key in differs)
        raise FoveateError(f"{out} holds other data ({told}); choose another folder")
    return dict(found)


def _fill(out: Path, stock: Stock, parameters: dict[str, Any], progress: bool, processes: int | None) -> None:
    parts = splits(stock)
    jobs = []
    (out / "records").mkdir()
    for number, split in enumerate(parts):
        for folder in ("images", "masks"):
            (out / folder / split.name).mkdir(parents=True)
        count = parameters["test"] if number else parameters["train"]
        jobs += [Job(number, index, split.kind(index, count)) for index in range(count)]
    make = partial(_write_one, out, parts, parameters["seed"], stock.ocr if parameters["judged"] else "")
    rows = [*track(spread(make, jobs, processes, few=500), "pictures", len(jobs), disable=not progress)]
    summary: dict[str, Any] = {}
    for number, split in enumerate(parts):
        mine = [row for row, job in zip(rows, jobs, strict=True) if job.split == number]
        write(out / "records" / f"{split.name}.jsonl", "".join(json.dumps(row["record"]) + "\n" for row in mine))
        asked = [(row, question) for row in mine for question in row["questions"] if question.family in split.families]
        summary[split.name] = {
            "pictures": dict(Counter(row["record"]["kind"] for row in mine)),
            "redrawn": sum(row["redrawn"] for row in mine),
            "questions": _balance([question for _, question in asked], number == 0),
        }
        if number:
            _write_tests(out / "test", split.name, asked)
        else:
            write_json(out / "train.json", [_talk(row, row["questions"]) for row in mine], indent=0)
            told = [_talk(row, [row["told"]]) | {"boxes": row["boxes"]} for row in mine]
            write_json(out / "captions.json", told, indent=0)
            near = [_talk(close, close["questions"]) | {"boxes": close["boxes"]} for row in mine for close in row["closeups"]]
            write_json(out / "closeups.json", near, indent=0)
            scenes = [
                caption | {"boxes": caption["boxes"][: len(row["record"]["things"])]}  # the print is too small to be spelled
                for row, caption in zip(mine, told, strict=True)
                if row["record"]["kind"] == "scene"
            ]
            write_json(out / "words.json", scenes + near, indent=0)
    write(out / "licences.txt", LICENCES + "\n".join(stock.sources) + "\n")
    write_json(out / "real.json", {"parameters": parameters, "splits": summary})


# ---- one picture ---------------------------------------------------------------------------------------------------------------------


def _write_one(out: Path, parts: Sequence[Split], seed: int, reader: str, job: Job) -> dict[str, Any]:
    split = parts[job.split]
    refused: list[str] = []
    for attempt in range(TRIES):
        rng = random.Random(f"real/{seed}/{split.name}/{job.index}/{attempt}")
        row, image, texts = (_chart if job.kind == "chart" else _scene if job.kind == "scene" else _document)(rng, split, job)
        content = _encoded(image, photograph=job.kind == "scene")
        needed = " ".join(f"{question.question} {question.answers[0]}" for question in row["questions"])
        read = [(text, box) for text, box in texts if text in needed]
        refused = illegible(reader, Image.open(io.BytesIO(content)), read) if reader else []
        if not refused:
            break
    else:
        raise FoveateError(f"picture {job.index} of {split.name} was drawn {TRIES} times and never legible: {', '.join(refused[:3])}")
    name = f"{split.name}/{job.index:06d}"
    record = row["record"] = {"id": name.replace("/", "-"), "image": f"{name}.{'jpg' if job.kind == 'scene' else 'png'}"} | row["record"]
    (out / "images" / record["image"]).write_bytes(content)
    row["closeups"] = []
    if row["scene"] is not None and job.split == 0:
        row["closeups"] = _closeups(out, random.Random(f"real/{seed}/close/{job.index}"), row["scene"], image, record["image"])
    if row["mask"] is not None:
        row["mask"].save(out / "masks" / f"{name}.png", compress_level=6)
    del row["mask"], row["scene"]
    row["boxes"] = _shares(row["boxes"])
    return row | {"redrawn": attempt}


def _encoded(image: Image.Image, photograph: bool) -> bytes:
    content = io.BytesIO()
    if photograph:
        image.save(content, "JPEG", quality=90, subsampling=0)
    else:
        image.save(content, "PNG", compress_level=6)
    return content.getvalue()


def _shares(boxes: Sequence[tuple[str, Box]]) -> list[list[Any]]:
    return [[text, [round(edge / SIZE, 4) for edge in box]] for text, box in boxes]


def _closeups(out: Path, rng: random.Random, scene: Scene, image: Image.Image, name: str) -> list[dict[str, Any]]:
    """One of each label of a scene, as pictures on disk and rows."""
    rows = []
    for number in range(len(scene.labels)):
        found = closeups.closeup(rng, scene, number)
        if found is not None:
            close, box = found
            path = Path(name).with_stem(f"{Path(name).stem}-{number}")
            (out / "images" / path).write_bytes(_encoded(image.crop(box), photograph=True))
            record = {"id": str(path.with_suffix("")).replace("/", "-"), "image": path.as_posix()}
            questions = closeups.told(close, alone=len(scene.labels) == 1)
            rows.append({"record": record, "questions": questions, "boxes": _shares(closeups.spelled(close, scene, box))})
    return rows


Drawn = tuple[dict[str, Any], Image.Image, list[tuple[str, Box]]]
"""Everything of a picture but its number, its pixels, and the texts on it that are to be legible."""


def _scene(rng: random.Random, split: Split, job: Job) -> Drawn:
    # As many yes as no, and all counts equally often: by the picture's number, which says nothing else.
    scene = make_scene(rng, split.stock, split.fonts, number=job.index // 2 % 5, pairs=split.pairs)
    questions = scene_questions(scene, split.stock, rng, yes=job.index % 2 == 0)
    image, mask = render(scene)
    things = [
        {
            "name": thing.name,
            "group": said(thing.name).group,
            "style": thing.picture.style,
            "source": thing.picture.glyph or Path(thing.picture.file).name,
            "turn": thing.turn,
            "box": thing.box,
        }
        for thing in scene.things
    ]
    labels = [{**_printed(label.text, label.font, label.size, label.box), "under": label.under} for label in scene.labels]
    record = {"kind": "scene", "ground": asdict(scene.ground), "things": things, "labels": labels}
    texts = [(label.text, label.box) for label in scene.labels]
    told = caption(scene, cells=job.index % 4 > 1)
    return _row(record, questions, told, _placed(scene), mask, scene), image, texts


def _placed(scene: Scene) -> list[tuple[str, Box]]:
    return [*((thing.name, thing.box) for thing in scene.things), *((label.text, label.box) for label in scene.labels)]


def _row(
    record: dict[str, Any],
    questions: list[Question],
    told: Question,
    boxes: list[tuple[str, Box]],
    mask: Image.Image | None = None,
    scene: Scene | None = None,
) -> dict[str, Any]:
    return {"record": record, "questions": questions, "told": told, "boxes": boxes, "mask": mask, "scene": scene}


def _document(rng: random.Random, split: Split, job: Job) -> Drawn:
    facts = make_facts(rng, split.stock, job.kind)
    page = make_page(rng, facts, split.fonts)
    texts = [(text.text, text.box) for text in page.texts]
    printed = [_printed(text.text, text.font, text.size, text.box) for text in page.texts]
    record = {"kind": facts.kind, "title": facts.title, "rows": facts.rows, "texts": printed}
    told = transcript(text for text, _ in texts)
    return _row(record, page_questions(facts, rng), told, texts), render_page(page), texts


def _chart(rng: random.Random, split: Split, job: Job) -> Drawn:
    chart = make_chart(rng, split.stock, split.fonts)
    image, texts, bars = render_chart(chart)
    printed = [_printed(text, chart.font, chart.size, box) for text, box in texts]
    values = [{"label": label, "value": value, "box": box} for label, value, box in zip(chart.labels, chart.values, bars, strict=True)]
    record = {"kind": "chart", "title": chart.title, "bars": values, "numbered": chart.numbered, "texts": printed}
    told = transcript(text for text, _ in texts)
    return _row(record, chart_questions(chart, rng), told, texts), image, texts


def _printed(text: str, font: Font, size: int, box: Box) -> dict[str, Any]:
    return {"text": text, "font": Path(font.file).stem, "size": size, "box": box}


# ---- the files of questions ----------------------------------------------------------------------------------------------------------


def _talk(row: dict[str, Any], questions: Iterable[Question]) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for i, question in enumerate(questions):
        turns.append({"from": "human", "value": ("" if i else "<image>\n") + question.question})
        spelled = {"spelled": list(question.printed)} if question.printed else {}
        turns.append({"from": "gpt", "value": question.answers[0], **spelled})
    return {"id": row["record"]["id"], "image": row["record"]["image"], "conversations": turns}


def _write_tests(folder: Path, split: str, asked: Sequence[tuple[dict[str, Any], Question]]) -> None:
    for family in FAMILIES:
        rows = [
            {
                "id": f"{row['record']['id']}-{row['questions'].index(question)}",
                "image": row["record"]["image"],
                "question": question.question,
                "answers": list(question.answers),
                "category": row["record"]["kind"],
            }
            for row, question in asked
            if question.family == family
        ]
        if rows:
            write_json(folder / f"{split}-{family}.json", rows, indent=0)


def _balance(questions: Sequence[Question], training: bool) -> dict[str, Any]:
    """Of each family: questions, and the best constant answer with the share that it gets right (not of boxes in training: too many)."""
    balance: dict[str, Any] = {}
    for family in FAMILIES:
        count = sum(question.family == family for question in questions)
        if count:
            balance[family] = {"questions": count}
        if count and not (training and family == "boxes"):
            answer, share, _ = constant(questions, family)
            balance[family] |= {"constant": answer, "right": round(share, 4)}
    return balance


def told(found: dict[str, Any]) -> str:
    """real.json in words: questions of each split and family, and what the best constant answer scores."""
    lines = []
    for split, summary in found["splits"].items():
        pictures = sum(summary["pictures"].values())
        total = sum(family["questions"] for family in summary["questions"].values())
        lines.append(f"{split}: {pictures} pictures, {total} questions" + (f", {n} drawn again" if (n := summary["redrawn"]) else ""))
        for family, row in summary["questions"].items():
            best = f"  best constant answer {row['constant']!r}: {row['right']:.1%}" if "constant" in row else ""
            lines.append(f"  {family:10} {row['questions']:6}  metric={METRICS[family]:24}{best}")
    judged = found["parameters"]["judged"]
    lines.append(
        "Legibility was judged by PP-OCR." if judged else "Legibility was not judged: that takes onnxruntime and the package rapidocr."
    )
    return "\n".join(lines)
