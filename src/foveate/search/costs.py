"""What a schedule costs, as a share of what keeping every token costs: by visual tokens, or by FLOPs of the language model's prefill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from foveate.accounting.predict import observed
from foveate.errors import FoveateError

Counts = tuple[int, ...]  # visual tokens of one image in each decoder layer, which do not rise
Cost = Callable[[Counts], Fraction]


@dataclass(frozen=True)
class Prompt:
    """A prompt as it is on average, rounded: `images` of `per_image` visual tokens each and `text` other tokens (None: not known), in a
    model of `layers` decoder layers."""

    layers: int
    per_image: int
    images: int
    text: int | None


def tokens_share(prompt: Prompt) -> Cost:
    """Mean visual tokens over the layers, over those of an image."""
    return lambda counts: Fraction(sum(counts), prompt.layers * prompt.per_image)


def flops_share(config: Any, prompt: Prompt) -> Cost:
    """FLOPs of the decoder layers in the prefill, text included (conventions: `foveate.accounting`), over those of the bare model.
    FoveateError where the model's cost cannot be predicted."""
    text = prompt.text
    if text is None:
        raise FoveateError(
            f"the cost of a {config.model_type!r} model cannot be predicted; give a budget of visual tokens in place of FLOPs"
        )

    def flops(counts: Counts) -> int:
        visual = [prompt.images * count for count in counts]
        return sum(observed(config, visual, [count + text for count in visual], images=0).layer_flops)

    everything = flops((prompt.per_image,) * prompt.layers)
    return lambda counts: Fraction(flops(counts), everything)


def most_even(cost: Cost, limit: Fraction, per_image: int, layers: int, free: int = 0) -> int:
    """The most tokens that all layers from `free` on can have alike within the limit. FoveateError where one token each costs too much."""

    def even(tokens: int) -> Counts:
        return (per_image,) * free + (tokens,) * (layers - free)

    if (least := cost(even(1))) > limit:
        raise FoveateError(
            f"the budget {float(limit):g} is too small: one visual token in each layer"
            + (f", and all {per_image} in the first {free}," if free else "")
            + f" is a share of {ceil(least * 1000) / 1000:g} already; give at least that"
        )
    low, high = 1, per_image + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(even(middle)) <= limit else (low, middle)
    return low
