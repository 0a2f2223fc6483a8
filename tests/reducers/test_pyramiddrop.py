"""PyramidDrop against a plain oracle, the card's numbers, and what must hold of nested cuts."""

from dataclasses import replace
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import Attention, AttentionRows, FromLayer, Signal, View
from foveate.reducers.base import parse_with
from foveate.reducers.pyramiddrop import PyramidDrop
from foveate.tokens import Layout, TokenMap
from tests.reducers.ragged import counted
from tests.reducers.test_fastv import alone, grades, images, ranked, survivors
from tests.test_tokens import layouts

quick = settings(max_examples=40)


def view(layout: Layout, weights: Tensor, stage: int = 0, layers: int = 32, first: View | None = None) -> View:
    """In front of a drop of a model that is cut into four stages, whose last layers' attention is `weights`."""
    signals: dict[Signal, Any] = {Attention(layers * (stage + 1) // 4 - 1): AttentionRows.of(weights)}
    return replace(View.of(torch.zeros(*layout.shape, 1), layout=layout, signals=signals, layers=layers), first=first)


def shares(original: int, keep: float = 0.5, of: str = "arriving") -> list[int]:
    return PyramidDrop(keep, of=of).visual_tokens(original, 4)[1:]


@pytest.mark.parametrize("of", ["arriving", "original"])
def test_counts_of_576_and_575(of: str) -> None:
    assert shares(576, of=of) == [288, 144, 72]
    assert shares(575, of=of) == [287, 143, 71]
    assert shares(576, 1.0, of) == [576] * 3
    assert shares(1, 0.01, of) == [1] * 3  # the paper's rule would leave none


@pytest.mark.parametrize("keep", [0.9, 0.75, 1 / 3, 0.222, 0.58, 0.1])
def test_the_paper_removes_a_ceiling_and_the_code_keeps_a_floor(keep: float) -> None:
    share = Fraction(str(keep)).limit_denominator(1000)
    for v in range(1, 700, 7):
        assert counted(PyramidDrop(keep), v, 999) == max(1, v - ceil((1 - share) * v))
        for stage in range(3):
            assert counted(PyramidDrop(keep, of="original"), v, v, stage) == max(1, int(v * share ** (stage + 1)))


def test_the_two_rules_differ_in_the_last_token() -> None:
    assert shares(575, 0.9) == [517, 465, 418]
    assert shares(575, 0.9, "original") == [517, 465, 419]
    assert shares(576, 1 / 3) == [192, 64, 21]  # the float below 1/3 would give 191


def test_lengths_and_cost_of_the_paper() -> None:
    counts = PyramidDrop().visual_tokens(576, 32)
    assert counts == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert sum(counts) / 32 == 270
    assert [n + 55 for n in counts[::8]] == [631, 343, 199, 127]

    def cost(n: int) -> int:
        return 4 * n * 4096**2 + 2 * n**2 * 4096 + 3 * n * 4096 * 11008

    assert round(sum(map(cost, counts)) / 1e12, 3) == 1.777
    assert PyramidDrop().positions == "renumber"


def test_the_drops_stand_at_equal_parts_of_the_depth() -> None:
    assert PyramidDrop().sites(32) == [FromLayer(k, (Attention(k - 1),)) for k in (8, 16, 24)]
    assert [s.layer for s in PyramidDrop().sites(28)] == [7, 14, 21]
    assert [s.layer for s in PyramidDrop(stages=3).sites(32)] == [10, 21]
    assert [s.layer for s in PyramidDrop().sites(4)] == [1, 2, 3]


@quick
@given(layouts(), st.sampled_from([0.9, 0.5, 0.3, 1, 3]), st.sampled_from(["arriving", "original"]), st.integers(0, 10**6))
def test_three_stages_of_ragged_batches(layout: Layout, keep: float | int, of: str, seed: int) -> None:
    """Against loops, one by one, nested, text untouched, and as many as promised."""
    torch.manual_seed(seed)
    reducer, first = PyramidDrop(keep, of=of), None
    original, here = [len(i) for b in range(layout.shape[0]) for i in images(layout, b)], layout
    for stage in range(3):
        B, N = here.shape
        weights = grades(B, 2, N, N)
        now = view(here, weights, stage, first=first)
        first = first or now
        m = reducer.reduce(now, stage).map
        lengths = iter(original)
        for b in range(B):
            score = weights[b, :, int(here.valid[b].nonzero()[-1])].double().mean(0).numpy()
            kept = (here.valid[b] & ~here.visual[b]).nonzero()[:, 0].tolist()
            for slots in images(here, b):
                kept += ranked(np.asarray(score), slots, counted(reducer, len(slots), next(lengths), stage))
            assert survivors(m, b) == sorted(kept)
            if of == "arriving":
                one, at = alone(here, b)
                single = reducer.reduce(view(one, weights[b][None, :, at][..., at], stage), stage).map
                assert [int(at[s]) for s in survivors(single)] == survivors(m, b)
        here = m.target
    if of == "original" and keep == 0.5:
        assert here.lengths() == [max(1, n // 8) for n in original]


def test_the_sets_are_nested() -> None:
    layout = Layout.sequence(torch.arange(80)[None] < 64)
    reducer, whole, sets = PyramidDrop(), TokenMap.identity(layout), []
    for stage in range(3):
        N = whole.target.shape[1]
        whole = whole.then(reducer.reduce(view(whole.target, torch.rand(1, 4, N, N), stage, 8), stage).map)
        sets.append(set(survivors(whole)))
    assert [len(s) for s in sets] == [32 + 16, 16 + 16, 8 + 16]
    assert sets[0] > sets[1] > sets[2] > set(range(64, 80))


def test_one_entry_a_drop() -> None:
    assert PyramidDrop("0.5-0.25-0.125", of="original").visual_tokens(575, 32)[::8] == [575, 287, 143, 71]
    assert PyramidDrop((0.5, 0.25, 0.125)).visual_tokens(576, 32)[::8] == [576, 288, 72, 9]
    assert PyramidDrop((100, 50, 1)).visual_tokens(576, 32)[::8] == [576, 100, 50, 1]
    assert PyramidDrop(64).visual_tokens(576, 32)[::8] == [576, 64, 64, 64]


@quick
@given(layouts(), st.sampled_from([1.0, 9, 576, "1.0-1.0-1.0", (9, 1.0, 1)]), st.sampled_from(["arriving", "original"]))
def test_keeping_everything_is_the_identity(layout: Layout, keep: float | int, of: str) -> None:
    B, N = layout.shape
    reducer = PyramidDrop(keep, of=of)
    for stage in range(2):
        m = reducer.reduce(view(layout, torch.rand(B, 1, N, N), stage), stage).map
        assert m.is_identity


@quick
@given(layouts(), st.integers(0, 10**6))
def test_order_of_heads_and_scale_change_nothing(layout: Layout, seed: int) -> None:
    torch.manual_seed(seed)
    B, N = layout.shape
    weights = grades(B, 4, N, N)
    member = PyramidDrop().reduce(view(layout, weights)).map.member
    for other in (weights[:, [2, 0, 3, 1]], 0.25 * weights):
        assert torch.equal(PyramidDrop().reduce(view(layout, other)).map.member, member)


@pytest.mark.parametrize(
    "reducer",
    [PyramidDrop(), PyramidDrop((0.5, 0.25, 0.1), of="original"), PyramidDrop("300-200-110"), PyramidDrop((0.00001, 5), stages=3)],
)
def test_the_spelling_is_read_back(reducer: PyramidDrop) -> None:
    assert parse_with(str(reducer), {"pyramiddrop": PyramidDrop}) == [reducer]
    assert PyramidDrop.from_dict(reducer.to_dict()) == reducer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 1}, "stages=1 is not possible; give an integer >= 2"),
        ({"stages": 2.0}, "stages=2.0"),
        ({"keep": 0.0}, "keep=0.0 is not possible"),
        ({"keep": True}, "keep=True is not possible"),
        ({"keep": "half"}, "keep='half' is not possible"),
        ({"keep": ()}, r"keep=\(\) is empty"),
        ({"keep": None}, "keep=None is not possible"),
        ({"keep": (0.5, 0.25)}, "has 2 entries, but 4 stages have 3 drops"),
        ({"keep": (0.5, 0.25, 2.0)}, "keep=2.0 is not possible"),
        ({"of": "first"}, "of='first' is not possible"),
        ({"positions": "gap"}, "positions='gap'"),
    ],
)
def test_impossible_options_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        PyramidDrop(**options)  # type: ignore[arg-type]


def test_what_a_model_or_a_view_lacks_is_an_error() -> None:
    with pytest.raises(FoveateError, match="3 decoder layers cannot be cut into 4 stages; give stages=3"):
        PyramidDrop().sites(3)
    layout = Layout.sequence(torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(FoveateError, match=r"pyramiddrop: at which layer .* give View.of\(layers=…\)"):
        PyramidDrop().reduce(View.of(torch.zeros(1, 4, 1), layout=layout, signals={Attention(1): torch.zeros(1, 4)}))
    with pytest.raises(FoveateError, match=r"Attention.layer=7. is not provided here"):
        PyramidDrop().reduce(View.of(torch.zeros(1, 4, 1), layout=layout, layers=32))


def test_each_drop_looks_at_the_last_layer_of_its_own_stage() -> None:
    """Whatever else the view holds: attention of the other stages would keep other tokens."""
    layout = Layout.sequence(torch.arange(9)[None] < 8)
    weights = torch.zeros(3, 1, 1, 9, 9)
    signals: dict[Signal, Any] = {}
    for stage, layer in enumerate((7, 15, 23)):
        weights[stage, ..., stage] = 1
        signals[Attention(layer)] = AttentionRows.of(weights[stage])
    whole = View.of(torch.zeros(1, 9, 1), layout=layout, signals=signals, layers=32)
    for stage in range(3):
        assert survivors(PyramidDrop(1).reduce(whole, stage).map) == [stage, 8]
