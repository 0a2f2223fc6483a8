"""What a training run leaves on disk, so written that a kill at any moment leaves it usable.

output/recipe.json            the recipe the run was started with
output/log.jsonl              one line per logged step
output/0-pretrain/            one folder per stage
    checkpoint-50/            counts only once its mark `complete` is there: written last, by rename
    micro-batch.json          what `micro_batch: auto` has come to
    best-40/                  the weights that did best so far, where they are kept
    model/                    the finished stage: a whole model with its processor, and its mark
output/final/                 the last stage's model
output/best/                  the best model of the last stage that keeps one
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError
from foveate.files import sync, write, write_json

MARK = "complete"
KEPT = 2  # checkpoints of the stage under way
# May differ when a run goes on. The samples themselves are compared apart, whatever is done with bad ones.
HARMLESS = {
    "report_to",
    "output",
    "save_steps",
    "log_steps",
    "workers",
    "micro_batch",
    "pack",
    "on_bad_sample",
    "on_bad_image",
    "validation",
    "evaluate",
    "cache",
    "at_most",
}


def mark(folder: Path) -> None:
    """Declare a folder complete: everything in it reaches the disk before the mark does."""
    for path in folder.rglob("*"):
        sync(path)
    write(folder / MARK, "")


def is_complete(folder: Path) -> bool:
    return (folder / MARK).is_file()


def remove(folder: Path) -> None:
    """The mark goes first, so that a half-removed folder does not count."""
    (folder / MARK).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def checkpoints(stage: Path) -> list[Path]:
    """Folders checkpoint-N of a stage, complete or not, oldest first."""
    found = [path for path in stage.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest(stage: Path) -> Path | None:
    """The newest complete checkpoint."""
    return next((path for path in reversed(checkpoints(stage)) if is_complete(path)), None)


def clean(stage: Path) -> None:
    """Remove what a kill has left half done: checkpoints without their mark, and models under way."""
    for path in (*checkpoints(stage), *bests(stage)):
        if not is_complete(path):
            remove(path)
    if not is_complete(stage / "model"):
        remove(stage / "model")


def bests(stage: Path) -> list[Path]:
    """Folders best-N of a stage, complete or not, oldest first. A later one was only written because it was better."""
    found = [path for path in stage.glob("best-*") if path.name.removeprefix("best-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("best-")))


def newest_best(stage: Path) -> Path | None:
    return next((path for path in reversed(bests(stage)) if is_complete(path)), None)


def rotate(stage: Path) -> None:
    """Remove all complete checkpoints but the newest ones."""
    complete = [path for path in checkpoints(stage) if is_complete(path)]
    for path in complete[:-KEPT]:
        remove(path)


def drop_checkpoints(stage: Path) -> None:
    """The stage is finished; a kill may have cut short an earlier attempt at this."""
    for path in (*checkpoints(stage), *bests(stage)):
        remove(path)


def publish(source: Path, target: Path) -> None:
    """Copy a complete model folder; `target` is there whole or not at all."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    mark(temporary)
    if target.exists():
        remove(target)
    os.replace(temporary, target)


def claim(output: Path, now: dict[str, Any]) -> None:
    """Bind an output folder to the recipe (and facts of the data) of a run; one that is bound, to a recipe with other stages to come
    (`compare`).

    What was the final model is not final any more then."""
    if not compare(output, now):
        return
    (output / "final" / MARK).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "recipe.json", now)


def bound(output: Path) -> Any:
    """What an output folder is bound to; None if to nothing. FoveateError if that cannot be read."""
    path = output / "recipe.json"
    try:
        if not path.is_file():
            return None
        before = json.loads(path.read_text(encoding="utf-8"))
        len(before["recipe"]["stages"])
    except OSError as error:
        raise FoveateError(f"output {output} cannot be used: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise FoveateError(f"{path} is not the recipe of a run; set another `output`, or remove the folder to start anew") from None
    return before


def compare(output: Path, now: dict[str, Any]) -> bool:
    """FoveateError if the folder belongs to a run with another recipe (or other facts, where `now` has them), naming what differs.

    Other stages after those that the run has begun are no difference: it goes on with them. Whether there are, or no such run at all, is
    returned."""
    before = bound(output)
    if before is None:
        return True
    before, now = {key: before.get(key) for key in now}, json.loads(json.dumps(now))
    stages = before["recipe"]["stages"]
    there = [index for index, stage in enumerate(stages) if (output / f"{index}-{stage['name']}").is_dir()]
    begun = len(stages) if is_complete(output / "final") else max(there, default=-1) + 1  # earlier ones may have been removed
    changes = differences(_up_to(before, begun), _up_to(now, begun))
    if changes:
        raise FoveateError(
            f"{output} holds a run that was started with another recipe:\n  " + "\n  ".join(changes) + "\n"
            "Go back to its values to go on with it, or set another `output` (or remove the folder) to start anew"
        )
    return bool(differences(before, now))


def _up_to(run: dict[str, Any], begun: int) -> dict[str, Any]:
    """A run's recipe, and the facts of its data, as far as its first stages go."""
    stages, facts = run["recipe"]["stages"][:begun], run.get("facts")
    past = {} if facts is None else {"facts": {stage["name"]: facts.get(stage["name"]) for stage in stages}}
    return run | {"recipe": run["recipe"] | {"stages": stages}} | past


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """ "key: value before, now value" for every leaf that differs and matters."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(k for k in now if k not in before)]
        return [
            line
            for k in keys
            if k not in HARMLESS
            for line in differences(before.get(k), now.get(k), f"{key}.{k}" if key and key not in ("recipe",) else k)
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [line for i, pair in enumerate(zip(before, now, strict=True)) for line in differences(*pair, f"{key}.{i}")]
    return [] if before == now else [f"{key}: {json.dumps(before)} before, now {json.dumps(now)}"]


class RunLog:
    """`log.jsonl`. A resumed run drops the lines after its checkpoint, so that no step stands there twice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the lines that are not wanted, and a last one that a kill has cut short."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if wanted(row):
                kept.append(line + "\n")
        write(self.path, "".join(kept))

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
