"""What the engine owes to positions of several rows (m-RoPE) and to features that enter between layers (DeepStack)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.anatomy import read
from tests.conformance.checks import load

REDUCERS = ["random:keep=0.5", "vcc:layer=2,stride=4", "fastv:keep=0.5,layer=2", "random:keep=0.3,positions=renumber"]
every_reducer = pytest.mark.parametrize("reducer", REDUCERS)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@contextmanager
def turned(model: Any) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """By layer and by pass, the cosines and sines that the layer's attention is given."""
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in read(model).layers]

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen[index].append(kwargs["position_embeddings"])

        return hook

    attending: list[Any] = [layer.self_attn for layer in read(model).layers]
    hooks = [attention.register_forward_pre_hook(note(i), with_kwargs=True) for i, attention in enumerate(attending)]
    yield seen
    for hook in hooks:
        hook.remove()


def rotated(model: Any, position: Tensor) -> tuple[Tensor, Tensor]:
    rotary: Any = read(model).rotary
    cos, sin = rotary(torch.zeros(1), position)
    return cos, sin


def rope_index(model: Any, single: dict[str, Tensor]) -> Tensor:
    """(3, 1, N) the prompt's positions: time, row, column."""
    grids = {name: single[name] for name in ("image_grid_thw", "video_grid_thw") if name in single}
    position, _ = model.model.get_rope_index(single["input_ids"], mm_token_type_ids=single["mm_token_type_ids"], **grids)
    return torch.as_tensor(position)


def generate(model: Any, inputs: dict[str, Tensor], new: int, **options: Any) -> Any:
    special = [model.config.image_token_id, model.config.video_token_id, model.config.vision_start_token_id]
    how = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": special, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=new, **how, **options)


@every_reducer
def test_decoding_has_the_positions_of_the_bare_model(reducer: str) -> None:
    """A prompt has fewer positions than tokens (grids), and behind a cut fewer slots yet: decoding goes on from the positions."""
    loaded = load("qwen2_vl")
    model, inputs = loaded.model, loaded.batch("left")
    with turned(model) as bare:
        generate(model, inputs, 4)
    with foveate.attach(model, reducer), turned(model) as found:
        cache = generate(model, inputs, 4).past_key_values
    N = inputs["input_ids"].shape[1]
    assert cache.layers[-1].get_seq_length() < cache.get_seq_length() == N + 3
    for before, after in zip(bare, found, strict=True):
        assert len(before) == len(after) == 4
        for one, other in zip(before[1:], after[1:], strict=True):
            assert one[0].shape[1] == 1
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a, b.expand_as(a))


@every_reducer
def test_survivors_keep_their_time_row_and_column(reducer: str) -> None:
    """All three rows: those of the slot that is kept, the means of a group's; gaps in a grid are not closed, whatever is asked for."""
    loaded = load("qwen2_vl")
    model = loaded.model
    for single in loaded.singles[:2]:
        position = rope_index(model, single)
        assert not torch.equal(position[1], position[2]), "a grid has rows and columns"
        with foveate.attach(model, reducer) as run, turned(model) as found, torch.no_grad():
            model(**single, use_cache=False)
        ((at, token_map),) = run.last.maps.items()
        groups = [token_map.sources(0, slot) for slot in range(token_map.representative.shape[1])]
        left = torch.stack([position[..., group].sum(-1) // len(group) for group in groups], -1)
        assert left.shape[-1] < position.shape[-1]
        for index, passes in enumerate(found):
            (given,) = passes
            for a, b in zip(given, rotated(model, left if index >= at else position), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
@every_reducer
def test_a_second_turn_through_generate(name: str, reducer: str) -> None:
    """On a kept cache, text behind the prompt goes on from the prompt's positions; equals the whole conversation with the prompt's maps."""
    loaded = load(name)
    model, single = loaded.model, loaded.singles[1]
    more = torch.tensor([[7, 8, 9]])
    with foveate.attach(model, reducer) as run:
        one = generate(model, single, 3)
        maps, ids = run.maps, torch.cat([one.sequences, more], 1)
        two = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": one.past_key_values}, 3)
    longer = dict(single)
    longer["input_ids"] = two.sequences[:, :-1]
    for key in ("attention_mask", "mm_token_type_ids"):
        grown = longer["input_ids"].shape[1] - single[key].shape[1]
        longer[key] = torch.nn.functional.pad(single[key], (0, grown), value=1 if key == "attention_mask" else 0)
    with foveate.attach(model, maps=maps), torch.no_grad():
        whole = model(**longer, use_cache=False).logits
    torch.testing.assert_close(torch.stack(two.logits, 1), whole[:, -3:], **CLOSE)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[dict[str, Any]]:
    seen: dict[str, Any] = {}
    hook = module.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    yield seen
    hook.remove()


@pytest.mark.parametrize("which", [0, 1], ids=["one-image", "two-images"])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl:video"])
@pytest.mark.parametrize("reducer", ["random:keep=0.5,layer=1", "vcc:layer=1,stride=2", "random:keep=0.5", "fastv:keep=0.5,layer=2"])
def test_features_between_layers_are_cut_with_the_states(name: str, reducer: str, which: int) -> None:
    """DeepStack adds features behind layers 0, 1 and 2. By hand: layer by layer, states, positions and features gathered alike."""
    loaded = load(name)
    model, single = loaded.model, loaded.singles[which]
    decoder: Any = read(model).decoder
    with inputs_of(decoder) as given, torch.no_grad():
        bare = model(**single, use_cache=False).logits[0]
    with foveate.attach(model, reducer) as run, torch.no_grad():
        found = model(**single, use_cache=False).logits[0]
    ((at, token_map),) = run.last.maps.items()
    groups = [token_map.sources(0, slot) for slot in range(token_map.representative.shape[1])]
    hidden, position = given["inputs_embeds"], given["position_ids"][-3:]
    visual = given["visual_pos_masks"]
    features = [torch.zeros_like(hidden).masked_scatter(visual[..., None], of) for of in given["deepstack_visual_embeds"]]
    assert len(features) == 3
    with torch.no_grad():
        for index, layer in enumerate(decoder.layers):
            if index == at:
                hidden = torch.stack([hidden[:, group].mean(1) for group in groups], 1)
                position = torch.stack([position[..., group].sum(-1) // len(group) for group in groups], -1)
                features = [torch.stack([of[:, group].mean(1) for group in groups], 1) for of in features]
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotated(model, position), position_ids=None)
            if index < len(features):
                hidden = hidden + features[index]
        logits = model.lm_head(decoder.norm(hidden))[0]
    for slot, group in enumerate(groups):
        torch.testing.assert_close(found[group[0]], logits[slot], **CLOSE)
    assert (found - bare).abs().max() > 1e-2
