"""YOPO's neighbours: the published numbers, and the rule against plain loops."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.accounting import predict
from foveate.contract import ImageSize, View, Workload
from foveate.engine.rulings import hidden_by, opened_by
from foveate.errors import FoveateError, NotApplicable
from foveate.reducers import YOPO, parse
from foveate.reducers.yopo import Near, near_pairs
from tests.reducers.plain_decoder import causal, decode, embedded
from tests.tiny import IMAGE, LAYERS, ROWS, Batch, llava


def raster(rows: int, columns: int) -> View:
    return View.of(torch.zeros(1, rows * columns, 1), grid=(rows, columns))


def test_12996_of_331776_pairs() -> None:
    layout = raster(24, 24).layout
    near = Near(5)(layout, layout)[0]
    assert near.numel() == 331_776
    assert int(near.sum()) == 12_996 == 114**2 == near_pairs(24, 5) ** 2
    assert sorted(near.sum(1).unique().tolist()) == [9, 12, 15, 16, 20, 25]
    assert [int(near[row * 24 + column].sum()) for row, column in ((0, 0), (0, 12), (12, 12))] == [9, 15, 25]
    assert int(near.tril().sum()) == 6_786
    assert bool(Near(47)(layout, layout).all())


@pytest.mark.parametrize("window", [1, 3, 5, 9])
@pytest.mark.parametrize("cells", [1, 2, 4, 7])
def test_pairs_in_a_line(cells: int, window: int) -> None:
    assert near_pairs(cells, window) == sum(abs(a - b) <= window // 2 for a in range(cells) for b in range(cells))


@pytest.mark.parametrize(("both", "seen"), [(True, 12_996), (False, 6_786)])
def test_what_is_seen_under_a_causal_mask(both: bool, seen: int) -> None:
    view = raster(24, 24)
    rules = (YOPO(causal=not both).reduce(view),)
    hidden, opened = hidden_by(rules, view.layout, view.layout), opened_by(rules, view.layout, view.layout)
    assert hidden is not None
    mask = torch.ones(576, 576, dtype=torch.bool).tril() & ~hidden
    assert int((mask if opened is None else mask | opened).sum()) == seen


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("text", ["yopo:window=3", "yopo:window=3,causal=true,layer=2"])
def test_it_is_what_its_rule_says(attn: str, text: str) -> None:
    """Two images of 4 x 4, in plain loops."""
    model, row = llava(attn), ROWS[1]
    (reducer,) = parse(text)
    assert isinstance(reducer, YOPO)
    place: list[tuple[int, int, int] | None] = []  # image and cell of each token
    for token in row:
        number = sum(p is not None for p in place)
        place.append((number // 16, number % 16 // 4, number % 4) if token == IMAGE else None)

    def added(layer: int, i: int, j: int) -> float:
        a, b = place[i], place[j]
        if layer < reducer.layer or a is None or b is None:
            return causal(layer, i, j)
        near = a[0] == b[0] and abs(a[1] - b[1]) <= 1 and abs(a[2] - b[2]) <= 1
        return 0.0 if near and (j <= i or not reducer.causal) else float("-inf")

    inputs = Batch([row]).inputs
    expected = decode(model, embedded(model, inputs), range(len(row)), added)
    with foveate.attach(model, reducer) as run, torch.no_grad():
        found = model(**inputs).logits[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    told = predict(model.config, images=2, text_tokens=len(row) - 32, reducers=[reducer])
    assert run.ledger == told
    pairs = len(row) ** 2 - 32**2 + 2 * near_pairs(4, 3) ** 2
    assert told.flops["lm_attention"] == 4 * 32 * (pairs * (LAYERS - reducer.layer) + len(row) ** 2 * reducer.layer)


def test_of_unknown_rasters_nothing_is_said_to_be_saved() -> None:
    known, unknown = ImageSize((16,), (16,), ((4, 4),)), ImageSize.whole(16)
    assert YOPO(window=3).unseen(Workload((known,), (16,))) == 256 - 100
    assert YOPO(window=3).unseen(Workload((known,), (12,))) == 144 - 100  # that much is sure of what a cut has left
    assert YOPO(window=3).unseen(Workload((unknown,), (16,))) == YOPO(window=0).unseen(Workload((known,), (16,))) == 0


def test_what_cannot_be() -> None:
    with pytest.raises(FoveateError, match="window=4 is not possible; give an odd number, such as 5"):
        YOPO(window=4)
    with pytest.raises(NotApplicable, match="the tokens of image 0 do not lie in a raster"):
        YOPO().reduce(View.of(torch.zeros(1, 6, 1)))
