"""Rows of two passes that stand for the same, and the divergence between what the two say there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from foveate.errors import FoveateError
from foveate.losses.base import Seen, Whole
from foveate.tokens import TokenMap

IGNORED = -100  # the label of what is not supervised


@dataclass(frozen=True)
class Matches:
    """The student's visual tokens that have a counterpart in the teacher: R of them, with up to E of the teacher's rows each.

    sample  (R,) int64 in the batch, ascending
    row     (R,) int64 of the student's outputs (B, N, …)
    member  (R, E) int64 of the teacher's outputs, -1 where there are fewer
    """

    sample: Tensor
    row: Tensor
    member: Tensor

    def student(self, x_BND: Tensor) -> Tensor:
        """(R, D) the student's own rows."""
        return x_BND[self.sample, self.row]

    def teacher(self, x_BND: Tensor) -> Tensor:
        """(R, D) float32 means of the teacher's rows over the group that a student's token stands for."""
        total = torch.zeros((len(self.sample), x_BND.shape[2]), dtype=torch.float32, device=x_BND.device)
        for member in self.member.unbind(1):  # one by one: all members' rows at once are a group's size times as large
            there = member >= 0
            total[there] += x_BND[self.sample[there], member[there]].float()
        return total / (self.member >= 0).sum(1, keepdim=True)


def matched(student: TokenMap, teacher: TokenMap | None) -> Matches:
    """What the visual tokens of a student's last layer have in the teacher (None: a teacher with all tokens).

    A token stands for the slots that went into it. Of those, the ones count that live in a token of the teacher; where there are none, the
    token has no match. FoveateError where the two passes were not of the same sequence."""
    source = student.source
    if teacher is not None and teacher.source.shape != source.shape:
        raise FoveateError(
            f"a student of sequences {tuple(source.shape)} cannot be matched with a teacher of {tuple(teacher.source.shape)}"
        )
    representative = student.representative
    at = representative.clamp(min=0)
    targets = torch.arange(representative.shape[1], device=at.device)
    # Outputs are read at the representative, which is given its own token's unless it went into an earlier one as well.
    readable = (representative >= 0) & source.visual.gather(1, at) & (student.owner.gather(1, at) == targets)
    sample, target = readable.nonzero(as_tuple=True)
    member = student.member[sample, target]
    if student.weight is not None:
        member = torch.where(student.weight[sample, target] != 0, member, -1)
    if teacher is not None:
        alive = torch.zeros((source.shape[0], source.shape[1] + 1), dtype=torch.bool, device=at.device)
        into = teacher.member if teacher.weight is None else torch.where(teacher.weight != 0, teacher.member, -1)
        alive.scatter_(1, torch.where(into >= 0, into, source.shape[1]).flatten(1), True)
        alive[:, -1] = False
        member = torch.where(alive[sample[:, None], member.clamp(min=0)] & (member >= 0), member, -1)
    some = (member >= 0).any(1)
    return Matches(sample[some], representative[sample, target][some], member[some])


def divergence(teacher_RV: Tensor, student_RV: Tensor, temperature: float = 1.0) -> Tensor:
    """(R,) float32: KL(teacher ‖ student) of the distributions over the vocabulary, row by row."""
    wanted = log_softmax(teacher_RV.detach().float() / temperature, -1)
    return kl_div(log_softmax(student_RV.float() / temperature, -1), wanted, log_target=True, reduction="none").sum(-1)


def of_answers(student: Seen, teacher: Seen, whole: Whole, temperature: float = 1.0) -> Tensor:
    """() the mean, over the step's supervised tokens, of the divergence at the rows that predict them."""
    rows = whole.labels[:, 1:] != IGNORED
    return divergence(teacher.logits[:, :-1][rows], student.logits[:, :-1][rows], temperature).sum() / whole.tokens


def by_sample(values_R: Tensor, matches: Matches, samples: int) -> Tensor:
    """(B,) means over each sample's matched rows, 0 where it has none."""
    count = torch.zeros(samples, device=values_R.device).index_add(0, matches.sample, torch.ones_like(values_R))
    return torch.zeros(samples, device=values_R.device).index_add(0, matches.sample, values_R) / count.clamp(min=1)
