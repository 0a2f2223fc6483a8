"""DivPrune against a slow oracle, the angles of its card, and what every selection must hold."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import View
from foveate.reducers.divprune import DivPrune, spread
from foveate.tokens import TokenMap, budget
from tests.reducers.ragged import Ragged, batches, check_raster, check_rows, counted, crops, keeps, kept, make

quick = settings(max_examples=25)


def angles(*degrees: float) -> Tensor:
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])


def oracle(states: Tensor, picks: int) -> list[int]:
    """Max-min, as the card says it, distance by distance."""
    x = states.double().numpy()
    N = len(x)
    d = [[1 - float(x[i] @ x[j]) / float(np.linalg.norm(x[i]) * np.linalg.norm(x[j])) for j in range(N)] for i in range(N)]
    chosen: list[int] = []
    for _ in range(picks):
        others = [i for i in range(N) if i not in chosen]
        score = [min((d[i][j] for j in (chosen or [k for k in range(N) if k != i])), default=0.0) for i in others]
        chosen.append(others[int(np.argmax(score))])
    return chosen


def reduced(reducer: DivPrune, batch: Ragged) -> TokenMap:
    return reducer.reduce(batch.view()).map


def test_picks_of_the_card() -> None:
    x = angles(0, 10, 20, 80, 90, 180)
    picks = spread(x, 6).tolist()
    assert picks[:4] == [5, 0, 4, 2]
    assert sorted(picks[4:]) == [1, 3]  # a tie but for rounding
    question = View.of(torch.cat([x, x[:1]])[None], text=1)
    assert kept(DivPrune(4).reduce(question).map) == [0, 2, 4, 5, 6]


def test_three_tokens_of_the_card() -> None:
    x = angles(0, 10, 20, 80, 90, 180)[None]
    assert kept(DivPrune(3).reduce(View.of(x)).map) == [0, 4, 5]
    assert kept(DivPrune(3, order="pick").reduce(View.of(x)).map) == [5, 0, 4]


@quick
@given(st.integers(2, 12), st.integers(0, 99), st.data())
def test_the_oracles_picks(tokens: int, seed: int, data: st.DataObject) -> None:
    x = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(seed))
    picks = data.draw(st.integers(1, tokens))
    assert spread(x, picks).tolist() == oracle(x, picks)
    assert spread(x, picks).tolist() == spread(x, tokens).tolist()[:picks]  # the set for T is part of that for T + 1
    scaled = x * torch.rand(tokens, 1, generator=torch.Generator().manual_seed(seed)).add(0.5)
    assert spread(scaled, picks).tolist() == oracle(x, picks)


@quick
@given(batches(), keeps, st.sampled_from(["raster", "pick"]))
def test_each_image_of_a_ragged_batch(batch: Ragged, keep: Any, order: str) -> None:
    reducer = DivPrune(keep, order)
    token_map = reduced(reducer, batch)
    for row, slots in batch.images():
        left = budget(keep, len(slots))
        picks = [slots[i] for i in oracle(batch.tokens[row, slots], left)]
        expected = picks if order == "pick" and left < len(slots) else sorted(picks)
        assert [i for i in kept(token_map, row) if i in slots] == expected
        assert counted(reducer, len(slots), len(slots)) == left
    if order == "raster":
        check_raster(batch, token_map, [budget(keep, r * c) for r, c in batch.grids])
    check_rows(batch, token_map, [reduced(reducer, row) for row in batch.rows])


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_equal_tokens_are_never_picked_twice(tokens: int) -> None:
    x = torch.ones(tokens, 3)
    assert spread(x, tokens).tolist() == list(range(tokens))
    x = angles(0, 60, 150).repeat_interleave(3, 0)
    assert sorted(spread(x, 9).tolist()) == list(range(9))
    assert {i // 3 for i in spread(x, 3).tolist()} == {0, 1, 2}


def test_tokens_without_length() -> None:
    assert sorted(spread(torch.zeros(4, 3), 4).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("keep", [1.0, 16, 99])
@pytest.mark.parametrize("order", ["raster", "pick"])
def test_keeping_everything_is_the_identity(keep: Any, order: str) -> None:
    batch = make([[1, (4, 4), 2], [3]], left=True)
    assert reduced(DivPrune(keep, order), batch).is_identity


def test_scope() -> None:
    batch = make([[1, (2, 4), 1, (1, 4), 2], [2, (3, 3)]])
    split = crops(batch, torch.where(batch.layout.rank_in_image < 3, 0, 1))
    assert reduced(DivPrune(1), split).target.visual.sum() == 3
    assert reduced(DivPrune(1, scope="crop"), split).target.visual.sum() == 6
    assert reduced(DivPrune(1, scope="sample"), split).target.visual.sum() == 2


def test_the_cards_budget_and_defaults() -> None:
    assert counted(DivPrune(), 576, 576) == 56
    assert DivPrune().positions == "renumber"
    assert str(DivPrune()) == "divprune"


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 1.5}, {"order": "score"}, {"scope": "batch"}, {"positions": "gap"}])
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        DivPrune(**options)


def test_a_view_without_states() -> None:
    with pytest.raises(FoveateError, match="divprune looks at the tokens' states"):
        DivPrune().reduce(View(make([[(2, 2)]]).layout))
