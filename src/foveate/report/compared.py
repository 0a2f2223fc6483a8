"""A bench run's cells put together for its report: methods at budgets with intervals, families, and what can be said of it in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from foveate.evaluation.bench import BARE, BLIND
from foveate.evaluation.cells import Answer, Bench, Cell
from foveate.evaluation.metrics.common import wilson
from foveate.evaluation.metrics.scenes import RULES, Scenes, majority
from foveate.evaluation.paired import Paired, bootstrap, compare
from foveate.evaluation.samples import Sample, Task
from foveate.report.pace import LIMIT

RANDOM = "random"
CONSTANTS = 100  # of the references, so many of the most frequent are tried as constant answers
_LM = ("lm_linear", "lm_attention", "head")


@dataclass(frozen=True)
class Line:
    """A method at a budget on a task: means over its seeds.

    value, low, high  mean score of the questions that count, in per cent, and its 95 % interval (pictures drawn anew)
    paired            the same questions against the bare model; None for the bare model itself
    """

    method: str
    keep: float
    cells: list[Cell]
    value: float
    low: float
    high: float
    paired: Paired | None

    def mean(self, of: Callable[[Cell], float]) -> float:
        return fmean(of(cell) for cell in self.cells)

    @property
    def tokens(self) -> float:
        return self.mean(lambda cell: cell.mean_tokens)

    @property
    def flops(self) -> float | None:
        """None where the model's cost is not known."""
        return self.mean(lambda cell: cell.total_flops) if all(cell.flops for cell in self.cells) else None

    @property
    def lm_flops(self) -> float | None:
        return self.mean(lambda cell: sum(cell.flops.get(part, 0.0) for part in _LM)) if self.flops is not None else None


@dataclass(frozen=True)
class Family:
    """A group of a task's questions, as the bare model does on it; shares.

    constant, majority  the one answer that scores best for all of them, and what it scores; "" and None where the data is not at hand
    learnt              the bare model's interval lies above that, or it is not known
    """

    name: str
    n: int
    constant: str
    majority: float | None
    learnt: bool


def families(bare: Cell, task: Task | None) -> list[Family]:
    """In their order in the embedded world, others as they come."""
    samples: dict[str, list[Sample]] = {}
    for sample in task.samples if task else ():
        samples.setdefault(sample.group, []).append(sample)
    known = list(RULES)
    names = dict.fromkeys(answer.group for answer in bare.answers)
    found = []
    for name in sorted(names, key=lambda name: known.index(name) if name in known else len(known)):
        scores = [answer.score for answer in bare.answers if answer.group == name]
        constant, share = constant_answer(task, samples[name]) if task and name in samples else ("", None)
        found.append(Family(name, len(scores), constant, share, share is None or interval(scores)[0] > share))
    return found


def constant_answer(task: Task, samples: Sequence[Sample]) -> tuple[str, float]:
    """The one answer that scores best on `samples`, among their most frequent references, and its mean score."""
    if isinstance(task.metric, Scenes):
        return majority(samples[0].group, [sample.answers[0] for sample in samples])
    counts = Counter(answer for sample in samples for answer in dict.fromkeys(sample.answers))
    scored = [(fmean(task.metric.score(text, sample) for sample in samples), text) for text, _ in counts.most_common(CONSTANTS)]
    share, text = min(scored, key=lambda pair: (-pair[0], pair[1]))
    return text, share


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean score, taken as that many right answers; for scores between 0 and 1 that is wide enough."""
    return wilson(round(sum(scores)), len(scores))


def lines(bench: Bench, task: str, counted: set[str]) -> tuple[Line, list[Line]]:
    """The bare model, and every reducer at every budget that was not refused, on the questions of the families in `counted`."""
    whole = bench.bare(task)
    groups: dict[tuple[str, float], list[Cell]] = {}
    for cell in bench.cells:
        if cell.task == task and cell.method not in (BARE, BLIND) and not cell.refused and not cell.cache:
            groups.setdefault((cell.method, cell.keep), []).append(cell)
    bare = _only(whole, counted)
    others = []
    for (method, keep), cells in groups.items():
        own = [_only(cell, counted) for cell in cells]
        paired = compare(bare, own)
        others.append(Line(method, keep, cells, *_estimate(own), paired))
    return Line(BARE, 1.0, [whole], *_estimate([bare]), None), others


def budgets(found: Sequence[Line]) -> list[float]:
    """Of the lines, the largest first."""
    return sorted({line.keep for line in found}, reverse=True)


def middle(found: Sequence[Line]) -> float | None:
    """The budget that stands for all where only one can be shown."""
    keeps = budgets(found)
    return keeps[(len(keeps) - 1) // 2] if keeps else None


def against_random(found: Sequence[Line], counted: set[str]) -> dict[float, list[tuple[Line, Line, Paired]]]:
    """At each budget at which random was asked: every other method, random, and the two compared question by question. Budgets at which
    nothing differs from the bare model say nothing and are left out."""
    out: dict[float, list[tuple[Line, Line, Paired]]] = {}
    for base in found:
        others = [line for line in found if line.keep == base.keep and line.method != RANDOM]
        differs = any(line.paired and line.paired.lost + line.paired.gained for line in (base, *others))
        if base.method == RANDOM and others and differs:
            out[base.keep] = [(line, base, _versus(base, line, counted)) for line in others]
    return dict(sorted(out.items(), reverse=True))


def at_equal_tokens(found: Sequence[Line], counted: set[str]) -> list[tuple[Line, Paired]]:
    """Every other method at every budget, compared with random where that has at least as many tokens, but no more of them than it must;
    settings with more tokens than random ever has are left out."""
    random = sorted((line for line in found if line.method == RANDOM), key=lambda line: line.tokens)
    out = []
    for line in found:
        base = next((base for base in random if base.tokens >= line.tokens - 1e-9), None)
        if line.method != RANDOM and base is not None:
            out.append((line, _versus(base, line, counted)))
    return out


def _versus(base: Line, line: Line, counted: set[str]) -> Paired:
    return compare(_mean([_only(cell, counted) for cell in base.cells]), [_only(cell, counted) for cell in line.cells])


def findings(bare: Line, found: Sequence[Line], counted: set[str]) -> list[str]:
    """What a task's lines say, in a few sentences."""
    if not found:
        return ["No method has finished yet, so there is nothing to compare with the bare model."]
    sentences = []
    versus = against_random(found, counted)
    if versus:
        told = []
        for keep, entries in versus.items():
            better = ", ".join(_gain(*entry) for entry in entries if entry[2].low > 0)
            told.append(f"at keep {keep:g} {better or f'none of {len(entries)}'}")
        sentences.append(
            "Better than random at the same budget, with the whole 95 % interval of the paired difference above zero (points in brackets): "
            f"{'; '.join(told)}."
        )
        fair = at_equal_tokens(found, counted)
        wins = [(line, paired) for line, paired in fair if paired.low > 0]
        names = ", ".join(f"{line.method} at keep {line.keep:g} ({signed(100 * paired.difference)})" for line, paired in wins)
        compared = {line.method for line, _ in fair}
        never = ", ".join(sorted(compared - {line.method for line, _ in wins}))
        beyond = ", ".join(sorted({line.method for line in found} - compared - {RANDOM}))
        sentences.append(
            f"Better in this sense than random with at least as many tokens: {names or 'none'}."
            + (f" Never: {never}." if never else "")
            + (f" Always with more tokens than random: {beyond}." if beyond else "")
        )
    if all(line.method != RANDOM for line in found):
        sentences.append("Without the random baseline the run cannot say what choosing tokens is worth over keeping any of them.")
    return [*sentences, cheapest(bare, found)]


def cheapest(bare: Line, found: Sequence[Line]) -> str:
    """The setting that costs least of those that lose nothing for sure, in a sentence."""
    level = [(line, line.paired) for line in found if line.paired is not None and line.paired.high >= 0]
    if not level:
        return "Every method loses accuracy against the bare model at every budget, with its whole interval."
    cheap, paired = min(level, key=lambda pair: (pair[0].tokens if pair[0].flops is None else pair[0].flops, -pair[0].value))
    cost = f"{cheap.tokens:.3g} of {bare.tokens:.3g} visual tokens per layer"
    if cheap.flops is not None and bare.flops:
        cost = f"{100 * cheap.flops / bare.flops:.0f} % of the FLOPs, {cost}"
    return (
        f"The cheapest setting whose interval still reaches the bare model is {cheap.method} at keep {cheap.keep:g}: "
        f"{signed(100 * paired.difference)} points ({signed(100 * paired.low)} to {signed(100 * paired.high)}) for {cost}."
    )


def told_from_random(found: Sequence[Line], counted: set[str]) -> str:
    """Which methods differ from random at the same budget with their whole interval, to the better or the worse, in a sentence."""
    entries = [entry for at_keep in against_random(found, counted).values() for entry in at_keep]
    if not entries:
        return "Nothing can be compared with random at the same budget."
    told = []
    for word, own in (("better", [e for e in entries if e[2].low > 0]), ("worse", [e for e in entries if e[2].high < 0])):
        names = ", ".join(
            f"{line.method} at keep {line.keep:g}{_more(line, base)} ({signed(100 * paired.difference)} points, "
            f"{signed(100 * paired.low)} to {signed(100 * paired.high)})"
            for line, base, paired in own
        )
        told.append(f"{word}: {names or 'none'}")
    rest = sum(paired.low <= 0 <= paired.high for *_, paired in entries)
    end = f" In the other {rest} these questions show no difference." if rest else ""
    return (
        f"Of {len(entries)} comparisons with random at the same budget, question by question, the 95 % interval leaves out 0 in "
        f"{len(entries) - rest}. {told[0].capitalize()}; {told[1]}.{end}"
    )


def unrest(found: Sequence[Line]) -> str:
    """Why the seconds of a run are no comparison: seeds of one method at one budget are equal work. "" where no such thing was seen."""
    seconds = [(line, [cell.seconds for cell in line.cells]) for line in found if len(line.cells) > 1]
    uneven = [(max(own) / min(own), line, own) for line, own in seconds if min(own) > 0 and max(own) / min(own) > LIMIT]
    if not uneven:
        return ""
    _, line, own = max(uneven, key=lambda entry: entry[0])
    return (
        f"Seconds are left out, because the machine was busy: equal work took unequal time ({line.method} at keep {line.keep:g}, "
        f"{len(own)} seeds: {min(own):.1f} to {max(own):.1f} s)."
    )


def _gain(line: Line, base: Line, paired: Paired) -> str:
    """A method that is better than random, with its tokens where it has clearly more of them."""
    return f"{line.method} ({signed(100 * paired.difference)}{_more(line, base)})"


def _more(line: Line, base: Line) -> str:
    return f" with {line.tokens:.3g} tokens to {base.tokens:.3g}" if line.tokens > 1.05 * base.tokens else ""


def signed(points: float, digits: int = 1) -> str:
    """Its sign is always there, but no minus in front of a zero."""
    return f"{round(points, digits) + 0.0:+.{digits}f}".replace("-", "−")


def _only(cell: Cell, counted: set[str]) -> Cell:
    return replace(cell, answers=[answer for answer in cell.answers if answer.group in counted])


def _mean(cells: Sequence[Cell]) -> Cell:
    """One cell with the mean scores of several, which answer the same questions."""
    answers: list[Answer] = []
    for same in zip(*(cell.answers for cell in cells), strict=True):
        answers.append(replace(same[0], score=fmean(answer.score for answer in same)))
    return replace(cells[0], answers=answers)


def _estimate(cells: Sequence[Cell]) -> tuple[float, float, float]:
    """(value, low, high) in per cent of the mean over cells, pictures drawn anew."""
    whole = _mean(cells)
    scores = np.array([answer.score for answer in whole.answers])
    low, high, _ = bootstrap(scores, [answer.image for answer in whole.answers])
    return 100 * float(scores.mean()), 100 * low, 100 * high
