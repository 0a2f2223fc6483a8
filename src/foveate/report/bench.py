"""The report of a bench run as one HTML file: what it says, the accuracy-cost frontier, tables, pictures of kept tokens, what was lost.

What needs the data or the model again (questions, constant answers, pictures, predicted costs) is left out where they are not what they
were, and the page says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from foveate.accounting import CONVENTION, PARTS
from foveate.errors import FoveateError
from foveate.evaluation.bench import BARE, CACHE
from foveate.evaluation.cells import Bench, load_bench
from foveate.evaluation.table import CACHES, rows
from foveate.inspect.words import answer_text, si
from foveate.report.compared import Family, Line, budgets, findings, interval, signed, unrest
from foveate.report.examples import about_failures, failures_of, pictures_of
from foveate.report.frontier import looks, page_svg, save_plots
from foveate.report.page import write_page
from foveate.report.parts import BASELINE_NAMES, Part, Source, answered, at_budget, kind, part_of, shortened, source_of
from foveate.report.predicted import Prediction, asked, predictions
from foveate.report.results import DASH, headline, measure, panels, results

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
    source = source_of(bench, model, processor)
    parts = [part_of(bench, described, progress) for described in bench.meta["tasks"] if answered(bench, described["name"])]
    if not parts:
        raise FoveateError(f"{bench.folder}: the bare model has not answered any task yet; run the same bench command to go on")
    found = dict.fromkeys(line.method for part in parts for line in part.lines)
    methods = looks(sorted(found, key=lambda method: method not in BASELINE_NAMES), BASELINE_NAMES)
    name = _short(str(bench.meta["model"]))
    pictures, pictures_about = pictures_of(parts, source, scenes)
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
        "caches": _caches(bench),
        "caches_about": CACHES,
        "tasks": [_task(part, source, number, methods, progress) for number, part in enumerate(parts)],
        "refused": _refused(bench),
        "pictures": pictures,
        "pictures_about": pictures_about,
        "failures": [entry for method in methods for entry in failures_of(parts, method)],
        "failures_about": about_failures(parts),
        "conventions": _CONVENTIONS,
        "made": _made(bench),
    }
    drawn = [(f"{name}, {part.name}", own) for part in parts if (own := panels(part))]
    if drawn:
        save_plots(bench.folder, drawn, methods)
    return write_page("bench.html", bench.folder / "report.html", context)


def _short(model: str) -> str:
    """A model in a folder is named by its last part: the page is for others, who have no such folder."""
    return Path(model).name if Path(model).is_absolute() or model.startswith((".", "~")) else model


def _caches(bench: Bench) -> list[dict[str, Any]]:
    """The answers under cache policies, which cost as many tokens as the bare model's: they have no place among methods that save some."""
    found = [row for row in rows(bench) if row.cache and row.accuracy is not None]
    return [
        {
            **{"task": row.task, "method": row.method.removeprefix(CACHE), "keep": f"{row.keep:g}", "seeds": row.seeds},
            **{"value": f"{row.accuracy:.1f}", "change": f"{row.change:+.1f}{row.mark}", "kept": row.kept.removeprefix("KV ")},
        }
        for row in found
    ]


def _warnings(bench: Bench, parts: Sequence[Part]) -> list[str]:
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


def _task(part: Part, source: Source, number: int, methods: dict[str, Any], progress: bool) -> dict[str, Any]:
    described = part.described
    predicted, no_prediction = _predicted(part, source, progress)
    left_out = [family for family in part.families if not family.learnt]
    figure, busy = headline(part), unrest(part.lines)
    shown = "clips" if any(sample.clips for sample in part.samples.values()) else "pictures"
    about = (
        f"{described['samples']:,} questions about {len({answer.image for answer in part.bare.cells[0].answers}):,} {shown}, "
        f"metric {described['metric']}, answers of at most {described['max_new_tokens']} tokens."
    )
    if part.reason:
        about += f" The questions are not at hand, so constant answers and predicted costs are left out: {part.reason}."
    return {
        "name": part.name,
        "about": about,
        "plots": [page_svg(panel, methods, f"plot{number}-{place}") for place, panel in enumerate(panels(part))],
        "no_flops": "" if part.bare.flops is not None else "The FLOPs of this model cannot be told, so there is no plot over them.",
        "measure": measure(part),
        "figures": [figure] if figure else [],
        "results": results(part),
        "unrest": busy,
        "families": _family_tables(part) if len(part.families) > 1 else [],
        "columns": [{"name": family.name or DASH, "n": f"{family.n:,}", "counts": family.learnt} for family in part.families],
        "left_out": _left_out(left_out) if left_out and len(left_out) < len(part.families) else "",
        "cost": _costs(part, predicted),
        "no_prediction": no_prediction,
        "parts": _priced(part),
    }


def _left_out(unlearnt: Sequence[Family]) -> str:
    told = "; ".join(f"{family.name} (best constant answer: {shortened(answer_text(family.constant))})" for family in unlearnt)
    return (
        f"Not learnt, marked * and left out of accuracy, differences and plots: {told}. The bare model's interval is not above the best "
        "constant answer there, so that nothing can be lost. The run's own tables (table.md, summary.csv) count all families."
    )


def _family_tables(part: Part) -> list[tuple[str, list[dict[str, Any]]]]:
    """Of each budget: the best constant answer, the bare model, and the methods."""
    constant = {
        "method": "",
        "kind": "",
        "label": "best constant answer",
        "cells": [(DASH if family.majority is None else f"{100 * family.majority:.1f}", "") for family in part.families],
    }
    bare = _family_row(part, part.bare)
    return [
        (f"{keep:g}", [constant, bare, *(_family_row(part, line) for line in at_budget(part.lines, keep))]) for keep in budgets(part.lines)
    ]


def _family_row(part: Part, line: Line) -> dict[str, Any]:
    cells = []
    for family in part.families:
        scores: list[list[float]] = [[answer.score for answer in cell.answers if answer.group == family.name] for cell in line.cells]
        means = [sum(same) / len(same) for same in zip(*scores, strict=True)]
        low, high = interval(means)
        cells.append((f"{100 * sum(means) / len(means):.1f}", f"{100 * low:.1f}–{100 * high:.1f}"))
    return {"method": "" if line.method == BARE else line.method, "kind": kind(line), "label": "bare model", "cells": cells}


def _predicted(part: Part, source: Source, progress: bool) -> tuple[dict[str, Prediction], str]:
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


def _costs(part: Part, predicted: dict[str, Prediction]) -> list[dict[str, Any]]:
    def spent(line: Line, name: str) -> float:
        return line.mean(lambda cell: cell.flops[name])

    names = _priced(part)
    rows = []
    for line in (part.bare, *(line for keep in budgets(part.lines) for line in at_budget(part.lines, keep))):
        one = predicted.get(line.cells[0].reducer)
        cells = [
            f"{one.tokens:.1f}" if one else DASH,
            f"{line.tokens:.1f}",
            _number(one.flops if one else None),
            _number(line.flops),
            f"{signed(100 * (line.flops / one.flops - 1), 2)} %" if one and line.flops is not None else DASH,
            *(_number(None if line.flops is None else spent(line, name)) for name in names),
        ]
        rows.append({"method": "" if line.method == BARE else line.method, "kind": kind(line), "keep": f"{line.keep:g}", "cells": cells})
    return rows


def _number(flops: float | None) -> str:
    """Without the unit, which stands above."""
    return DASH if flops is None else si(flops).removesuffix("FLOP").strip()


def _priced(part: Part) -> list[str]:
    """The parts of the model whose FLOPs are known."""
    return [name for name in PARTS if name in part.bare.cells[0].flops]


def _refused(bench: Bench) -> list[tuple[str, str]]:
    """What was refused, at which budgets, with the reason."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for cell in bench.cells:
        if cell.refused:
            found.setdefault((cell.method, cell.refused), {})[f"{cell.keep:g}"] = None
    return [(f"{method} at keep {', '.join(keeps)}", reason) for (method, reason), keeps in found.items()]


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
    (
        "Seconds",
        "Wall clock of answering all questions, processor and tower included, on the machine below; other load counts. They are left out "
        "where the seeds of one method, which are equal work, took unequal time; without such a method that cannot be seen.",
    ),
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
    return [*out, ("Report", f"foveate {version('foveate')}")]
