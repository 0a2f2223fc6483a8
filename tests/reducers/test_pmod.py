"""p-MoD: the paper's numbers, its rule against plain loops, and its errors."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.contract import View, Workload
from foveate.errors import FoveateError
from foveate.reducers import PMoD, parse, visual_tokens
from foveate.reducers.pmod import Routers
from foveate.tokens import Layout

K = [486, 464, 440, 414, 388, 360, 331, 302, 273, 244, 215, 187, 161, 135, 111, 89]
WIDTH, MLP = 4096, 11008  # of Vicuna-7B


def tera(visual: list[int], text: int) -> float:
    """T FLOPs of decoder layers, 2 a multiply-add, as the paper's tables come out."""
    total = [count + text for count in visual]
    return sum(2 * n * (4 * WIDTH**2 + 3 * WIDTH * MLP) + 4 * n * n * WIDTH for n in total) / 1e12


def test_how_many_go_through_each_of_32_layers() -> None:
    found = visual_tokens([PMoD()], 576, 32)
    assert found == [576] * 8 + K + [86] * 8
    assert sum(found) / (32 * 576) == pytest.approx(0.5369, abs=5e-5)


@pytest.mark.parametrize(
    ("visual", "text", "dense", "routed", "within"),
    [
        (576, 64, 8.38, 4.92, 0.02),  # LLaVA-1.5 7B; how long the text is, is not told
        (2560, 180, 39.46, 21.94, 0.01),  # LLaVA-NeXT 7B, up to 2,880 tokens an image: neither mean is told, and these come to both numbers
    ],
)
def test_the_papers_flops(visual: int, text: int, dense: float, routed: float, within: float) -> None:
    assert tera([visual] * 32, text) == pytest.approx(dense, rel=within)
    assert tera(visual_tokens([PMoD()], visual, 32), text) == pytest.approx(routed, rel=within)


@pytest.mark.parametrize(("tokens", "percent"), [(576, 53.8), (2880, 53.7)])
def test_the_papers_cache(tokens: int, percent: float) -> None:
    """Of the visual tokens' part."""
    assert 100 * sum(visual_tokens([PMoD()], tokens, 32)) / (32 * tokens) == pytest.approx(percent, abs=0.15)


@pytest.mark.parametrize("layers", [1, 2, 4, 7, 28])
@pytest.mark.parametrize("text", ["pmod", "pmod:shift=0.3,floor=0.4", "pmod:dense=1.0,shift=0.6"])
def test_shares_of_other_depths(layers: int, text: str) -> None:
    (reducer,) = parse(text)
    assert isinstance(reducer, PMoD)
    for layer in range(layers):
        share = math.cos(math.pi * layer / max(1, layers - 1)) / 2 + reducer.shift
        if share > reducer.dense:
            assert layer not in reducer.shares(layers)
        else:
            assert reducer.shares(layers)[layer] == min(1.0, max(reducer.floor, share))
    assert [site.layer for site in reducer.sites(layers)] == list(reducer.shares(layers))


def routed(logits: list[float], share: float) -> tuple[list[int], list[float]]:
    """What goes through and what all weigh, of an image whose routers say `logits` and a text token behind it."""
    N = len(logits)
    weights = Routers(1, 1)
    weights.weight.data.fill_(1.0)
    view = View.of(torch.tensor(logits).view(1, N, 1), text=torch.full((1, 1, 1), 9.0), layers=1, weights=weights)
    decision = PMoD(dense=1.0, shift=share - 0.5).reduce(view)
    assert decision.gain is not None
    assert decision.passing is decision.gain
    return decision.map.representative[0].tolist(), decision.gain[0].tolist()


def test_the_example_by_hand() -> None:
    kept, weight = routed([2.0, -1.0, 0.0, 0.0], 0.5)
    assert kept == [0, 2, 4]  # the tie of 2 and 3 goes to the lower index; the text stays
    assert weight == pytest.approx([1.1928, 0.8477, 1, 1, 1], abs=1e-4)


def test_new_routers_weigh_nothing_and_take_the_first() -> None:
    view = View.of(torch.randn(2, 6, 8), text=torch.randn(2, 2, 8), layers=4)
    decision = PMoD(untrained=True).reduce(view, 1)  # layer 2: a share of 1/4
    assert decision.map.representative.tolist() == [[0, 6, 7]] * 2
    assert decision.gain is not None
    assert bool((decision.gain == 1).all())


def test_no_weight_leaves_its_bounds() -> None:
    _, weight = routed([1e4, -1e4, 50.0, -50.0], 0.5)
    assert weight == pytest.approx([1.2, 0.8, 1.2, 0.8, 1.0])


def test_kept_and_passed_by_both_give_the_router_a_gradient() -> None:
    weights = Routers(8, 4)
    x = torch.randn(1, 6, 8)
    view = View.of(x, text=1, layers=4, weights=weights)
    decision = PMoD().reduce(view, 1)
    assert decision.gain is not None
    for token in range(5):  # the last one is text
        (grad,) = torch.autograd.grad(decision.gain[0, token], weights.weight, retain_graph=True)
        torch.testing.assert_close(grad[2], 0.2 * x[0, token])


def test_each_image_is_ranked_by_itself() -> None:
    weights = Routers(1, 1)
    weights.weight.data.fill_(1.0)
    visual = torch.tensor([[True] * 4 + [False] + [True] * 4])
    layout = Layout.sequence(visual, grids=[(2, 2), (2, 2)])
    x = torch.tensor([9.0, 8, 7, 6, 0, 1, 2, 3, 4]).view(1, 9, 1) / 10
    kept = PMoD(dense=1.0, shift=0.0).reduce(View.of(x, layout=layout, layers=1, weights=weights)).map.representative
    assert kept.tolist() == [[0, 1, 4, 7, 8]]


@pytest.mark.parametrize("option", ["shift=2", "shift=true", "floor=0", "floor=1.5", "dense=0", "dense=x", "untrained=1"])
def test_impossible_options_are_named(option: str) -> None:
    with pytest.raises(FoveateError, match=f"pmod: {option.partition('=')[0]}=.* is not possible"):
        parse(f"pmod:{option}")


def test_what_a_view_must_tell() -> None:
    with pytest.raises(FoveateError, match="pmod decides by weights and the view has none"):
        PMoD().reduce(View.of(torch.randn(1, 4, 8), layers=4), 1)
    with pytest.raises(FoveateError, match="depends on the model's depth"):
        PMoD().reduce(View.of(torch.randn(1, 4, 8)), 1)
    with pytest.raises(FoveateError, match="depends on the model's depth"):
        PMoD().count(Workload((), ()), 1)
    with pytest.raises(FoveateError, match="pmod has no option keep"):
        PMoD().at(0.5)
