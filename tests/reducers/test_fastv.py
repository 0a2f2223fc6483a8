"""FastV against a plain oracle, the numbers of the paper's tables, and what must hold of any ranking by attention."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import Attention, AttentionRows, FromLayer, View
from foveate.reducers.base import parse_with
from foveate.reducers.fastv import FastV
from foveate.tokens import Layout, TokenMap, budget, top
from tests.reducers.ragged import counted
from tests.test_tokens import layouts

quick = settings(max_examples=40)
keeps = st.one_of(st.sampled_from([0.05, 0.25, 1 / 3, 0.5, 0.75, 1.0]), st.integers(1, 10))


def grades(*shape: int) -> Tensor:
    """Random multiples of 1/64: sums are exact in float32, and ties are common."""
    return torch.randint(0, 65, shape) / 64


def view(layout: Layout, weights: Tensor, layer: int = 1, tokens: Tensor | None = None) -> View:
    B, N = layout.shape
    return View.of(torch.zeros(B, N, 1) if tokens is None else tokens, layout=layout, signals={Attention(layer): AttentionRows.of(weights)})


def alone(layout: Layout, b: int) -> tuple[Layout, Tensor]:
    """Row `b` without padding, and its slots."""
    slots = layout.valid[b].nonzero()[:, 0]
    visual = layout.visual[b, slots]
    return Layout.sequence(visual[None], torch.unique_consecutive(layout.image[b, slots][visual], return_counts=True)[1].tolist()), slots


def survivors(m: TokenMap, b: int = 0) -> list[int]:
    """Valid slots of row `b` that live on, in the order of the target."""
    return [s for s in m.representative[b].tolist() if s >= 0 and bool(m.source.valid[b, s])]


def images(layout: Layout, b: int) -> list[list[int]]:
    """Visual slots of each image of row `b`."""
    found: dict[int, list[int]] = {}
    for s in range(layout.shape[1]):
        if bool(layout.visual[b, s]):
            found.setdefault(int(layout.image[b, s]), []).append(s)
    return list(found.values())


def ranked(score: "np.ndarray", slots: list[int], keep: int) -> list[int]:
    return sorted(slots, key=lambda s: (-score[s], s))[:keep]


def oracle(layout: Layout, weights: Tensor, reducer: FastV, b: int) -> list[int]:
    """The survivors of one row, in loops."""
    a = weights[b].double().numpy()
    valid = [s for s in range(layout.shape[1]) if bool(layout.valid[b, s])]
    score = np.zeros(layout.shape[1])
    for n in valid:
        queries = [valid[-1]] if reducer.rows == "last" else [q for q in valid if q != n]
        score[n] = sum(a[h, q, n] for h in range(len(a)) for q in queries) / max(1, len(queries)) / len(a)
    kept = [s for s in valid if not bool(layout.visual[b, s])]
    for slots in images(layout, b):
        kept += ranked(score, slots, budget(reducer.keep, len(slots)))
    return sorted(kept)


@quick
@given(layouts(), keeps, st.sampled_from(["last", "all"]), st.integers(0, 10**6))
def test_the_rule_is_the_cards_in_ragged_batches(layout: Layout, keep: float | int, rows: str, seed: int) -> None:
    torch.manual_seed(seed)
    B, N = layout.shape
    weights = grades(B, 2, N, N)
    reducer = FastV(keep, rows=rows)
    m = reducer.reduce(view(layout, weights)).map
    for b in range(B):
        assert survivors(m, b) == oracle(layout, weights, reducer, b)
        one, slots = alone(layout, b)
        single = reducer.reduce(view(one, weights[b][None, :, slots][..., slots])).map
        assert [int(slots[s]) for s in survivors(single)] == survivors(m, b)
        assert [len(i) for i in images(m.target, b)] == [counted(reducer, len(i), len(i)) for i in images(layout, b)]
    assert m.target.lengths() == [budget(keep, n) for n in layout.lengths()]


def test_more_rows_than_one_block() -> None:
    """300 slots: the paper's average is taken block by block."""
    layout = Layout.sequence(torch.arange(300)[None] < 280)
    weights = grades(1, 1, 300, 300)
    reducer = FastV(40, rows="all")
    assert survivors(reducer.reduce(view(layout, weights)).map) == oracle(layout, weights, reducer, 0)


def test_a_prompt_of_631_tokens() -> None:
    visual = torch.zeros(1, 631, dtype=torch.bool)
    visual[:, 35:611] = True
    m = FastV().reduce(view(Layout.sequence(visual), torch.rand(1, 2, 631, 631))).map
    assert m.target.shape == (1, 343)
    assert m.target.position[0, -20:].tolist() == list(range(611, 631))
    assert FastV().positions == "keep"
    assert FastV().visual_tokens(576, 32) == [576] * 2 + [288] * 30


@pytest.mark.parametrize(
    ("layer", "keep", "percent"), [(2, 0.5, 55.2), (2, 0.25, 33.2), (2, 0.1, 20.3), (3, 0.5, 56.7), (3, 0.25, 35.4), (5, 0.5, 59.6)]
)
def test_the_papers_cost_of_612_tokens(layer: int, keep: float, percent: float) -> None:
    def cost(n: int) -> int:
        return 4 * n * 4096**2 + 2 * n**2 * 4096 + 2 * n * 4096 * 11008

    counts = FastV(keep, layer).visual_tokens(576, 32)
    assert round(100 * sum(cost(n + 36) for n in counts) / (32 * cost(612)), 1) == percent


def test_a_one_hot_row_is_kept_first() -> None:
    weights = torch.zeros(1, 32, 8, 8)
    weights[:, :, 7, 4] = 1
    m = FastV(1).reduce(view(Layout.sequence(torch.arange(8)[None] < 7), weights)).map
    assert survivors(m) == [4, 7]


def test_the_two_rules_differ() -> None:
    """The last row asks for slot 1, every other row for slot 0, and each token most of all for itself, which does not count."""
    weights = torch.zeros(1, 1, 6, 6)
    weights[..., 0] = 0.5
    weights[0, 0, -1] = torch.tensor([0.1, 0.9, 0, 0, 0, 0])
    weights[0, 0, 2, 2] = 9.0
    layout = Layout.sequence(torch.arange(6)[None] < 4)
    assert survivors(FastV(1).reduce(view(layout, weights)).map) == [1, 4, 5]
    assert survivors(FastV(1, rows="all").reduce(view(layout, weights)).map) == [0, 4, 5]


@pytest.mark.parametrize("rows", ["last", "all"])
def test_the_answer_is_never_looked_at(rows: str) -> None:
    layout = Layout.sequence(torch.arange(12)[None] < 8)
    weights = torch.rand(1, 2, 12, 12)
    asked = view(layout, weights).asked_at(torch.tensor([9]))
    other = weights.clone()
    other[:, :, 10:] = torch.rand(1, 2, 2, 12) * 9
    kept = survivors(FastV(3, rows=rows).reduce(asked).map)
    assert kept == survivors(FastV(3, rows=rows).reduce(view(layout, other).asked_at(torch.tensor([9]))).map)
    assert kept != survivors(FastV(3, rows=rows).reduce(view(layout, other).asked_at(torch.tensor([11]))).map)


@quick
@given(layouts(), st.integers(1, 6), st.sampled_from(["last", "all"]), st.integers(0, 10**6))
def test_order_of_heads_and_scale_change_nothing(layout: Layout, keep: int, rows: str, seed: int) -> None:
    torch.manual_seed(seed)
    B, N = layout.shape
    weights, reducer = grades(B, 4, N, N), FastV(keep, rows=rows)
    member = reducer.reduce(view(layout, weights)).map.member
    for other in (weights[:, [2, 0, 3, 1]], 0.25 * weights):
        assert torch.equal(reducer.reduce(view(layout, other)).map.member, member)


@quick
@given(layouts(), st.sampled_from([1.0, 9, 576]), st.sampled_from(["last", "all"]))
def test_keeping_everything_is_the_identity(layout: Layout, keep: float | int, rows: str) -> None:
    B, N = layout.shape
    m = FastV(keep, rows=rows).reduce(view(layout, torch.rand(B, 1, N, N))).map
    assert m.is_identity


def test_of_original_counts_what_was_there_before_another_cut() -> None:
    layout = Layout.sequence(torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]]).bool())
    weights = torch.rand(2, 1, 14, 14)
    first = view(layout, weights)
    cut = TokenMap.keep(layout, top(layout, torch.rand(2, 14), 3))
    B, M = cut.target.shape
    later = replace(view(cut.target, torch.rand(B, 1, M, M)), first=first)
    for of, lengths in (("original", [3, 2, 2]), ("arriving", [2, 2, 2])):
        reducer = FastV(0.5, of=of)
        assert reducer.reduce(later).map.target.lengths() == lengths == [counted(reducer, 3, n) for n in (8, 4, 4)]
    assert FastV(4, of="original").reduce(later).map.target.lengths() == [3, 3, 3]


def test_where_it_acts_and_how_it_is_spelled() -> None:
    assert FastV(layer=3).sites(32) == [FromLayer(3, (Attention(2),))]
    assert parse_with("fastv:keep=144,layer=3,rows=all", {"fastv": FastV}) == [FastV(144, 3, "all")]
    assert str(FastV()) == "fastv"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 0}, "use random:keep=0.5"),
        ({"layer": True}, "layer=True"),
        ({"layer": 2.0}, "layer=2.0"),
        ({"rows": "mean"}, "rows='mean' is not possible; choose \"last\""),
        ({"of": "all"}, "of='all' is not possible; choose \"original\""),
        ({"keep": 0}, "keep=0 is not possible"),
        ({"keep": 1.5}, "keep=1.5 is not possible"),
        ({"keep": "half"}, "keep='half' is not possible"),
        ({"keep": True}, "keep=True is not possible"),
        ({"positions": "mean"}, "positions='mean'"),
    ],
)
def test_impossible_options_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        FastV(**options)  # type: ignore[arg-type]


def test_a_view_that_does_not_say_who_asks_is_an_error() -> None:
    layout = Layout.sequence(torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(FoveateError, match="where the question ends is not known"):
        FastV().reduce(View(layout, signals={Attention(1): AttentionRows.of(torch.rand(1, 1, 4, 4))}))
