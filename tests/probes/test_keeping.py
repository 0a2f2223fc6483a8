"""What is encoded, kept: once for the same call, within so many bytes, without the levels of a tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.engine.keeping import Kept

PIXELS = torch.arange(12.0).view(1, 3, 2, 2)


class Encoder:
    """Features of 24 bytes a call, and what it noted."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> tuple[Any, list[int]]:
        self.calls += 1
        states = torch.full((1, 2, 3), float(self.calls))
        return BaseModelOutputWithPooling(pooler_output=states, hidden_states=(states, states)), [self.calls]


def test_the_same_call_is_made_once() -> None:
    kept, encode = Kept(at_most=100), Encoder()
    first = kept.of("images", {"pixel_values": PIXELS, "layer": -1}, encode)
    assert kept.seconds == 0
    again = kept.of("images", {"layer": -1, "pixel_values": PIXELS.clone()}, encode)
    assert (encode.calls, kept.bytes) == (1, 24)
    assert kept.seconds > 0
    for outputs, noted in (first, again):
        assert type(outputs) is BaseModelOutputWithPooling
        assert outputs.hidden_states is None
        assert torch.equal(outputs.pooler_output, torch.ones(1, 2, 3))
        assert noted == [1]


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("videos", {"pixel_values": PIXELS, "layer": -1}),
        ("images", {"pixel_values": PIXELS, "layer": -2}),
        ("images", {"pixel_values": PIXELS + 1e-6 * (PIXELS == 3), "layer": -1}),
        ("images", {"pixel_values": PIXELS.view(1, 3, 4, 1), "layer": -1}),
        ("images", {"pixel_values": PIXELS.to(torch.bfloat16), "layer": -1}),
        ("images", {"pixel_values": [PIXELS], "layer": -1}),
        ("images", {"pixel_values": PIXELS}),
    ],
)
def test_another_call_is_another(method: str, given: dict[str, Any]) -> None:
    kept, encode = Kept(at_most=100), Encoder()
    kept.of("images", {"pixel_values": PIXELS, "layer": -1}, encode)
    assert kept.of(method, given, encode)[1] == [2]


def test_what_does_not_fit_is_encoded_anew() -> None:
    kept, encode = Kept(at_most=30), Encoder()
    for image in (PIXELS, PIXELS + 1, PIXELS, PIXELS + 1):
        kept.of("images", {"pixel_values": image}, encode)
    assert (encode.calls, kept.bytes) == (3, 24), "the first is kept, the second is not"
