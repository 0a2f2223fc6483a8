"""MDist: what is said at answers and at visual tokens, brought near what a pass with all tokens says there (arXiv 2410.16236).

    L = text * L_res + visual * L_vis
    L_res  KL(teacher ‖ student) at the rows that predict answers, mean over the step's supervised tokens
    L_vis  KL(teacher ‖ student) at visual tokens, mean over each sample's, then over the step's samples

In LLaVA-KD the teacher is a larger model with the same visual tokens; here it is the same model with all tokens, and a student's token is
compared with the mean of the teacher's logits over the patches that it stands for (of states, for a head that is linear). What was dropped
has no match. Unverified, since the paper was not read itself: whether the sums over positions are means (they are here), and the
temperature (1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.errors import FoveateError
from foveate.losses.base import ALL, Loss, Seen, Step, Whole
from foveate.losses.rows import by_sample, divergence, matched, of_answers


@dataclass(frozen=True)
class MDist(Loss):
    """Distils a pass with all tokens into one with fewer. text, visual: weights of the two terms, 1 in the paper."""

    name: ClassVar[str] = "mdist"
    paper: ClassVar[str] = "2410.16236"
    text: float = 1.0
    visual: float = 1.0

    def __post_init__(self) -> None:
        if min(self.text, self.visual) < 0 or self.text == self.visual == 0:
            raise FoveateError(f"mdist: text={self.text:g} and visual={self.visual:g} are weights: 0 or more, and one of them above 0")

    def teacher(self, step: Step, student: str) -> str | None:
        return None if student == ALL else ALL

    def between(self, student: Seen, teacher: Seen, whole: Whole) -> Tensor:
        loss = self.text * of_answers(student, teacher, whole)
        if self.visual and student.left is not None:
            found = matched(student.left, teacher.left)
            values = divergence(found.teacher(teacher.logits), found.student(student.logits))
            loss = loss + self.visual * by_sample(values, found, len(whole.labels)).sum() / whole.samples
        return loss
