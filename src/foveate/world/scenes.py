"""Writes the embedded world to disk: pictures, captions, conversations and test questions in the LLaVA format.

OUT/images/{train,test}/000000.png
OUT/pretrain.json   one caption per training picture
OUT/finetune.json   about ten questions per training picture, one conversation
OUT/test.json       one question a row: id, image, question, answer, family
OUT/scenes.json     the truth about the test pictures: each thing's kind, name, colour, size and box (row0, col0, row1, col1, unit)
OUT/world.json      the world's parameters, marked complete at the very end
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from foveate.errors import FoveateError
from foveate.files import write_json
from foveate.jobs import spread
from foveate.world.pictures import Scene, Split, render, scene
from foveate.world.questions import DESCRIBE, FAMILIES, Question, caption, conversation, parse_box

__all__ = [
    "FAMILIES",
    "Question",
    "Scene",
    "caption",
    "conversation",
    "in_turns",
    "parse_box",
    "render",
    "scene",
    "world_scene",
    "write_world",
]

VERSION = 1  # of the world: raised whenever the same seed would give other scenes or texts


def world_scene(seed: int, split: Split, index: int, detail: int = 1) -> Scene:
    """The scene behind `OUT/images/<split>/<index>.png` of the world of a seed and a `detail`."""
    return scene(f"world/{seed}/{index}", split, detail)


def write_world(
    out: Path,
    train: int,
    test: int,
    seed: int,
    size: int = 128,
    progress: bool = True,
    processes: int | None = None,
    detail: int = 1,
) -> None:
    """Writes a world of `train` + `test` pictures of `size` px, whose things are `detail` times smaller than usual. The files are the same
    for any number of processes.

    Running it again on a complete world of the same parameters does nothing; an interrupted one is written anew.
    Raises FoveateError for bad numbers and for a folder that holds anything else.
    """
    for name, value, least in (("train", train, 0), ("test", test, 0), ("size", size, 32), ("detail", detail, 1)):
        if value < least:
            raise FoveateError(f"{name}={value}: a world needs {name} >= {least}")
    if train + test == 0:
        raise FoveateError("train=0 and test=0: a world needs at least one picture")
    out = Path(out)
    parameters = {"version": VERSION, "train": train, "test": test, "seed": seed, "size": size}
    parameters |= {"detail": detail} if detail > 1 else {}
    if not claimed(out, parameters, "images"):
        return
    jobs: list[tuple[Path, int, Split, int, int, int]] = [(out, seed, "train", i, size, detail) for i in range(train)]
    jobs += [(out, seed, "test", i, size, detail) for i in range(test)]
    # Starting processes takes as long as some two thousand pictures.
    rows = [*track(spread(_write_one, jobs, processes, few=2000), "scenes", len(jobs), disable=not progress)]
    learn, check = rows[:train], rows[train:]
    write_json(out / "pretrain.json", [talk(row, "image", [(DESCRIBE, row["caption"])]) for row in learn], indent=0)
    asked = [[(q["question"], q["answer"]) for q in row["questions"]] for row in learn]
    write_json(out / "finetune.json", [talk(row, "image", turns) for row, turns in zip(learn, asked, strict=True)], indent=0)
    questions = [{"id": f"{row['id']}-{i}", "image": row["image"], **q} for row in check for i, q in enumerate(row["questions"])]
    write_json(out / "test.json", questions, indent=0)
    write_json(out / "scenes.json", [{key: row[key] for key in ("id", "image", "caption", "things")} for row in check], indent=0)
    write_json(out / "world.json", {**parameters, "complete": True}, indent=None)


def claimed(out: Path, parameters: dict[str, Any], kind: str) -> bool:
    """Whether a world is to be written into a folder, which then is marked as not complete and has folders of that `kind`; False: it is
    there. FoveateError for a folder that holds anything else."""
    mark = out / "world.json"
    if out.exists() and not out.is_dir():
        raise FoveateError(f"{out} is a file; name a folder for the scenes")
    if mark.is_file():
        try:
            found = json.loads(mark.read_text())
        except json.JSONDecodeError:
            found = {}
        if found == {**parameters, "complete": True}:
            return False
        if found.get("complete", True):
            told = {key: found.get(key) for key in parameters}
            raise FoveateError(f"{out} holds another world ({told}, wanted {parameters}); choose another folder or delete this one")
    elif out.is_dir() and any(out.iterdir()):
        raise FoveateError(f"{out} is not empty and holds no world of scenes; choose an empty or new folder")
    for split in ("train", "test"):
        (out / kind / split).mkdir(parents=True, exist_ok=True)
    write_json(mark, {**parameters, "complete": False}, indent=None)
    return True


def in_turns(talk: dict[str, Any], turns: int) -> Iterator[dict[str, Any]]:
    """A conversation about a picture, as `write_world` writes it, as several of at most `turns` questions each."""
    said = talk["conversations"]
    for number, start in enumerate(range(0, len(said), 2 * turns)):
        own = [dict(turn) for turn in said[start : start + 2 * turns]]
        if start:
            own[0]["value"] = "<image>\n" + own[0]["value"]
        yield {**talk, "id": f"{talk['id']}-{number}", "conversations": own}


def _write_one(job: tuple[Path, int, Split, int, int, int]) -> dict[str, Any]:
    out, seed, split, index, size, detail = job
    item = world_scene(seed, split, index, detail)
    image = f"{split}/{index:06d}.png"
    Image.fromarray(render(item, size)).save(out / "images" / image, compress_level=1)
    things = []
    for thing in item.things:
        told = asdict(thing)
        things.append({key: told[key] for key in ("kind", "name", "colour", "size", "box")})
    return {
        "id": f"{split}-{index:06d}",
        "image": image,
        "caption": caption(item),
        "questions": [{"question": q.question, "answer": q.answer, "family": q.family} for q in conversation(item)],
        "things": things,
    }


def talk(row: dict[str, Any], kind: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """A conversation about an "image" or a "video"."""
    said = []
    for i, (question, answer) in enumerate(turns):
        said += [{"from": "human", "value": ("" if i else f"<{kind}>\n") + question}, {"from": "gpt", "value": answer}]
    return {"id": row["id"], kind: row[kind], "conversations": said}
