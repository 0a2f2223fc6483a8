"""DualSpeed: most steps fast, on few tokens; now and then a slow one on all of them, held to what the fast pass says (arXiv 2602.03815).

    fast  the stage's reducer, cross entropy alone
    slow  with probability `slow`: all tokens, cross entropy + KL(pass with the stage's reducer, no gradient ‖ pass with all tokens),
          mean over the step's supervised tokens

The paper fine-tunes so, with DivPrune leaving a tenth of the tokens, and serves all tokens; in its pre-training every pass is fast. In
front of the image tokens of a fast pass it has four learned vectors, which are dropped afterwards: weights of their own, left out here. It
draws in each process; here each step has one draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.errors import FoveateError
from foveate.losses.base import ALL, Loss, Seen, Step, Whole
from foveate.losses.rows import of_answers


@dataclass(frozen=True)
class DualSpeed(Loss):
    """Trains on few tokens for a model that serves all of them. slow: the probability of a step on all tokens."""

    name: ClassVar[str] = "dualspeed"
    paper: ClassVar[str] = "2602.03815"
    chooses: ClassVar[bool] = True
    any_budget: ClassVar[bool] = True
    slow: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.slow <= 1:
            raise FoveateError(f"dualspeed: slow={self.slow:g} is a probability, from 0 to 1")

    def students(self, step: Step) -> tuple[str, ...]:
        return (ALL if step.draw(self.name) < self.slow else step.reducers,)

    def teacher(self, step: Step, student: str) -> str | None:
        return step.reducers if student == ALL else None

    def between(self, student: Seen, teacher: Seen, whole: Whole) -> Tensor:
        return of_answers(student, teacher, whole)

    def check(self, reducers: str) -> None:
        if reducers == ALL:
            raise FoveateError(
                "dualspeed has fast steps under the stage's reducer, but a part of its schedule has none: write for example "
                "reducers: [{share: 1, reducer: 'divprune:keep=0.1'}]"
            )
