"""What every loss is: a frozen dataclass that says which passes a step makes, and what a trained pass and its teacher differ by.

All passes of a step are of one model with one set of weights, under other reducers. A *student* is trained; a *teacher* runs in evaluation
mode without gradient. Both give outputs at the length that the caller gave (`TokenMap.expand`), so text is found at the same place in
either; which visual rows stand for the same is told by `foveate.losses.rows.matched`.
"""

from __future__ import annotations

import hashlib
from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.errors import FoveateError
from foveate.reducers import parse, spell
from foveate.reducers.spelling import Spelled
from foveate.tokens import TokenMap

ALL = "none"  # the spelling of no reducer: all tokens


@dataclass(frozen=True)
class Step:
    """An optimiser step: `number` (from 0) of `total`, and the reducers that the stage's schedule names for it. What is drawn for a step is
    a function of it: the same in every process, in every micro-batch, and in a run that was resumed."""

    seed: int
    number: int
    total: int
    reducers: str = ALL

    @property
    def progress(self) -> float:
        """The share of the stage that lies before this step, in [0, 1)."""
        return self.number / self.total

    def draw(self, name: str) -> float:
        """A number in [0, 1) for `name` in this step."""
        digest = hashlib.sha256(repr((self.seed, name, self.number)).encode()).digest()
        return int.from_bytes(digest[:4], "little") / 2**32


@dataclass(frozen=True)
class Seen:
    """What a pass gave.

    logits  (B, N, V) at the caller's length
    left    from the slots that entered the language model to those that its last layer gave; None: all of them are there
    """

    logits: Tensor
    left: TokenMap | None = None


@dataclass(frozen=True)
class Whole:
    """The labels of a micro-batch, (B, N) with -100 where nothing is supervised, and what the whole optimiser step has: supervised tokens
    and samples, over all its micro-batches (a process' share of them). Terms are divided by these: how a batch is cut changes nothing."""

    labels: Tensor
    tokens: Tensor | float
    samples: float


class Loss(Spelled, ABC):
    """One method. Subclasses are frozen dataclasses whose fields are the method's options.

    name, paper  its spelling, and its arXiv number
    chooses      whether it says by itself which passes are trained; else they are those of the stage's schedule
    compares     whether it adds a term of its own (`between`)
    any_budget   whether the model is meant to serve at any budget afterwards, all tokens among them
    """

    paper: ClassVar[str]
    chooses: ClassVar[bool] = False
    compares: ClassVar[bool] = True
    any_budget: ClassVar[bool] = False

    def students(self, step: Step) -> tuple[str, ...]:
        """The reducers of the passes that are trained, each with the cross entropy of the answers."""
        return (step.reducers,)

    def teacher(self, step: Step, student: str) -> str | None:
        """The reducers of the pass that a student is compared with; None: with none in this step."""
        return None

    @property
    def answers(self) -> float:
        """The weight of the students' cross entropy."""
        return 1.0

    def between(self, student: Seen, teacher: Seen, whole: Whole) -> Tensor:
        """(), a micro-batch's part of the term; gradients flow to the student alone."""
        raise NotImplementedError

    def check(self, reducers: str) -> None:
        """Raises FoveateError where the loss cannot be used in a part of the schedule with these reducers."""


def kept(name: str, reducers: str, share: float) -> str:
    """The stage's reducer, left with `share` of an image's visual tokens. FoveateError where it is not one that can be set so."""
    if share >= 1:
        return ALL
    found = parse(reducers)
    if len(found) != 1:
        raise FoveateError(
            f"{name} sets how many tokens the stage's reducer keeps, and needs one that has an option keep in every part of its schedule, "
            f"not {reducers!r}: write for example reducers: [{{share: 1, reducer: 'dart:keep=0.5'}}]"
        )
    try:
        return spell([found[0].at(share)])
    except FoveateError as error:
        raise FoveateError(f"{name} sets how many tokens the stage's reducer keeps: {error}") from None
