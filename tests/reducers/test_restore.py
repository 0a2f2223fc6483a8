"""RESTORE's attention: its numbers by hand, and the bias against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import foveate
from foveate.contract import View
from foveate.engine.rulings import laid_over
from foveate.reducers import RESTORE
from foveate.reducers.restore import likeness
from foveate.tokens import Layout
from tests.reducers.plain_decoder import causal, decode, embedded
from tests.tiny import IMAGE, ROWS, Batch, llava


def test_what_the_rotary_embedding_leaves() -> None:
    apart = [1, 2, 4, 8, 64, 256, 576]
    raised = (2 - likeness(torch.tensor(apart))).log()
    assert raised.tolist() == pytest.approx([0.0294, 0.0984, 0.2158, 0.2512, 0.4208, 0.5184, 0.5688], abs=5e-5)
    assert float(likeness(torch.tensor([0]))) == 1.0


def sized(sizes: list[float], text: int = 1) -> Layout:
    layout = View.of(torch.zeros(1, len(sizes) + text, 1), text=text).layout
    return replace(layout, size=torch.tensor([sizes + [0.0] * text]))


def test_sizes_by_hand() -> None:
    layout = sized([1, 3, 8])
    mean, own = (RESTORE().reduce(View(layout), stage).bias for stage in (0, 1))
    assert mean is not None
    assert own is not None
    assert own(layout, layout).tolist() == [[pytest.approx([0.0, math.log(3), math.log(8), 0.0])]]
    assert mean(layout, layout).tolist() == [[pytest.approx([math.log(4)] * 3 + [0.0])]]


def test_all_sizes_1_are_ordinary_to_the_bit() -> None:
    model, batch = llava(), Batch(ROWS, "left")
    with torch.no_grad():
        bare = model(**batch.inputs).logits
        for reducers in ("restore", "fastv:keep=1.0,layer=1+restore:first=own"):
            with foveate.attach(model, reducers, shortcuts=False):
                assert torch.equal(model(**batch.inputs).logits, bare)
        with foveate.attach(model, "fastv:keep=0.5,layer=1"):
            dropped = model(**batch.inputs).logits
        with foveate.attach(model, "fastv:keep=0.5,layer=1+restore"):  # what is dropped goes into no other
            assert torch.equal(model(**batch.inputs).logits, dropped)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("distance", [False, True])
def test_it_is_what_the_equations_say(attn: str, distance: bool) -> None:
    """On an image merged to 8 tokens, which the plain decoder is given merged."""
    model, row = llava(attn), ROWS[0]
    inputs = Batch([row]).inputs
    with foveate.attach(model, [foveate.reducers.parse("tome:keep=0.5")[0], RESTORE(distance=distance)]) as run, torch.no_grad():
        found = model(**inputs, output_hidden_states=True)
        found = model(**inputs).logits[0]
    merged = run.last.maps[0]
    size = [len(merged.sources(0, slot)) for slot in range(merged.target.shape[1])]
    visual = (merged.target.kind[0] == 1).tolist()
    assert sum(n for n, v in zip(size, visual, strict=True) if v) == 16
    assert max(size) > 1
    x = merged.apply(embedded(model, inputs).float()[None])[0].double()

    def added(layer: int, i: int, j: int) -> float:
        bias = math.log(16 / 8 if layer == 0 else size[j]) if visual[j] else 0.0
        if distance and visual[j]:
            angles = [abs(i - j) * 10_000 ** (-2 * k / 128) for k in range(64)]
            bias += math.log(2 - sum(map(math.cos, angles)) / 64)
        return causal(layer, i, j) + bias

    expected = decode(model, x, range(len(size)), added)
    there = [slot for slot in range(len(row)) if row[slot] != IMAGE]
    torch.testing.assert_close(found[there].double(), expected[[not v for v in visual]], rtol=1e-3, atol=1e-4)


def test_a_merged_token_weighs_what_its_copies_would() -> None:
    """Four equal tokens, merged to one of size 4 without positions to tell them apart: what the text sees of them is the same."""
    torch.manual_seed(0)
    query, key, value, other = torch.randn(1, 8), torch.randn(1, 8), torch.randn(1, 4), torch.randn(1, 8)

    def seen(copies: int, mask: Any) -> torch.Tensor:
        keys, values = torch.cat([key.expand(copies, -1), other]), torch.cat([value.expand(copies, -1), torch.zeros(1, 4)])
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, None if mask is None else mask[0, 0])

    layout = sized([4.0])
    rule = RESTORE(first="own").reduce(View(layout))
    mask = laid_over(
        None, (rule,), layout.each(lambda part: part[:, 1:]), layout, lambda: torch.ones(1, 1, 1, 2, dtype=torch.bool), 2, torch.float32
    )
    torch.testing.assert_close(seen(1, mask), seen(4, None))
