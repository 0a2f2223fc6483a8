"""Latent attention: a layer that caches what its keys and values are made of. Reducers serve it, cache policies do not."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.errors import NotApplicable, Reason
from foveate.reducers import parse
from tests.conformance.family import alone


@pytest.mark.parametrize("cache", ["snapkv:keep=0.5,window=2,every=2", "lookm:keep=0.5", "random:keep=0.5"])
def test_a_policy_is_refused_and_nothing_stays(cache: str) -> None:
    model = alone("kimi_k25")
    with pytest.raises(NotApplicable, match=r"caches latents.*take a reducer") as refused:
        foveate.attach(model, None, cache=cache)
    assert refused.value.reason == Reason.LATENT_CACHE
    foveate.attach(model, "random:keep=0.5").detach()


def test_what_a_reducer_drops_leaves_the_cache_of_latents() -> None:
    model = alone("kimi_k25")
    ids = torch.tensor([[5, 6, *[model.config.image_token_id] * 6, 7, 8]])
    given = {"pixel_values": torch.randn(24, 3, 4, 4), "image_grid_thw": torch.tensor([[1, 4, 6]])}
    (reducer,) = parse("random:keep=0.5,layer=2")
    with foveate.attach(model, reducer) as run, torch.no_grad():
        cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given, use_cache=True).past_key_values
    assert run.last.visual_tokens == [6, 6, 3, 3]
    assert [layer.keys.shape[2] for layer in cache.layers] == [10, 10, 7, 7]
    assert cache.layers[0].keys.shape[1] == 1  # one latent for all heads
