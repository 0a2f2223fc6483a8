"""What the caller sees has the caller's length; what was encoded ahead is held no longer than its request."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import foveate
from foveate.probes.encoding import Item
from tests.situations.models import GREEDY, MODELS, inputs, qwen
from tests.tiny import IMAGE, PATCHES, llava

ONE = [5, 6, 7] + [IMAGE] * PATCHES + [1, 2, 3]
CUTS = ["random:keep=1.0", "divprune:keep=0.5", "fastv:keep=0.5,layer=2", "pyramiddrop:keep=0.5", "tome:keep=0.5", "vcc:layer=2,stride=4"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reducer", CUTS)
@pytest.mark.parametrize("outermost", [True, False])
def test_hidden_states_of_every_level(name: str, reducer: str, outermost: bool) -> None:
    whole = MODELS[name]()
    model, call = whole if outermost else whole.model, inputs(name, [[*ONE, 0, 0]])
    call["attention_mask"] = (call["input_ids"] != 0).long()
    with torch.no_grad():
        bare = model(**call, output_hidden_states=True).hidden_states
        with foveate.attach(model, reducer) as run:
            outputs = model(**call, output_hidden_states=True)
            plain = model(**call)
        states = outputs.hidden_states
        assert [s.shape for s in states] == [s.shape for s in bare]
        assert torch.equal(outputs[0], plain[0])
        cut = min(run.last.maps, default=len(bare))
        if reducer == "random:keep=1.0":
            assert all(map(torch.equal, states, bare))
        for level in range(1, min(cut + 1, len(bare) - 1)):  # what no cut has touched yet
            torch.testing.assert_close(states[level], bare[level])
        for level in range(len(bare)):
            provenance = run.last.provenance(min(max(level - 1, 0), len(bare) - 2))
            for slot in range(call["input_ids"].shape[1]):  # a row is its survivor's, at every level
                owner = int(provenance.representative[0, int(provenance.owner[0, slot])])
                assert torch.equal(states[level][0, slot], states[level][0, owner])


@pytest.mark.parametrize("reducer", ["fastervlm:keep=0.5", "random:keep=0.5", "divprune:keep=0.5"])
def test_what_is_encoded_ahead_goes_with_its_request(reducer: str) -> None:
    model = llava()
    born: list[weakref.ref[Any]] = []
    init = Item.__init__

    def noted(self: Item, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        born.append(weakref.ref(self))

    with foveate.attach(model, reducer), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Item, "__init__", noted)
        for seed in range(5):
            model.generate(**inputs("llava", [ONE, ONE], seed), max_new_tokens=2, **GREEDY)
        gc.collect()
        assert born
        assert not [ref for ref in born if ref() is not None]


@pytest.mark.parametrize("reducer", ["random:keep=0.5", "divprune:keep=0.5", "visionzip:dominant=0.5,contextual=0.25,layer=-1"])
def test_a_request_with_an_image_and_a_video_after_many_images(reducer: str) -> None:
    model, grid = qwen(), torch.tensor([[1, 4, 4]])
    ids = torch.tensor([[5, 92] + [90] * 4 + [93, 92] + [91] * 4 + [93, 6, 7]])
    kind = (ids == 90).int() + 2 * (ids == 91).int()
    torch.manual_seed(1)
    call = {"input_ids": ids, "mm_token_type_ids": kind, "pixel_values": torch.randn(16, 96), "image_grid_thw": grid}
    call |= {"pixel_values_videos": torch.randn(16, 96), "video_grid_thw": grid}
    with foveate.attach(model, reducer) as run, torch.no_grad():
        first = model.generate(**call, max_new_tokens=2, **GREEDY)
        model.model.get_image_features(torch.randn(16 * 1024, 96), grid.repeat(1024, 1))
        for count in (1, 300):
            model.model.get_image_features(torch.randn(16 * count, 96), grid.repeat(count, 1))
            assert torch.equal(model.generate(**call, max_new_tokens=2, **GREEDY), first)
        driver: Any = run._driver
        assert 0 < len(driver._ahead) <= 301  # bounded, but never less than the last call


@pytest.mark.parametrize("reducer", ["fastervlm:keep=0.5", "random:keep=0.5", "divprune:keep=0.5"])
def test_features_encoded_by_hand_are_the_images(reducer: str) -> None:
    model, call = llava(), inputs("llava", [ONE])
    with foveate.attach(model, reducer) as run, torch.no_grad():
        expected = model(**call).logits
        maps = run.last.maps[0].representative
        features = model.model.get_image_features(call["pixel_values"], return_dict=True)
        found = model(input_ids=call["input_ids"], mm_encoder_outputs={"image": features}).logits
        assert torch.equal(run.last.maps[0].representative, maps)
        assert torch.equal(found, expected)
