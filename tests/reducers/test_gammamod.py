"""γ-MoD: the authors' number, its rule against plain loops, ranks of attention maps, and its errors."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from torch.nn.functional import cross_entropy

from foveate.contract import ThroughLayer, View
from foveate.errors import FoveateError
from foveate.reducers import GammaMoD, parse, visual_tokens
from foveate.reducers.gammamod import Router, arank
from foveate.tokens import Layout
from tests.reducers.ragged import counted, make


@pytest.mark.parametrize(("prompt", "left"), [(1100, 571), (1200, 671), (1500, 971), (2048, 1519)])
def test_529_dropped(prompt: int, left: int) -> None:
    """Of 1,024 tokens of an image and the 35 in front of it, however long the prompt is: the authors' capacity, and this rule."""
    capacity = 1 - (1024 + 35) * 0.5 / prompt
    assert ceil(prompt * capacity) == left == prompt - 529
    assert counted(GammaMoD(), 1024 + 35, 1024 + 35) == 1024 + 35 - 529
    assert counted(GammaMoD(), 1024, 1024) == 512


@pytest.mark.parametrize(("keep", "through"), [(0.5, 5), (0.3, 3), (0.34, 4), (1 / 3, 3), (0.0001, 1), (4, 4), (40, 9), (1.0, 9)])
def test_how_many_go_through(keep: float | int, through: int) -> None:
    assert visual_tokens([GammaMoD(keep, layers="1-2")], 9, 4) == [9, through, through, 9]


def test_the_inner_layers_of_32() -> None:
    assert GammaMoD().sites(32) == [ThroughLayer(layer) for layer in range(3, 31)]
    with pytest.raises(FoveateError, match=r"a model of 4 decoder layers has no inner ones; name some, as in layers=1-2"):
        GammaMoD().sites(4)


def routed(p: list[float], text: int = 1, **options: object) -> tuple[list[int], list[float], View]:
    """What goes through and what all weigh, of an image to whose tokens the router gives these probabilities."""
    router = Router(2)
    router.weight.data = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    half = torch.tensor(p).logit() / 2
    states = torch.stack([half, (2 - half.square()).sqrt()], -1)[None]  # of a root mean square of 1
    view = View.of(states, text=torch.ones(1, text, 2), layers=4, weights=router)
    decision = GammaMoD(layers="1-2", **options).reduce(view, 1)  # type: ignore[arg-type]
    assert decision.gain is not None
    assert decision.passing is None
    return decision.map.representative[0].tolist(), decision.gain[0].tolist(), view


def test_the_example_by_hand() -> None:
    """Two of four tokens, and the question's two, which are never ranked. Positions are counted anew."""
    kept, weight, _ = routed([0.7, 0.1, 0.6, 0.2], text=2)
    assert kept == [0, 2, 4, 5]
    assert weight == pytest.approx([0.7, 0.1, 0.6, 0.2, 1, 1], abs=1e-5)
    assert routed([0.7, 0.1, 0.6, 0.2], weigh="2p")[1] == pytest.approx([1.4, 0.2, 1.2, 0.4, 1], abs=1e-5)
    assert GammaMoD().positions == "renumber"


def test_the_loss_is_the_cross_entropy_to_what_goes_through() -> None:
    _, _, view = routed([0.7, 0.1, 0.6, 0.2])
    reducer = GammaMoD(layers="1-2")
    assert view.weights is not None
    loss = reducer.reduce(view, 0).loss
    assert loss is not None
    p = torch.tensor([0.7, 0.1, 0.6, 0.2])
    logits = torch.stack([torch.zeros(4), p.logit()], -1)
    torch.testing.assert_close(loss, cross_entropy(logits, torch.tensor([1, 0, 1, 0]))[None], rtol=1e-4, atol=1e-6)
    loss.sum().backward()
    (weight,) = view.weights.parameters()
    assert weight.grad is not None
    assert bool(weight.grad.any())
    assert reducer.loss_weight(0.0) == reducer.loss_weight(0.9) == 0.01
    view.weights.eval()
    assert reducer.reduce(view, 0).loss is None


def test_a_new_router_is_the_dense_model_or_halves_it() -> None:
    view = View.of(torch.randn(2, 6, 8), text=torch.randn(2, 2, 8), layers=4)
    for weigh, gain in (("2p", 1.0), ("p", 0.5)):
        decision = GammaMoD(layers="1", weigh=weigh, untrained=True).reduce(view)
        assert decision.map.representative.tolist() == [[0, 1, 2, 6, 7]] * 2  # all tie
        assert decision.gain is not None
        assert torch.equal(decision.gain, torch.tensor([gain] * 6 + [1.0] * 2).expand(2, 8))


def test_one_router_for_all_layers_and_images_each_by_itself() -> None:
    batch = make([[1, (2, 3), 2, (1, 3), 1], [2], [(3, 3), 1]], left=True, width=6)
    router = Router(6)
    torch.nn.init.normal_(router.weight)
    reducer = GammaMoD(layers="1-2")

    def decided(view: View, stage: int) -> list[list[int]]:
        return reducer.reduce(view, stage).map.representative.tolist()

    whole = View.of(batch.tokens, layout=batch.layout, layers=4, weights=router)
    assert decided(whole, 0) == decided(whole, 1)
    expected = []
    for row, slots in batch.images():
        x = batch.tokens[row, slots].double()
        logits = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ router.weight.double().T
        p = logits.softmax(-1)[:, 1].tolist()
        best = sorted(range(len(slots)), key=lambda n, p=p: (-p[n], n))[: len(slots) - len(slots) // 2]  # type: ignore[misc]
        expected += [(row, slots[n]) for n in sorted(best)]
    kept = [(b, s) for b, row in enumerate(decided(whole, 0)) for s in row if s >= 0 and bool(batch.layout.visual[b, s])]
    assert kept == expected


def test_ranks_of_attention_maps() -> None:
    for n in (1, 5, 24):
        uniform = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
        assert arank(torch.stack([torch.eye(n), uniform])).tolist() == [0, n - 1]
    first = torch.zeros(6, 6)
    first[:, 0] = 1  # all look at the first token
    assert arank(first[None]).tolist() == [1]


def test_layers_of_lowest_rank() -> None:
    ranks = {1: 9.0, 2: 3.5, 3: 3.5, 4: 7.0, 6: 2.0}
    assert [GammaMoD.of_ranks(ranks, share).layers for share in (0.2, 0.4, 0.6, 1.0)] == [6, "3-6", "2-3-6", "1-2-3-4-6"]
    assert GammaMoD.of_ranks(ranks, 0.4, weigh="2p", keep=0.7) == parse("gammamod:layers=3-6,weigh=2p,keep=0.7")[0]
    with pytest.raises(FoveateError, match=r"keep=2\.0 is not possible"):
        GammaMoD.of_ranks(ranks, 2)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("keep=0", "keep=0 is not possible"),
        ("keep=1.5", "keep=1.5 is not possible"),
        ("layers=0-2", "gammamod: layers='0-2' is not possible; give ascending integers >= 1"),
        ("layers=outer", "gammamod: layers='outer' is not possible"),
        ("weigh=3p", 'gammamod: weigh=.3p. is not possible; choose "p" or "2p"'),
        ("untrained=1", "gammamod: untrained=1 is not possible"),
    ],
)
def test_impossible_options_are_named(option: str, says: str) -> None:
    with pytest.raises(FoveateError, match=says):
        parse(f"gammamod:{option}")


def test_what_a_view_must_tell() -> None:
    layout = Layout.sequence(torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(FoveateError, match="gammamod decides by weights and the view has none"):
        GammaMoD(layers="1").reduce(View.of(torch.randn(1, 4, 8), layers=4))
    with pytest.raises(FoveateError, match="gammamod looks at the tokens' states and the view has none"):
        GammaMoD(layers="1").reduce(View(layout, weights=Router(8)))
