"""Where scores come from. A signal is a small frozen description; `View.signal` computes it once, and only if asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.tokens import Layout


@dataclass(frozen=True)
class Signal:
    """Base of all signals. `compute(view)` gives a (B, N) float32 score a slot; what it says about text slots has no meaning."""

    def compute(self, view: View) -> Tensor:
        raise FoveateError(f"{type(self).__name__} is not provided here: hand it in by View.of(..., signals={{...}})")


@dataclass(frozen=True)
class Noise(Signal):
    """Uniform scores from a hash of (seed, image content, place in the image): the same in every batch row, beam and resumed run."""

    seed: int = 0

    def compute(self, view: View) -> Tensor:
        if view.image_keys is None:
            raise FoveateError("random scores need the images' content keys: call the model with pixel_values, or View.of(image_keys=…)")
        image = view.layout.image.clamp(min=0)
        key = view.image_keys[image] ^ _mix(torch.full_like(image, self.seed) * 0x9E3779B1 + view.layout.rank_in_image)
        return (_mix(key) >> 8).to(torch.float32) / float(1 << 24)


@dataclass(frozen=True)
class View:
    """What a reducer may look at: the arriving slots, their states, the images' content keys and the signals it asked for."""

    layout: Layout
    tokens: Tensor | None = None
    image_keys: Tensor | None = None
    signals: dict[Signal, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        *,
        layout: Layout | None = None,
        text: int = 0,
        image_keys: Tensor | None = None,
        signals: dict[Signal, Tensor] | None = None,
    ) -> View:
        """A view of plain tensors. tokens: (B, N, D), one image a row followed by `text` text slots, unless a layout says otherwise."""
        if layout is None:
            B, N = tokens.shape[:2]
            visual = torch.arange(N, device=tokens.device).expand(B, N) < N - text
            layout = Layout.sequence(visual)
        return cls(layout, tokens, image_keys, dict(signals or {}))

    def signal(self, signal: Signal) -> Tensor:
        """(B, N) float32 scores of the arriving slots."""
        if signal not in self.signals:
            self.signals[signal] = signal.compute(self).to(torch.float32)
        return self.signals[signal]


def content_keys(images: Tensor | list[Tensor]) -> Tensor:
    """(I,) int64 hash of each image's content; images: (I, ...) pixels or a list of feature tensors. Never leaves the device."""
    keys = []
    for image in images:
        words = image.detach().to(torch.float32).flatten().view(torch.int32).to(torch.int64)
        places = torch.arange(words.numel(), dtype=torch.int64, device=words.device)
        keys.append(_mix(_mix(words ^ _mix(places)).sum()))
    return torch.stack(keys) if keys else torch.zeros(0, dtype=torch.int64)


def _mix(x: Any) -> Tensor:
    """A 32-bit finaliser (xor-shift, multiply) on int64 tensors: integers only, so the same on every device."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)
