"""Training runs beside the first of them: what they cost, what they answer, and which differences mean something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foveate.errors import FoveateError
from foveate.evaluation.evaluate import Result
from foveate.evaluation.paired import bootstrap_families
from foveate.inspect.words import duration, si
from foveate.report.compared import signed
from foveate.report.pace import Clock, clock, paces
from foveate.report.runs import Arm, StageLog, split_stages

Cell = tuple[str, str]
PER_LAYER = "visual tokens per image, per layer"


def check_arms(arms: Sequence[Arm], blind: Result | None = None) -> None:
    """FoveateError unless there are arms and all were asked the same questions."""
    if not arms:
        raise FoveateError("a report needs at least one arm")
    asked = [(row.id, row.image, row.question) for row in arms[0].result.rows]
    others = [(arm.name, arm.result) for arm in arms[1:]] + ([("the grey-image evaluation", blind)] if blind else [])
    for name, result in others:
        if [(row.id, row.image, row.question) for row in result.rows] != asked:
            raise FoveateError(f"{name} and {arms[0].name} were not asked the same questions; evaluate them on one data folder")


def clock_of(arms: Sequence[Arm], logs: Sequence[list[StageLog]]) -> Clock:
    """Whether the seconds of the runs can be compared."""
    return clock([(arm.name, paces(log)) for arm, log in zip(arms, logs, strict=True)])


def learned_families(arms: Sequence[Arm]) -> list[str]:
    """Families in which at least one arm is above the majority answer with its whole 95 % interval; the others compare nothing."""
    return [
        family
        for family in arms[0].result.families
        if any(arm.result.families[family].low > arm.result.families[family].majority_accuracy for arm in arms)
    ]


# ---- differences ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """An arm less the first one on the same questions, in points, with its 95 % interval, whole pictures drawn anew. `family`: "" for the
    mean over the families that count, each counting the same."""

    family: str
    points: float
    low: float
    high: float

    @property
    def means_something(self) -> bool:
        """The interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def signed(self) -> str:
        return signed(self.points)

    @property
    def interval(self) -> str:
        return f"{signed(self.low)} to {signed(self.high)}"


def differences(first: Result, other: Result, counted: Sequence[str]) -> list[Difference]:
    """Of every family, then of the mean over `counted`, unless there is none."""
    apart = np.array([float(two.correct) - float(one.correct) for one, two in zip(first.rows, other.rows, strict=True)])
    images, families = [row.image for row in first.rows], [row.family for row in first.rows]
    found = []
    for name, own in [*((family, [family]) for family in first.families), *([("", list(counted))] if counted else [])]:
        mean, low, high, _ = bootstrap_families(apart, images, families, own)
        found.append(Difference(name, 100 * mean, 100 * low, 100 * high))
    return found


def findings(arms: Sequence[Arm], logs: Sequence[list[StageLog]]) -> list[str]:
    """For each arm after the first two sentences, its cost as a share of the first arm's and which differences mean something; then whether
    seconds could be compared, and what one seed cannot say."""
    counted, quiet = learned_families(arms), clock_of(arms, logs)
    sentences = []
    for arm, log in list(zip(arms, logs, strict=True))[1:]:
        pre, fine = (
            f"{own[1] / base[1]:.2f} of the FLOPs" + (f" and {own[0] / base[0]:.2f} of the wall clock" if quiet.quiet else "")
            for own, base in zip(_halves(log), _halves(logs[0]), strict=True)
        )
        sentences.append(f"{arm.name}: pre-training took {pre} of {arms[0].name}, fine-tuning {fine}.")
        sentences.append(_meaning(arm, arms[0], counted))
    if len(arms) > 1:
        sentences.append(quiet.told)
        sentences.append(
            "One seed: the intervals say how far these questions carry, not what another seed would have given. Equal recipes differ by a "
            "few points from seed to seed, so that a difference of that size can be chance even where its interval leaves out 0."
        )
    return sentences


def _meaning(arm: Arm, first: Arm, counted: Sequence[str]) -> str:
    """Which differences of an arm to the first one their intervals tell from 0."""
    if not counted:
        return f"{arm.name} and {first.name}: no run has learned a family well enough to compare accuracies."
    *by_family, mean = differences(first.result, arm.result, counted)
    own = [one for one in by_family if one.family in counted]
    every = "all families" if len(counted) == len(first.result.families) else ", ".join(counted)
    text = f"{arm.name} less {first.name}: {signed(mean.points)} points of mean accuracy ({every}), 95 % interval {mean.interval}: "
    text += f"{'better' if mean.points > 0 else 'worse'}." if mean.means_something else "no difference that these questions can show."
    told = [f"{one.family} ({signed(one.points)}, {one.interval})" for one in own if one.means_something]
    if not told:
        return f"{text} In no family by itself does the interval leave out 0."
    rest = len(own) - len(told)
    return f"{text} By family the interval leaves out 0 in {', '.join(told)}" + (f"; not in the other {rest}." if rest else ".")


# ---- tables --------------------------------------------------------------------------------------------------------------------------


def _halves(log: list[StageLog]) -> tuple[tuple[float, float], tuple[float, float]]:
    """(seconds, FLOPs) of pre-training and of fine-tuning."""
    before, last = split_stages(log)
    return (sum(stage.seconds for stage in before), sum(stage.flops for stage in before)), (last.seconds, last.flops)


def cost_table(logs: Sequence[list[StageLog]], quiet: bool) -> list[tuple[str, list[tuple[str, list[Cell]]]]]:
    """Groups of (label, one (value, ratio to the first arm) for each arm); `quiet`: whether seconds have a ratio."""

    def line(stages: list[list[StageLog]], of: Callable[[StageLog], float], spell: Callable[[float], str], ratio: bool) -> list[Cell]:
        values = [sum(of(stage) for stage in arm) for arm in stages]
        return [(spell(value), f"ratio {value / values[0]:.2f}" if ratio and i else "") for i, value in enumerate(values)]

    def weighted(stages: list[list[StageLog]], of: Callable[[StageLog], float]) -> list[Cell]:
        means = [sum(of(stage) * stage.images for stage in arm) / sum(stage.images for stage in arm) for arm in stages]
        return [(f"{mean:.4g}", "") for mean in means]

    def group(stages: list[list[StageLog]]) -> list[tuple[str, list[Cell]]]:
        return [
            ("FLOPs", line(stages, lambda stage: stage.flops, si, True)),
            ("wall clock", line(stages, lambda stage: stage.seconds, duration, quiet)),
            ("visual tokens per image, from the bridge", weighted(stages, lambda stage: stage.tokens)),
            (PER_LAYER, weighted(stages, lambda stage: stage.layer_tokens)),
            ("images seen", line(stages, lambda stage: stage.images, lambda value: f"{value:,.0f}", False)),
        ]

    halves = [split_stages(log) for log in logs]
    return [
        ("Pre-training", group([before for before, _ in halves])),
        ("Fine-tuning", group([[last] for _, last in halves])),
        ("Both", group(list(logs))[:2]),
    ]


def accuracy_table(arms: Sequence[Arm], blind: Result | None, learned: Sequence[str]) -> list[dict[str, Any]]:
    """A line for each family, and one for the mean over those that were learned, or else all. `cells` hold (accuracy, interval) of the
    arms, `apart` the differences of all but the first."""
    counted = list(learned) or list(arms[0].result.families)
    apart = [differences(arms[0].result, arm.result, counted) for arm in arms[1:]]
    lines = []
    for number, (family, first) in enumerate(arms[0].result.families.items()):
        scores = [arm.result.families[family] for arm in arms]
        lines.append(
            {
                "family": family,
                "n": first.n,
                "learned": family in learned,
                "majority": percent(first.majority_accuracy),
                "blind": percent(blind.families[family].accuracy) if blind else "",
                "cells": [(percent(score.accuracy), f"{100 * score.low:.0f}–{100 * score.high:.0f}") for score in scores],
                "apart": [own[number] for own in apart],
            }
        )

    def mean(result: Result) -> str:
        return percent(_mean([result.families[family].accuracy for family in counted]))

    whole = {"family": "mean", "n": "", "learned": True, "blind": mean(blind) if blind else "", "apart": [own[-1] for own in apart]}
    whole["majority"] = percent(_mean([arms[0].result.families[family].majority_accuracy for family in counted]))
    whole["cells"] = [(mean(arm.result), "") for arm in arms]
    return [*lines, whole]


def presence_table(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    if "presence" not in arms[0].result.families:
        return []
    labels = {"precision": "precision", "recall": "recall", "f1": "F1", "yes_ratio": "answered yes"}
    return [(label, [percent(arm.result.families["presence"].details[key]) for arm in arms]) for key, label in labels.items()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"
