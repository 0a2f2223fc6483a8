"""Frequencies of the rotary embedding that are multiplied, each by the axis that it turns by; and the rotary module, called once more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.anatomy import Anatomy
from foveate.contract import Frequencies
from foveate.errors import FoveateError, NotApplicable, Reason

Call = tuple[tuple[Any, ...], dict[str, Any]]
AXES = 3  # time, height, width


@dataclass(frozen=True)
class Stretch:
    """What some slots turn by in the place of the model's frequencies.

    factors     (F,) float64, what these are multiplied with
    where       (B, N) or (B, 1) bool: slots of samples with images; all others turn as ever
    everywhere  whether that is known to be every slot
    """

    factors: Tensor
    where: Tensor
    everywhere: bool

    def select(self, index: Tensor) -> Stretch:
        """Rows of the batch are chosen, reordered or repeated."""
        return replace(self, where=self.where[index.to(self.where.device)])

    def goes_on(self) -> Stretch:
        """What comes after the last slot."""
        return replace(self, where=self.where[:, -1:])

    def turned(self, anatomy: Anatomy, turn: Callable[[Callable[..., Any]], Any], at_BM: Tensor) -> Any:
        """The cosines and sines (B, M, h) of the slots `at_BM`; `turn` gives them by a rotary module."""
        frequencies, own = anatomy.frequencies, anatomy.rotary
        assert frequencies is not None
        assert own is not None
        stretched = turn(anatomy.rotary_at((frequencies.double() * self.factors).float()))
        if self.everywhere:
            return stretched
        here = self.where if self.where.shape[1] == 1 else self.where.gather(1, at_BM.clamp(min=0))
        return tuple(torch.where(here.to(a.device)[..., None], a, b) for a, b in zip(stretched, turn(own), strict=True))


def placed(call: Call) -> Tensor:
    """The positions that the rotary module was called with."""
    args, kwargs = call
    found: Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    return found


def called(rotary: Callable[..., Any], call: Call, positions: Tensor) -> Any:
    """What a rotary module makes of other positions than it was called with."""
    args, kwargs = call
    if "position_ids" in kwargs:
        return rotary(*args, **{**kwargs, "position_ids": positions})
    return rotary(args[0], positions, *args[2:], **kwargs)


def stretched(
    name: str, rule: Frequencies, anatomy: Anatomy, call: Call | None, shown: Tensor, before: Stretch | None, past: int
) -> Stretch:
    """What a method's rule makes of a chunk in whose samples `shown` (B, N) bool there are images. call: one of the rotary module.
    before: what slots of earlier chunks, `past` of them, turn by.

    NotApplicable where tokens have no time, row and column to turn by, FoveateError where a sequence has begun with other frequencies."""
    axes = None if call is None else _axes(anatomy, call)
    if axes is None:
        raise NotApplicable(
            Reason.ONE_AXIS,
            f"{name} stretches the rotary embedding by time, height and width, and this model's does not turn by these three, or changes "
            "its frequencies by itself: choose a model of the kind of Qwen2-VL, or leave out the option that stretches",
        )
    assert anatomy.frequencies is not None
    factors = rule(axes).double().to(anatomy.frequencies.device)
    if before is None and not past:
        return Stretch(factors, shown, bool(shown.all()))
    if before is None or not torch.equal(before.factors, factors) or bool((shown & ~before.where).any()):
        raise FoveateError(
            f"{name} stretches the rotary embedding of a whole sequence, and this one has begun with other frequencies ({past} tokens of "
            "it are cached): begin anew without the cache, or show the first image in the first turn"
        )
    return before


def with_images(image_BN: Tensor, samples_BN: Tensor | None) -> Tensor:
    """(B, N) bool: slots of samples that have an image. image: -1 where a slot is of none; samples: as in `Chunk`."""
    there = image_BN >= 0
    if samples_BN is None:
        return there.any(1, keepdim=True).expand_as(there)
    count = samples_BN.new_zeros((len(samples_BN), int(samples_BN.max()) + 1))
    return count.scatter_add(1, samples_BN, there.to(count.dtype)).gather(1, samples_BN) > 0


def _axes(anatomy: Anatomy, call: Call) -> Tensor | None:
    """(F,) int64, which of a token's three positions each frequency turns by, whatever way the module lays them out: found by giving each
    a frequency of its own and turning one step along one axis at a time. None where that does not tell."""
    frequencies, positions = anatomy.frequencies, placed(call)
    if frequencies is None or positions.ndim != 3 or len(positions) != AXES:
        return None
    args, kwargs = call
    exact = tuple(
        part.new_zeros(1, dtype=torch.float32) if isinstance(part, Tensor) and part.is_floating_point() else part for part in args
    )
    F = len(frequencies)
    marks = torch.arange(1, F + 1, dtype=torch.float32, device=frequencies.device) / (F + 1)  # below one radian
    rotary = anatomy.rotary_at(marks)
    found = torch.full((F + 1,), -1)
    for axis in range(AXES):
        step = torch.zeros_like(positions[:, :1, :1])
        step[axis] = 1
        turned = called(rotary, (exact, kwargs), step)
        if not isinstance(turned, tuple) or len(turned) != 2 or turned[0].ndim != 3:
            return None
        angle = torch.atan2(turned[1].float(), turned[0].float()).flatten().cpu()
        found[(angle * (F + 1)).round().clamp(0, F).long()] = axis
    return None if bool((found[1:] < 0).any()) else found[1:]
