"""InEncoder: cuts inside the vision tower, carried out in front of the language model; ToMe as its paper has it, against a slow loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import foveate
from foveate import FoveateError
from foveate.contract import Cut, InEncoder, Noise, Site, View, Workload
from foveate.errors import NotApplicable, Reason
from foveate.reducers import VCC, FasterVLM, Random, Reducer, ToMe, parse, spell, visual_tokens
from foveate.reducers.base import Reducer as Base
from foveate.tokens import Kind, TokenMap, budget, top
from tests.reducers.test_tome import Token, one_pass
from tests.test_attach import check_decoding, everything, state_of
from tests.tiny import IMAGE, PATCHES, ROWS, Batch, assembled, prompt

DEPTH = 4


def make(tower: str = "clip", attn: str = "sdpa", dtype: torch.dtype = torch.float32, level: Any = -2) -> Any:
    """A LLaVA whose tower has four blocks."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 64}
    vision = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower](**sizes, image_size=32, patch_size=8)
    if tower == "siglip":
        vision.vision_use_head = False
    text = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=99,
        initializer_range=0.2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=level,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        attn_implementation=attn,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # states that differ, so that who merges with whom is clear
        for parameter in model.model.vision_tower.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


every_tower = pytest.mark.parametrize("tower", ["clip", "siglip"])


@dataclass(frozen=True)
class Fewer(Base):
    """Drops patches at random in front of a block; `crops` gives each crop another number of them."""

    name: ClassVar[str] = "fewer"
    paper: ClassVar[str] = "-"
    block: int = 1
    keep: float | int = 0.5
    ragged: bool = False

    def sites(self, layers: int) -> list[Site]:
        return [InEncoder(self.block, (Noise(0),))]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        noise = view.signal(Noise(0))
        kept = top(view.layout, noise, self.keep)
        if self.ragged:  # by content, so that it does not depend on the batch
            kept = kept & (noise > 0.3)
        return Cut(TokenMap.keep(view.layout, kept))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return [budget(self.keep, arriving) for arriving in work.arriving]


CUTS: dict[str, list[Reducer]] = {
    "r": [ToMe(0.1, r=3, site="tower", blocks=3)],
    "evenly": [ToMe(0.4, site="tower", blocks=3)],
    "one block": [ToMe(0.5, site="tower", blocks=1, positions="keep")],
    "not proportional": [ToMe(0.4, site="tower", blocks=3, proportional=False)],
    "dropped": [Fewer(0), Fewer(3, 5)],
    "ragged": [Fewer(1, 0.9, ragged=True)],
    "dropped, then merged": [Fewer(1, 12), ToMe(0.5, site="tower", blocks=3)],
    "and in the language model": [ToMe(0.5, site="tower", blocks=2), Random(0.8), VCC(1, 2)],
}
every_cut = pytest.mark.parametrize("reducers", CUTS.values(), ids=CUTS.keys())


# ---- what must not change


@every_tower
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("shortcuts", [True, False], ids=["shortcuts", "no-shortcuts"])
def test_keep_all_is_bit_identical(tower: str, attn: str, dtype: torch.dtype, shortcuts: bool) -> None:
    model = make(tower, attn, dtype)
    for level in (-2, [1, -1]):
        if isinstance(level, list):
            model = make(tower, attn, dtype, level)
        for batch in (Batch(ROWS, "right", dtype), Batch(ROWS, "left", dtype)):
            bare = everything(model, batch)
            with foveate.attach(model, [ToMe(1.0, site="tower", blocks=3), Fewer(0, 1.0)], shortcuts=shortcuts):
                kept = everything(model, batch)
            assert kept.keys() == bare.keys()
            for name, value in bare.items():
                if name.startswith("grad") and isinstance(level, list) and not shortcuts:
                    continue  # a level that the bridge and the next block use gets its gradients added up in another order
                assert torch.equal(kept[name], value), name


def test_nothing_is_left_behind() -> None:
    model, batch = make(), Batch(ROWS)
    bare = model(**batch.inputs).logits
    before = state_of(model)
    with pytest.raises(ValueError, match="match"), foveate.attach(model, CUTS["r"]):
        model(input_ids=torch.tensor([ROWS[0]]), pixel_values=batch.pixels)
    with pytest.raises(ValueError, match="unpack"), foveate.attach(model, CUTS["r"]):
        model(input_ids=torch.tensor([ROWS[0]]), pixel_values=batch.pixels[..., None])
    with pytest.raises(FoveateError, match="no block 4"):
        foveate.attach(model, ToMe(0.5, site="tower", blocks=4))
    with foveate.attach(model, CUTS["r"]), torch.no_grad():
        assert not torch.equal(model(**batch.inputs).logits, bare)
    assert state_of(model) == before
    assert torch.equal(model(**batch.inputs).logits, bare)


# ---- the slow way


def slow_tome(model: Any, pixels: Tensor, reducer: ToMe) -> tuple[list[list[Token]], Tensor]:
    """A loop over blocks, crops and tokens: the tokens of every crop that are left, and the last states at full length."""
    tower = model.model.vision_tower
    clip = hasattr(tower, "pre_layrnorm")
    states = tower.embeddings(pixels)
    states = tower.pre_layrnorm(states) if clip else states
    crops, full = [], []
    for crop in states:
        tokens = [Token(x, {i: 1.0}, 1.0, i) for i, x in enumerate(crop)]
        for index, block in enumerate(tower.encoder.layers):
            x = torch.stack([t.state for t in tokens])
            x, keys = slow_block(block, x, torch.tensor([t.size for t in tokens]) if reducer.proportional else torch.ones(len(tokens)))
            for token, state in zip(tokens, x, strict=True):
                token.state = state
            if index < reducer.blocks:
                left = len(tokens) - int(clip)
                over = left - budget(reducer.keep, PATCHES)
                r = min(over, reducer.r or math.ceil(over / (reducer.blocks - index)))
                by_key = [Token(k, {i: 1.0}, 1.0, i) for i, k in enumerate(keys.double().numpy())]
                groups = one_pass(by_key, r, protect=int(clip))
                tokens = [together([tokens[i] for i in sorted(g.sources)], tokens[g.keeper].keeper) for g in groups]
        crops.append([t for t in tokens if not clip or 0 not in t.sources])
        full.append(torch.stack([next(t.state for t in tokens if i in t.sources) for i in range(len(crop))]))
    return crops, torch.stack(full)


def together(parts: list[Token], keeper: int) -> Token:
    size = sum(p.size for p in parts)
    return Token(sum(p.size * p.state for p in parts) / size, {s: 1.0 for p in parts for s in p.sources}, size, keeper)


def slow_block(block: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) -> (n, D) and the keys' mean over heads (n, h)."""
    attention = block.self_attn
    y = block.layer_norm1(x)
    q, k, v = (p(y).view(len(x), attention.num_heads, -1).transpose(0, 1) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    weights = (q @ k.transpose(1, 2) * attention.scale + size.log()).softmax(-1)
    x = x + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
    return x + block.mlp(block.layer_norm2(x)), k.mean(0)


@every_tower
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{"keep": 0.1, "r": 3}, {"keep": 0.4}, {"keep": 3, "proportional": False}, {"keep": 1, "r": 9}])
@torch.no_grad()
def test_tome_is_the_slow_loop(tower: str, attn: str, options: dict[str, Any]) -> None:
    reducer = ToMe(**options, site="tower", blocks=3)
    model, batch = make(tower, attn, level=-1), Batch([ROWS[1]])
    crops, full = slow_tome(model, batch.pixels, reducer)
    features: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    with foveate.attach(model, reducer) as run:
        model(**batch.inputs)
    hook.remove()
    clip = tower == "clip"
    torch.testing.assert_close(features[0], full[:, int(clip) :], rtol=1e-4, atol=1e-5)
    assert run.last.visual_tokens == [sum(map(len, crops))] * 2 == [2 * n for n in visual_tokens([reducer], PATCHES, 2)]
    token_map = run.last.maps[0]
    starts = [3, 3 + PATCHES + 1]
    expected = [sorted(s - int(clip) + start for s in t.sources) for start, crop in zip(starts, crops, strict=True) for t in crop]
    slots = (token_map.target.kind[0] == Kind.PATCH).nonzero()[:, 0].tolist()
    assert sorted(token_map.sources(0, m) for m in slots) == sorted(expected)
    keepers = sorted(t.keeper - int(clip) + start for start, crop in zip(starts, crops, strict=True) for t in crop)
    assert token_map.representative[0, slots].tolist() == keepers
    assert token_map.target.size[0, slots].tolist() == [float(len(token_map.sources(0, m))) for m in slots]
    # What enters the language model is what the projector makes of the merged states.
    states = {t.keeper - int(clip) + start: t.state for start, crop in zip(starts, crops, strict=True) for t in crop}
    seen: list[Tensor] = []
    part = model.model.language_model.layers[0].input_layernorm
    hook = part.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with foveate.attach(model, reducer):
        model(**batch.inputs)
    hook.remove()
    made = model.model.multi_modal_projector(torch.stack([states[k] for k in keepers]))
    torch.testing.assert_close(seen[0][0, slots], made, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_blocks_run_on_what_is_left_of_their_crops() -> None:
    model, batch = make(), Batch(ROWS)
    lengths: list[int] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda m, a, k: lengths.append(k["hidden_states"].shape[1]), with_kwargs=True)
        for layer in model.model.vision_tower.encoder.layers
    ]
    with foveate.attach(model, ToMe(0.25, r=5, site="tower", blocks=3)):
        model(**batch.inputs)
    assert lengths == [17, 12, 7, 5]  # the last step is limited by `keep`
    lengths.clear()
    model(**batch.inputs)
    assert lengths == [17] * 4
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_a_tower_returns_every_level_at_full_length_with_equal_groups() -> None:
    model, batch = make(), Batch([ROWS[0]])
    tower = model.model.vision_tower
    tower(batch.pixels, output_hidden_states=True)  # the library hooks the blocks by itself, here before we do
    with foveate.attach(model, ToMe(0.4, site="tower", blocks=3)) as run:
        output = tower(batch.pixels, output_hidden_states=True)
        model(**batch.inputs)
    assert [x.shape for x in output.hidden_states] == [(1, 17, 32)] * 5
    assert output.last_hidden_state.shape == (1, 17, 32)
    token_map = run.last.maps[0]
    for m in range(token_map.target.shape[1]):
        members = [s - 3 + 1 for s in token_map.sources(0, m)]
        if len(members) > 1:
            for level in output.hidden_states:
                assert all(torch.equal(level[0, members[0]], level[0, i]) for i in members)


@torch.no_grad()
def test_levels_in_front_of_a_cut_are_merged_as_it_says() -> None:
    """Features of the first block, and a cut behind it: what enters is the mean of that level over each group."""
    model, batch = make(level=1), Batch([ROWS[0]])
    bare = model.model.vision_tower(batch.pixels, output_hidden_states=True).hidden_states[1][0, 1:]
    features: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    with foveate.attach(model, ToMe(0.4, site="tower", blocks=3)) as run:
        model(**batch.inputs)
    hook.remove()
    token_map = run.last.maps[0]
    groups = [[s - 3 for s in token_map.sources(0, m)] for m in range(token_map.target.shape[1]) if token_map.target.visual[0, m]]
    assert max(map(len, groups)) > 1
    for members in groups:
        torch.testing.assert_close(features[0][0, members[0]], bare[members].mean(0), rtol=1e-4, atol=1e-5)


# ---- the rest of what always holds


@every_tower
@every_cut
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(tower: str, reducers: list[Reducer]) -> None:
    model = make(tower)
    with foveate.attach(model, reducers):
        for side in ("left", "right"):
            batch = Batch(ROWS, side)
            together = model(**batch.inputs).logits
            for i, single in enumerate(batch.singles):
                torch.testing.assert_close(batch.own(together, i), model(**single).logits[0], rtol=1e-4, atol=1e-5)


@every_cut
@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_with_the_cache_is_the_whole_run_again(side: str, reducers: list[Reducer]) -> None:
    check_decoding(make(), reducers, side)


@every_cut
@torch.no_grad()
def test_generate_is_greedy_by_hand(reducers: list[Reducer]) -> None:
    """`generate` encodes ahead of its first forward pass."""
    model, batch = make(), Batch(ROWS, "left")
    with foveate.attach(model, reducers) as run:
        found = model.generate(**batch.inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=1000)
        generated = run.maps
        model(**batch.inputs)
        assert [type(r) for r in run.maps] == [type(r) for r in generated]
    for i, single in enumerate(batch.singles):
        inputs, maps = dict(single), []
        if "pixel_values" in single:
            with foveate.attach(model, reducers) as run:
                model(**single)
            maps = run.maps
        with foveate.attach(model, maps=maps):
            for _ in range(4):
                token = model(**inputs, use_cache=False).logits[:, -1].argmax(-1)[:, None]
                inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        assert found[i, -4:].tolist() == inputs["input_ids"][0, -4:].tolist()


@torch.no_grad()
def test_beams_share_their_groups() -> None:
    model, batch = make(), Batch(ROWS[:2], "left")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "pad_token_id": 0, "eos_token_id": 1000}
    with foveate.attach(model, CUTS["evenly"]):
        together = model.generate(**batch.inputs, **options)
        for i, single in enumerate(batch.singles):
            assert together[i, -4:].tolist() == model.generate(**single, **options)[0, -4:].tolist()


@every_cut
@pytest.mark.parametrize("reentrant", [False, True])
def test_training(reducers: list[Reducer], reentrant: bool) -> None:
    """Gradients reach the tower's embeddings, also through checkpointed blocks, and the loss is that of the caller's labels."""
    found = []
    for checkpointing in (False, True):
        model, batch = make().train(), Batch(ROWS)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.get_input_embeddings().requires_grad_(True)
        labels = batch.labels()
        with foveate.attach(model, reducers):
            out = model(**batch.inputs, labels=labels, use_cache=False)
            out.loss.backward()
        logits, targets = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100))
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        patches = grads["model.vision_tower.embeddings.patch_embedding.weight"]
        assert patches.isfinite().all()
        assert patches.any()
        found.append(grads | {"loss": out.loss.detach()})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_copy_of_an_attached_model_and_a_second_turn() -> None:
    model = make()
    first, second = prompt(1, [1, 2]), [IMAGE] * PATCHES + [3, 4]
    batch = Batch([first + second])
    with foveate.attach(model, CUTS["evenly"]):
        cache = model(input_ids=torch.tensor([first]), pixel_values=batch.pixels[:1], use_cache=True).past_key_values
        turn = model(input_ids=torch.tensor([second]), pixel_values=batch.pixels[1:], past_key_values=cache).logits
        whole = model(**batch.singles[0], use_cache=False).logits
    torch.testing.assert_close(turn[:, -2:], whole[:, -2:], rtol=1e-4, atol=1e-5)


# ---- what is not possible


@torch.no_grad()
def test_tokens_that_are_not_one_for_each_patch() -> None:
    bridged = assembled()  # its 16 tokens are windows of 16 patches
    with foveate.attach(bridged, Fewer(1)), pytest.raises(NotApplicable) as error:
        bridged(**Batch([ROWS[0]]).inputs)
    assert error.value.reason == Reason.NOT_BY_PATCH


@torch.no_grad()
def test_a_projector_that_tells_places_apart_is_noticed() -> None:
    model = make()
    linear = model.model.multi_modal_projector.linear_2
    linear.register_forward_hook(lambda module, args, output: output + torch.randn(16, 32, generator=torch.Generator().manual_seed(0)))
    with foveate.attach(model, CUTS["evenly"]), pytest.raises(NotApplicable, match="told apart by their places"):
        model(**Batch(ROWS).inputs)


def test_towers_whose_blocks_take_more_than_states() -> None:
    from transformers import PixtralVisionConfig

    torch.manual_seed(0)
    vision = PixtralVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    text = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)).eval()
    with foveate.attach(model, Fewer(1)), pytest.raises(NotApplicable) as error:
        model.model.get_image_features(torch.randn(1, 3, 32, 32), image_sizes=torch.tensor([[32, 32]]), vision_feature_layer=-1)
    assert error.value.reason == Reason.TOWER_INPUTS


def test_features_from_elsewhere_are_not_known() -> None:
    model, batch = make(), Batch([ROWS[0]])
    features = model.model.get_image_features(batch.pixels, return_dict=True)
    with foveate.attach(model, CUTS["evenly"]) as run, pytest.raises(FoveateError, match="encode while attached"):
        run.anatomy.core(input_ids=batch.inputs["input_ids"], mm_encoder_outputs={"image": features})


def test_what_does_not_fit() -> None:
    model = make()
    with pytest.raises(FoveateError, match="attach one of the two"):
        foveate.attach(model, [*CUTS["evenly"], FasterVLM(0.5)])

    @dataclass(frozen=True)
    class Everything(Fewer):
        def reduce(self, view: View, stage: int = 0) -> Cut:
            layout = view.layout
            index = torch.arange(1, layout.shape[1]).expand(layout.shape[0], -1)
            return Cut(TokenMap.merge(layout, index[..., None], None, index))

    with foveate.attach(model, Everything()), pytest.raises(FoveateError, match=r"drops the tower's \[CLS\]"):
        model(**Batch(ROWS).inputs)


@pytest.mark.parametrize(
    "options",
    [
        {"site": "bridge"},
        {"site": "tower", "blocks": 0},
        {"site": "tower", "metric": "keys"},
        {"site": "tower", "order": "matching"},
        {"site": "tower", "scope": "crop"},
        {"blocks": 3},
        {"proportional": False},
        {"site": "tower", "proportional": 1},
    ],
)
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=list(options)[-1]):
        ToMe(**options)


def test_spelling_and_counting() -> None:
    for text in ("tome", "tome:site=tower", "tome:keep=0.5,r=8,site=tower,blocks=4,proportional=false"):
        assert spell(parse(text)) == text
    # r = 23 in each of 22 blocks, as in the paper's settings for CLIP-L at 336 pixels: 576 - 22 * 23
    assert visual_tokens(parse("tome:keep=1,r=23,site=tower"), 576, 2) == [70, 70]
    assert visual_tokens(parse("tome:keep=0.25,site=tower"), 576, 2) == [144, 144]
    assert visual_tokens(parse("tome:keep=1,r=9,site=tower,blocks=3"), 16, 2) == [2, 2]  # a pass at most halves
    merged = [ToMe(0.25, site="tower")._merged(576 - 20 * i, 576, i) for i in range(3)]
    assert np.diff([0, *merged]).tolist() == [20, 0, 0]
