"""Accuracy against cost: one model on some tasks under many reducers and budgets, each answer kept, every cell a file of its own.

    bench("asset:vlm", ["scenes"], ["fastv", "divprune"], keep=[0.5, 0.25], out="runs/bench")

Cells are tasks x methods x budgets x seeds. The bare model is one cell a task, and the first, so that what is broken in model or data shows
before anything else runs. A cell is written when it is finished: a run that was stopped goes on with the next one, and a later run with
more reducers, budgets or tasks adds its cells to those that are there.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from foveate.cache_policies import CachePolicy
from foveate.cache_policies import parse as parse_policy
from foveate.errors import FoveateError
from foveate.evaluation.asking import Asked, Engine, Here, limited
from foveate.evaluation.cells import BENCH, CELLS, Bench, Cell, load_bench, save_cell
from foveate.evaluation.samples import Task
from foveate.evaluation.table import print_table, write_tables
from foveate.evaluation.tasks import load_task
from foveate.files import write_json
from foveate.inference import Broken, progress_bar
from foveate.machine import environment
from foveate.reducers import Reducer, parse, spell

BASELINES = ("random", "uniform", "downsample")
BARE, BLIND = "none", "blind"  # the latter: the bare model on grey pictures
CACHE = "cache "  # in front of the name of a cache policy, which may be a reducer's as well
# What all cells of a folder have in common.
_FIXED = ("model_hash", "engine", "tiling", "image_size", "limit", "batch_size", "dtype", "device")
_OF_TASK = ("metric", "samples", "data_hash", "max_new_tokens")


# ---- what is asked -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A method at a budget with a seed; `refused`: why it cannot be set to this budget. `blind`: on grey pictures. Where it is a cache
    policy, `cache`, nothing is reduced."""

    method: str
    keep: float
    seed: int | None
    reducers: tuple[Reducer, ...]
    refused: str = ""
    blind: bool = False
    cache: CachePolicy | None = None

    def cell(self, task: str) -> Cell:
        """Still empty."""
        spelling = self.method if self.refused else spell(self.reducers)
        cache = "" if self.cache is None else str(self.cache)
        return Cell(task, self.method, self.keep, self.seed, spelling, refused=self.refused, cache=cache)


def budgets(text: str) -> list[float]:
    """Reads "1,0.5,0.25"."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise FoveateError(f"keep={text} is not possible; give shares between commas, such as 0.5,0.25,0.11") from error


def plan(reducers: Sequence[str], keep: Sequence[float], seeds: int, baselines: bool = True, blind: bool = False) -> list[Arm]:
    """What every task is asked under: the bare model, with `blind` on grey pictures too, then each method at each budget below 1, with
    each seed where it has one.

    A method is called by its spelling without what `Reducer.at` sets and without its seed.
    """
    for share in keep:
        if not 0 < share <= 1:
            raise FoveateError(f"keep={share:g} is not possible; give shares of the visual tokens in (0, 1]")
    if seeds < 1:
        raise FoveateError(f"seeds={seeds} is not possible; random methods need at least 1")
    methods: dict[str, list[Reducer]] = {}
    for text in (*reducers, *(BASELINES if baselines else ())):
        parts = parse(text)
        if not parts:
            raise FoveateError(f"the reducer {text!r} is the bare model, which is in every table; leave it out")
        methods.setdefault("+".join(part.spelled((*part.amounts, "seed")) for part in parts), parts)
    arms = [Arm(BARE, 1.0, None, ())] + ([Arm(BLIND, 1.0, None, (), blind=True)] if blind else [])
    for method, parts in methods.items():
        random = any(hasattr(part, "seed") for part in parts)
        for share in sorted({float(share) for share in keep if share < 1}, reverse=True):
            arms += [_arm(method, parts, share, seed) for seed in (range(seeds) if random else [None])]
    return arms


def cached(policies: Sequence[str], keep: Sequence[float], seeds: int) -> list[Arm]:
    """Each cache policy at each budget below 1, with each seed where it has one; once as it is spelled, at 1, where it has no budget."""
    arms: dict[tuple[str, float, int | None], Arm] = {}
    for text in policies:
        policy = parse_policy(text)
        if policy is None:
            raise FoveateError(f"the cache policy {text!r} is none at all, which the bare model has; leave it out")
        method = CACHE + policy.spelled(("keep", "seed"))
        shares = sorted({float(share) for share in keep if share < 1}, reverse=True) if hasattr(policy, "keep") else [1.0]
        for share in shares:
            for seed in range(seeds) if hasattr(policy, "seed") else [None]:
                at = policy.at(share) if hasattr(policy, "keep") else policy
                seeded: dict[str, Any] = {} if seed is None else {"seed": seed}
                arms[method, share, seed] = Arm(method, share, seed, (), cache=replace(at, **seeded))
    return list(arms.values())


def _arm(method: str, parts: Sequence[Reducer], keep: float, seed: int | None) -> Arm:
    seeded: dict[str, Any] = {"seed": seed}
    try:
        found = [part.at(keep) for part in parts]
    except FoveateError as error:
        return Arm(method, keep, seed, (), str(error))
    return Arm(method, keep, seed, tuple(replace(part, **seeded) if hasattr(part, "seed") else part for part in found))


# ---- the run -------------------------------------------------------------------------------------------------------------------------


def bench(
    model: Any,
    tasks: Sequence[str | Task],
    reducers: Sequence[str],
    keep: Sequence[float],
    out: str | Path,
    *,
    processor: Any = None,
    cache: Sequence[str] = (),
    seeds: int = 3,
    baselines: bool = True,
    blind: bool = False,
    batch_size: int = 64,
    limit: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    tiling: str | None = None,
    image_size: int | None = None,
    progress: bool = True,
) -> Bench:
    """Answers every task under every reducer at every budget, and leaves cells, summary.csv, summary.json and table.md in `out`.

    model: a folder, hub name or "asset:" name (loaded in float32, or another `dtype`), a loaded model together with its `processor`,
    or an `Engine`.
    tasks: what `load_task` reads, or Tasks. reducers: spellings; what says how many tokens stay is set by each budget of `keep`.
    cache: spellings of cache policies, each by itself, beside the reducers; `keep` of those that have one is set by each budget too.
    seeds: of methods that have one. baselines: random, uniform and downsample, beside the reducers. blind: the bare model on grey pictures,
    which shows what the questions give away by themselves.
    limit: so many questions of each task, see `limited`. tiling: cut images so, where the model is Foveate's own, see `retiled`.
    image_size: make all images so many pixels wide and high, see `resized`.
    progress: shows a bar, and the table at the end.
    FoveateError for bad input, for a folder with another model's run, or for logits that are not finite. What is finished stays.
    """
    arms = plan(reducers, keep, seeds, baselines, blind) + cached(cache, keep, seeds)
    if batch_size < 1:
        raise FoveateError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(model, Engine):
        _check(model, arms, processor, device, dtype, tiling, image_size)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise FoveateError(f"{folder} is a file; name a folder for the bench run")
    asked = [limited(load_task(task, progress) if isinstance(task, str) else task, limit) for task in tasks]
    names = [task.name for task in asked]
    if not names or len(set(names)) < len(names):
        raise FoveateError(f"a bench run needs at least one task, and each of them once; got {', '.join(names) or 'none'}")
    engine = model if isinstance(model, Engine) else Here(model, processor, "bench(model, …, processor=...)", device, dtype)
    if isinstance(engine, Here):
        engine.fit(tiling, image_size)
    command = _command(engine.model, tasks, reducers, keep, out, seeds, baselines, blind, batch_size, limit)
    _begin(
        folder,
        {
            "model": engine.model,
            "model_hash": engine.hash(),
            "engine": engine.name,
            "tasks": [_described(task, spec) for task, spec in zip(asked, tasks, strict=True)],
            "keep": sorted({1.0, *map(float, keep)}, reverse=True),
            "seeds": seeds,
            "limit": limit,
            "tiling": tiling,
            "image_size": image_size,
            "batch_size": batch_size,
            "dtype": engine.dtype,
            "device": engine.device,
            "command": shlex.join([*command, *_beside(cache, tiling, image_size), *engine.told]),
            "environment": environment(),
            "order": [arm.cell(task.name).name for task in asked for arm in arms],
        },
    )
    try:
        with progress_bar(progress) as bar:
            _answer_all(engine, asked, arms, folder, batch_size, bar)
    finally:
        engine.close()
        found = load_bench(folder)
        write_tables(found)
        if progress:
            print_table(found, Console())
    return found


def _check(engine: Engine, arms: Sequence[Arm], *beside: Any) -> None:
    """FoveateError for what an engine cannot be given beside it, and for methods that it cannot run."""
    if any(option is not None for option in beside):
        names = "processor, device, dtype, tiling, image_size"
        raise FoveateError(f"{names}: of a model in this process; leave them out beside the engine {engine.name}")
    for arm in arms:
        engine.check(arm.reducers, arm.cache)


def _command(
    model: str,
    tasks: Sequence[str | Task],
    reducers: Sequence[str],
    keep: Sequence[float],
    out: str | Path,
    seeds: int,
    baselines: bool,
    blind: bool,
    batch_size: int,
    limit: int | None,
) -> list[str]:
    words = ["foveate", "bench", model]
    for text in reducers:
        words += ["--reduce", text]
    words += ["--keep", ",".join(f"{share:g}" for share in keep)]
    for task in tasks:
        words += ["--tasks", task if isinstance(task, str) else task.name]
    words += ["--out", str(out), "--seeds", str(seeds), "--batch-size", str(batch_size)]
    words += [] if limit is None else ["--limit", str(limit)]
    words += ["--blind"] if blind else []
    return words + ([] if baselines else ["--no-baselines"])


def _beside(cache: Sequence[str], tiling: str | None, image_size: int | None) -> list[str]:
    words = [word for policy in cache for word in ("--cache", policy)]
    words += [] if tiling is None else ["--tiling", tiling]
    return words + ([] if image_size is None else ["--image-size", str(image_size)])


def _described(task: Task, spec: str | Task) -> dict[str, Any]:
    told = {"name": task.name, "spec": spec if isinstance(spec, str) else None, "metric": task.metric.name}
    return {**told, "samples": len(task.samples), "data_hash": task.hash, "max_new_tokens": task.max_new_tokens}


def _begin(folder: Path, meta: dict[str, Any]) -> None:
    """Writes bench.json, or adds to the one that is there. FoveateError where that is of another model, other data or other settings."""
    if (folder / BENCH).is_file():
        before = load_bench(folder).meta
        known = {task["name"]: task for task in before.get("tasks", [])}
        before = {"engine": Here.name, "image_size": None} | before  # runs of before these could be chosen
        differs = [f"{name} (there {before.get(name)}, now {meta[name]})" for name in _FIXED if before.get(name) != meta[name]]
        for task in meta["tasks"]:
            there = known.get(task["name"], task)
            own = [name for name in _OF_TASK if there[name] != task[name]]
            differs += [f"{name} of task {task['name']} (there {there[name]}, now {task[name]})" for name in own]
        if differs:
            raise FoveateError(f"{folder} holds a bench run with another {'; another '.join(differs)}. Choose another folder with --out")
        meta = {
            **meta,
            "tasks": list({**known, **{task["name"]: task for task in meta["tasks"]}}.values()),
            "keep": sorted({*before["keep"], *meta["keep"]}, reverse=True),
            "seeds": max(before["seeds"], meta["seeds"]),
            **{name: "\n".join(dict.fromkeys([*before[name].splitlines(), meta[name]])) for name in ("command", "environment")},
            "order": list(dict.fromkeys([*before["order"], *meta["order"]])),
        }
    write_json(folder / BENCH, meta)


def _answer_all(engine: Engine, tasks: Sequence[Task], arms: Sequence[Arm], folder: Path, batch_size: int, bar: Any) -> None:
    total = len(arms) * sum(len(task.samples) for task in tasks)
    shown, done = bar.add_task("", total=total), 0
    for task in tasks:
        n = len(task.samples)
        missing = [arm for arm in arms if not (folder / CELLS / f"{arm.cell(task.name).name}.json").is_file()]
        done += (len(arms) - len(missing)) * n
        asked = Asked.of(engine.processor, task, batch_size)
        for arm in missing:
            bar.update(shown, description=f"{task.name}, {arm.method if arm.cache else arm.cell(task.name).reducer}", completed=done)
            save_cell(folder, _finished(engine, asked, arm, partial(bar.advance, shown)))
            done += n
        bar.update(shown, completed=done)


def _finished(engine: Engine, asked: Asked, arm: Arm, tell: Callable[[int], None]) -> Cell:
    """The cell, with answers or with the reason why there are none."""
    empty = arm.cell(asked.task.name)
    if empty.refused:
        return empty
    try:
        return engine.answered(asked, arm.reducers, tell, cache=arm.cache, blind=arm.blind).cell(asked, empty)
    except Broken as error:
        raise FoveateError(f"{empty.task}, {empty.cache or empty.reducer}: {error}") from error
    except FoveateError as error:
        if arm.method == BARE:
            raise
        return replace(empty, refused=str(error))  # model and data are sound: the bare model has answered
