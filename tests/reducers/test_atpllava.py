"""ATP-LLaVA: its scores and cuts against plain loops, the budget that its loss meets, and its errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.contract import Attention, AttentionRows, FromLayer, Question, View, Workload
from foveate.errors import FoveateError
from foveate.reducers import ATPLLaVA, parse
from foveate.reducers.atpllava import Thresholds, spread
from foveate.tokens import Layout, TokenMap
from tests.reducers.ragged import Ragged, make

DEPTH = 32


def view_of(batch: Ragged, weights: Thresholds | None, layer: int, seed: int = 0) -> View:
    N = batch.layout.shape[1]
    rows = torch.rand(len(batch.spans), 2, N, N, generator=torch.Generator().manual_seed(seed))
    return View.of(batch.tokens, layout=batch.layout, signals={Attention(layer - 1): AttentionRows.of(rows)}, layers=DEPTH, weights=weights)


def drawn(layers: int = DEPTH) -> Thresholds:
    torch.manual_seed(1)
    weights = Thresholds(layers)
    for parameter in weights.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return weights.eval()


def sigmoid(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).sigmoid())


def expected(batch: Ragged, view: View, weights: Thresholds, layer: int, spatial: bool) -> list[tuple[int, int]]:
    """(row, slot) of what stays, in loops."""
    rows = view.signal(Attention(layer - 1)).weights.double().mean(1)
    found = []
    for (row, slots), (_, columns) in zip(batch.images(), batch.grids, strict=True):
        own = [s for s in range(batch.layout.shape[1]) if batch.layout.visual[row, s]]
        text = [s for s in range(batch.layout.shape[1]) if batch.layout.valid[row, s] and s not in own]
        scores = []
        for by in (own, text):
            received = [sum(float(rows[row, q, n]) for q in by) / max(1, len(by)) for n in slots]
            mean = sum(received) / len(received)
            scores.append([r / mean / (1 + r / mean) if mean else 0.0 for r in received])
        means = [sum(score) / len(score) for score in scores]
        weight, bias = weights.weight[layer].tolist(), weights.bias[layer].tolist()
        theta = [sigmoid(weight[i][0] * means[0] + weight[i][1] * means[1] + bias[i]) for i in range(2)]
        margins = []
        for n in range(len(slots)):
            r, c = divmod(n, columns)
            steps = [step for step in (2, 4, 8) if r % step == 0 and c % step == 0]
            d = 1 - 3 / max(steps) ** 2 if steps else 0.0
            looked = (scores[0][n] + scores[1][n]) / 2 - theta[0]
            margins.append(max(looked, d - theta[1]) if spatial else looked)
        stays = [n for n, margin in enumerate(margins) if margin > 0] or [margins.index(max(margins))]
        found += [(row, slots[n]) for n in stays]
    return found


def kept(token_map: TokenMap, layout: Layout) -> list[tuple[int, int]]:
    return [(b, s) for b, row in enumerate(token_map.representative.tolist()) for s in row if s >= 0 and bool(layout.visual[b, s])]


@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize("left", [True, False])
def test_the_rule_in_ragged_batches(spatial: bool, left: bool) -> None:
    batch = make([[1, (9, 5), 2, (3, 4), 1], [2], [(4, 4), 2]], left=left, pad=1)
    weights, reducer = drawn(), ATPLLaVA(layers="3", spatial=spatial)
    for seed in range(3):
        view = view_of(batch, weights, 3, seed)
        found = reducer.reduce(view).map
        assert kept(found, batch.layout) == expected(batch, view, weights, 3, spatial)
        rows = view.signal(Attention(2)).weights
        for b, (single, (start, end)) in enumerate(zip(batch.rows, batch.spans, strict=True)):
            alone = replace(view_of(single, weights, 3), signals={Attention(2): AttentionRows.of(rows[b : b + 1, :, start:end, start:end])})
            if single.grids:
                own = [(b, start + s) for _, s in kept(reducer.reduce(alone).map, single.layout)]
                assert own == [at for at in kept(found, batch.layout) if at[0] == b]


def test_the_spacing_of_a_raster() -> None:
    """The published rates: of 24 x 24 tokens 144, 36 and 9."""
    layout = Layout.sequence(torch.ones(1, 576, dtype=torch.bool), grids=[(24, 24)])
    values, counts = spread(layout).unique(return_counts=True)
    assert values.tolist() == pytest.approx([0, 0.25, 0.8125, 0.953125])
    assert counts.tolist() == [576 - 144, 144 - 36, 36 - 9, 9]
    assert not spread(Layout.sequence(torch.ones(1, 16, dtype=torch.bool))).any()  # no raster


def test_one_token_stays_and_broken_pictures_are_shown_whole() -> None:
    weights = Thresholds(DEPTH).eval()
    weights.bias.data.fill_(9.0)  # thresholds near 1
    batch = make([[(2, 3), 1]])
    assert len(kept(ATPLLaVA(layers="3").reduce(view_of(batch, weights, 3)).map, batch.layout)) == 1
    view = view_of(batch, weights, 3)
    view.signals[Attention(2)] = AttentionRows.of(torch.full((1, 2, 7, 7), float("nan")))
    assert len(kept(ATPLLaVA(layers="3").reduce(view).map, batch.layout)) == 6


# ---- the budget


class Received:
    """Stands in for attention rows: what slots receive from text and from visual tokens, as drawn once for the tokens of all images."""

    def __init__(self, layout: Layout, received_2BN: Tensor, text: Tensor) -> None:
        self.values, self.text = received_2BN, text

    def received(self, rows_BN: Tensor) -> Tensor:
        return self.values[0 if torch.equal(rows_BN, self.text) else 1]


def pass_through(reducer: ATPLLaVA, weights: Thresholds, received: Tensor, layout: Layout) -> tuple[list[Any], list[int]]:
    """The decisions of one pass, and the visual tokens of the batch in each decoder layer. received: (3, 2, B, N)."""
    decisions, here, first, counts = [], TokenMap.identity(layout), None, []
    acts = [site.layer for site in reducer.sites(DEPTH)]
    for stage, layer in enumerate(acts):
        now = here.target
        text = Question.of(now, now.valid).text
        values = torch.stack([here.apply(of[..., None])[..., 0] for of in received[stage]])
        view = View.of(torch.zeros(*now.shape, 1), layout=now, layers=DEPTH, weights=weights)
        view = replace(view, signals={Attention(layer - 1): Received(now, values, text)}, first=first)
        first = first or view
        decisions.append(reducer.reduce(view, stage))
        counts += [int(now.visual.sum())] * (layer - (acts[stage - 1] if stage else 0))
        here = here.then(decisions[-1].map)
    return decisions, counts + [int(here.target.visual.sum())] * (DEPTH - acts[-1])


def alone_in(layout: Layout, row: int) -> Layout:
    """The layout of one row."""
    return layout.each(lambda part: part[row : row + 1])


@pytest.fixture(scope="module")
def pictures() -> tuple[Layout, Tensor]:
    """Six pictures of 24 x 24 tokens, some looked at all over and some in few places, and what they receive at three layers."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout.sequence(torch.arange(580).expand(6, 580) < 576, grids=[(24, 24)] * 6)
    peaked = torch.linspace(0.3, 2.5, 6)[:, None]
    return layout, (torch.randn(3, 2, 6, 580, generator=generator) * peaked).exp()


@pytest.mark.parametrize("keep", [0.25, 144])
def test_576_become_144_on_the_mean_by_the_budget_loss(pictures: tuple[Layout, Tensor], keep: float | int) -> None:
    layout, received = pictures
    reducer, weights = ATPLLaVA(keep), Thresholds(DEPTH)
    optimiser = torch.optim.Adam(weights.parameters(), lr=0.05)
    for step in range(100):
        decisions, counts = pass_through(reducer, weights, received, layout)
        assert counts == [6 * 576] * DEPTH  # all are there while the thresholds are trained
        assert [decision.loss is None for decision in decisions] == [True, True, False]
        optimiser.zero_grad()
        (decisions[-1].loss.mean() * (1 - step / 100)).backward()
        optimiser.step()
    assert weights.weight.grad is not None
    assert weights.weight.grad.any(-1).any(-1).nonzero()[:, 0].tolist() == [5, 15, 25]
    _, counts = pass_through(reducer, weights.eval(), received, layout)
    assert sum(counts) / (6 * DEPTH) == pytest.approx(144, abs=3)
    assert counts[:5] == [6 * 576] * 5
    assert counts[5] > counts[15] > counts[25] > 0
    one = []
    for b in range(6):
        alone = alone_in(layout, b)
        one.append(sum(pass_through(reducer, weights, received[:, :, b : b + 1], alone)[1]))
    assert sum(one) == sum(counts)  # a batch is its rows
    assert max(one) > 1.2 * min(one)  # and pictures differ


def test_soft_masks_and_what_the_loss_says(pictures: tuple[Layout, Tensor]) -> None:
    layout, received = pictures
    weights = drawn().train()
    decisions, _ = pass_through(ATPLLaVA(), weights, received, layout)
    _, counts = pass_through(ATPLLaVA(), weights.eval(), received, layout)
    assert decisions[-1].loss.tolist() == pytest.approx([abs(sum(counts) / (6 * DEPTH * 576) - 0.25)] * 6, abs=1e-6)
    for decision in decisions:
        assert decision.map.is_identity
        assert torch.equal(decision.gain[:, 576:], torch.ones(6, 4))
        gain = decision.gain.detach()[:, :576]
        assert 0 < float(gain.min()) < float(gain.max()) < 1
    first = decisions[0].gain[layout.visual] > 0.5
    weights.eval()
    hard = pass_through(ATPLLaVA(), weights, received, layout)[0][0].map
    assert first.view(6, 576).nonzero().tolist() == [[b, s] for b, s in kept(hard, layout)]


def test_rows_without_images_have_no_part_in_the_loss() -> None:
    layout = Layout.sequence(torch.tensor([[True] * 16 + [False] * 2, [False] * 18]), grids=[(4, 4)])
    found = [
        pass_through(ATPLLaVA(), Thresholds(DEPTH), torch.rand(3, 2, 2, 18, generator=torch.Generator().manual_seed(2))[:, :, :rows], one)
        for rows, one in ((2, layout), (1, alone_in(layout, 0)))
    ]
    both, alone = (decisions[-1].loss.tolist() for decisions, _ in found)
    assert both == [pytest.approx(alone[0]), 0.0]


# ---- the rest


def test_counts_and_sites() -> None:
    reducer = ATPLLaVA()
    assert reducer.sites(32) == [FromLayer(layer, (Attention(layer - 1),)) for layer in (5, 15, 25)]
    work = Workload((), (576, 9))
    assert reducer.count(work, 1) == [576, 9]
    assert not reducer.exact(work)
    assert ATPLLaVA(1.0).exact(work)
    assert ATPLLaVA(1.0).score_flops(work) == 0
    assert not ATPLLaVA(1).exact(work)  # one token
    assert reducer.while_trained() == ATPLLaVA(1.0)
    assert reducer.at(0.5) == ATPLLaVA(0.5)


def test_another_cut_between_its_layers_is_refused_in_training() -> None:
    batch = make([[(3, 3), 1]])
    weights = drawn().train()
    first = view_of(batch, weights, 5)
    reducer = ATPLLaVA()
    reducer.reduce(first, 0)
    shorter = make([[(2, 3), 1]])
    with pytest.raises(FoveateError, match="another method takes tokens between its layers while it is trained"):
        reducer.reduce(replace(view_of(shorter, weights, 15), first=first), 1)
    reducer.reduce(replace(view_of(shorter, weights.eval(), 15), first=first), 1)
    with pytest.raises(FoveateError, match="depends on the model's depth"):
        reducer.reduce(replace(view_of(batch, weights.train(), 5), layers=None), 0)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("keep=0", "keep=0 is not possible"),
        ("layers=0", "atpllava: layers=0 is not possible; give ascending integers >= 1"),
        ("layers=5-5", "atpllava: layers='5-5' is not possible"),
        ("spatial=1", "atpllava: spatial=1 is not possible"),
        ("temperature=0.0", "atpllava: temperature=0.0 is not possible; give a number > 0"),
        ("untrained=no", "atpllava: untrained='no' is not possible"),
    ],
)
def test_impossible_options_are_named(option: str, says: str) -> None:
    with pytest.raises(FoveateError, match=says):
        parse(f"atpllava:{option}")


def test_without_weights_nothing_is_decided() -> None:
    batch = make([[(3, 3), 1]])
    with pytest.raises(FoveateError, match="atpllava decides by weights and the view has none"):
        ATPLLaVA().reduce(view_of(batch, None, 5))
    assert ATPLLaVA(1.0).reduce(view_of(batch, None, 5)).map.is_identity
