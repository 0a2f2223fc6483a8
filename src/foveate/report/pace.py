"""Whether seconds of training can be compared: equal work has to take equal time, or the machine had something else to do as well.

Optimiser steps of a stage under one reducer do nearly equal work, which a run's log counts in FLOPs beside the seconds. Two things are held
against each other.

Within a run    how much longer a stage took than at the pace of its quick quarter, in seconds for each FLOP (`Pace.stretch`)
Between runs    the median seconds of a step where two did the same: one stage, reducer and depth, FLOPs within half a per cent

Both may be up to `LIMIT`. Steps of seconds on two quiet cores have a stretch of 1.02 to 1.05 (benchmarks/training_step), those of the
demo's arms, of half a second and counted in CPU time, 1.03 to 1.07; prefills of seconds 1.06, and 1.23 at worst (benchmarks/prefill).
Made-up logs whose steps scatter by 15 % have one of 1.11; a load that doubles a fourth of the steps shows as more than 1.2. What lengthens
a stage by less than a fifth is not seen. Nor is, in the log of one run, a load that was there evenly from its first step to its last: it is
seen only where another run did equal work without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isclose
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.report.runs import StageLog

LIMIT = 1.2
SAME_WORK = 0.005  # by which FLOPs of a step may differ
FEWEST = 8  # logged steps of a stage that can tell, at least half as many under each reducer that counts
SHOWN = 3  # reasons, or examples of equal work, that a sentence gives


@dataclass(frozen=True)
class Pace:
    """Steps of a stage under one reducer. `layers`: visual tokens in each; `flops`: of a step, mean; `seconds`: of a step, median.

    `stretch` is that of the whole stage: its seconds by those that the pace of its quick quarter would have taken; None where too few steps
    are logged to tell. A reducer's first logged step is left out of all three, since it makes what the others find made."""

    stage: str
    reducer: str
    layers: tuple[float, ...]
    flops: float
    seconds: float
    stretch: float | None


@dataclass(frozen=True)
class Clock:
    """What the logs of several runs say of their seconds. `unrest`: why these are no comparison, nothing where they are one; `even`: equal
    work of two runs that took about as long, in words."""

    unrest: tuple[str, ...]
    even: tuple[str, ...]

    @property
    def quiet(self) -> bool:
        return not self.unrest

    @property
    def told(self) -> str:
        """A sentence for a report."""
        if not self.quiet:
            return f"Seconds are not compared, FLOPs are: the logs do not show a quiet machine ({_some(self.unrest)})."
        if self.even:
            return f"Seconds are compared: every stage went at an even pace, and equal work took about as long ({_some(self.even)})."
        return (
            "Seconds are compared, since every stage went at an even pace. But no two runs did equal work, so that a load which was there "
            "evenly for the whole of one would not be seen."
        )


def paces(stages: Sequence[StageLog]) -> list[Pace]:
    """Those of a run: one for each stage and reducer under which enough steps are logged, and at least one for each stage."""
    found = []
    for stage in stages:
        steps = [(part, _steps(stage, part.reducer)) for part in stage.parts]
        enough = [(part, own) for part, own in steps if len(own) >= FEWEST // 2]
        if sum(len(own) for _, own in enough) < FEWEST:
            found.append(Pace(stage.name, stage.parts[0].reducer, stage.parts[0].layers, 0.0, 0.0, None))
            continue
        took = sum(float(own[:, 1].sum()) for _, own in enough)
        quick = sum(float(np.quantile(own[:, 1] / own[:, 2], 0.25) * own[:, 2].sum()) for _, own in enough)
        for part, own in enough:
            count, _, flops = own.sum(0)
            second = float(np.median(own[:, 1] / own[:, 0]))
            found.append(Pace(stage.name, part.reducer, part.layers, float(flops / count), second, took / max(quick, 1e-12)))
    return found


def _steps(stage: StageLog, reducer: str) -> NDArray[np.float64]:
    """(logged steps, 3): how many optimiser steps each stands for, their seconds and FLOPs, under one reducer but for the first."""
    ends = np.array([(0.0, 0.0, 0.0), *((point.step, point.seconds, point.flops) for point in stage.points)])
    own = np.diff(ends, axis=0)[[point.reducer == reducer for point in stage.points]][1:]
    return own[own[:, 2] > 0]


def clock(runs: Sequence[tuple[str, Sequence[Pace]]]) -> Clock:
    """Of runs by their names, each with its paces."""
    unrest = []
    for name, own in runs:
        for stage, stretch in dict.fromkeys((pace.stage, pace.stretch) for pace in own):
            if stretch is None:
                unrest.append(f"{name}, {stage}: too few steps are logged to tell")
            elif stretch > LIMIT:
                unrest.append(f"{name}, {stage}: {stretch:.2f} times the seconds that the pace of its quick quarter would have taken")
        if not own:
            unrest.append(f"{name}: nothing is known of its pace")
    equal: dict[tuple[str, str, str], tuple[float, str]] = {}
    for (name, own), (other, others) in combinations(runs, 2):
        for one, two in ((one, two) for one in own for two in others if same_work(one, two)):
            ratio = max(one.seconds, two.seconds) / min(one.seconds, two.seconds)
            text = f"{one.stage}: {one.seconds:.3g} s a step in {name}, {two.seconds:.3g} s in {other}, a ratio of {ratio:.2f}"
            key = name, other, one.stage
            equal[key] = max(equal.get(key, (0.0, "")), (ratio, text))
    unrest += [f"equal work took unequal time, {text}" for ratio, text in equal.values() if ratio > LIMIT]
    return Clock(tuple(unrest), tuple(text for ratio, text in equal.values() if ratio <= LIMIT))


def same_work(one: Pace, two: Pace) -> bool:
    """Whether a step is the same work in both, as far as logs tell."""
    alike = (one.stage, one.reducer, one.layers) == (two.stage, two.reducer, two.layers)
    return alike and min(one.seconds, two.seconds) > 0 and isclose(one.flops, two.flops, rel_tol=SAME_WORK)


def read_pace(given: dict[str, Any]) -> Pace:
    """From what `asdict` made of it, also after JSON."""
    return Pace(**{**given, "layers": tuple(given["layers"])})


def _some(texts: Sequence[str]) -> str:
    more = len(texts) - SHOWN
    return "; ".join(texts[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
