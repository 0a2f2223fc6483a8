"""RDist: how a sample's visual tokens relate to each other, brought near how they do in a pass with all tokens (arXiv 2410.16236).

    R = Y Yᵀ, of the outputs Y (tokens, width) at a sample's visual tokens
    L = 1 - cos(vec R_student, vec R_teacher), mean over the step's samples; those without visual tokens count as 0

The paper adds it with weight 0.5. In LLaVA-KD the teacher is a larger model with the same visual tokens; here it is the same model with all
tokens, and its Y are means over the patches that a student's token stands for. What was dropped has no match. Unverified, since the paper
was not read itself: which outputs Y are. Here they are the logits, which every pass gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from foveate.losses.base import ALL, Loss, Seen, Step, Whole
from foveate.losses.rows import matched


@dataclass(frozen=True)
class RDist(Loss):
    """Distils relations between visual tokens of a pass with all tokens into one with fewer."""

    name: ClassVar[str] = "rdist"
    paper: ClassVar[str] = "2410.16236"

    def teacher(self, step: Step, student: str) -> str | None:
        return None if student == ALL else ALL

    def between(self, student: Seen, teacher: Seen, whole: Whole) -> Tensor:
        total = 0.0 * student.logits.sum()
        if student.left is None:
            return total
        found = matched(student.left, teacher.left)
        mine, theirs = found.student(student.logits).float(), found.teacher(teacher.logits).detach()
        for sample in found.sample.unique().tolist():
            own = found.sample == sample
            total = total + relation(mine[own], theirs[own])
        return total / whole.samples


def relation(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """() 1 - cosine between the two Gram matrices; widths may differ. Nothing changes if either side is rotated or scaled."""
    own, wanted = (torch.mm(y, y.T).flatten() for y in (student_ND, teacher_ND))
    return 1 - cosine_similarity(own, wanted, dim=0)
