"""Which reducer applies at which optimiser step: pure functions, so that a resumed run is the same run.

LLaVolta (arXiv 2406.20092) divides one stage of training, under one optimiser and one learning-rate curve, into parts with ever less
compression. Its code counts forward calls in a Python attribute (gradient accumulation moves the switches, a resumed run forgets them, and
the first part lasts one call too long); here the part is a function of the optimiser step alone, with boundaries at floor(i * T / m) for m
equal parts of T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any

NONE = "none"
COUNTED = 8  # of what a stage draws from for each step, where what it costs is told beforehand


@dataclass(frozen=True)
class Part:
    """`share` of a stage's optimiser steps, in which the reducers of `cycle` take turns, one optimiser step each. "none" is no reducer."""

    share: Fraction
    cycle: tuple[str, ...] = (NONE,)


def boundaries(shares: Sequence[Fraction], total: int) -> list[int]:
    """First step of every part but the first: floor(total * (share_0 + ... + share_i)). 5197 steps in 4 equal parts: 1299, 2598, 3897."""
    edges, covered = [], Fraction(0)
    for share in shares[:-1]:
        covered += share
        edges.append(floor(covered * total))
    return edges


def part_at(parts: Sequence[Part], step: int, total: int) -> tuple[int, int]:
    """(index of the part, steps since its start) of optimiser step `step` of `total`; steps count from 0."""
    if not 0 <= step < total:
        raise ValueError(f"step {step} is outside of a stage of {total} steps")
    starts = [0, *boundaries([part.share for part in parts], total)]
    index = max(i for i, start in enumerate(starts) if start <= step)
    return index, step - starts[index]


def reducer_at(parts: Sequence[Part], step: int, total: int) -> str:
    """The reducer string of optimiser step `step` (from 0) of `total`, "none" for no reducer. A stage without parts has none."""
    if not parts:
        return NONE
    index, since = part_at(parts, step, total)
    cycle = parts[index].cycle
    return cycle[since % len(cycle)]


def steps_by_reducer(parts: Sequence[Part], total: int) -> list[range]:
    """The optimiser steps of `total` that each reducer has, part by part and in the order of their cycles. Without parts there is one."""
    parts = parts or [Part(Fraction(1))]
    edges = [0, *boundaries([part.share for part in parts], total), total]
    found = []
    for part, begin, end in zip(parts, edges, edges[1:], strict=False):
        found += [range(begin + turn, end, len(part.cycle)) for turn in range(len(part.cycle))]
    return found


def spread(numbers: Sequence[Any], most: int = COUNTED) -> Sequence[Any]:
    """At most so many of them, evenly spread and as far from the one end as from the other."""
    count = len(numbers)
    return numbers if count <= most else [numbers[round((2 * i + 1) * (count - 1) / (2 * most))] for i in range(most)]


def stage_steps(samples: int, batch_size: int, *, epochs: float | None, steps: int | None) -> int:
    """Optimiser steps of a stage. Every batch is full: the last one of `epochs` is filled up from the epoch after it (558,128 samples in
    batches of 256: 2181 steps)."""
    if steps is not None:
        return steps
    exact = Fraction(str(epochs if epochs is not None else 1)) * samples / batch_size
    return max(1, -floor(-exact))
