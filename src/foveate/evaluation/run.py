"""Answer a test set with a vision-language model and score the answers family by family."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate import inference
from foveate.data import conversations
from foveate.data.chat import Renderer
from foveate.data.conversations import check_text
from foveate.data.pixels import open_image
from foveate.data.rows import read_json
from foveate.engine.attach import attach
from foveate.errors import FoveateError, readable
from foveate.evaluation.metrics import FAMILIES, FamilyScore, check_truth, score_family
from foveate.files import write_json
from foveate.reducers import Reducer, in_model, parse, prepare, saved_reducers, spell

log = logging.getLogger(__name__)

GREY = (127, 127, 127)
WORLD = (
    'A world is a folder with `images` and with test.json, a list of {"id": "1", "image": a file in images, "family": one of '
    f'{", ".join(FAMILIES)}, "question": "...", "answer": "..."}}; `foveate data scenes FOLDER` makes one. Questions of any other '
    'kind about pictures of your own, a list of {"image": "a.jpg", "question": "...", "answer": "..."}, are asked by '
    "`foveate bench MODEL --tasks FILE.json:metric=exact,images=FOLDER --out RUN`"
)
Range = tuple[int, int]  # fewest, most


@dataclass(frozen=True)
class Row:
    """One question with its true answer, the model's answer and the verdict."""

    id: str
    image: str
    family: str
    question: str
    answer: str
    prediction: str
    correct: bool


@dataclass(frozen=True)
class Result:
    """What a model answered.

    `visual_tokens`: per image, as they enter the language model; `layer_tokens`: per image in each of its layers, as observed, where
    reducers were attached; both are means over all questions, and the ranges hold the fewest and the most. `seconds`: wall clock of
    answering.
    """

    model: str
    data: str
    reducers: str
    blind: bool
    visual_tokens: float
    layer_tokens: list[float] | None
    seconds: float
    families: dict[str, FamilyScore]
    rows: list[Row]
    visual_range: Range | None = None
    layer_ranges: list[Range] | None = None

    @property
    def mean(self) -> float:
        """Mean of the families' accuracies, each family counting the same."""
        return sum(score.accuracy for score in self.families.values()) / len(self.families)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean": self.mean}

    def save(self, path: str | Path) -> None:
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """A result written by `save`; FoveateError if the file is not one."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            del raw["mean"]
            families = {name: FamilyScore(**score) for name, score in raw.pop("families").items()}
            if raw.get("visual_range") is not None:
                raw["visual_range"] = tuple(raw["visual_range"])
            if raw.get("layer_ranges") is not None:
                raw["layer_ranges"] = [tuple(ends) for ends in raw["layer_ranges"]]
            return cls(families=families, rows=[Row(**row) for row in raw.pop("rows")], **raw)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FoveateError(f"{path} is not an evaluation result written by foveate eval --output: {error}") from error


@dataclass(frozen=True)
class Question:
    id: str
    image: str
    family: str
    question: str
    answer: str


def read_questions(data_dir: str | Path, limit: int | None = None) -> list[Question]:
    """The checked rows of `data_dir`/test.json, in file order.

    With a limit: the first rows of every family, taken in turn, so that each family has its share.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise FoveateError(f"no such data folder: {folder}; make one with `foveate data scenes {folder}`")
    path = folder / "test.json"
    if not path.is_file():
        raise FoveateError(f"{folder} has no test.json, so it is no world. {WORLD}")
    raw, _ = read_json(path)
    if not raw:
        raise FoveateError(f"{path} holds no questions; it must be a list with at least one")
    if limit is not None and limit < 1:
        raise FoveateError(f"limit must be at least 1 question, got {limit}")
    questions = [_question(item, f"{path}, row {number}") for number, item in enumerate(raw)]
    missing = [name for name in sorted({question.image for question in questions}) if not (folder / "images" / name).is_file()]
    if missing:
        where = readable(str((folder / "images").absolute() / missing[0]))
        raise FoveateError(
            f"{path}: {len(missing)} image(s) are missing in {folder / 'images'}, the first is {missing[0]}: no file {where}"
        )
    if limit is None or limit >= len(questions):
        return questions
    turn: dict[str, int] = dict.fromkeys(FAMILIES, 0)
    order = []
    for number, question in enumerate(questions):
        order.append((turn[question.family], number))
        turn[question.family] += 1
    return [questions[number] for number in sorted(number for _, number in sorted(order)[:limit])]


def _question(item: Any, where: str) -> Question:
    if not isinstance(item, dict):
        raise FoveateError(f"{where}: expected an object, got {item!r}. {WORLD}")
    names = ("id", "image", "family", "question", "answer")
    for name in names:
        if not isinstance(item.get(name), str):
            raise FoveateError(f"{where}: the field {name!r} must be a text, got {item.get(name)!r}. {WORLD}")
        if wrong := check_text(item[name]):
            raise FoveateError(f"{where}: the field {name!r}: {wrong}")
    question = Question(**{name: item[name] for name in names})
    check_truth(question.family, question.answer, where)
    return question


def load_model(name: str | Path, device: str | None = None, **options: Any) -> tuple[Any, Any]:
    """A vision-language model and its processor, from a folder, a hub name or a shipped asset ("asset:vlm").

    `device`: default the GPU if there is one, else the CPU. `options`: those of `from_pretrained`, with dtype float32 if it is not said;
    a device_map among them stands in place of `device`.
    """
    import foveate.model  # noqa: F401  # registers the Auto classes
    from foveate.world import resolve

    source = resolve(str(name))
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FoveateError(f"{folder} holds no model (no config.json); a training run leaves its model in <output>/final")
    if not folder.is_dir() and (folder.is_absolute() or source.count("/") != 1 or source.startswith(".")):
        raise FoveateError(f"no such model folder: {source}")
    try:
        model = AutoModelForImageTextToText.from_pretrained(source, **{"dtype": torch.float32, **options})
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FoveateError(f"cannot load a vision-language model and its processor from {source}: {reason}") from error
    if "device_map" not in options:
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model, processor


def prompts(processor: Any, questions: Sequence[str], images: Sequence[int] | None = None) -> list[str]:
    """The prompts of questions about so many `images` each (one, unless told), as training writes them: image, line break, question.
    A thought that the template opens is closed, empty, where training writes it so.

    A question that says itself where its images stand, by markers, is left as it is."""
    renderer = Renderer(processor)
    counts = [1] * len(questions) if images is None else images
    marks = [f"{conversations.MARKER}\n" * count for count in counts]
    texts = [text if conversations.MARKER in text else mark + text for mark, text in zip(marks, questions, strict=True)]
    return [renderer.ask([("user", text)]) for text in texts]


def model_inputs(processor: Any, images: Sequence[Sequence[Image.Image]], texts: Sequence[str]) -> Any:
    """What the processor makes of prompts that `prompts` wrote, each about its own images, padded on the left."""
    given: dict[str, Any] = {"images": [list(own) for own in images]} if any(images) else {}
    start = processor.tokenizer.bos_token
    if start and texts[0].startswith(start):
        given["add_special_tokens"] = False  # the template has written them
    try:
        return processor(text=list(texts), padding=True, padding_side="left", return_tensors="pt", **given)
    except ValueError as error:
        raise FoveateError(f"{type(processor).__name__} does not take these images and prompts: {error}") from error


def shrunk(processor: Any, reducers: Sequence[Reducer]) -> tuple[Any, Sequence[Reducer]]:
    """The processor to use where reducers make images smaller, and those of them that are still to `prepare` each image.

    A processor that makes all images one size would undo what they do; one that can be `resized` makes them all smaller instead."""
    if not hasattr(processor, "resized"):
        return processor, reducers
    side = prepare(reducers, Image.new("RGB", (processor.image_size, processor.image_size))).width
    return (processor if side == processor.image_size else processor.resized(side)), ()


@dataclass(frozen=True)
class Answers:
    """To a batch of prompts: the `texts`, how many image tokens stand in each prompt, the `lengths` of the prompts in tokens, visual ones
    included, and how many answers are thoughts that were `cut` off."""

    texts: list[str]
    placeholders: list[int]
    lengths: list[int]
    cut: int = 0


def answer(
    model: Any, processor: Any, images: Sequence[Image.Image], owners: Sequence[Sequence[int]], texts: Sequence[str], new: int
) -> Answers:
    """Greedy answers of at most `new` tokens to prompts that `prompts` wrote; prompt i is about images[k] for each k in owners[i].

    What several prompts share goes through tower and bridge once, where the model takes encoded images, one entry an image.
    FoveateError where the processor does not take them, and for logits that are not finite.
    """
    tokenizer = processor.tokenizer
    shown = [k for owner in owners for k in owner]
    inputs = model_inputs(processor, [[images[k] for k in owner] for owner in owners], texts).to(model.device, model.dtype)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    token = tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", conversations.MARKER))
    plain = set(inputs) == {"input_ids", "attention_mask", "pixel_values"} and len(inputs["pixel_values"]) == len(shown)
    if plain and len(images) < len(shown) and hasattr(model, "get_image_features"):
        encoded = model.get_image_features(pixel_values=inputs["pixel_values"][[shown.index(k) for k in range(len(images))]])
        features = encoded.pooler_output
        if type(encoded) is BaseModelOutputWithPooling and features is not None and len(features) == len(images):
            repeated = features[shown] if isinstance(features, Tensor) else [features[k] for k in shown]
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=repeated)}
            del inputs["pixel_values"]
    said = inference.answer(model, tokenizer, inputs, end=Renderer(processor).end_id, max_new_tokens=new)
    cut = sum(one.thinking for one in said)
    return Answers([one.text for one in said], (ids == token).sum(1).tolist(), mask.sum(1).tolist(), cut)


def tell_cut_thoughts(count: int, total: int, new: int) -> None:
    """Say that answers are missing because their thoughts took all of the tokens."""
    if count:
        log.warning("%d of %d answers are still thoughts after %d tokens and count as empty; allow for more new tokens", count, total, new)


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; behind it the model is as it was."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def evaluate(
    model_or_dir: Any,
    data_dir: str | Path,
    *,
    processor: Any = None,
    reducers: Any = None,
    limit: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 8,
    blind: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> Result:
    """Answer `data_dir`/test.json greedily and score it per family.

    `model_or_dir`: a folder, hub name or "asset:" name (loaded in float32), or a loaded model together with its `processor`.
    `reducers`: what `foveate.attach` takes; left out, those that the model was saved with, if any ("none" is the bare model).
    `blind`: every image is replaced by a plain grey one of its size, which shows what the questions give away by themselves.
    `limit`: at most so many questions, all families in turn.
    FoveateError for a missing or empty folder, a broken test.json, an unknown family, an unreadable image, and logits that are not finite.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise FoveateError(f"batch_size and max_new_tokens must be at least 1, got {batch_size} and {max_new_tokens}")
    questions = read_questions(data_dir, limit)
    if isinstance(model_or_dir, str | Path):
        model, processor = load_model(model_or_dir, device)
        name = str(model_or_dir)
    else:
        model, name = model_or_dir, str(model_or_dir.config.name_or_path or type(model_or_dir).__name__)
    if processor is None:
        raise FoveateError("evaluate needs the processor of a model that is already loaded: evaluate(model, data_dir, processor=...)")
    if reducers is None:
        reducers = saved_reducers(model.config.name_or_path)
    elif isinstance(reducers, str):
        reducers = parse(reducers)
    reducers = list(reducers) if isinstance(reducers, list | tuple) else [reducers] if reducers is not None else []

    folder = Path(data_dir) / "images"
    # Neighbours share their image and, within an image, are of similar length.
    order = sorted(range(len(questions)), key=lambda i: (questions[i].image, len(questions[i].question)))
    texts = prompts(processor, [question.question for question in questions])
    processor, before = shrunk(processor, reducers)
    predictions, cut = [""] * len(questions), 0
    entered: list[int] = []  # visual tokens of each question's image
    layers: list[tuple[int, ...]] = []  # of each question's image in each decoder layer
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    start = time.perf_counter()
    with answering(model), attach(model, in_model(reducers)) if reducers else nullcontext() as run, progress_bar(progress) as bar:
        task = bar.add_task("answering", total=len(questions))
        for batch in batches:
            names = list(dict.fromkeys(questions[i].image for i in batch))
            images = [open_image(folder / image) for image in names]
            if blind:
                images = [Image.new("RGB", image.size, GREY) for image in images]
            owners = [[names.index(questions[i].image)] for i in batch]
            shown = [prepare(before, image) for image in images]
            answers = answer(model, processor, shown, owners, [texts[i] for i in batch], max_new_tokens)
            for i, text in zip(batch, answers.texts, strict=True):
                predictions[i] = text
            cut += answers.cut
            entered += answers.placeholders
            if run is not None:
                layers += zip(*(layout.visual.sum(1).tolist() for layout in run.last.layouts), strict=True)
            bar.advance(task, len(batch))
    seconds = time.perf_counter() - start
    tell_cut_thoughts(cut, len(questions), max_new_tokens)

    rows = [
        Row(**asdict(question), prediction=prediction, correct=FAMILIES[question.family](prediction, question.answer))
        for question, prediction in zip(questions, predictions, strict=True)
    ]
    families = {}
    for family in FAMILIES:
        own = [row for row in rows if row.family == family]
        if own:
            families[family] = score_family(family, [row.prediction for row in own], [row.answer for row in own])
    by_layer = list(zip(*layers, strict=True)) if layers else None
    return Result(
        name,
        str(data_dir),
        spell(reducers),
        blind,
        sum(entered) / len(entered),
        None if by_layer is None else [sum(counts) / len(counts) for counts in by_layer],
        seconds,
        families,
        rows,
        (min(entered), max(entered)),
        None if by_layer is None else [(min(counts), max(counts)) for counts in by_layer],
    )


def spread(mean: float, ends: Range | None) -> str:
    """A number of tokens, with its range where it is not always the same."""
    return f"{mean:.4g}" + (f" ({ends[0]} to {ends[1]})" if ends is not None and ends[0] != ends[1] else "")


def progress_bar(shown: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not shown)


def print_result(result: Result, console: Console | None = None) -> None:
    """Print the accuracy of each family beside its majority answer."""
    what = f"reducers {result.reducers}, {spread(result.visual_tokens, result.visual_range)} visual tokens per image"
    what += ", grey images" if result.blind else ""
    if result.layer_tokens is not None:
        ranges: Sequence[Range | None] = result.layer_ranges or [None] * len(result.layer_tokens)
        counts = map(spread, result.layer_tokens, ranges)
        what += "\nthrough the layers: " + ", ".join(f"{count} x{len(list(same))}" for count, same in groupby(counts))
    table = Table(title=f"{result.model} on {result.data}", title_justify="left", caption=what, caption_justify="left")
    for column in ("family", "n", "accuracy %", "95 % interval", "majority %", "majority answer"):
        table.add_column(column, justify="left" if column in ("family", "majority answer") else "right")
    for family, score in result.families.items():
        interval = f"{100 * score.low:.1f} to {100 * score.high:.1f}"
        majority = f"{100 * score.majority_accuracy:.1f}"
        table.add_row(family, str(score.n), f"{100 * score.accuracy:.1f}", interval, majority, escape(score.majority_answer))
    table.add_section()
    table.add_row("mean", str(len(result.rows)), f"{100 * result.mean:.1f}")
    (console or Console()).print(table)
