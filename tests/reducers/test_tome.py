"""ToMe: the matching of its card, a slow oracle of repeated passes, and what every merge must hold."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import TowerKeys, View
from foveate.reducers.tome import ToMe, bipartite, mean, merge_until
from foveate.tokens import TokenMap, budget
from tests.reducers.ragged import Ragged, batches, check_raster, check_rows, counted, crops, edges, keeps, make

quick = settings(max_examples=25)


@dataclass
class Token:
    """What a token has become: its state, its sources with their weights, how many patches it is, the token whose place it takes."""

    state: Any
    sources: dict[int, float]
    size: float
    keeper: int


def joined(parts: list[Token], weighted: bool) -> Token:
    """The last is the destination."""
    weights = [p.size if weighted else 1.0 for p in parts]
    total = sum(weights)
    state = sum(w * p.state for p, w in zip(parts, weights, strict=True)) / total
    sources = {s: v * w / total for p, w in zip(parts, weights, strict=True) for s, v in p.sources.items()}
    return Token(state, sources, sum(p.size for p in parts), parts[-1].keeper)


def one_pass(tokens: list[Token], r: int, *, protect: int = 0, weighted: bool = True) -> list[Token]:
    """Steps 1 to 5 of the paper's section on matching, pair by pair."""
    a, b = list(range(0, len(tokens), 2)), list(range(1, len(tokens), 2))
    r = min(r, (len(tokens) - protect) // 2)
    if r <= 0:
        return tokens

    def similarity(i: int, j: int) -> float:
        x, y = tokens[i].state, tokens[j].state
        return -math.inf if min(i, j) < protect else float(x @ y) / float(np.linalg.norm(x) * np.linalg.norm(y))

    def nearest(i: int) -> int:
        return max(b, key=lambda j: (similarity(i, j), -j))

    best = {i: nearest(i) for i in a}
    order = sorted(a, key=lambda i: (-similarity(i, best[i]), i))
    stays = sorted(order[r:]) if protect else order[r:]
    left = [(i, tokens[i]) for i in stays]
    left += [(j, joined([*(tokens[i] for i in order[:r] if best[i] == j), tokens[j]], weighted)) for j in b]
    return [token for _, token in sorted(left, key=lambda at: min(at[0], protect))]  # the protected in front, all others as they are


def oracle(states: Tensor, left: int, *, r: int = 0, weighted: bool = True) -> list[Token]:
    tokens = [Token(x, {i: 1.0}, 1.0, i) for i, x in enumerate(states.double().numpy())]
    while len(tokens) > left:
        tokens = one_pass(tokens, min(len(tokens) - left, r or len(tokens)), weighted=weighted)
    return tokens


def reduced(reducer: ToMe, batch: Ragged) -> TokenMap:
    return reducer.reduce(batch.view()).map


def angles(*degrees: float) -> Tensor:
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])


def test_the_matching_of_the_card() -> None:
    x = angles(0, 5, 90, 100, 180, 30)
    matching = bipartite(x, 2)
    assert matching.group.tolist() == [1, 1, 2, 2, 0, 3]  # [4, (0, 1), (2, 3), 5]
    assert matching.keeper.tolist() == [4, 1, 3, 5]
    y, size = mean(x, matching, torch.ones(6))
    assert size.tolist() == [1, 2, 2, 1]
    torch.testing.assert_close(y, torch.stack([x[4], (x[0] + x[1]) / 2, (x[2] + x[3]) / 2, x[5]]))
    torch.testing.assert_close((y * size[:, None]).sum(0), x.sum(0))
    assert torch.equal(y[matching.group][[0, 1, 4]], y[[1, 1, 0]])


def test_the_order_of_the_unmerged_is_by_similarity_and_ascending_behind_a_protected_token() -> None:
    """A is 0, 2, 4, 6; with their best at 40, 30, 20 and 0 degrees only the last is merged."""
    x = angles(0, 40, 100, 130, 200, 220, 300, 300)
    assert bipartite(x, 1).keeper.tolist() == [4, 2, 0, 1, 3, 5, 7]
    assert bipartite(x, 1, protect_first=1).keeper.tolist() == [0, 2, 4, 1, 3, 5, 7]


@pytest.mark.parametrize("protect", [0, 1, 2, 5])
@quick
@given(tokens=st.integers(1, 11), r=st.integers(0, 12), seed=st.integers(0, 99))
def test_a_pass_is_the_oracles(protect: int, tokens: int, r: int, seed: int) -> None:
    x = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(seed))
    matching = bipartite(x, r, protect_first=min(protect, tokens))
    y, size = mean(x, matching, torch.ones(2, tokens))
    for row in range(2):
        expected = one_pass([Token(v, {i: 1.0}, 1.0, i) for i, v in enumerate(x[row].double().numpy())], r, protect=min(protect, tokens))
        assert y.shape[1] == len(expected) == tokens - min(r, (tokens - min(protect, tokens)) // 2)
        assert matching.keeper[row].tolist() == [t.keeper for t in expected]
        assert [set((matching.group[row] == k).nonzero()[:, 0].tolist()) for k in range(y.shape[1])] == [set(t.sources) for t in expected]
        np.testing.assert_allclose(y[row].numpy(), np.stack([t.state for t in expected]), atol=1e-5)
        assert size[row].tolist() == [t.size for t in expected]
        for p in range(min(protect, tokens)):
            assert {p} in [set(t.sources) for t in expected]


def test_ties_go_to_the_first() -> None:
    x = torch.ones(6, 2)
    assert bipartite(x, 1).group.tolist() == [2, 2, 0, 3, 1, 4]  # 0 into 1, the lowest of A into the lowest of B


@quick
@given(batches(), keeps, st.sampled_from([0, 1, 3]), st.sampled_from(["raster", "matching"]))
def test_each_image_of_a_ragged_batch(batch: Ragged, keep: Any, r: int, order: str) -> None:
    reducer = ToMe(keep, r, order=order)
    token_map = reduced(reducer, batch)
    applied = token_map.apply(batch.tokens)
    for row, slots in batch.images():
        expected = oracle(batch.tokens[row, slots], budget(keep, len(slots)), r=r)
        if order == "raster":
            expected.sort(key=lambda t: t.keeper)
        found = [e for e in edges(token_map, row) if e[0] in slots]
        assert [e[0] for e in found] == [slots[t.keeper] for t in expected]
        for (_, members), token in zip(found, expected, strict=True):
            assert [m for m, _ in members] == [slots[s] for s in sorted(token.sources)]
            np.testing.assert_allclose([w for _, w in members], [token.sources[s] for s in sorted(token.sources)], rtol=1e-6)
        at = [i for i in range(applied.shape[1]) if token_map.target.valid[row, i] and int(token_map.representative[row, i]) in slots]
        np.testing.assert_allclose(applied[row, at].numpy(), np.stack([t.state for t in expected]), atol=1e-5)
        assert token_map.target.size[row, at].tolist() == [t.size for t in expected]
        assert counted(reducer, len(slots), len(slots)) == len(expected)
    assert token_map.target.size.sum() == batch.layout.size.sum()
    if order == "raster":
        check_raster(batch, token_map, [budget(keep, h * w) for h, w in batch.grids])
    check_rows(batch, token_map, [reduced(reducer, row) for row in batch.rows])


def test_means_are_weighted_by_what_a_slot_already_stands_for() -> None:
    """Two reducers in a row: the second weighs as one would that knew of all patches."""
    batch = make([[1, (1, 4), 1]])
    x = batch.tokens
    once = reduced(ToMe(2), batch)
    twice = once.then(ToMe(1).reduce(View.of(once.apply(x), layout=once.target)).map)
    torch.testing.assert_close(twice.apply(x)[0, 1], x[0, 1:5].mean(0))
    assert twice.target.size[0].tolist() == [0, 4, 0]


def test_mass_is_conserved_and_one_token_is_the_mean_of_all() -> None:
    x = torch.randn(1, 13, 4)
    token_map = ToMe(1).reduce(View.of(x, text=1)).map
    torch.testing.assert_close(token_map.apply(x)[0, 0], x[0, :12].mean(0))
    token_map = ToMe(5).reduce(View.of(x, text=1)).map
    torch.testing.assert_close((token_map.apply(x) * token_map.target.size[..., None]).sum(1), x[:, :12].sum(1))


@pytest.mark.parametrize("keep", [1, 3, 5])
def test_copies_of_one_token_stay_that_token(keep: int) -> None:
    x = torch.randn(1, 1, 4).expand(1, 9, 4)
    token_map = ToMe(keep).reduce(View.of(x)).map
    torch.testing.assert_close(token_map.apply(x), x[:, :keep])


def test_small_passes_are_not_one_large_one() -> None:
    x = torch.randn(12, 4)
    size = torch.ones(12)
    assert merge_until(x, size, 6, r=1)[0].group.tolist() != merge_until(x, size, 6)[0].group.tolist()


def test_scale_of_a_state_does_not_matter_in_a_pass() -> None:
    x = torch.randn(8, 4)
    scaled = bipartite(x * torch.rand(8, 1).add(0.5), 3)
    assert all(torch.equal(a, b) for a, b in zip(scaled, bipartite(x, 3), strict=True))


def test_keys_of_the_tower_as_the_metric() -> None:
    batch = make([[1, (2, 4), 1]])
    keys = torch.randn(1, 10, 3)
    view = View.of(batch.tokens, layout=batch.layout, signals={TowerKeys(-3): keys})
    reducer = ToMe(3, metric="keys", layer=-3)
    assert reducer.sites(4)[0].needs == (TowerKeys(-3),)
    assert ToMe(3).sites(4)[0].needs == ()
    expected = sorted(oracle(keys[0, 1:9], 3), key=lambda t: t.keeper)
    found = [members for e, members in edges(reducer.reduce(view).map, 0) if 1 <= e <= 8]
    assert [[m for m, _ in members] for members in found] == [[1 + s for s in sorted(t.sources)] for t in expected]
    torch.testing.assert_close(reducer.reduce(view).map.apply(batch.tokens)[0, 1], batch.tokens[0, [m for m, _ in found[0]]].mean(0))


def test_gradients_reach_every_merged_token() -> None:
    x = torch.randn(1, 8, 4, requires_grad=True)
    token_map = ToMe(2).reduce(View.of(x)).map
    token_map.apply(x).sum().backward()
    assert x.grad is not None
    expected = torch.zeros(8)
    for _, members in edges(token_map, 0):
        for m, w in members:
            expected[m] = w
    torch.testing.assert_close(x.grad[0, :, 0], expected)
    assert bool((expected > 0).all())


@pytest.mark.parametrize("keep", [1.0, 16, 99])
@pytest.mark.parametrize("order", ["raster", "matching"])
def test_keeping_everything_is_the_identity(keep: Any, order: str) -> None:
    assert reduced(ToMe(keep, order=order), make([[1, (4, 4), 2], [3]], left=True)).is_identity


def test_scope() -> None:
    batch = make([[1, (2, 4), 1, (1, 4), 2], [2, (3, 3)]])
    split = crops(batch, torch.where(batch.layout.rank_in_image < 3, 0, 1))
    for scope, sizes in (("image", [8, 4, 9]), ("crop", [3, 5, 3, 1, 3, 6]), ("sample", [12, 9])):
        target = reduced(ToMe(1, scope=scope), split).target
        assert target.size[target.visual].tolist() == sizes


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"keep": 1.5},
        {"r": -1},
        {"r": 0.5},
        {"metric": "values"},
        {"layer": 0.5},
        {"order": "x"},
        {"scope": "x"},
        {"positions": "x"},
    ],
)
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        ToMe(**options)


def test_a_view_without_states() -> None:
    with pytest.raises(FoveateError, match="tome looks at the tokens' states"):
        ToMe().reduce(View(make([[(2, 2)]]).layout))
