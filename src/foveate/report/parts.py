"""A bench run as its report reads it: task by task, with the questions and the model where they are still what they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from foveate.errors import FoveateError
from foveate.evaluation.bench import BARE
from foveate.evaluation.cells import Bench
from foveate.evaluation.samples import Sample, Task
from foveate.evaluation.tasks import load_task
from foveate.inference import load_model, model_hash, resized, retiled
from foveate.reducers import BASELINES
from foveate.report.compared import Family, Line, families, lines

BASELINE_NAMES = {method.name for method in BASELINES}
_LONGEST = 300  # letters shown of a text


@dataclass(frozen=True)
class Part:
    """A task of the run: as bench.json describes it, with its lines; `task` is None where the data is not what it was, for `reason`."""

    described: dict[str, Any]
    task: Task | None
    reason: str
    families: list[Family]
    counted: set[str]
    samples: dict[str, Sample]
    bare: Line
    lines: list[Line]

    @property
    def name(self) -> str:
        return str(self.described["name"])


@dataclass(frozen=True)
class Source:
    """The run's model and processor, or the `reason` why they are not at hand."""

    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    reason: str = ""


def answered(bench: Bench, task: str) -> bool:
    return any(cell.task == task and cell.method == BARE for cell in bench.cells)


def source_of(bench: Bench, model: Any, processor: Any) -> Source:
    """The run's model, with pictures cut and sized as the run had them."""
    name = str(bench.meta["model"])
    try:
        if model is None or processor is None:
            model, processor = load_model(name)
            if model_hash(name) != bench.meta["model_hash"]:
                return Source(None, None, f"the files of {name} have another hash than the run's model")
        retiled(model, processor, bench.meta.get("tiling"))
        processor = resized(processor, bench.meta.get("image_size"))
    except FoveateError as error:
        return Source(None, None, f"the model cannot be loaded: {error}")
    return Source(model, processor)


def part_of(bench: Bench, described: dict[str, Any], progress: bool) -> Part:
    whole = bench.bare(described["name"])
    task, reason = None, ""
    if described["spec"] is None:
        reason = "its questions were handed over from Python and are not on disk"
    else:
        try:
            task = load_task(described["spec"], progress)
        except FoveateError as error:
            reason = str(error)
    if task is not None and task.hash != described["data_hash"]:
        task, reason = None, "the data has changed since: it has another hash"
    if task is not None:  # a run may have asked only some of its questions
        ids = {answer.id for answer in whole.answers}
        task = replace(task, samples=tuple(sample for sample in task.samples if sample.id in ids))
    known = families(whole, task)
    counted = {family.name for family in known if family.learnt} or {family.name for family in known}
    bare, others = lines(bench, described["name"], counted)
    samples = {sample.id: sample for sample in task.samples} if task else {}
    return Part(described, task, reason, known, counted, samples, bare, others)


def at_budget(found: Sequence[Line], keep: float) -> list[Line]:
    """The lines at a budget, baselines first."""
    return sorted((line for line in found if line.keep == keep), key=lambda line: line.method not in BASELINE_NAMES)


def kind(line: Line) -> str:
    if line.method == BARE:
        return "bare"
    return "baseline" if line.method in BASELINE_NAMES else ""


def shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
