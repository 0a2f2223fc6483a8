"""Growth that keeps the function: exact where grown tokens equal their parents, with a cache, packed, under reducers; annealed; refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.tiny_backbones import Assembled, Backbones, llama_config, save_lm
from torch import Tensor
from transformers import MistralConfig

import foveate
from foveate.bridges import build_bridge
from foveate.bridges.chain_of_sight import parents
from foveate.errors import FoveateError
from foveate.model import FoveateForConditionalGeneration
from foveate.model.grown import KEPT, STATE, Table, annealed, lineage

COS = {"kind": "chain_of_sight", "scales": [[4, 2], [2, 1]], "width": 32, "head_dim": 16}
GROWN, SIZE = [[4, 2], [1, 1]], 32  # 2 + 4 tokens become 2 + 16 on the same grid of 4 x 4
BOTH = [[8, 2], [4, 2], [2, 1]]  # at 64 px, a grid of 8 x 8: the coarse scale seeds two
TEXT = list(b"what is that?")


@pytest.fixture
def model(assemble: Callable[..., Assembled]) -> FoveateForConditionalGeneration:
    torch.manual_seed(0)
    found, _ = assemble(COS)
    return found.eval()


def bigger(model: Any, keep: Any = KEPT, scales: Any = GROWN, size: int = SIZE) -> Any:
    found = copy.deepcopy(model)
    found.scale_bridge(scales, size, keep=keep)
    return found


def features(model: Any, images: int = 1) -> Tensor:
    """Of images without detail: every patch says the same."""
    rows, columns = model.config.grid
    flat = torch.randn(images, 1, 1, 32, generator=torch.Generator().manual_seed(1))
    return flat.expand(images, 1, rows * columns, 32)


def prompt(model: Any, *parts: Any) -> Tensor:
    """A row of ids: numbers are so many images, bytes are text."""
    tokens = model.model.bridge.tokens(model.config.grid)
    ids: list[int] = []
    for part in parts:
        ids += [model.config.image_token_id] * (part * tokens) if isinstance(part, int) else list(part)
    return torch.tensor([ids])


def logits(model: Any, *parts: Any) -> Tensor:
    ids = prompt(model, *parts)
    images = sum(part for part in parts if isinstance(part, int))
    given = {"tower_features": features(model, images)} if images else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **given).logits
    return found[ids != model.config.image_token_id]


def test_a_token_knows_which_it_was_inflated_from() -> None:
    small = build_bridge({**COS, "grid": 4, "vision_width": 32, "text_width": 32, "levels": 1})
    for scales, grid, sources in ((GROWN, 4, None), (BOTH, 8, None), ([[8, 2], [2, 2], [2, 1]], 8, None), ([[4, 2], [2, 2]], 8, [0, 0])):
        large = small.scaled(scales=scales, grid=grid, sources=sources)
        of = parents(COS["scales"], 4, scales, grid, sources)  # type: ignore[arg-type]
        own, new = (torch.cat([part.queries.flatten(0, 1) for part in bridge.resamplers]) for bridge in (small, large))  # type: ignore
        assert torch.equal(new, own[of])


@pytest.mark.parametrize(("scales", "size"), [(GROWN, SIZE), (BOTH, 64), ([[8, 2], [1, 1]], 64)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_detail_the_text_is_what_it_was(model: Any, scales: Any, size: int, attention: str) -> None:
    model.set_attn_implementation(attention)
    grown = bigger(model, scales=scales, size=size)
    for parts in ((b"see", 1, b"what?"), (1, b"a"), (b"a", 1, b"and", 1, b"which?")):
        expected = logits(model, *parts)
        assert torch.allclose(logits(grown, *parts), expected, atol=2e-5)
        assert not torch.allclose(logits(bigger(model, (), scales, size), *parts), expected, atol=2e-2)
    assert torch.equal(logits(grown, TEXT), logits(model, TEXT))  # text alone is the language model's own


def test_each_part_is_needed(model: Any) -> None:
    expected = logits(model, b"see", 1, b"what?")

    def off(*keep: str) -> float:
        return float((logits(bigger(model, keep), b"see", 1, b"what?") - expected).abs().max())

    whole = off(*KEPT)
    assert whole < 2e-5
    assert all(off(*(name for name in KEPT if name != left)) > 20 * whole for left in KEPT)


@settings(max_examples=25)
@given(st.sampled_from([(GROWN, 4), (BOTH, 8), ([[8, 2], [1, 1]], 8)]), st.sets(st.sampled_from(KEPT), min_size=1), st.floats(0.01, 1))
def test_what_is_left_goes_linearly(target: tuple[Any, int], keep: set[str], left: float) -> None:
    config = type("Config", (), {"bridge": {**COS, "grid": 4}, "grown": None})()
    bridge = {"scales": target[0], "grid": target[1]}
    whole = lineage(config, None, keep)
    kept, part = Table.of(bridge, whole), Table.of(bridge, annealed(whole, left))  # type: ignore[arg-type]
    plain = Table.plain(len(kept.position))
    for name in ("position", "weight", "seen"):
        ends = getattr(plain, name), getattr(kept, name)
        assert torch.allclose(getattr(part, name), torch.lerp(*ends, left), atol=1e-5)
    assert part.length == pytest.approx(plain.length + left * (kept.length - plain.length))
    assert bool((kept.seen.diagonal() == 1).all())
    assert ("keys" in keep) == bool((kept.weight < 1).any())
    if "keys" in keep:  # the copies of a token together weigh what it did
        of = parents(COS["scales"], 4, target[0], target[1])  # type: ignore[arg-type]
        assert torch.allclose(torch.zeros(6).index_add(0, of, kept.weight), torch.ones(6))
    assert annealed(whole, 0) is None


def test_nothing_left_is_the_plain_growth(model: Any) -> None:
    grown, plain = bigger(model), bigger(model, ())
    grown.anneal_growth(1e-7)
    assert torch.allclose(logits(grown, 1, b"what?"), logits(plain, 1, b"what?"), atol=1e-4)
    grown.anneal_growth(0.0)
    assert grown.config.grown is None
    assert torch.equal(logits(grown, 1, b"what?"), logits(plain, 1, b"what?"))


def test_a_second_growth_keeps_the_first(model: Any) -> None:
    first = bigger(model, scales=[[8, 2], [4, 1]], size=64)
    second = bigger(first, scales=[*BOTH[:1], [2, 1]], size=64)
    expected = logits(model, b"see", 1, b"what?")
    assert torch.allclose(logits(second, b"see", 1, b"what?"), expected, atol=2e-5)
    first.anneal_growth(0.5)  # what is kept then is the first growth as it is now
    second = bigger(first, scales=[*BOTH[:1], [2, 1]], size=64)
    assert torch.allclose(logits(second, b"see", 1, b"what?"), logits(first, b"see", 1, b"what?"), atol=2e-5)


@pytest.mark.parametrize("left", [1.0, 0.4])
@pytest.mark.parametrize("keep", [KEPT, ("positions",), ("keys", "order")])
def test_a_cache_goes_on_where_the_prompt_ended(model: Any, keep: Any, left: float) -> None:
    grown = bigger(model, keep)
    grown.anneal_growth(left)
    ids, given = prompt(grown, b"see", 1, b"what is that?"), {"tower_features": features(grown)}
    with torch.no_grad():
        whole = grown(input_ids=ids, **given).logits
        cut = ids.shape[1] - 4
        first = grown(input_ids=ids[:, :cut], **given, use_cache=True)
        parts, cache = [first.logits], first.past_key_values
        for step in range(cut, ids.shape[1]):
            parts.append(grown(input_ids=ids[:, step : step + 1], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-5)


def test_generated_text_is_that_of_the_small_model(model: Any) -> None:
    """Prompts of two lengths, padded on the left, greedy and with beams, with a cache and without."""
    grown = bigger(model)

    def answers(m: Any, **options: Any) -> Tensor:
        rows = [prompt(m, b"see", 1, b"what?")[0], prompt(m, 1, b"a")[0]]
        length = max(map(len, rows))
        ids = torch.stack([torch.cat([row.new_zeros(length - len(row)), row]) for row in rows])
        mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long()
        found: Tensor = m.generate(
            input_ids=ids, attention_mask=mask, **pixels(m), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, **options
        )
        return found[:, length:]

    def pixels(m: Any) -> dict[str, Tensor]:
        """The tower of an even grey still marks its patches' places: it is made not to."""
        embeddings = m.model.vision_tower.vision_model.embeddings if hasattr(m.model.vision_tower, "vision_model") else None
        embeddings = embeddings or m.model.vision_tower.embeddings
        embeddings.position_embedding.weight.data.zero_()
        size = m.config.image_size
        return {"pixel_values": torch.stack([torch.full((3, size, size), 0.3), torch.full((3, size, size), -0.6)])}

    for options in ({}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(answers(grown, **options), answers(model, **options))


def test_padding_and_packing(model: Any) -> None:
    """A row among others, or behind another in one packed row, has the logits that it has alone."""
    grown = bigger(model)
    grown.anneal_growth(0.7)
    a, b = prompt(grown, b"see", 1, b"what?")[0], prompt(grown, 1, b"a")[0]
    alone = [grown(input_ids=row[None], tower_features=features(grown)).logits[0] for row in (a, b)]
    two = features(grown).expand(2, -1, -1, -1)
    padded = torch.stack([a, torch.cat([b, b.new_zeros(len(a) - len(b))])])
    mask = (torch.arange(len(a)) < torch.tensor([[len(a)], [len(b)]])).long()
    found = grown(input_ids=padded, attention_mask=mask, tower_features=two).logits
    assert torch.allclose(found[0], alone[0], atol=2e-5)
    assert torch.allclose(found[1, : len(b)], alone[1], atol=2e-5)
    places = torch.cat([torch.arange(len(a)), torch.arange(len(b))])[None]
    own = torch.block_diag(torch.ones(len(a), len(a)), torch.ones(len(b), len(b))).tril().bool()[None, None]
    for given_mask in (None, own):
        packed = grown(input_ids=torch.cat([a, b])[None], position_ids=places, attention_mask=given_mask, tower_features=two).logits[0]
        assert torch.allclose(packed, torch.cat(alone), atol=2e-5)


def test_what_is_kept_is_saved(model: Any, tmp_path: Any) -> None:
    grown = bigger(model)
    grown.anneal_growth(0.3)
    grown.save_pretrained(tmp_path)
    again = FoveateForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.grown == grown.config.grown
    assert again.config.grown["left"] == 0.3
    assert torch.equal(logits(again, 1, b"what?"), logits(grown, 1, b"what?"))


@pytest.mark.parametrize("reducer", ["uniform:keep=0.5", "uniform:keep=0.5,layer=1", "vcc:layer=1,stride=2"])
def test_reducers_cut_what_the_model_has_made(model: Any, reducer: str) -> None:
    """What a reducer leaves goes on with a cache as without, and one that leaves all changes nothing."""
    grown = bigger(model)
    grown.anneal_growth(0.7)
    given, more = {"tower_features": features(grown)}, torch.tensor([TEXT[:1]])
    ids = prompt(grown, b"see", 1, b"what is that?")
    with torch.no_grad():
        with foveate.attach(grown, reducer) as run:
            cache = grown(input_ids=ids, **given, use_cache=True).past_key_values
            assert min(run.last.visual_tokens) < 18
            step = grown(input_ids=more, past_key_values=cache).logits[0, -1]
            whole = grown(input_ids=torch.cat([ids, more], 1), **given).logits[0, -1]
        assert torch.allclose(step, whole, atol=2e-5)
        bare = grown(input_ids=ids, **given).logits
        with foveate.attach(grown, "uniform:keep=1.0", shortcuts=False):
            assert torch.allclose(grown(input_ids=ids, **given).logits, bare, atol=1e-5)


def test_refused(model: Any, assemble: Callable[..., Assembled], folders: Backbones, tmp_path: Any) -> None:
    with pytest.raises(FoveateError, match="cannot keep 'weights'; it can keep positions, keys, order"):
        bigger(model, ("weights",))
    grown = bigger(model)
    with pytest.raises(FoveateError, match="do not say which of them are of images"):
        grown(inputs_embeds=torch.zeros(1, 4, 32))
    cache = grown(input_ids=prompt(grown, 1, b"a"), tower_features=features(grown), use_cache=True).past_key_values
    assert hasattr(cache, STATE)
    cache.batch_repeat_interleave(2)
    with pytest.raises(FoveateError, match="filled by 1 rows"):
        grown(input_ids=torch.tensor([[3], [3]]), past_key_values=cache)
    window = MistralConfig(vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                           num_key_value_heads=1, sliding_window=8)  # fmt: skip
    sliding, _ = assemble(COS, text=save_lm(tmp_path / "mistral", config=window))
    with pytest.raises(FoveateError, match="sliding windows"):
        bigger(sliding)
    flex, _ = assemble(COS, text=save_lm(tmp_path / "llama", config=llama_config(260)), attn_implementation="flex_attention")
    with pytest.raises(FoveateError, match="flex_attention does not take"):
        bigger(flex)
