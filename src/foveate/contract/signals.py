"""Where scores come from. A signal is a small frozen description of what a reducer wants to know; whoever makes the View provides it.

`ClsAttention`, `ReceivedAttention`, `TowerKeys` are read in the vision tower and follow each token through the bridge to its slot;
`Attention` and `Keys` are read in a decoder layer, `States` in front of one; `Noise` needs the images alone. Everything is float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from foveate.errors import FoveateError

if TYPE_CHECKING:  # a view holds signals, and they are computed from it
    from foveate.contract.view import View

_CHUNK = 256  # words of an image that are hashed as one


@dataclass(frozen=True)
class Signal:
    """Base of all signals. What one says about slots that it does not apply to (text, for the tower's) has no meaning.

    words: what a model must have for it, as `foveate list` says it; "" where every model has it
    """

    words: ClassVar[str] = ""

    def compute(self, view: View) -> Any:
        raise FoveateError(f"{self} is not provided here: attach to a model that has it, or hand it in by View.of(..., signals={{...}})")


@dataclass(frozen=True)
class Noise(Signal):
    """(B, N) uniform scores from a hash of (seed, image content, place in the image): the same in every batch row, beam and resumed run."""

    seed: int = 0

    def compute(self, view: View) -> Tensor:
        if view.image_keys is None:
            raise FoveateError("random scores need the images' content keys: call the model with pixel_values, or View.of(image_keys=…)")
        image = view.layout.image.clamp(min=0)
        key = view.image_keys[image] ^ _mix(torch.full_like(image, self.seed) * 0x9E3779B1 + view.layout.rank_in_image)
        return (_mix(key) >> 8).to(torch.float32) / float(1 << 24)


@dataclass(frozen=True)
class ClsAttention(Signal):
    """(B, N) attention that the tower's [CLS] pays to each token in block `layer` (negative: index into the hidden states, so that -2 is
    the block whose output LLaVA takes), mean over heads, softmax over [CLS] and patches. A token made of several patches has their mean.
    In a tower without [CLS]: what `ReceivedAttention` gives. `joint`: of all heads taken as one (`AttentionRows.as_one_head`)."""

    words: ClassVar[str] = "the tower's [CLS] attention (without [CLS]: attention received)"
    layer: int = -2
    joint: bool = False


@dataclass(frozen=True)
class ReceivedAttention(Signal):
    """(B, N) attention that each token receives in the tower's block `layer`, mean over heads and over all queries of its crop."""

    words: ClassVar[str] = "the tower's attention"
    layer: int = -2


@dataclass(frozen=True)
class TowerKeys(Signal):
    """(B, N, h) keys of the tower's block `layer`, mean over heads; of a token made of several patches, their mean."""

    words: ClassVar[str] = "the tower's keys"
    layer: int = -2


@dataclass(frozen=True)
class Pixels(Signal):
    """(B, N, v) the pixels of each token's patches, one after the other, as the processor has made them. In front of the vision tower's
    blocks only."""

    words: ClassVar[str] = "the pixels"


@dataclass(frozen=True)
class Attention(Signal):
    """The `AttentionRows` of decoder layer index `layer`: any of its rows, none of them computed before it is asked for."""

    words: ClassVar[str] = "attention of a decoder layer"
    layer: int


@dataclass(frozen=True)
class Keys(Signal):
    """(B, N, G * h) keys of decoder layer index `layer` after the rotary embedding, its key heads side by side."""

    words: ClassVar[str] = "keys of a decoder layer"
    layer: int


@dataclass(frozen=True)
class States(Signal):
    """(B, N, D) the states that entered decoder layer index `layer`, of the tokens that are here after it."""

    words: ClassVar[str] = "states of two decoder layers"
    layer: int


@dataclass(frozen=True)
class Groups(Signal):
    """(B, N, 2) what the tower has made of each token's patch: the number of the patch that its group keeps (-1: dropped), and its own."""


GROUPS = Groups()


def content_keys(images: Tensor | list[Tensor]) -> Tensor:
    """(I,) int64 hash of each image's content; images: (I, ...) pixels or a list of feature tensors. Never leaves the device."""
    keys = []
    for image in images:
        words = image.detach().to(torch.float32).flatten().view(torch.int32)
        if words.numel() > 4 * _CHUNK:  # sums over chunks first, each word by an odd factor of its own: integers, which wrap around
            words = torch.nn.functional.pad(words, (0, -words.numel() % _CHUNK)).view(-1, _CHUNK).to(torch.int64)
            factors = _mix(torch.arange(1, _CHUNK + 1, device=words.device)) | 1
            words = (words * factors).sum(1)
            words = words ^ (words >> 32)
        words = words.to(torch.int64)
        places = torch.arange(words.numel(), dtype=torch.int64, device=words.device)
        keys.append(_mix(_mix(words ^ _mix(places)).sum()))
    return torch.stack(keys) if keys else torch.zeros(0, dtype=torch.int64)


def hashed(seed: int, *parts: Tensor) -> Tensor:
    """Uniform scores in [0, 1) from a seed and tensors of small integers, which are broadcast."""
    found = _mix(torch.full_like(parts[0], seed))
    for part in parts:
        found = _mix(found ^ part)
    return (found >> 8).to(torch.float32) / float(1 << 24)


def _mix(x: Any) -> Tensor:
    """A 32-bit finaliser (xor-shift, multiply) on int64 tensors: integers only, so the same on every device."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)
