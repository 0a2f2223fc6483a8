"""Accuracy against cost: one model on some tasks under many reducers and budgets, each answer kept, every cell a file of its own.

    bench("asset:vlm", ["scenes"], ["fastv", "divprune"], keep=[0.5, 0.25], out="runs/bench")

Cells are tasks x methods x budgets x seeds. The bare model is one cell a task, and the first, so that what is broken in model or data shows
before anything else runs. A cell is written when it is finished: a run that was stopped goes on with the next one, and a later run with
more reducers, budgets or tasks adds its cells to those that are there.
"""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from rich.console import Console
from transformers.utils import cached_file

from foveate.accounting import Ledger
from foveate.accounting.predict import observed
from foveate.data.pixels import open_image
from foveate.engine.attach import attach
from foveate.engine.run import Run
from foveate.errors import FoveateError
from foveate.evaluation.cells import BENCH, CELLS, Answer, Bench, Cell, load_bench, save_cell
from foveate.evaluation.run import answer, answering, load_model, progress_bar, prompts, shrunk, tell_cut_thoughts
from foveate.evaluation.table import print_table, write_tables
from foveate.evaluation.tasks import Sample, Task, load_task
from foveate.files import write_json
from foveate.inference import Broken
from foveate.machine import environment
from foveate.reducers import Reducer, in_model, parse, prepare, spell
from foveate.world import resolve

BASELINES = ("random", "uniform", "downsample")
BARE = "none"
_FIXED = ("model_hash", "limit", "batch_size", "dtype", "device")  # what all cells of a folder have in common
_OF_TASK = ("metric", "samples", "data_hash", "max_new_tokens")
_MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


# ---- what is asked -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A method at a budget with a seed; `refused`: why it cannot be set to this budget."""

    method: str
    keep: float
    seed: int | None
    reducers: tuple[Reducer, ...]
    refused: str = ""

    def cell(self, task: str) -> Cell:
        """Still empty."""
        spelling = self.method if self.refused else spell(self.reducers)
        return Cell(task, self.method, self.keep, self.seed, spelling, refused=self.refused)


def budgets(text: str) -> list[float]:
    """Reads "1,0.5,0.25"."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise FoveateError(f"keep={text} is not possible; give shares between commas, such as 0.5,0.25,0.11") from error


def plan(reducers: Sequence[str], keep: Sequence[float], seeds: int, baselines: bool = True) -> list[Arm]:
    """What every task is asked under: the bare model, then each method at each budget below 1, with each seed where it has one.

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
    arms = [Arm(BARE, 1.0, None, ())]
    for method, parts in methods.items():
        random = any(hasattr(part, "seed") for part in parts)
        for share in sorted({float(share) for share in keep if share < 1}, reverse=True):
            arms += [_arm(method, parts, share, seed) for seed in (range(seeds) if random else [None])]
    return arms


def _arm(method: str, parts: Sequence[Reducer], keep: float, seed: int | None) -> Arm:
    seeded: dict[str, Any] = {"seed": seed}
    try:
        found = [part.at(keep) for part in parts]
    except FoveateError as error:
        return Arm(method, keep, seed, (), str(error))
    return Arm(method, keep, seed, tuple(replace(part, **seeded) if hasattr(part, "seed") else part for part in found))


def limited(task: Task, limit: int | None) -> Task:
    """About `limit` questions of a task, its groups in turn. Pictures are taken with all of their questions, which some metrics belong to
    together, so that there may be a few more."""
    if limit is None or limit >= len(task.samples):
        return task
    if limit < 1:
        raise FoveateError(f"limit must be at least 1 question, got {limit}")
    pictures: dict[str, list[int]] = {}
    for number, sample in enumerate(task.samples):
        pictures.setdefault(picture(sample), []).append(number)
    turns: dict[str, int] = {}
    order = []
    for own in pictures.values():
        group = task.samples[own[0]].group
        order.append((turns.get(group, 0), own))
        turns[group] = turns.get(group, 0) + 1
    chosen: list[int] = []
    for _, own in sorted(order):
        if len(chosen) < limit:
            chosen += own
    return replace(task, samples=tuple(task.samples[number] for number in sorted(chosen)))


def picture(sample: Sample) -> str:
    """The names of a sample's pictures, which are the same where the pictures are; its id where it has none."""
    return " ".join(ref[1] if isinstance(ref, tuple) else str(ref) for ref in sample.images) or sample.id


def model_hash(model: Any) -> str:
    """SHA-256 of a model: by name, of its files (weights, configurations, processor); of a loaded one, of its weights."""
    whole = hashlib.sha256()
    if isinstance(model, str | Path):
        source = resolve(str(model))
        folder = Path(source) if Path(source).is_dir() else Path(str(cached_file(source, "config.json"))).parent
        for path in sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES):
            with path.open("rb") as file:
                whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    else:
        for name, weight in sorted(model.state_dict().items()):
            whole.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            whole.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return whole.hexdigest()


# ---- the run -------------------------------------------------------------------------------------------------------------------------


def bench(
    model: Any,
    tasks: Sequence[str | Task],
    reducers: Sequence[str],
    keep: Sequence[float],
    out: str | Path,
    *,
    processor: Any = None,
    seeds: int = 3,
    baselines: bool = True,
    batch_size: int = 64,
    limit: int | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Bench:
    """Answers every task under every reducer at every budget, and leaves cells, summary.csv, summary.json and table.md in `out`.

    model: a folder, hub name or "asset:" name (loaded in float32), or a loaded model together with its `processor`.
    tasks: what `load_task` reads, or Tasks. reducers: spellings; what says how many tokens stay is set by each budget of `keep`.
    seeds: of methods that have one. baselines: random, uniform and downsample, beside the reducers.
    limit: so many questions of each task, see `limited`. progress: shows a bar, and the table at the end.
    FoveateError for bad input, for a folder with another model's run, or for logits that are not finite. What is finished stays.
    """
    arms = plan(reducers, keep, seeds, baselines)
    if batch_size < 1:
        raise FoveateError(f"batch_size must be at least 1, got {batch_size}")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise FoveateError(f"{folder} is a file; name a folder for the bench run")
    asked = [limited(load_task(task, progress) if isinstance(task, str) else task, limit) for task in tasks]
    names = [task.name for task in asked]
    if not names or len(set(names)) < len(names):
        raise FoveateError(f"a bench run needs at least one task, and each of them once; got {', '.join(names) or 'none'}")
    given = model
    if isinstance(model, str | Path):
        model, processor = load_model(model, device)
    if processor is None:
        raise FoveateError("bench needs the processor of a model that is already loaded: bench(model, …, processor=...)")
    name = str(given) if isinstance(given, str | Path) else str(model.config.name_or_path or type(model).__name__)
    _begin(
        folder,
        {
            "model": name,
            "model_hash": model_hash(given),
            "tasks": [_described(task, spec) for task, spec in zip(asked, tasks, strict=True)],
            "keep": sorted({1.0, *map(float, keep)}, reverse=True),
            "seeds": seeds,
            "limit": limit,
            "batch_size": batch_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "command": _command(name, tasks, reducers, keep, out, seeds, baselines, batch_size, limit),
            "environment": environment(),
            "order": [arm.cell(task.name).name for task in asked for arm in arms],
        },
    )
    try:
        with answering(model), progress_bar(progress) as bar:
            _answer_all(model, processor, asked, arms, folder, batch_size, bar)
    finally:
        found = load_bench(folder)
        write_tables(found)
        if progress:
            print_table(found, Console())
    return found


def _command(
    model: str,
    tasks: Sequence[str | Task],
    reducers: Sequence[str],
    keep: Sequence[float],
    out: str | Path,
    seeds: int,
    baselines: bool,
    batch_size: int,
    limit: int | None,
) -> str:
    words = ["foveate", "bench", model]
    for text in reducers:
        words += ["--reduce", text]
    words += ["--keep", ",".join(f"{share:g}" for share in keep)]
    for task in tasks:
        words += ["--tasks", task if isinstance(task, str) else task.name]
    words += ["--out", str(out), "--seeds", str(seeds), "--batch-size", str(batch_size)]
    words += [] if limit is None else ["--limit", str(limit)]
    return shlex.join(words + ([] if baselines else ["--no-baselines"]))


def _described(task: Task, spec: str | Task) -> dict[str, Any]:
    told = {"name": task.name, "spec": spec if isinstance(spec, str) else None, "metric": task.metric.name}
    return {**told, "samples": len(task.samples), "data_hash": task.hash, "max_new_tokens": task.max_new_tokens}


def _begin(folder: Path, meta: dict[str, Any]) -> None:
    """Writes bench.json, or adds to the one that is there. FoveateError where that is of another model, other data or other settings."""
    if (folder / BENCH).is_file():
        before = load_bench(folder).meta
        known = {task["name"]: task for task in before.get("tasks", [])}
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


def _answer_all(model: Any, processor: Any, tasks: Sequence[Task], arms: Sequence[Arm], folder: Path, batch_size: int, bar: Any) -> None:
    total = len(arms) * sum(len(task.samples) for task in tasks)
    shown, done = bar.add_task("", total=total), 0
    for task in tasks:
        n = len(task.samples)
        missing = [arm for arm in arms if not (folder / CELLS / f"{arm.cell(task.name).name}.json").is_file()]
        done += (len(arms) - len(missing)) * n
        asked = Asked.of(processor, task, batch_size)
        for arm in missing:
            bar.update(shown, description=f"{task.name}, {arm.cell(task.name).reducer}", completed=done)
            save_cell(folder, _finished(model, processor, asked, arm, partial(bar.advance, shown)))
            done += n
        bar.update(shown, completed=done)


@dataclass(frozen=True)
class Asked:
    """A task with its prompts, what tells the samples' pictures apart, and which samples are asked together."""

    task: Task
    prompts: list[str]
    pictures: list[str]
    batches: list[list[int]]

    @classmethod
    def of(cls, processor: Any, task: Task, batch_size: int) -> Self:
        texts = prompts(processor, [sample.question for sample in task.samples], [len(sample.images) for sample in task.samples])
        names = [picture(sample) for sample in task.samples]
        return cls(task, texts, names, batches(task.samples, names, batch_size))


def batches(samples: Sequence[Sample], pictures: Sequence[str], size: int) -> list[list[int]]:
    """Numbers of samples that are asked together: neighbours share their pictures and, within a picture, are of similar length. Questions
    without any are asked by themselves, since not every processor takes both at once."""

    def place(number: int) -> tuple[bool, str, int]:
        return bool(samples[number].images), pictures[number], len(samples[number].question)

    found = []
    for _, numbers in groupby(sorted(range(len(samples)), key=place), key=lambda number: bool(samples[number].images)):
        own = list(numbers)
        found += [own[at : at + size] for at in range(0, len(own), size)]
    return found


def _finished(model: Any, processor: Any, asked: Asked, arm: Arm, tell: Callable[[int], None]) -> Cell:
    """The cell, with answers or with the reason why there are none."""
    empty = arm.cell(asked.task.name)
    if empty.refused:
        return empty
    try:
        return answered(model, processor, asked, arm.reducers, empty, tell)
    except Broken as error:
        raise FoveateError(f"{empty.task}, {empty.reducer}: {error}") from error
    except FoveateError as error:
        if arm.method == BARE:
            raise
        return replace(empty, refused=str(error))  # model and data are sound: the bare model has answered


def answered(
    model: Any, processor: Any, asked: Asked, reducers: Sequence[Reducer], empty: Cell, tell: Callable[[int], None] = lambda number: None
) -> Cell:
    """`empty` with the answers under the reducers, inside of `answering(model)`. `tell` hears of each batch how many have been answered."""
    task, samples, n = asked.task, asked.task.samples, len(asked.task.samples)
    said, tokens, ledgers, cut = [""] * n, [], [], 0
    start = time.perf_counter()
    processor, before = shrunk(processor, reducers)
    with attach(model, in_model(reducers)) as run:
        for batch in asked.batches:
            place = {ref: k for k, ref in enumerate(dict.fromkeys(ref for number in batch for ref in samples[number].images))}
            pictures = [prepare(before, _opened(ref)) for ref in place]
            owners = [[place[ref] for ref in samples[number].images] for number in batch]
            run.passes.clear()
            answers = answer(model, processor, pictures, owners, [asked.prompts[number] for number in batch], task.max_new_tokens)
            for number, text in zip(batch, answers.texts, strict=True):
                said[number] = text
            seen, ledger = _seen(run, answers.lengths, model.dtype.itemsize)
            tokens.append(seen)
            cut += answers.cut
            ledgers.append(ledger)
            tell(len(batch))
    seconds = time.perf_counter() - start
    tell_cut_thoughts(cut, n, task.max_new_tokens)
    scores = [float(task.metric.score(text, sample)) for text, sample in zip(said, samples, strict=True)]
    known = [ledger for ledger in ledgers if ledger is not None] if None not in ledgers else []
    return replace(
        empty,
        answers=[
            Answer(sample.id, name, sample.group, text, score)
            for sample, name, text, score in zip(samples, asked.pictures, said, scores, strict=True)
        ],
        visual_tokens=[sum(layer) / n for layer in zip(*tokens, strict=True)],
        flops={part: sum(ledger.flops[part] for ledger in known) / n for part in (known[0].flops if known else ())},
        kv_bytes=sum(sum(ledger.kv_bytes) for ledger in known) / n,
        seconds=seconds,
        summary=task.metric.summary(samples, said, scores),
    )


def _opened(ref: Any) -> Image.Image:
    try:
        return open_image(ref)
    except FoveateError as error:
        raise Broken(str(error)) from error


def _seen(run: Run, lengths: list[int], dtype_bytes: int) -> tuple[list[int], Ledger | None]:
    """Of the batch just answered: visual tokens in each decoder layer, and the whole cost, None where this model's is not known."""
    depth = len(run.anatomy.layers)
    visual = run.last.visual_tokens if run.passes else [0] * depth
    try:
        if run.passes:
            return visual, run.last.ledger(run.config, dtype_bytes=dtype_bytes)
        return visual, observed(run.config, [[0] * len(lengths)] * depth, [lengths] * depth, images=0, dtype_bytes=dtype_bytes)
    except FoveateError:
        return visual, None
