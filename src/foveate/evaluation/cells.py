"""What a bench run leaves on disk: one file a cell (a task under a reducer at a budget with a seed), written whole or not at all.

OUT/bench.json          what was asked: model, tasks, hashes of both, versions, command
OUT/cells/<name>.json   one finished cell with every answer
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError
from foveate.files import write_json

BENCH, CELLS = "bench.json", "cells"


@dataclass(frozen=True)
class Answer:
    """One sample's answer. `score` is in 0..1. `image`: what samples about one picture share, since their errors are not independent."""

    id: str
    image: str
    group: str
    prediction: str
    score: float


@dataclass(frozen=True)
class Cell:
    """A task under a reducer. Numbers of tokens, FLOPs and bytes are means over the samples.

    method, keep, seed   what the table's rows and columns are made of; "none", 1.0, None for the bare model
    reducer              canonical spelling, as `attach` takes it
    visual_tokens        of one sample in each decoder layer, as they went through it
    flops                by part: "tower", "bridge", "lm_linear", "lm_attention", "head", "scores"; {} where the cost cannot be predicted
    kv_bytes             of the prompt, all layers, as they ran; `kv_stays` what a cache policy has left of them
    seconds              wall clock of answering all samples, processor and tower included
    summary              the metric's figures, headline first, percentages
    cache                canonical spelling of the cache policy; "": none
    refused              why the reducer does not work on this model; there are no answers then
    """

    task: str
    method: str
    keep: float
    seed: int | None
    reducer: str
    answers: list[Answer] = field(default_factory=list)
    visual_tokens: list[float] = field(default_factory=list)
    flops: dict[str, float] = field(default_factory=dict)
    kv_bytes: float = 0.0
    seconds: float = 0.0
    summary: dict[str, float] = field(default_factory=dict)
    refused: str = ""
    cache: str = ""
    kv_stays: float = 0.0

    @property
    def name(self) -> str:
        """A file name: readable, and unique by a hash of what the cell is."""
        what = json.dumps([self.task, self.method, self.keep, self.seed, self.reducer])
        plain = "".join(letter if letter.isalnum() else "-" for letter in f"{self.task}-{self.method}-{self.keep:g}")
        return f"{plain[:80]}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"

    @property
    def accuracy(self) -> float:
        """The headline figure."""
        return next(iter(self.summary.values()))

    @property
    def mean_tokens(self) -> float:
        return sum(self.visual_tokens) / len(self.visual_tokens)

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())


@dataclass(frozen=True)
class Bench:
    """A bench run as it stands. `meta` is bench.json: model, model_hash, tasks (each with name, metric, samples, data_hash), command,
    environment, seeds, keep."""

    folder: Path
    meta: dict[str, Any]
    cells: list[Cell]

    def bare(self, task: str) -> Cell:
        """The bare model's cell of `task`, which all others are compared with."""
        found = next((cell for cell in self.cells if cell.task == task and cell.method == "none"), None)
        if found is None:
            raise FoveateError(f"{self.folder}: the bare model has not answered {task} yet; run the same bench command to go on")
        return found


def save_cell(folder: Path, cell: Cell) -> None:
    write_json(folder / CELLS / f"{cell.name}.json", asdict(cell))


def load_cell(path: Path) -> Cell:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Cell(**{**raw, "answers": [Answer(**answer) for answer in raw["answers"]]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path} is not a cell of a bench run: {error}; remove it, and the same bench command computes it again"
        raise FoveateError(message) from error


def load_bench(folder: str | Path, order: Sequence[str] = ()) -> Bench:
    """The run in `folder`, its cells in the order of their names in `order` (others after them, by name)."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / BENCH).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FoveateError(f"{folder} holds no bench run ({BENCH}: {error}); make one with `foveate bench MODEL --out {folder}`") from error
    rank = {name: at for at, name in enumerate(order or meta.get("order", []))}
    cells = [load_cell(path) for path in (folder / CELLS).glob("*.json")]
    return Bench(folder, meta, sorted(cells, key=lambda cell: (rank.get(cell.name, len(rank)), cell.name)))
