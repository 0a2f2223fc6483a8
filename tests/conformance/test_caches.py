"""Cache policies on families of models: what keeps all changes nothing, a batch is its rows alone, and what goes is gone from the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.anatomy import grows, read
from foveate.cache_policies import parse
from foveate.errors import NotApplicable, Reason
from tests.conformance.checks import TOLERANCE, Loaded, load, state_of
from tests.conformance.family import families

# Decided by each head and again while decoding; by each layer, rows of different lengths; by all layers together.
CACHES = ("snapkv:keep=0.5,window=2,every=2", "zipvl:tau=0.6", "prefixkv:keep=0.5,first=1")
REPRESENTATIVE = ("qwen3_vl:video", "gemma3", "lfm2_vl")  # positions of three rows, windows, convolutions
NEW = 5
REFUSED = {Reason.BOUNDED_CACHE, Reason.LATENT_CACHE, Reason.SHARED_KEYS}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole", False)
        metafunc.parametrize("name", [name for name in families() if whole or name in REPRESENTATIVE])


def said(loaded: Loaded, inputs: dict[str, Tensor]) -> Any:
    """Some generated tokens, no image's placeholder among them."""
    special = [token for token in loaded.processor.tokenizer.all_special_ids if token is not None]
    how: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}
    with torch.no_grad():
        return loaded.model.generate(**inputs, max_new_tokens=NEW, output_logits=True, suppress_tokens=special, **how)


def refusal(loaded: Loaded) -> Reason | None:
    """Why no policy serves this model, where that is one of the reasons for which it may be so."""
    try:
        foveate.attach(loaded.model, None, cache="random").detach()
    except NotApplicable as error:
        if error.reason in REFUSED:
            return error.reason
        raise
    return None


def test_what_keeps_all_is_the_bare_model(name: str) -> None:
    loaded = load(name)
    if refusal(loaded) is not None:
        pytest.skip(str(refusal(loaded)))
    bare = said(loaded, loaded.batch("left"))
    before = state_of(loaded.model)
    for cache in ("snapkv:keep=1.0", "snapkv:keep=10000,window=2", "lookm:keep=10000"):
        with foveate.attach(loaded.model, None, cache=cache):
            found = said(loaded, loaded.batch("left"))
        assert all(map(torch.equal, bare.logits, found.logits)), cache
    assert state_of(loaded.model) == before, "something is left on the model"


@pytest.mark.parametrize("cache", CACHES)
def test_a_batch_is_its_rows_alone_and_the_caches_are_shorter(name: str, cache: str) -> None:
    loaded = load(name)
    if refusal(loaded) is not None:
        pytest.skip(str(refusal(loaded)))
    bare = [said(loaded, loaded.batch("left")), *(said(loaded, single) for single in loaded.singles)]
    if not all(_alike(bare[0], row, one) for row, one in enumerate(bare[1:])):
        pytest.skip("the bare model says other things in a batch")
    with foveate.attach(loaded.model, None, cache=cache) as run:
        together = said(loaded, loaded.batch("left"))
        record = run.last
        alone = [said(loaded, single) for single in loaded.singles]
    for row, one in enumerate(alone):
        assert _alike(together, row, one), f"row {row}"
    anatomy = read(loaded.model)
    thinned = [i for i, layer in enumerate(anatomy.layers) if grows(layer, anatomy.text_config, i)]
    assert sorted(record.stays) == thinned
    assert all(0 < record.stays[i] <= record.ran[i] for i in thinned)
    assert sum(record.stays.values()) < sum(record.ran.values())
    if "every" not in cache:
        policy = parse(cache)
        assert policy is not None
        for i in thinned:
            longest = max(one.past_key_values.layers[i].keys.shape[2] for one in alone)
            assert together.past_key_values.layers[i].keys.shape[2] == longest < bare[0].past_key_values.layers[i].keys.shape[2]


def _alike(together: Any, row: int, alone: Any) -> bool:
    return all(torch.allclose(a[row], b[0], **TOLERANCE) for a, b in zip(together.logits, alone.logits, strict=True))
