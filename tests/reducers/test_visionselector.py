"""VisionSelector: the scorer against all pairs, the top-k that has a gradient against its closed form, counts and errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foveate.contract import View
from foveate.errors import FoveateError
from foveate.reducers import VisionSelector, parse
from foveate.reducers.learned import new_weights
from foveate.reducers.visionselector import Scorer, shifted


class Given(nn.Module):
    """Scores a token by its first value."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x_LD: Tensor) -> Tensor:
        return self.scale * x_LD[:, 0]


def trained_on(scores: list[list[float]], training: bool = True) -> View:
    weights = Given().train(training)
    return View.of(torch.tensor(scores)[..., None], text=torch.ones(len(scores), 1, 1), weights=weights)


def jacobian(score: Tensor, k: int) -> Tensor:
    found: Tensor = torch.autograd.functional.jacobian(lambda s: shifted(s, k).sigmoid(), score)
    return found


def test_the_published_example() -> None:
    s = torch.tensor([2.0, 0.0, 0.0, -1.0])
    assert (shifted(s, 2) - s)[0].item() == pytest.approx(-0.1874, abs=1e-4)
    assert shifted(s, 2).sigmoid().tolist() == pytest.approx([0.860, 0.453, 0.453, 0.234], abs=5e-4)
    assert jacobian(s, 2)[0].tolist() == pytest.approx([0.102, -0.038, -0.038, -0.027], abs=5e-4)
    even = jacobian(torch.zeros(2), 1)
    torch.testing.assert_close(even, torch.tensor([[0.125, -0.125], [-0.125, 0.125]]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=40), st.data())
def test_gates_add_up_and_their_gradient_is_the_closed_form(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores) - 1))
    s = torch.tensor(scores, dtype=torch.float64)
    gate = shifted(s, k).sigmoid()
    assert float(gate.sum()) == pytest.approx(k, abs=1e-6)
    v = gate * (1 - gate)
    torch.testing.assert_close(jacobian(s, k), v.diag() - torch.outer(v, v) / v.sum(), rtol=1e-6, atol=1e-8)


def test_the_scorer_is_the_mean_over_all_pairs() -> None:
    torch.manual_seed(0)
    scorer, x = Scorer(8), torch.randn(5, 8)
    for part in (scorer.query, scorer.key):
        nn.init.normal_(part.weight)
        nn.init.normal_(part.bias)
    pairs = scorer.query(x) @ scorer.key(x).T / math.sqrt(4)
    torch.testing.assert_close(scorer(x), pairs.mean(1))


def test_the_advertised_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Scorer(3584).parameters()) == 12_848_640
    new = new_weights(VisionSelector, 64, 4)
    assert isinstance(new, Scorer)
    assert not bool(new.query.bias.any() | new.key.bias.any())
    assert float(new.query.weight.detach().std()) == pytest.approx(1e-4, rel=0.05)


def test_hard_once_trained() -> None:
    decision = VisionSelector(0.5).reduce(trained_on([[2.0, 0.0, 1.0, 0.0, 1.0]], training=False))
    assert decision.map.representative.tolist() == [[0, 2, 5]]  # floor(2.5), and the text
    assert decision.gain is None
    assert decision.loss is None
    frozen = trained_on([[2.0, 0.0, 1.0]])
    assert frozen.weights is not None
    frozen.weights.requires_grad_(False)
    assert VisionSelector(1).reduce(frozen).map.representative.tolist() == [[0, 3]]


def test_soft_while_it_is_trained() -> None:
    rows = [[2.0, 0.0, 0.0, -1.0], [0.3, 0.1, 0.2, 0.4]]
    decision = VisionSelector(0.5).reduce(trained_on(rows))
    assert decision.map.is_identity
    assert decision.gain is not None
    assert decision.loss is not None
    for row, scores in enumerate(rows):
        gate = shifted(torch.tensor(scores), 2).sigmoid()
        torch.testing.assert_close(decision.gain[row], torch.cat([gate, torch.ones(1)]))
        hard = torch.zeros(4).scatter(0, torch.tensor(scores).sort(descending=True, stable=True).indices[:2], 1.0)
        torch.testing.assert_close(decision.loss[row], nn.functional.binary_cross_entropy(gate, hard))
    decision.loss.sum().backward()


@pytest.mark.parametrize("keep", [1.0, 4, 9])
def test_an_image_that_stays_whole_is_not_weighed(keep: float) -> None:
    decision = VisionSelector(keep).reduce(trained_on([[2.0, 0.0, 0.0, -1.0]]))
    assert decision.gain is not None
    assert decision.loss is not None
    assert decision.gain.tolist() == [[1.0] * 5]
    assert decision.loss.tolist() == [0.0]


def test_the_weight_of_its_loss_rises() -> None:
    assert [VisionSelector().loss_weight(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 1.05, 2.0])


@pytest.mark.parametrize(("keep", "tokens", "left"), [(0.2, 576, 115), (0.1, 30, 3), (0.3, 10, 3), (0.05, 3, 1), (7, 5, 5), (7, 9, 7)])
def test_counts_are_rounded_down(keep: float, tokens: int, left: int) -> None:
    assert VisionSelector(keep).left(tokens, tokens) == left


@pytest.mark.parametrize(
    ("option", "says"), [("keep=0", "keep=0"), ("keep=1.5", "keep=1.5"), ("scope=row", "scope=.row."), ("untrained=2", "untrained=2")]
)
def test_impossible_options_are_named(option: str, says: str) -> None:
    with pytest.raises(FoveateError, match=f"{says} is not possible"):
        parse(f"visionselector:{option}")
