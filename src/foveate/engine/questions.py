"""Where the question about an image ends. What a method ranks by it must never depend on the answer.

The slot that asks is the last one in front of the first answer after the image, in the image's own sample:

- in `generate`: the last slot of the prompt, whatever a step runs again (no cache) or an assistant has proposed;
- with labels: the slot before the first supervised one after the image, so that an image after an earlier answer has a question of its own;
- else the last slot of the sample, which ends with the row or, of packed samples, where positions begin anew.

Labels that supervise the text on both sides of an image do not say where its question ends, nor does a training step without labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.contract import Question
from foveate.tokens import Layout, TokenMap

NO_LABELS = (
    "the model is in training mode and was given no labels (the Trainer takes them away for label_smoothing_factor and compute_loss_func); "
    "give it the labels, even where its own loss is not used, or choose a method that does not look at the question, such as divprune"
)
ALL_LABELS = (
    "the labels supervise the text before an image and what follows it directly; set the labels of the prompt to -100, or choose a method "
    "that does not look at the question, such as divprune"
)


@dataclass(frozen=True)
class Asked:
    """What is known of the questions of a chunk of a sequence, at its slots as they arrived.

    starts   (B, N) int64: the first slot of the slot's sample
    asking   (B, N) int64: of a visual slot, the one that asks about its image
    single   whether every row has one question, and all of the row is its prompt
    unknown  why the questions cannot be known, "" where they are
    """

    starts: Tensor
    asking: Tensor
    single: bool
    unknown: str = ""

    @classmethod
    def of(cls, layout: Layout, answers: Tensor | None, samples: Tensor | None, unknown: str = "", labelled: bool = False) -> Asked:
        """answers: (B, N) bool, slots that belong to an answer; labelled: whether labels say so. samples: (B, N) int64 or None."""
        B, N = layout.shape
        slot = torch.arange(N, device=layout.valid.device).expand(B, N)
        there = torch.where(layout.valid, slot, -1)
        if samples is None:
            starts, last = torch.zeros_like(slot), there.max(1, keepdim=True).values.expand(B, N)
        else:
            ends = samples.new_full((B, int(samples.max()) + 1), -1).scatter_reduce(1, samples, there, "amax")
            begins = samples.new_full(ends.shape, N).scatter_reduce(1, samples, slot, "amin")
            starts, last = begins.gather(1, samples), ends.gather(1, samples)
        if answers is None or not bool(answers.any()):
            return cls(starts, last, samples is None, unknown)
        image, images = layout.image.clamp(min=0), int(layout.image.max()) + 1
        of_image = torch.where(layout.image >= 0, slot, -1)
        end = slot.new_full((max(1, images),), -1).scatter_reduce(0, image.flatten(), of_image.flatten(), "amax")[image]
        # The first answer at or after each slot; N where none is left.
        following = torch.where(answers & layout.valid, slot, N).flip(1).cummin(1).values.flip(1)
        following = torch.nn.functional.pad(following, (0, 1), value=N)
        answer = following.gather(1, (end + 1).clamp(0, N))
        answer = torch.where(answer <= last, answer, N)
        before = torch.nn.functional.pad(there.cummax(1).values, (1, 0), value=-1).gather(1, answer)  # the last token in front of it
        asking = torch.where(answer < N, before, last)
        if labelled and not unknown:
            begin = torch.where(layout.image >= 0, slot, N)
            begin = slot.new_full((max(1, images),), N).scatter_reduce(0, image.flatten(), begin.flatten(), "amin")[image]
            ahead = answers.gather(1, (begin - 1).clamp(0, N - 1)) & (begin > starts)
            if bool((layout.visual & ahead & (answer < N) & (asking == end)).any()):
                unknown = ALL_LABELS
        return cls(starts, asking, False, unknown)

    def at(self, whole: TokenMap | None, layout: Layout) -> tuple[Question, ...]:
        """The questions in terms of the slots that `whole` has left of the chunk (None: all), whose layout is `layout`."""
        if self.single:
            return (Question.of(layout, layout.valid),)
        B, M = layout.shape
        slot = torch.arange(M, device=layout.valid.device).expand(B, M) if whole is None else whole.representative
        at = slot.clamp(min=0)
        asking, starts, visual = self.asking.gather(1, at), self.starts.gather(1, at), layout.visual
        found: list[Question] = []
        left = visual
        while not found or bool(left.any()):
            # Of each row the first question that is left, the others in turn.
            now = torch.where(left, asking, torch.iinfo(torch.int64).max).min(1, keepdim=True).values
            about = visual & (asking == now)
            start = torch.where(about, starts, torch.iinfo(torch.int64).max).min(1, keepdim=True).values
            none = ~about.any(1, keepdim=True)
            now, start = torch.where(none, self.asking.max(1, keepdim=True).values, now), torch.where(none, 0, start)
            found.append(Question.of(layout, layout.valid & (slot >= start) & (slot <= now), about))
            left = left & ~about
        return tuple(found)


def answers_of(kwargs: dict[str, Any], shape: tuple[int, int] | None) -> Tensor | None:
    """(B, N) bool: the supervised slots, from the labels of a call; None where it has none, or such as are no tokens (classification)."""
    labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
    if isinstance(labels, Tensor) and labels.shape == shape:
        return labels >= 0
    if isinstance(shifted, Tensor) and shifted.shape == shape:
        return torch.nn.functional.pad(shifted >= 0, (1, 0))[:, :-1]
    return None


def samples_of(kwargs: dict[str, Any], shape: tuple[int, int], cached: bool) -> Tensor | None:
    """(B, N) int64: which packed sample each slot belongs to, by the rule of the library's own masks; None where nothing is packed."""
    B, N = shape
    starts, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if isinstance(starts, Tensor) and B == 1:
        slots = torch.arange(N, device=starts.device)
        return torch.searchsorted(starts.to(torch.int64)[1:], slots, right=True)[None].clamp(max=max(0, len(starts) - 2))
    if not isinstance(positions, Tensor) or kwargs.get("attention_mask") is not None or cached or N == 1:
        return None
    if positions.ndim == 3:  # of m-RoPE the row of text positions, where there is one
        positions = positions[0] if positions.shape[0] == 4 else None
    if positions is None or positions.shape[-1] != N:
        return None
    anew = torch.nn.functional.pad(positions[:, 1:] <= positions[:, :-1], (1, 0))
    return anew.cumsum(1).expand(B, N) if bool(anew.any()) else None
