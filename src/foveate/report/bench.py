"""The report of a bench run as one HTML file: what it says, the accuracy-cost frontier, tables, pictures of kept tokens, what was lost.

What needs the data or the model again (questions, constant answers, pictures, predicted costs) is left out where they are not what they
were, and the page says why.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import floor, log10
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

import foveate
from foveate.accounting import CONVENTION, PARTS
from foveate.data.conversations import MARKER
from foveate.data.pixels import open_image
from foveate.errors import FoveateError
from foveate.evaluation.bench import BARE
from foveate.evaluation.cells import Answer, Bench, Cell, load_bench
from foveate.evaluation.samples import Sample, Task
from foveate.evaluation.tasks import load_task
from foveate.inference import load_model, model_hash
from foveate.inspect.look import look
from foveate.reducers import BASELINES
from foveate.report.compared import RANDOM, Family, Line, budgets, families, findings, interval, lines, middle, signed
from foveate.report.demo import duration, si
from foveate.report.demo import spell as said
from foveate.report.frontier import Mark, Panel, looks, page_svg, save_plots
from foveate.report.page import data_uri, write_page
from foveate.report.predicted import Prediction, asked, predictions

FAILURES = 4  # shown of each method
METHODS = 2  # whose kept tokens are drawn, beside random
_THUMB = 240  # px
_LONGEST = 300  # letters shown of a text
_DASH = "–"
_BASELINES = {method.name for method in BASELINES}
_META = ("model", "model_hash", "tasks", "order", "command", "environment")


def write_bench_report(folder: str | Path, *, model: Any = None, processor: Any = None, scenes: int = 3, progress: bool = True) -> Path:
    """Writes report.html, frontier.png and frontier.svg into the folder of a bench run, and returns the page.

    model, processor: the run's, if they are loaded already; else they are loaded by the name that the run has written down.
    scenes: how many samples are drawn with what was kept of them; 0 leaves pictures of kept tokens out.
    A run that was stopped has a report on what is there; tasks that the bare model has not answered are named and left out.
    FoveateError where the folder holds no run, or not one task is answered by the bare model.
    """
    bench = load_bench(folder)
    absent = [name for name in _META if name not in bench.meta]
    if absent:
        raise FoveateError(f"{bench.folder}/bench.json lacks {', '.join(absent)}; make the run anew in another folder")
    source = _source(bench, model, processor)
    parts = [_part(bench, described, progress) for described in bench.meta["tasks"] if _answered(bench, described["name"])]
    if not parts:
        raise FoveateError(f"{bench.folder}: the bare model has not answered any task yet; run the same bench command to go on")
    found = dict.fromkeys(line.method for part in parts for line in part.lines)
    methods = looks(sorted(found, key=lambda method: method not in _BASELINES), _BASELINES)
    name = _short(str(bench.meta["model"]))
    pictures, pictures_about = _pictures(parts, source, scenes)
    context = {
        "title": "Accuracy against cost",
        "model": name,
        "methods": methods,
        "warnings": _warnings(bench, parts),
        "findings": [
            f"{part.name}: {sentence}" if len(parts) > 1 else sentence
            for part in parts
            for sentence in findings(part.bare, part.lines, part.counted)
        ],
        "tasks": [_task(part, source, number, methods, progress) for number, part in enumerate(parts)],
        "refused": _refused(bench),
        "pictures": pictures,
        "pictures_about": pictures_about,
        "failures": [entry for method in methods for entry in _failures(parts, method)],
        "failures_about": _failures_about(parts),
        "conventions": _CONVENTIONS,
        "made": _made(bench),
    }
    rows = [(f"{name}, {part.name}", panels) for part in parts if (panels := _panels(part))]
    if rows:
        save_plots(bench.folder, rows, methods)
    return write_page("bench.html", bench.folder / "report.html", context)


def _short(model: str) -> str:
    """A model in a folder is named by its last part: the page is for others, who have no such folder."""
    return Path(model).name if Path(model).is_absolute() or model.startswith((".", "~")) else model


@dataclass(frozen=True)
class _Part:
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
class _Source:
    """The run's model and processor, or the `reason` why they are not at hand."""

    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    reason: str = ""


def _answered(bench: Bench, task: str) -> bool:
    return any(cell.task == task and cell.method == BARE for cell in bench.cells)


def _source(bench: Bench, model: Any, processor: Any) -> _Source:
    if model is not None and processor is not None:
        return _Source(model, processor)
    name = str(bench.meta["model"])
    try:
        model, processor = load_model(name)
        if model_hash(name) != bench.meta["model_hash"]:
            return _Source(None, None, f"the files of {name} have another hash than the run's model")
    except FoveateError as error:
        return _Source(None, None, f"the model cannot be loaded: {error}")
    return _Source(model, processor)


def _part(bench: Bench, described: dict[str, Any], progress: bool) -> _Part:
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
    return _Part(described, task, reason, known, counted, samples, bare, others)


def _warnings(bench: Bench, parts: Sequence[_Part]) -> list[str]:
    there = {cell.name for cell in bench.cells}
    missing = sum(name not in there for name in bench.meta["order"])
    out = []
    if missing:
        out.append(f"{missing} of {len(bench.meta['order'])} cells are missing; the same command goes on with them.")
    absent = [described["name"] for described in bench.meta["tasks"] if described["name"] not in {part.name for part in parts}]
    if absent:
        out.append(f"Left out, because the bare model has not answered them yet: {', '.join(absent)}.")
    for part in parts:
        if not any(family.learnt for family in part.families):
            out.append(f"{part.name}: the bare model is in no family clearly above the best constant answer: it compares nothing.")
    return out


# ---- a task --------------------------------------------------------------------------------------------------------------------------


def _task(part: _Part, source: _Source, number: int, methods: dict[str, Any], progress: bool) -> dict[str, Any]:
    described = part.described
    panels = _panels(part)
    predicted, no_prediction = _predicted(part, source, progress)
    left_out = [family for family in part.families if not family.learnt]
    headline = _headline(part)
    about = (
        f"{described['samples']:,} questions about {len({answer.image for answer in part.bare.cells[0].answers}):,} pictures, "
        f"metric {described['metric']}, answers of at most {described['max_new_tokens']} tokens."
    )
    if part.reason:
        about += f" The questions are not at hand, so constant answers and predicted costs are left out: {part.reason}."
    return {
        "name": part.name,
        "about": about,
        "plots": [page_svg(panel, methods, f"plot{number}-{place}") for place, panel in enumerate(panels)],
        "no_flops": "" if part.bare.flops is not None else "The FLOPs of this model cannot be told, so there is no plot over them.",
        "measure": _measure(part),
        "figures": [headline] if headline else [],
        "results": _results(part, headline),
        "families": _family_tables(part) if len(part.families) > 1 else [],
        "columns": [{"name": family.name or _DASH, "n": f"{family.n:,}", "counts": family.learnt} for family in part.families],
        "left_out": _left_out(left_out) if left_out and len(left_out) < len(part.families) else "",
        "cost": _costs(part, predicted),
        "no_prediction": no_prediction,
        "parts": _priced(part),
    }


def _measure(part: _Part) -> str:
    few = len(part.counted) < len(part.families)
    name = "mean score of a question, %" if _headline(part) else "accuracy, %"
    return f"{name}, {len(part.counted)} of {len(part.families)} families" if few else name


def _left_out(unlearnt: Sequence[Family]) -> str:
    told = "; ".join(f"{family.name} (best constant answer: {_cut(said(family.constant))})" for family in unlearnt)
    return (
        f"Not learnt, marked * and left out of accuracy, differences and plots: {told}. The bare model's interval is not above the best "
        "constant answer there, so that nothing can be lost. The run's own tables (table.md, summary.csv) count all families."
    )


def _panels(part: _Part) -> list[Panel]:
    """Over tokens and, where it is known, over FLOPs."""
    found = []
    if part.bare.tokens > 0:
        marks = [_mark(line, line.tokens) for line in part.lines if line.tokens > 0]
        found.append(Panel(_mark(part.bare, part.bare.tokens), marks, "visual tokens of a sample, mean over layers", _measure(part)))
    if part.bare.flops:
        power = 3 * floor(log10(part.bare.flops) / 3)
        unit = si(10.0**power).removeprefix("1 ")
        marks = [_mark(line, line.flops / 10**power) for line in part.lines if line.flops]
        found.append(Panel(_mark(part.bare, part.bare.flops / 10**power), marks, f"{unit} of a whole request", _measure(part)))
    return found


def _mark(line: Line, cost: float) -> Mark:
    name = "bare model" if line.method == BARE else f"{line.method}, keep {line.keep:g}"
    flops = "" if line.flops is None else f", {si(line.flops)}"
    told = f"{name}: {line.value:.1f} % ({line.low:.1f} to {line.high:.1f}), {line.tokens:.4g} tokens{flops}"
    return Mark(line.method, cost, line.value, line.low, line.high, told)


def _headline(part: _Part) -> str:
    """The metric's own first figure, where it is another than the mean score of all questions."""
    cell = part.bare.cells[0]
    plain = 100 * sum(answer.score for answer in cell.answers) / len(cell.answers)
    return "" if abs(plain - cell.accuracy) < 1e-6 else next(iter(cell.summary))


def _results(part: _Part, headline: str) -> list[tuple[str, list[dict[str, Any]]]]:
    groups = [("", [_result(part.bare, part.bare, headline)])]
    for keep in budgets(part.lines):
        groups.append((f"{keep:g}", [_result(line, part.bare, headline) for line in _at(part.lines, keep)]))
    return groups


def _at(found: Sequence[Line], keep: float) -> list[Line]:
    """The lines at a budget, baselines first."""
    return sorted((line for line in found if line.keep == keep), key=lambda line: line.method not in _BASELINES)


def _kind(line: Line) -> str:
    if line.method == BARE:
        return "bare"
    return "baseline" if line.method in _BASELINES else ""


def _result(line: Line, bare: Line, headline: str) -> dict[str, Any]:
    paired = line.paired
    return {
        "method": "" if line.method == BARE else line.method,
        "kind": _kind(line),
        "seeds": len(line.cells),
        "value": f"{line.value:.1f}",
        "interval": f"{line.low:.1f}–{line.high:.1f}",
        "figures": [f"{line.mean(lambda cell: cell.summary[headline]):.1f}"] if headline else [],
        "difference": signed(100 * paired.difference) if paired else "",
        "difference_interval": f"{signed(100 * paired.low)} to {signed(100 * paired.high)}" if paired else "",
        "p": _probability(paired.p) if paired else "",
        "loyalty": f"{100 * paired.loyalty:.1f}" if paired else "",
        "tokens": f"{line.tokens:.1f}",
        "flops": _DASH if line.flops is None else si(line.flops),
        "of_whole": _share(line.flops, bare.flops),
        "of_lm": _share(line.lm_flops, bare.lm_flops),
        "kv": _DASH if line.flops is None else f"{line.mean(lambda cell: cell.kv_bytes) / 2**20:.3g}",
        "seconds": duration(line.mean(lambda cell: cell.seconds)),
    }


def _share(value: float | None, whole: float | None) -> str:
    return f"{100 * value / whole:.0f} %" if value is not None and whole else _DASH


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _family_tables(part: _Part) -> list[tuple[str, list[dict[str, Any]]]]:
    """Of each budget: the best constant answer, the bare model, and the methods."""
    constant = {
        "method": "",
        "kind": "",
        "label": "best constant answer",
        "cells": [(_DASH if family.majority is None else f"{100 * family.majority:.1f}", "") for family in part.families],
    }
    bare = _family_row(part, part.bare)
    return [(f"{keep:g}", [constant, bare, *(_family_row(part, line) for line in _at(part.lines, keep))]) for keep in budgets(part.lines)]


def _family_row(part: _Part, line: Line) -> dict[str, Any]:
    cells = []
    for family in part.families:
        scores: list[list[float]] = [[answer.score for answer in cell.answers if answer.group == family.name] for cell in line.cells]
        means = [sum(same) / len(same) for same in zip(*scores, strict=True)]
        low, high = interval(means)
        cells.append((f"{100 * sum(means) / len(means):.1f}", f"{100 * low:.1f}–{100 * high:.1f}"))
    return {"method": "" if line.method == BARE else line.method, "kind": _kind(line), "label": "bare model", "cells": cells}


def _predicted(part: _Part, source: _Source, progress: bool) -> tuple[dict[str, Prediction], str]:
    """By spelling, and what there is to say about it."""
    if part.task is None or source.model is None:
        return {}, f"No predictions: {part.reason or source.reason}."
    spellings = [line.cells[0].reducer for line in (part.bare, *part.lines)]  # a seed changes no number of tokens
    found = predictions(source.model.config, source.processor, part.task, spellings, progress)
    n = len(asked(part.task))
    which = "all" if n == len(part.task.samples) else f"{n} evenly spaced"
    about = (
        f"Predicted: from the configuration and what the processor makes of {which} questions, without weights. "
        "Observed: from the tokens that went through the layers, all questions."
    )
    failed = {reason for reason in found.values() if isinstance(reason, str)}
    about += f" Not predicted: {'; '.join(sorted(failed))}." if failed else ""
    return {spelling: one for spelling, one in found.items() if isinstance(one, Prediction)}, about


def _costs(part: _Part, predicted: dict[str, Prediction]) -> list[dict[str, Any]]:
    def spent(line: Line, name: str) -> float:
        return line.mean(lambda cell: cell.flops[name])

    names = _priced(part)
    rows = []
    for line in (part.bare, *(line for keep in budgets(part.lines) for line in _at(part.lines, keep))):
        one = predicted.get(line.cells[0].reducer)
        cells = [
            f"{one.tokens:.1f}" if one else _DASH,
            f"{line.tokens:.1f}",
            _number(one.flops if one else None),
            _number(line.flops),
            f"{signed(100 * (line.flops / one.flops - 1), 2)} %" if one and line.flops is not None else _DASH,
            *(_number(None if line.flops is None else spent(line, name)) for name in names),
        ]
        rows.append({"method": "" if line.method == BARE else line.method, "kind": _kind(line), "keep": f"{line.keep:g}", "cells": cells})
    return rows


def _number(flops: float | None) -> str:
    """Without the unit, which stands above."""
    return _DASH if flops is None else si(flops).removesuffix("FLOP").strip()


def _priced(part: _Part) -> list[str]:
    """The parts of the model whose FLOPs are known."""
    return [name for name in PARTS if name in part.bare.cells[0].flops]


def _refused(bench: Bench) -> list[tuple[str, str]]:
    """What was refused, at which budgets, with the reason."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for cell in bench.cells:
        if cell.refused:
            found.setdefault((cell.method, cell.refused), {})[f"{cell.keep:g}"] = None
    return [(f"{method} at keep {', '.join(keeps)}", reason) for (method, reason), keeps in found.items()]


# ---- pictures and failures -----------------------------------------------------------------------------------------------------------


def _pictures(parts: Sequence[_Part], source: _Source, scenes: int) -> tuple[list[dict[str, str]], str]:
    """Drawings of what the best methods keep, layer by layer, and what is said above them."""
    if scenes < 1:
        return [], "Not asked for."
    if source.model is None:
        return [], f"No pictures: {source.reason}."
    out: list[dict[str, str]] = []
    reasons: dict[str, None] = {}
    for part in parts:
        own, keep = part.lines, middle(part.lines)
        if part.task is None or keep is None:
            reasons[f"{part.name}: {part.reason or 'no method has finished'}"] = None
            continue
        chosen = _drawn(_at(own, keep))
        for sample in _telling(part, chosen)[: scenes - len(out)]:
            question = sample.question.replace(MARKER, "").strip()
            try:
                figure = look(
                    source.model,
                    [open_image(ref) for ref in sample.images],
                    sample.question,
                    [line.cells[0].reducer for line in chosen],
                    processor=source.processor,
                    per_layer=True,
                    max_new_tokens=part.task.max_new_tokens,
                )
            except FoveateError as error:
                reasons[str(error)] = None
                continue
            src = _drawing(figure)
            out.append({"src": src, "alt": f"kept tokens: {_cut(question)}", "caption": f"{part.name}, {sample.id}, keep {keep:g}"})
    about = (
        f"Questions that the bare model answers rightly and the methods do not all alike, at the middle budget: the {METHODS} best methods "
        "and random, in front of every layer at which the set changes. Grey: dropped; outlined: merged."
    )
    if reasons:
        about += f" Not drawn: {'; '.join(reasons)}."
    return out, about


def _drawing(figure: Figure) -> str:
    """Few colours are enough for it, and a third of the bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return data_uri(Image.open(buffer).convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=256))


def _drawn(own: Sequence[Line]) -> list[Line]:
    """The most accurate methods that are no baselines, and random."""
    best = sorted((line for line in own if not _kind(line)), key=lambda line: -line.value)[:METHODS]
    return best + [line for line in own if line.method == RANDOM]


def _telling(part: _Part, chosen: Sequence[Line]) -> list[Sample]:
    """Samples with pictures that the bare model has right and not all methods: most divided first, families in turn, no picture twice."""
    rights = [{answer.id for answer in line.cells[0].answers if answer.score >= 0.5} for line in chosen]
    divided = []
    for place, answer in enumerate(part.bare.cells[0].answers):
        right = sum(answer.id in own for own in rights)
        if answer.score >= 0.5 and right < len(rights) and answer.group in part.counted and part.samples[answer.id].images:
            divided.append((-min(right, len(rights) - right), place, answer))
    turns: dict[str, int] = {}
    seen: set[str] = set()
    order = []
    for _, _, answer in sorted(divided, key=lambda entry: entry[:2]):
        if answer.image not in seen:
            seen.add(answer.image)
            turns[answer.group] = turns.get(answer.group, 0) + 1
            order.append((turns[answer.group], part.samples[answer.id]))
    return [sample for _, sample in sorted(order, key=lambda entry: entry[0])]


def _failures_about(parts: Sequence[_Part]) -> str:
    keeps = {f"{share:g}" for part in parts if (share := middle(part.lines)) is not None}
    keep = " or ".join(sorted(keeps)) or _DASH
    text = f"Questions that the bare model has right and the method, at keep {keep}, has wrong; families in turn."
    away = [f"{part.name}: {part.reason}" for part in parts if part.task is None]
    return text + (f" The questions of these tasks are not at hand, so only the answers are shown: {'; '.join(away)}." if away else "")


def _failures(parts: Sequence[_Part], method: str) -> list[tuple[str, str, list[dict[str, str]]]]:
    """The method's name, how much it lost and gained, and some of what it lost."""
    told: list[str] = []
    shown: list[dict[str, str]] = []
    for part in parts:
        keep = middle(part.lines)
        line = next((line for line in part.lines if line.method == method and line.keep == keep), None)
        if line is None or line.paired is None:
            continue
        n = sum(answer.group in part.counted for answer in part.bare.cells[0].answers)
        told.append(
            f"{part.name}: {line.paired.lost:,} of {n:,} questions scored lower than by the bare model, {line.paired.gained:,} higher."
        )
        lost = _lost(part.bare.cells[0], line.cells[0], part.counted)
        shown += [_failure(part, before, after) for before, after in lost[: FAILURES - len(shown)]]
    return [(method, " ".join(told), shown)] if told else []


def _lost(bare: Cell, cell: Cell, counted: set[str]) -> list[tuple[Answer, Answer]]:
    """What the bare model has right and the cell has wrong, groups in turn."""
    turns: dict[str, int] = {}
    found = []
    for before, after in zip(bare.answers, cell.answers, strict=True):
        if before.score >= 0.5 > after.score and before.group in counted:
            turns[before.group] = turns.get(before.group, 0) + 1
            found.append((turns[before.group], before, after))
    return [(before, after) for _, before, after in sorted(found, key=lambda entry: entry[0])]


def _failure(part: _Part, before: Answer, after: Answer) -> dict[str, str]:
    sample = part.samples.get(before.id)
    src = ""
    if sample is not None and sample.images:
        image = open_image(sample.images[0])
        large = max(image.size) > _THUMB
        image.thumbnail((_THUMB, _THUMB), Image.Resampling.LANCZOS)
        src = data_uri(image, "JPEG" if large else "PNG")
    return {
        "id": before.id,
        "src": src,
        "question": _cut(sample.question.replace(MARKER, "").strip()) if sample else before.id,
        "truth": _cut(" / ".join(said(answer) for answer in dict.fromkeys(sample.answers))) if sample else _DASH,
        "bare": _cut(said(before.prediction)),
        "reduced": _cut(said(after.prediction)),
    }


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"


# ---- small print ---------------------------------------------------------------------------------------------------------------------


_CONVENTIONS = [
    (
        "Accuracy",
        "Mean score of the questions, over seeds where a method draws at random. Small print: 95 % interval from 2,000 resamples of whole "
        "pictures, since questions about one picture are not independent. A metric with a headline of its own has a column for it, which "
        "counts all families.",
    ),
    (
        "Difference",
        "To the bare model on the same questions, in points, with the paired 95 % interval from the same resamples. p is two-sided: "
        "McNemar's exact test where all scores are 0 or 1, else from the resamples. Neither is corrected for the number of comparisons: "
        "of twenty without any effect, one interval misses zero by chance.",
    ),
    ("Loyalty", "Share of the answers, in %, that are the bare model's own, right or wrong, but for case, space and a final full stop."),
    (
        "Budget and tokens",
        "keep is what was asked for. Tokens are visual tokens of a sample as they went through the decoder layers, mean over the layers. "
        "Methods that act inside the language model have more of them at the same keep: compare at equal tokens or FLOPs, in the plots.",
    ),
    ("FLOPs", f"Of a request's prompt: {CONVENTION}. “Of LM” leaves out tower and bridge."),
    ("KV", "Keys and values of the prompt in all layers, as they stay in the cache, in MiB."),
    ("Seconds", "Wall clock of answering all questions, processor and tower included, on the machine below; other load counts."),
    (
        "Families",
        "Small print: Wilson's 95 % interval, which takes questions for independent and is somewhat too narrow where they share a picture. "
        "Best constant answer: what one and the same answer to all questions of the family would score.",
    ),
]


def _made(bench: Bench) -> list[tuple[str, str]]:
    meta = bench.meta
    out = [("Command", line) for line in str(meta["command"]).splitlines()]
    out += [("Model", f"{meta['model']}, SHA-256 {meta['model_hash']}")]
    out += [(f"Data of {task['name']}", f"{task['spec'] or 'handed over'}, SHA-256 {task['data_hash']}") for task in meta["tasks"]]
    settings = [f"{name} {meta[name]}" for name in ("dtype", "device", "batch_size", "limit", "seeds") if meta.get(name) is not None]
    out += [("Settings", ", ".join(settings))] if settings else []
    out += [("Machine", line) for line in str(meta["environment"]).splitlines()]
    return [*out, ("Report", f"foveate {foveate.__version__}")]
