"""The two sets of arms: on the embedded world, and on real parts and pictures. What each is trained on, and what it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real.tasks import asked, result

from foveate.evaluation.bench import bench
from foveate.evaluation.evaluate import Result, evaluate
from foveate.files import write_json
from foveate.real.stock import open_stock
from foveate.real.write import write_real
from foveate.world.scenes import in_turns, write_world

HERE = Path(__file__).parent
RECIPES = HERE.parent.parent / "recipes" / "pretraining"
FIRST = "resampler"  # the paper's baseline: the arm that all others are compared with
SECOND = "mlp"  # LLaVA's bridge: the second one that all are compared with
TURNS = 2  # questions of one sample
SPLIT = "compositions"  # of real pictures: what the arms are asked about


@dataclass(frozen=True)
class Set:
    """write: (folder, pictures of pre-training, of tests) makes the data; ask: (model, data, folder of the run) asks the finished model;
    tasks: (data) what it is asked on the way, as `foveate bench` spells it. `scenes`, `test`: how many pictures unless told."""

    recipes: Path
    output: Path
    work: Path
    scenes: int
    test: int
    write: Callable[[Path, int, int], None]
    ask: Callable[[Path, Path, Path], Result]
    tasks: Callable[[Path], list[str]]

    def names(self) -> list[str]:
        return [FIRST, *sorted(path.stem for path in self.recipes.glob("*.yaml") if path.stem != FIRST)]


# ---- the embedded world --------------------------------------------------------------------------------------------------------------


def write_scenes(folder: Path, scenes: int, test: int) -> None:
    """The world and the three files of samples: captions and questions for pre-training, questions about scenes of their own for
    fine-tuning. `scenes`: of pre-training; three samples each, so that a tenth of them needs scenes * 0.3 / 5 more."""
    tuning = max(1, round(scenes * 0.3 / 5))
    write_world(folder, train=scenes + tuning, test=test, seed=0)
    captions = json.loads((folder / "pretrain.json").read_text(encoding="utf-8"))
    talks = json.loads((folder / "finetune.json").read_text(encoding="utf-8"))
    cut = [list(in_turns(talk, TURNS)) for talk in talks]
    # Half of the scenes have their caption and half of their questions, in turns: many scenes, each seen about three times.
    questions = [part for i, parts in enumerate(cut[:scenes]) for j, part in enumerate(parts) if (i + j) % 2]
    write_json(folder / "captions.json", captions[:scenes:2], indent=0)
    write_json(folder / "questions.json", questions, indent=0)
    write_json(folder / "mixed.json", captions[:scenes:2] + questions, indent=0)  # the two as one source, which `losses` ask for
    write_json(folder / "tuning.json", [part for parts in cut[scenes:] for part in parts], indent=0)


def ask_scenes(model: Path, data: Path, run: Path) -> Result:
    answers = run / "evaluation.json"
    if not answers.is_file():
        evaluate(model, data).save(answers)
    return Result.load(answers)


# ---- real pictures -------------------------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, scenes: int, test: int) -> None:
    """Questions about real pictures, and in `arms` the files of samples as above; scenes.json has the captions of pictures that are no
    pages, with the boxes of their things, for a first stage. Two samples a picture of pre-training; fine-tuning has a tenth of them, about
    other pictures."""
    tuning = max(1, round(scenes * 0.2 / 3))
    write_real(folder, open_stock(), train=scenes + tuning, test=test)
    captions, talks, words = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("captions", "train", "words"))
    # Scenes, pages and charts come one kind after the other: the pictures of fine-tuning are taken from all along.
    last = {round((i + 0.5) * len(talks) / tuning) for i in range(tuning)}
    first = [i for i in range(len(talks)) if i not in last]
    told = [captions[i] for i in first[::2]]
    cut = {i: list(in_turns(talk, TURNS)) for i, talk in enumerate(talks)}
    arms = folder / "arms"
    write_json(arms / "captions.json", [_without_boxes(row) for row in told], indent=0)
    own = {row["image"] for row in told}
    write_json(arms / "scenes.json", [row for row in words if row["image"] in own], indent=0)
    write_json(arms / "questions.json", list(_every_other(cut[i] for i in first)), indent=0)
    write_json(arms / "tuning.json", [part for i in sorted(last) for part in cut[i]], indent=0)


def _without_boxes(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "boxes"}


def _every_other(talks: Iterator[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Half of the parts of the conversations, in turns."""
    for i, parts in enumerate(talks):
        yield from (part for j, part in enumerate(parts) if (i + j) % 2)


def ask_pictures(model: Path, data: Path, run: Path) -> Result:
    files = asked(data, [SPLIT])
    found = bench(model, [one.task for one in files], [], [1.0], run / "answers", baselines=False, batch_size=16)
    return result(found, files, str(model))


SETS = {
    "world": Set(RECIPES, HERE, Path("runs/pretraining"), 8000, 300, write_scenes, ask_scenes, lambda data: [str(data)]),
    "real": Set(
        RECIPES / "real",
        HERE / "real",
        Path("runs/pretraining-real"),
        1500,
        200,
        write_pictures,
        ask_pictures,
        lambda data: [one.task for one in asked(data, [SPLIT])],
    ),
}
