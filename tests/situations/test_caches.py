"""A cache outlives its attachment: it knows what has cut it, and going on with it is right or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate import FoveateError
from tests.situations.models import GREEDY, MODELS, inputs
from tests.tiny import IMAGE, PATCHES

ONE = [5, 6, 7] + [IMAGE] * PATCHES + [1, 2, 3]
CUTS = ["divprune:keep=0.5", "fastv:keep=0.25,layer=2", "vcc:layer=2,stride=4", "pyramiddrop:keep=0.5"]
OTHERS = [None, "none", "random:keep=0.5", "fastv:keep=0.5,layer=1", "pyramiddrop:keep=0.5", "vcc:layer=3,stride=2"]
every_model = pytest.mark.parametrize("name", MODELS)
every_cut = pytest.mark.parametrize("reducer", CUTS)


def go_on(model: Any, cache: Any, turns: list[list[int]], **more: Any) -> list[Tensor]:
    found = []
    for turn in turns:
        found.append(model(input_ids=torch.tensor([turn]), past_key_values=cache, **more).logits[:, -1])
    return found


@every_model
@every_cut
@pytest.mark.parametrize("turns", [[[4], [9], [8]], [[4, 9, 8]]], ids=["a stream", "a turn"])
def test_going_on_under_another_attachment(name: str, reducer: str, turns: list[list[int]]) -> None:
    model, call = MODELS[name](), inputs(name, [ONE])
    with torch.no_grad():
        with foveate.attach(model, reducer):
            right = go_on(model, model(**call, use_cache=True).past_key_values, turns)
        for other in OTHERS:
            with foveate.attach(model, reducer):
                cache = model(**call, use_cache=True).past_key_values
            with foveate.attach(model, other):
                for expected, found in zip(right, go_on(model, cache, turns), strict=True):
                    torch.testing.assert_close(found, expected, msg=f"{reducer} then {other}")


@every_model
@every_cut
def test_going_on_with_nothing_attached_is_refused(name: str, reducer: str) -> None:
    model, call = MODELS[name](), inputs(name, [ONE])
    with torch.no_grad():
        with foveate.attach(model, reducer) as run:
            cache = model(**call, use_cache=True).past_key_values
        method = str(run.reducers[0])
        for turns in ([[4]], [[4, 9, 8]]):
            with pytest.raises(FoveateError, match="has cut, and nothing is attached") as error:
                go_on(model, cache, turns)
            assert method in str(error.value)
        with foveate.attach(model, None, record="none"), pytest.raises(FoveateError, match="nothing is attached"):
            go_on(model, cache, [[4]])  # that sets no hook at all
        with pytest.raises(FoveateError, match="nothing is attached"):
            model.generate(input_ids=torch.tensor([[*ONE, 4]]), past_key_values=cache, max_new_tokens=2, **GREEDY)


@pytest.mark.parametrize("name", ["llava", "foveate"])  # Qwen's positions of a second picture are `generate`'s to make
@every_cut
def test_a_turn_with_another_image_under_another_reducer(name: str, reducer: str) -> None:
    """The second image is cut as its reducer says, the first stays as it was: a layer that neither cuts sees what it would have seen."""
    model, call = MODELS[name](), inputs(name, [ONE])
    more = inputs(name, [[4] + [IMAGE] * PATCHES + [8, 3]], seed=2)
    with torch.no_grad():
        found = []
        for second in (reducer, "random:keep=1.0", "fastv:keep=0.5,layer=3"):
            with foveate.attach(model, reducer):
                cache = model(**call, use_cache=True).past_key_values
            held = [layer.keys.shape[2] for layer in cache.layers]
            with foveate.attach(model, second) as run:
                model(**more, past_key_values=cache)
                went = run.last.tokens
                found.append(go_on(model, cache, [[9]])[0])
            grown = [layer.keys.shape[2] - before for layer, before in zip(cache.layers, held, strict=True)]
            assert grown == [n + 1 for n in went]
            assert all(torch.isfinite(x).all() for x in found)


@every_model
@every_cut
def test_a_cache_that_was_never_cut_is_the_librarys_own(name: str, reducer: str) -> None:
    model, call = MODELS[name](), inputs(name, [ONE])
    with torch.no_grad():
        bare = model(**call, use_cache=True).past_key_values
        expected = go_on(model, bare, [[4], [9]])
        with foveate.attach(model, "random:keep=1.0"):
            cache = model(**call, use_cache=True).past_key_values
        assert type(cache) is type(bare)
        found = go_on(model, cache, [[4]])
        with foveate.attach(model, reducer):
            found += go_on(model, cache, [[9]])
    for right, other in zip(expected, found, strict=True):
        torch.testing.assert_close(right, other)
