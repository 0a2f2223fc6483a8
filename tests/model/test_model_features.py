"""Features of the tower in the place of pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import IMAGE, ROWS, Batch, assembled

import foveate
from foveate.errors import FoveateError
from foveate.model import FoveateConfig, FoveateForConditionalGeneration
from foveate.reducers import parse


def raster() -> Any:
    """A model whose visual tokens are a raster of patches."""
    torch.manual_seed(0)
    parts = assembled().config
    config = FoveateConfig(
        vision_config=parts.vision_config,
        text_config=parts.text_config,
        bridge={"kind": "mlp"},
        vision_feature_layer=[2],
        image_token_id=IMAGE,
    )
    return FoveateForConditionalGeneration(config).eval()


def read(batch: Batch, model: Any) -> dict[str, Any]:
    """The same inputs with features."""
    features = model.model.encode_crops(batch.pixels)
    return {name: value for name, value in batch.inputs.items() if name != "pixel_values"} | {"tower_features": features}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_same_logits_from_features(dtype: torch.dtype) -> None:
    model, batch = assembled(dtype=dtype), Batch(ROWS, dtype=dtype)
    inputs = read(batch, model)
    assert inputs["tower_features"].shape == (3, 2, 16, 32)
    model.model.vision_tower.forward = None  # it does not run
    whole = assembled(dtype=dtype)(**batch.inputs)
    found = model(**inputs)
    assert torch.equal(found.logits, whole.logits)
    assert torch.equal(found.image_hidden_states, whole.image_hidden_states)


@pytest.mark.parametrize(
    ("model", "reducers"),
    [
        (assembled(), "uniform:keep=0.5"),
        (assembled(), "divprune:keep=0.25"),
        (assembled(), "fastv:keep=0.5"),
        (assembled(), "vcc:layer=2,stride=2"),
        (raster(), "avgpool2d:stride=2"),
        (raster(), "tome:keep=0.5"),
    ],
)
@torch.no_grad()
def test_reducers_see_the_same_tokens(model: Any, reducers: str) -> None:
    batch = Batch(ROWS)
    found = []
    for inputs in (batch.inputs, read(batch, model)):
        with foveate.attach(model, parse(reducers)):
            found.append(model(**inputs).logits)
    assert torch.equal(*found)
    assert not torch.equal(found[0], model(**batch.inputs).logits)


def test_gradients_are_the_same() -> None:
    gradients = []
    for features in (False, True):
        model, batch = assembled(), Batch(ROWS)
        model.model.vision_tower.requires_grad_(False)
        inputs = read(batch, model) if features else batch.inputs
        model(**inputs, labels=batch.labels()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


@torch.no_grad()
def test_features_of_another_shape_are_refused() -> None:
    model, batch = assembled(), Batch(ROWS)
    inputs = read(batch, model)
    for wrong in (inputs["tower_features"][:, :1], inputs["tower_features"][:, :, 1:]):
        with pytest.raises(FoveateError, match="2 levels of 4 x 4 patches"):
            model(**{**inputs, "tower_features": wrong})
    with pytest.raises(FoveateError, match="give images once"):
        model(**inputs, pixel_values=batch.pixels)
