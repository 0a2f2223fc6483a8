"""DART against a plain oracle, the card's numbers, and what must hold of pivots and picks."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import FromLayer, Keys, View
from foveate.reducers.base import parse_with
from foveate.reducers.dart import DART
from foveate.tokens import Layout, TokenMap, budget, top
from tests.reducers.ragged import counted
from tests.reducers.test_fastv import alone, images, keeps, survivors
from tests.test_tokens import layouts

quick = settings(max_examples=40)


def view(layout: Layout, tokens: Tensor, keys: Tensor) -> View:
    return View.of(tokens, layout=layout, signals={Keys(1): keys})


def pictured(tokens: Tensor, keys: Tensor, text: int = 0) -> View:
    """One image and the text behind it."""
    return view(Layout.sequence(torch.arange(len(tokens))[None] < len(tokens) - text), tokens[None], keys[None])


def oracle(layout: Layout, tokens: Tensor, keys: Tensor, reducer: DART, b: int) -> list[int]:
    """The survivors of one row, pick by pick."""
    x, norm = tokens[b].double().numpy(), keys[b].double().abs().sum(-1).tolist()
    valid = [s for s in range(layout.shape[1]) if bool(layout.valid[b, s])]
    text = [s for s in valid if not bool(layout.visual[b, s])]
    kept = list(text)
    for slots in images(layout, b):
        total = counted(reducer, len(slots), len(slots))
        chosen = sorted(slots, key=lambda s: (-norm[s], s))[: min(reducer.visual_pivots, total)]
        pivots = chosen + sorted((s for s in text if s > slots[-1]), key=lambda s: (-norm[s], s))[: reducer.text_pivots]
        left = total - len(chosen)
        for p, pivot in enumerate(pivots):
            cosine = {s: float(x[s] @ x[pivot]) / (np.linalg.norm(x[s]) * np.linalg.norm(x[pivot])) for s in slots}
            share = left // len(pivots) + (1 if p < left % len(pivots) else 0)
            for _ in range(share):
                chosen = [*chosen, min((s for s in slots if s not in chosen), key=lambda s: (cosine[s], s))]
        kept += chosen
    return sorted(kept)


@quick
@given(layouts(), keeps, st.integers(1, 3), st.integers(0, 3), st.sampled_from(["exact", "code"]), st.integers(0, 10**6))
def test_the_rule_is_the_cards_in_ragged_batches(
    layout: Layout, keep: float | int, visual_pivots: int, text_pivots: int, rounding: str, seed: int
) -> None:
    torch.manual_seed(seed)
    B, N = layout.shape
    tokens, keys = torch.randn(B, N, 5), torch.randint(-2, 3, (B, N, 4)).float()  # ties among norms are common
    reducer = DART(keep, 2, visual_pivots, text_pivots, rounding)
    m = reducer.reduce(view(layout, tokens, keys)).map
    for b in range(B):
        assert survivors(m, b) == oracle(layout, tokens, keys, reducer, b)
        one, slots = alone(layout, b)
        single = reducer.reduce(view(one, tokens[b, slots][None], keys[b, slots][None])).map
        assert [int(slots[s]) for s in survivors(single)] == survivors(m, b)
    assert m.target.lengths() == [counted(reducer, n, n) for n in layout.lengths()]
    if rounding == "exact":
        assert m.target.lengths() == [budget(keep, n) for n in layout.lengths()]


def test_a_pivot_takes_its_opposite_first() -> None:
    p = torch.tensor([1.0, 2.0, 0.0])
    x = torch.stack([p, p, torch.tensor([2.0, -1.0, 0.0]), -p])
    keys = torch.tensor([[0.0], [5.0], [1.0], [1.0]])
    for keep, kept in ((1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])):
        assert survivors(DART(keep, visual_pivots=1, text_pivots=0).reduce(pictured(x, keys)).map) == kept


def test_pivots_pick_in_turn_visual_ones_first_by_descending_norm() -> None:
    """Slots 1 and 4 are pivots. Slot 2 is the least like either; next, 3 for slot 1 and 5 for slot 4."""
    x = torch.tensor([[1.0, 1.0], [1.0, 0.1], [-1.0, -1.0], [-1.0, 0.9], [0.1, 1.0], [0.9, -1.0], [0.5, 0.5]])
    keys = torch.tensor([[0.0], [-9.0], [1.0], [0.0], [8.0], [0.0], [1.0]])
    assert survivors(DART(3, visual_pivots=2, text_pivots=1).reduce(pictured(x, keys, 1)).map) == [1, 2, 4, 6]
    assert survivors(DART(4, visual_pivots=2, text_pivots=1).reduce(pictured(x, keys, 1)).map) == [1, 2, 4, 5, 6]
    keys[1], keys[4] = 8.0, -9.0
    assert survivors(DART(4, visual_pivots=2, text_pivots=1).reduce(pictured(x, keys, 1)).map) == [1, 2, 3, 4, 6]


def test_a_text_pivot_picks_and_is_not_counted() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-1.0, 0.2], [0.0, 1.0]])
    keys = torch.tensor([[3.0], [0.0], [0.0], [0.0], [1.0]])
    # The visual pivot (slot 0) takes slot 3, the text (slot 4) then slot 2, its opposite.
    assert survivors(DART(3, visual_pivots=1, text_pivots=1).reduce(pictured(x, keys, 1)).map) == [0, 2, 3, 4]
    # Without text behind it the image still keeps as many.
    assert survivors(DART(3, visual_pivots=1, text_pivots=1).reduce(pictured(x[:4], keys[:4])).map) == [0, 1, 3]


def test_text_before_the_image_other_images_and_the_answer_are_no_pivots() -> None:
    layout = Layout.sequence(torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0]]).bool(), [6, 6])
    tokens, keys = torch.randn(1, 16, 4), torch.rand(1, 16, 3)

    def kept(*noisy: int) -> list[int]:
        x, k = tokens.clone(), keys.clone()
        for s in noisy:
            x[:, s], k[:, s] = torch.randn(4), torch.rand(3) * 50
        whole = view(layout, x, k)
        return survivors(DART(5, visual_pivots=1, text_pivots=2).reduce(whole.asked_at(torch.tensor([14]))).map)

    assert kept() == kept(0, 15)  # slot 15 is the answer
    assert [s for s in kept() if s < 8] == [s for s in kept(*range(8, 14)) if s < 8]
    assert [s for s in kept() if s > 6] == [s for s in kept(*range(8)) if s > 6]
    assert len({tuple(kept(14)) for _ in range(5)}) > 1  # the text behind both does count


@pytest.mark.parametrize(("keep", "stays"), [(192, 196), (128, 132), (64, 68), (0.222, 124), (1.0, 576), (576, 576), (575, 572), (3, 4)])
def test_counts_of_the_code(keep: float | int, stays: int) -> None:
    assert counted(DART(keep, rounding="code"), 576, 576) == stays
    counts = DART(keep, rounding="code").visual_tokens(576, 4)
    assert counts == [576, 576, stays, stays]
    assert counted(DART(keep), 576, 576) == (keep if isinstance(keep, int) else {0.222: 128, 1.0: 576}[keep])


@pytest.mark.parametrize("keep", [0.1, 0.222, 1 / 3, 0.7])
def test_shares_of_the_code_are_free_of_float_traps(keep: float) -> None:
    for n in range(1, 600, 13):
        t = math.floor(Fraction(str(keep)).limit_denominator(1000) * n / 8)
        assert counted(DART(keep, rounding="code"), n, n) == min(n, 8 * t + 4)
        assert counted(DART(keep, rounding="code", visual_pivots=10, text_pivots=5), n, n) == min(
            n, 15 * math.floor(Fraction(str(keep)).limit_denominator(1000) * n / 15) + 10
        )


@quick
@given(layouts(), st.integers(1, 8), st.integers(0, 10**6))
def test_scale_changes_nothing(layout: Layout, keep: int, seed: int) -> None:
    """Powers of two, token by token for the states and one for all keys: what a norm without weights does."""
    torch.manual_seed(seed)
    B, N = layout.shape
    tokens, keys = torch.randn(B, N, 5), torch.randn(B, N, 4)
    member = DART(keep).reduce(view(layout, tokens, keys)).map.member
    scaled = tokens * 2.0 ** torch.randint(-3, 4, (B, N, 1))
    assert torch.equal(DART(keep).reduce(view(layout, scaled, 4 * keys)).map.member, member)
    assert torch.equal(DART(keep).reduce(view(layout, tokens, -keys.flip(-1))).map.member, member)  # L1 norms, heads in any order


@quick
@given(layouts(), st.sampled_from([1.0, 9, 576]), st.sampled_from(["exact", "code"]))
def test_keeping_everything_is_the_identity(layout: Layout, keep: float | int, rounding: str) -> None:
    B, N = layout.shape
    assert DART(keep, rounding=rounding).reduce(view(layout, torch.randn(B, N, 3), torch.rand(B, N, 2))).map.is_identity


def test_survivors_keep_raster_order_and_positions() -> None:
    m = DART(9).reduce(pictured(torch.randn(40, 6), torch.randn(40, 4), 5)).map
    kept = survivors(m)
    assert kept == sorted(kept)
    assert kept[-5:] == list(range(35, 40))
    assert m.target.position.tolist() == [kept]
    assert DART().positions == "keep"


def test_of_original_counts_what_was_there_before_another_cut() -> None:
    first = pictured(torch.randn(20, 4), torch.rand(20, 2), 2)
    cut = TokenMap.keep(first.layout, top(first.layout, torch.rand(1, 20), 12))
    later = replace(view(cut.target, torch.randn(1, 14, 4), torch.rand(1, 14, 2)), first=first)
    assert DART(0.5, of="original").reduce(later).map.target.lengths() == [9]
    assert DART(0.5).reduce(later).map.target.lengths() == [6]
    assert (counted(DART(0.5, of="original"), 12, 18), counted(DART(0.5), 12, 18), counted(DART(0.9, of="original"), 12, 18)) == (9, 6, 12)


def test_states_without_length_do_no_harm() -> None:
    m = DART(5).reduce(pictured(torch.zeros(12, 3), torch.zeros(12, 2), 2)).map
    assert survivors(m) == [0, 1, 2, 3, 4, 10, 11]


def test_where_it_acts_and_how_it_is_spelled() -> None:
    assert DART().sites(32) == [FromLayer(2, (Keys(1),))]
    assert parse_with("dart:keep=128,layer=3,rounding=code", {"dart": DART}) == [DART(128, 3, rounding="code")]
    assert str(DART()) == "dart"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 0}, "layer=0 is not possible, the keys of the layer before it are needed; give an integer >= 1"),
        ({"layer": True}, "layer=True"),
        ({"visual_pivots": 0}, "visual_pivots=0 is not possible; give an integer >= 1"),
        ({"text_pivots": -1}, "text_pivots=-1 is not possible; give an integer >= 0"),
        ({"rounding": "up"}, "rounding='up' is not possible; choose \"exact\""),
        ({"of": "all"}, "of='all' is not possible"),
        ({"keep": 0}, "keep=0 is not possible"),
        ({"keep": "half"}, "keep='half' is not possible"),
    ],
)
def test_impossible_options_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        DART(**options)  # type: ignore[arg-type]


def test_a_view_without_states_is_an_error() -> None:
    with pytest.raises(FoveateError, match="needs the tokens' states"):
        DART().reduce(View(Layout.sequence(torch.ones(1, 4, dtype=torch.bool))))
