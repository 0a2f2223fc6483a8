"""EPIC: token consistency distillation between budgets that drift apart (arXiv 2510.00515).

With p, the share of the stage that is over:

    the student removes s of the visual tokens, s even in [0.1 + 0.16 p, 0.1 + 0.64 p]
    the teacher removes max(s - gap, 0), gap = min(0.1 + 0.5 p, 0.3), with the same weights and no gradient
    L = alpha * T² * KL(teacher ‖ student) + (1 - alpha) * cross entropy, over the tokens of the answers; T = 2

Both are pruned by the stage's reducer: the paper's at layer 2 by DART or FastV (alpha 0.5) or at random (alpha 0.4). Of the paper's two
variants only this one's code is released, and it is followed here but for two things: it leaves out the row that predicts an answer's
first token, and takes the one behind its last instead (a mask that is not shifted); and it draws in each process, here each step has one
draw. The layer variant was not to be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.errors import FoveateError
from foveate.losses.base import Loss, Seen, Step, Whole, kept
from foveate.losses.rows import of_answers


@dataclass(frozen=True)
class EPIC(Loss):
    """Distils a pass with a few more tokens into one with fewer. alpha: the weight of the term; temperature: T."""

    name: ClassVar[str] = "epic"
    paper: ClassVar[str] = "2510.00515"
    chooses: ClassVar[bool] = True
    alpha: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1 or not self.temperature > 0:
            raise FoveateError(f"epic: alpha={self.alpha:g} must be above 0 and at most 1, temperature={self.temperature:g} above 0")

    def removed(self, step: Step) -> tuple[float, float]:
        """The shares of an image's tokens that student and teacher remove in a step."""
        p = step.progress
        low, high = 0.1 + 0.8 * 0.2 * p, 0.1 + 0.8 * 0.8 * p
        student = low + (high - low) * step.draw(self.name)
        return student, max(student - min(0.1 + 0.5 * p, 0.3), 0.0)

    def students(self, step: Step) -> tuple[str, ...]:
        return (kept(self.name, step.reducers, 1 - self.removed(step)[0]),)

    def teacher(self, step: Step, student: str) -> str | None:
        return kept(self.name, step.reducers, 1 - self.removed(step)[1])

    @property
    def answers(self) -> float:
        return 1 - self.alpha

    def between(self, student: Seen, teacher: Seen, whole: Whole) -> Tensor:
        return self.alpha * self.temperature**2 * of_answers(student, teacher, whole, self.temperature)

    def check(self, reducers: str) -> None:
        for share in (0.26, 0.999):  # the fewest and the most that any step keeps, but for all
            kept(self.name, reducers, share)
