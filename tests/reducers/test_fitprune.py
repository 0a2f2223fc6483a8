"""FitPrune: ranking and recipe against loops written from its formulas, the card's example, budgets and errors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.contract import Attention, AttentionRows, FromLayer, View
from foveate.errors import FoveateError
from foveate.reducers import FitPrune, parse
from foveate.reducers.fitprune import left, recipe, tail
from foveate.tokens import Layout, budget
from tests.reducers.test_fastv import alone, images, ranked, survivors, view
from tests.test_tokens import layouts


def score(layout: Layout, weights: torch.Tensor, b: int) -> np.ndarray:
    """Of each visual slot of a row, in loops: what text rows and what visual rows give it, the largest of the heads in each row."""
    most = weights[b].double().numpy().max(0)
    valid = [s for s in range(layout.shape[1]) if bool(layout.valid[b, s])]
    visual = [s for s in valid if bool(layout.visual[b, s])]
    found = np.zeros(layout.shape[1])
    for n in visual:
        found[n] = sum(most[q, n] for q in valid if q not in visual) * sum(most[q, n] for q in visual)
    return found


@settings(max_examples=25, deadline=None)
@given(layouts(), st.sampled_from([0.2, 0.5, 0.9]), st.integers(0, 10**6))
def test_the_rule_is_the_cards_in_ragged_batches(layout: Layout, keep: float, seed: int) -> None:
    torch.manual_seed(seed)
    B, N = layout.shape
    weights = torch.rand(B, 2, N, N)
    reducer = FitPrune([(1, keep)])
    m = reducer.reduce(view(layout, weights, 0)).map
    for b in range(B):
        kept = (layout.valid[b] & ~layout.visual[b]).nonzero()[:, 0].tolist()
        for slots in images(layout, b):
            kept += ranked(score(layout, weights, b), slots, budget(keep, len(slots)))
        assert survivors(m, b) == sorted(kept)
        one, at = alone(layout, b)
        single = reducer.reduce(view(one, weights[b][None, :, at][..., at], 0)).map
        assert [int(at[s]) for s in survivors(single)] == survivors(m, b)


def test_the_cards_example() -> None:
    """Products 4, 4, 9, 4: of equal ones the later goes, as everywhere in this library, and token 2 stays to the end."""
    cross, own = [4.0, 1.0, 3.0, 2.0, 0.0], [1.0, 4.0, 3.0, 2.0, 0.0]
    weights = torch.tensor([own] * 4 + [cross])[None, None] / 16
    shown = View.of(torch.zeros(1, 5, 1), text=1, signals={Attention(0): AttentionRows.of(weights)})
    for keep, kept in ((0.75, [0, 1, 2]), (0.5, [0, 2]), (0.25, [2])):
        assert survivors(FitPrune([(1, keep)]).reduce(shown).map) == [*kept, 4]


def test_the_largest_head_counts() -> None:
    """Means over the heads would keep tokens 0 and 1, which both heads look at a little."""
    heads = torch.tensor([[0.3, 0.3, 0.4, 0.0, 0.0], [0.3, 0.3, 0.0, 0.4, 0.0]])
    weights = heads[:, None].expand(2, 5, 5)[None]
    shown = View.of(torch.zeros(1, 5, 1), text=1, signals={Attention(1): AttentionRows.of(weights)})
    assert survivors(FitPrune().reduce(shown).map) == [2, 3, 4]


def slow_tail(values: Sequence[float], alpha: float) -> set[int]:
    gone: list[int] = []
    for n in sorted(range(len(values)), key=lambda n: (values[n], n)):
        if sum(values[m] for m in [*gone, n]) > alpha * sum(values):
            break
        gone.append(n)
    return set(gone)


counts = st.lists(st.integers(0, 64), min_size=4, max_size=4).filter(any)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(counts, counts), min_size=1, max_size=5), st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0]))
def test_tails_and_what_they_leave(layers: list[tuple[list[int], list[int]]], alpha: float) -> None:
    image = [(torch.tensor(cross).float(), torch.tensor(own).float()) for cross, own in layers]
    gone: set[int] = set()
    expected = [1.0]
    for cross, own in layers[:-1]:
        assert set(tail(torch.tensor(cross).float(), alpha).nonzero()[:, 0].tolist()) == slow_tail(cross, alpha)
        gone |= slow_tail(cross, alpha) & slow_tail(own, alpha)
        expected.append(max(1, 4 - len(gone)) / 4)
    assert left(image, alpha) == expected
    assert all(a >= b for a, b in pairwise(expected))


def test_a_layer_that_does_not_attend_takes_nothing() -> None:
    some = torch.tensor([1.0, 1.0, 6.0, 8.0])
    assert left([None, (some, some), None, None], 0.2) == [1.0, 1.0, 0.5, 0.5]


def test_the_recipe_meets_its_budget_with_the_smallest_tolerance() -> None:
    generator = torch.Generator().manual_seed(0)
    many = [[(torch.rand(32, generator=generator), torch.rand(32, generator=generator)) for _ in range(8)] for _ in range(3)]
    for limit in (0.9, 0.6, 0.4):
        found = FitPrune.fitted(many, limit)
        tokens = found.visual_tokens(32, 8)
        shares = recipe(many, limit, lambda shares: sum(shares) / len(shares))
        assert sum(shares) / 8 <= limit
        assert sum(tokens) / (8 * 32) == pytest.approx(sum(shares) / 8, abs=0.5 / 32)
        assert sum(tokens) / (8 * 32) > limit - 0.1  # no more goes than has to
        assert parse(str(found)) == [found]
    assert FitPrune.fitted(many, 1.0) == FitPrune("0:1")
    late = FitPrune.fitted(many, 0.5, lambda shares: sum(shares[4:]) / 4)  # a cost that knows the last four layers alone
    assert sum(late.visual_tokens(32, 8)[4:]) / (4 * 32) == pytest.approx(0.5, abs=0.1)


def test_budgets_that_cannot_be_met() -> None:
    alike = [[(torch.ones(4), torch.ones(4))] * 4]
    with pytest.raises(FoveateError, match=r"the budget 0\.4 is too small, one token of each image costs 0\.4375 already"):
        FitPrune.fitted(alike, 0.4)
    with pytest.raises(FoveateError, match="there are no images"):
        FitPrune.fitted([], 0.5)


def test_where_it_acts() -> None:
    assert FitPrune("0:1/1:0.75/3:0.5").sites(8) == [FromLayer(1, (Attention(0),)), FromLayer(3, (Attention(2),))]
    with pytest.raises(FoveateError, match=r"fitprune: .* no layer's attention can be read in front of layer 0; begin at layer 1$"):
        parse("fitprune:keeps=0:0.5")
    with pytest.raises(FoveateError, match=r"fitprune: keeps=.2:0\.5/1:0\.2. is not possible, layer 1 does not come after layer 2"):
        parse("fitprune:keeps=2:0.5/1:0.2")
    with pytest.raises(FoveateError, match="fitprune has no option keep"):
        FitPrune().at(0.5)
