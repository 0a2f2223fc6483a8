"""What is measured on a model's prompts: KL divergences, recipes and ranks, against passes that are watched by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import IMAGE, LAYERS, ROWS, Batch, llava
from torch import Tensor

from foveate.errors import FoveateError
from foveate.reducers import VTW, FitPrune, parse
from foveate.reducers.fitprune import recipe
from foveate.search.calibrate import aranks, divergences, fitprune, gammamod, vtw


@pytest.fixture(scope="module")
def model() -> Any:
    return llava("eager")


@pytest.fixture(scope="module")
def maps(model: Any) -> list[tuple[Tensor, list[Tensor]]]:
    """Of each prompt with images, which of its tokens are visual, and the attention maps (H, N, N) of all layers."""
    found = []
    for ids, single in zip(ROWS[:2], Batch(ROWS).singles, strict=False):
        with torch.no_grad():
            attentions = model(**single, output_attentions=True, use_cache=False).attentions
        found.append((torch.tensor(ids) == IMAGE, [layer[0] for layer in attentions]))
    return found


def test_divergences_of_a_model_without_pictures(model: Any) -> None:
    """From layer 0 on: what a prompt's text alone says, at its own positions. A padded batch is its rows."""
    batch = Batch(ROWS[:2], "left")
    found = divergences(model, [batch.inputs], first=0)
    assert list(found) == [0, 1, 2, 3, LAYERS]
    assert found[LAYERS] == 0 < min(value for layer, value in found.items() if layer < LAYERS)
    expected = []
    for row, single in zip(batch.rows, batch.singles, strict=True):
        text = [at for at, token in enumerate(row) if token != IMAGE]
        with torch.no_grad():
            whole = model(**single).logits[0, -1].softmax(-1)
            blind = model(input_ids=torch.tensor([[row[at] for at in text]]), position_ids=torch.tensor([text])).logits[0, -1].softmax(-1)
        expected.append(float((whole * (whole / blind).log()).sum()))
    assert found[0] == pytest.approx(sum(expected) / 2, rel=1e-3)
    one_by_one = divergences(model, batch.singles, first=0)
    assert [one_by_one[layer] for layer in found] == pytest.approx(list(found.values()), rel=1e-3, abs=1e-6)
    last = min(found, key=lambda layer: (found[layer], layer))
    assert vtw(model, batch.singles, first=0, eta=1e-9) == VTW(last)
    assert vtw(model, batch.singles, first=2, eta=1e9) == VTW(2)


def test_a_recipe_is_fitted_to_what_tokens_receive(model: Any, maps: list[tuple[Tensor, list[Tensor]]]) -> None:
    images = []
    for visual, layers in maps:
        most = [layer.amax(0).double() for layer in layers]
        for image in visual.nonzero()[:, 0].split(16):
            cross = [m[~visual][:, image].mean(0) for m in most]
            own = [m[visual][:, image].mean(0) for m in most]
            images.append(list(zip(cross, own, strict=True)))
    assert len(images) == 3
    shares = recipe(images, 0.6, lambda shares: sum(shares) / len(shares))
    found = fitprune(model, Batch(ROWS, "left").singles, tokens=0.6)
    assert found == FitPrune(list(enumerate(shares)))
    assert sum(found.visual_tokens(16, LAYERS)) <= 0.6 * 16 * LAYERS + 2
    assert fitprune(model, [Batch(ROWS, "left").inputs], tokens=0.6) == found
    assert fitprune(model, Batch(ROWS).singles, tokens=1.0) == FitPrune("0:1")
    late = fitprune(model, Batch(ROWS).singles, tokens=0.5, cost=lambda shares: shares[-1])
    assert late.visual_tokens(16, LAYERS)[-1] <= 8


def test_ranks_are_those_of_the_maps(model: Any, maps: list[tuple[Tensor, list[Tensor]]]) -> None:
    found = aranks(model, Batch(ROWS[:2]).singles)
    expected = {
        layer: sum(float(torch.linalg.matrix_rank(of[layer].tril(-1)).float().mean()) for _, of in maps) / 2
        for layer in range(1, LAYERS - 1)
    }
    assert found == pytest.approx(expected)
    lowest = min(found, key=lambda layer: (found[layer], -layer))
    assert gammamod(model, Batch(ROWS[:2]).singles, share=0.5, weigh="2p") == parse(f"gammamod:layers={lowest},weigh=2p")[0]


def test_what_cannot_be_measured(model: Any) -> None:
    text = Batch(ROWS[2:]).singles
    for measure in (lambda: vtw(model, text, first=3), lambda: fitprune(model, text, tokens=0.5), lambda: aranks(model, text)):
        with pytest.raises(FoveateError, match="none of the prompts has an image"):
            measure()
    for first in (-1, LAYERS):
        with pytest.raises(FoveateError, match=f"first={first} is not possible; give a decoder layer index from 0 to 3"):
            divergences(model, text, first=first)
    with pytest.raises(FoveateError, match=r"the budget 0\.01 is too small"):
        fitprune(model, Batch(ROWS[:1]).singles, tokens=0.01)
    assert not hasattr(model, "foveate_run")
    assert model.training is False
