"""Schedules against a plain oracle and the methods that they contain, by hand, and what must hold of shares and their spelling."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import FoveateError
from foveate.contract import Attention, AttentionRows, BeforeLM, ClsAttention, FromLayer, Noise, View
from foveate.reducers.base import parse_with
from foveate.reducers.fastervlm import FasterVLM
from foveate.reducers.fastv import FastV
from foveate.reducers.pyramiddrop import PyramidDrop
from foveate.reducers.schedule import Schedule
from foveate.reducers.uniform import Uniform
from foveate.tokens import Layout, budget
from tests.reducers.ragged import counted
from tests.reducers.test_fastv import alone, grades, images, ranked, survivors, view
from tests.test_tokens import layouts

quick = settings(max_examples=40)
LAYERS = (1, 3, 4)  # in front of which the schedules of these tests cut


@st.composite
def shares(draw: st.DrawFn) -> list[float]:
    """One a layer of LAYERS, each smaller than the one before."""
    tenths = draw(st.sets(st.integers(1, 9), min_size=len(LAYERS), max_size=len(LAYERS)))
    return [tenth / 10 for tenth in sorted(tenths, reverse=True)]


@quick
@given(layouts(), shares(), st.integers(0, 10**6))
def test_three_cuts_of_ragged_batches(layout: Layout, keep: list[float], seed: int) -> None:
    """Against loops and one by one: every cut ranks anew what is left, and takes a share of what the image had."""
    torch.manual_seed(seed)
    reducer, first = Schedule(list(zip(LAYERS, keep, strict=True))), None
    original, here = [len(i) for b in range(layout.shape[0]) for i in images(layout, b)], layout
    for stage, (layer, share) in enumerate(zip(LAYERS, keep, strict=True)):
        B, N = here.shape
        weights = grades(B, 2, N, N)
        now = replace(view(here, weights, layer - 1), first=first)
        first = first or now
        m = reducer.reduce(now, stage).map
        lengths = iter(original)
        for b in range(B):
            score = weights[b, :, int(here.valid[b].nonzero()[-1])].double().mean(0).numpy()
            kept = (here.valid[b] & ~here.visual[b]).nonzero()[:, 0].tolist()
            had = [next(lengths) for _ in images(here, b)]
            for slots, n in zip(images(here, b), had, strict=True):
                assert counted(reducer, len(slots), n, stage) == budget(share, n)
                kept += ranked(np.asarray(score), slots, budget(share, n))
            assert survivors(m, b) == sorted(kept)
            if stage == 0:
                one, at = alone(here, b)
                single = reducer.reduce(view(one, weights[b][None, :, at][..., at], layer - 1)).map
                assert [int(at[s]) for s in survivors(single)] == survivors(m, b)
        here = m.target
    assert here.lengths() == [budget(keep[-1], n) for n in original]


@quick
@given(layouts(), st.sampled_from([0.1, 0.3, 0.5, 0.9]), st.integers(0, 10**6))
def test_one_cut_is_fastv(layout: Layout, keep: float, seed: int) -> None:
    torch.manual_seed(seed)
    B, N = layout.shape
    given = view(layout, grades(B, 2, N, N))
    assert torch.equal(Schedule([(2, keep)]).reduce(given).map.member, FastV(keep).reduce(given).map.member)


def test_halves_at_the_ends_of_stages_are_pyramiddrop() -> None:
    """64 tokens, so that no half is rounded."""
    here, first = Layout.sequence(torch.arange(70)[None] < 64), None
    schedule, pyramid = Schedule("8:0.5/16:0.25/24:0.125"), PyramidDrop()
    assert schedule.sites(32) == pyramid.sites(32)
    assert schedule.visual_tokens(64, 32) == pyramid.visual_tokens(64, 32)
    for stage, layer in enumerate((7, 15, 23)):
        N = here.shape[1]
        now = replace(view(here, torch.rand(1, 2, N, N), layer), first=first, layers=32)
        first = first or now
        m = schedule.reduce(now, stage).map
        assert torch.equal(m.member, pyramid.reduce(now, stage).map.member)
        here = m.target


def test_counts_by_hand() -> None:
    assert Schedule("0:1/2:0.5/4:0.25").visual_tokens(64, 6) == [64, 64, 32, 32, 16, 16]
    assert Schedule("0:1/2:0.5/4:0.25").visual_tokens(1, 6) == [1] * 6
    assert Schedule("1:0.5/2:0.3").visual_tokens(5, 4) == [5, 3, 2, 2]  # 2.5 and 1.5, half up; of 5, not of 3
    assert Schedule("1:0.001").visual_tokens(64, 2) == [64, 1]
    assert Schedule("0:1").visual_tokens(64, 2) == [64, 64]


def test_a_weak_token_comes_back_in_no_later_ranking() -> None:
    """Layer 0 asks for tokens 0 and 1 of four; layer 1 would ask for 3, which is gone."""
    row = torch.zeros(1, 1, 5, 5)
    row[..., :2] = 0.5
    reducer = Schedule("1:0.5/2:0.25")
    first = view(Layout.sequence(torch.arange(5)[None] < 4), row, 0)
    m = reducer.reduce(first).map
    assert survivors(m) == [0, 1, 4]
    row = torch.zeros(1, 1, 3, 3)
    row[0, 0, 2] = torch.tensor([0.2, 0.3, 0.5])
    assert m.then(reducer.reduce(replace(view(m.target, row), first=first), 1).map).representative.tolist() == [[1, 4]]


@quick
@given(layouts(), st.sampled_from([0.2, 0.5, 0.8]), st.integers(0, 10**6))
def test_other_rankings(layout: Layout, keep: float, seed: int) -> None:
    torch.manual_seed(seed)
    B, N = layout.shape
    cls, noise = grades(B, N), grades(B, N)
    given = View.of(torch.zeros(B, N, 1), layout=layout, signals={ClsAttention(): cls, Noise(5): noise})
    rankings = ("cls", "random", "uniform")
    found = {signal: Schedule([(0, keep)], signal, seed=5).reduce(given).map for signal in rankings}
    assert torch.equal(found["cls"].member, FasterVLM(keep, scope="image").reduce(given).map.member)
    assert torch.equal(found["uniform"].member, Uniform(keep).reduce(given).map.member)
    for b in range(B):
        kept = (layout.valid[b] & ~layout.visual[b]).nonzero()[:, 0].tolist()
        for slots in images(layout, b):
            kept += ranked(noise[b].numpy(), slots, budget(keep, len(slots)))
        assert survivors(found["random"], b) == sorted(kept)


def test_where_it_acts() -> None:
    assert Schedule("0:1/2:0.5/4:0.25").sites(6) == [FromLayer(2, (Attention(1),)), FromLayer(4, (Attention(3),))]
    assert Schedule("0:0.5/3:0.25", "cls").sites(6) == [BeforeLM((ClsAttention(),)), FromLayer(3, (ClsAttention(),))]
    assert Schedule("1:0.5", "random", seed=7).sites(6) == [FromLayer(1, (Noise(7),))]
    assert Schedule("0:0.5", "uniform").sites(6) == [BeforeLM()]
    assert Schedule("0:1").sites(6) == []
    assert Schedule().positions == "keep"


@pytest.mark.parametrize(
    ("keeps", "spelled"),
    [
        ("0:1/2:0.50/3:.5/4:0.25", "2:0.5/4:0.25"),
        ([(0, 1), (2, 0.5), (4, 0.25)], "2:0.5/4:0.25"),
        ([(3, 0.00001)], "3:0.00001"),
        (((1, 1 / 3),), "1:0.3333333333333333"),
        ("0:1/5:1.0", "0:1"),
    ],
)
def test_the_spelling_is_canonical(keeps: Any, spelled: str) -> None:
    reducer = Schedule(keeps)
    assert str(reducer) == f"schedule:keeps={spelled}"
    assert parse_with(str(reducer), {"schedule": Schedule}) == [reducer]
    assert Schedule.from_dict(reducer.to_dict()) == reducer


def test_the_default_and_all_options_are_read_back() -> None:
    assert str(Schedule()) == "schedule"
    reducer = Schedule("0:0.5/1:0.25", "random", seed=3, positions="renumber")
    assert str(reducer) == "schedule:positions=renumber,keeps=0:0.5/1:0.25,signal=random,seed=3"
    assert parse_with(f"{reducer}+schedule", {"schedule": Schedule}) == [reducer, Schedule()]


@quick
@given(st.integers(1, 600).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), min_size=1, max_size=40))))
def test_counts_become_shares_and_come_back(drawn: tuple[int, list[int]]) -> None:
    per_image, counts = drawn
    counts = sorted(counts, reverse=True)
    reducer = Schedule.of_counts(counts, per_image, signal="cls")
    assert reducer.visual_tokens(per_image, len(counts)) == counts
    assert parse_with(str(reducer), {"schedule": Schedule}) == [reducer]


def test_counts_become_short_shares() -> None:
    """0.3 of 64 tokens would be 19, 0.1 would be 6."""
    assert str(Schedule.of_counts([64, 64, 32, 16, 16, 5], 64)) == "schedule:keeps=2:0.5/3:0.25/5:0.08"


@quick
@given(layouts(), st.sampled_from(["0:1", "1:0.999", "2:0.99/3:0.98"]))
def test_keeping_everything_is_the_identity(layout: Layout, keeps: str) -> None:
    B, N = layout.shape
    reducer = Schedule(keeps)
    for stage, (layer, _) in enumerate(reducer.cuts):
        assert reducer.reduce(view(layout, torch.rand(B, 1, N, N), layer - 1), stage).map.is_identity
    assert reducer.visual_tokens(9, 4) == [9] * 4


@quick
@given(layouts(), st.integers(0, 10**6))
def test_order_of_heads_and_scale_change_nothing(layout: Layout, seed: int) -> None:
    torch.manual_seed(seed)
    B, N = layout.shape
    weights = grades(B, 4, N, N)
    member = Schedule().reduce(view(layout, weights)).map.member
    for other in (weights[:, [2, 0, 3, 1]], 0.25 * weights):
        assert torch.equal(Schedule().reduce(view(layout, other)).map.member, member)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keeps": ""}, "keeps='' is not possible, a pair is empty; write layer:share pairs, as in keeps=2:0.5/4:0.25"),
        ({"keeps": []}, r"keeps=\[\] is not possible, it is empty"),
        ({"keeps": None}, "None is no layer and share"),
        ({"keeps": 0.5}, "0.5 is no layer and share"),
        ({"keeps": "0.5"}, "'0.5' is no layer and share"),
        ({"keeps": "2:0.5/"}, "a pair is empty"),
        ({"keeps": "2:0.5:1"}, "'2:0.5:1' is no layer and share"),
        ({"keeps": [(2.5, 0.5)]}, r"\(2.5, 0.5\) is no layer and share"),
        ({"keeps": "two:0.5"}, "'two:0.5' is no layer and share"),
        ({"keeps": "2:32"}, r"the share 32 is not in \(0, 1\]"),
        ({"keeps": "2:0"}, r"the share 0 is not in \(0, 1\]"),
        ({"keeps": "2:nan"}, r"the share nan is not in \(0, 1\]"),
        ({"keeps": "-1:0.5"}, "there is no layer -1"),
        ({"keeps": "2:0.5/2:0.25"}, "layer 2 does not come after layer 2"),
        ({"keeps": "4:0.5/2:0.25"}, "layer 2 does not come after layer 4"),
        ({"keeps": "2:0.25/4:0.5"}, "the share rises from 0.25 to 0.5 at layer 4, and what is dropped does not come back"),
        ({"keeps": "0:0.5"}, "no layer's attention can be read in front of layer 0; begin at layer 1, or choose signal=cls"),
        ({"signal": "text"}, "signal='text' is not possible; choose \"attention\""),
        ({"seed": -1}, "seed=-1 is not possible; give an integer >= 0"),
        ({"positions": "gap"}, "positions='gap'"),
    ],
)
def test_impossible_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        Schedule(**options)


@pytest.mark.parametrize("counts", [[4, 0], [5, 4], [2, 3]])
def test_impossible_counts_are_errors(counts: list[int]) -> None:
    with pytest.raises(FoveateError, match=r"cannot be kept; give counts from 1 to 4|the share rises from 0\.5 to 0\.8"):
        Schedule.of_counts(counts, 4)


def test_a_view_that_does_not_say_who_asks_is_an_error() -> None:
    layout = Layout.sequence(torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(FoveateError, match="where the question ends is not known"):
        Schedule().reduce(View(layout, signals={Attention(1): AttentionRows.of(torch.rand(1, 1, 4, 4))}))
