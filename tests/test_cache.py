"""Cache policies in a model: what stays is what decoding sees, whatever the batch, the beams, the turn and what else is attached."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.cache_utils import Fp8QuantizedLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import foveate
from foveate import CachePolicy, CacheView, FoveateError, NotApplicable
from foveate.accounting import predict
from foveate.cache_policies import POLICIES, parse
from foveate.cache_policies.base import Keeping
from tests.situations.models import GREEDY, mistral, qwen, text_backend
from tests.tiny import IMAGE, LAYERS, MODELS, PATCHES, ROWS, Batch, llava, prompt

EXAMPLES = [policy.examples[0] for policy in POLICIES.values()] + ["lookm:keep=0.5,window=4,merge=pivot"]
ONCE = [spelling for policy in POLICIES.values() for spelling in policy.examples if "every" not in spelling]
AGAIN = [spelling for policy in POLICIES.values() for spelling in policy.examples if "every" in spelling]
every_example = pytest.mark.parametrize("cache", EXAMPLES)
TURN = [4, 9, 8, 2, 11, 12]


def generated(model: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    return model.generate(**inputs, **{"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, **GREEDY, **more})


def lengths(cache: Any) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


# ---- the oracle: the whole sequence again, with what was evicted masked out head by head -----------------------------------------------


@contextmanager
def masked(model: Any, gone: dict[int, Tensor], since: int) -> Iterator[None]:
    """In decoder layer i the queries from `since` on do not see the keys gone[i] (B, H, K)."""
    layers = {id(layer.self_attn): i for i, layer in enumerate(model.model.language_model.layers)}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        layer = layers.get(id(module))
        if layer is not None:
            N = query.shape[2]
            seen = torch.ones(N, N, dtype=torch.bool).tril() if mask is None else mask
            hidden = torch.nn.functional.pad(gone[layer], (0, N - gone[layer].shape[2]))[:, :, None].expand(-1, -1, N, -1)
            mask = seen & ~(hidden & (torch.arange(N) >= since)[:, None])
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    before = AttentionInterface().get("sdpa")
    AttentionInterface.register("sdpa", attend)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", before)


@dataclass(frozen=True)
class Uneven(Keeping):
    """A policy whose first head keeps four slots and whose second keeps nine."""

    name: ClassVar[str] = "uneven"

    @property
    def observes(self) -> int:
        return 0

    def score(self, view: CacheView) -> Tensor:
        return view.noise(3)

    def lengths(self, view: CacheView) -> Tensor:
        return torch.tensor([[4, 9]]).expand(len(view.tokens), -1)


@pytest.mark.parametrize("cache", [*(spelling for spelling in ONCE if "merge" not in spelling), Uneven()], ids=str)
def test_decoding_is_the_whole_sequence_with_the_evicted_keys_hidden(cache: str | CachePolicy) -> None:
    model, batch = llava(), Batch(ROWS, "left")
    n = batch.inputs["input_ids"].shape[1]
    with torch.no_grad():
        with foveate.attach(model, None, cache=cache):
            found = generated(model, batch.inputs)
        held = found.past_key_values.memory.held
        gone = {}
        for i, layer in held.items():
            slots = layer.slots.expand(-1, 2, -1)
            there = torch.zeros(3, 2, n + 6, dtype=torch.bool).scatter(2, torch.where(slots >= 0, slots, n + 5), True)
            gone[i] = (~there[..., :n]).repeat_interleave(2, 1)
            assert bool((gone[i] & batch.inputs["attention_mask"].bool()[:, None]).any())
        ids = found.sequences[:, :-1]
        mask = torch.nn.functional.pad(batch.inputs["attention_mask"], (0, ids.shape[1] - n), value=1)
        with masked(model, gone, n):
            again = model(input_ids=ids, attention_mask=mask, pixel_values=batch.inputs["pixel_values"], use_cache=False).logits[:, n - 1 :]
    torch.testing.assert_close(torch.stack(found.logits, 1), again, atol=1e-5, rtol=1e-4)


# ---- keep all --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", [spelling for policy in POLICIES.values() for spelling in policy.keeps_all])
def test_what_keeps_all_is_the_bare_model_bit_for_bit(name: str, cache: str) -> None:
    model, batch = MODELS[name](), Batch(ROWS, "left")
    with torch.no_grad():
        bare = generated(model, batch.inputs)
        with foveate.attach(model, None, cache=cache):
            found = generated(model, batch.inputs)
        after = generated(model, batch.inputs)
    for other in (found, after):
        assert torch.equal(bare.sequences, other.sequences)
        assert all(map(torch.equal, bare.logits, other.logits))
    assert type(after.past_key_values) is DynamicCache


@every_example
def test_the_prompt_itself_and_training_see_everything(cache: str) -> None:
    model, batch = llava(), Batch(ROWS, "right")
    labels = batch.labels()
    with torch.no_grad():
        bare = model(**batch.inputs, labels=labels)
        with foveate.attach(model, None, cache=cache):
            found = model(**batch.inputs, labels=labels)
            without = model(**batch.inputs, labels=labels, use_cache=False)
    assert torch.equal(bare.logits, found.logits)
    assert torch.equal(bare.logits, without.logits)
    assert bare.loss == found.loss == without.loss


# ---- batches, beams, turns -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llava, qwen], ids=["llava", "qwen"])
@pytest.mark.parametrize("cache", [*EXAMPLES, *AGAIN])
def test_a_batch_is_its_rows_alone(make: Any, cache: str) -> None:
    model, batch = make(), Batch(ROWS, "left")
    calls = [batch.inputs, *batch.singles] if make is llava else _qwen_calls(batch)
    with torch.no_grad(), foveate.attach(model, None, cache=cache):
        together, *alone = [generated(model, call) for call in calls]
    for row, one in enumerate(alone):
        torch.testing.assert_close(torch.stack(together.logits)[:, row], torch.stack(one.logits)[:, 0], atol=1e-5, rtol=1e-4)
    if any(name in cache for name in ("random", "snapkv", "lookm")) and "every" not in cache:
        assert lengths(together.past_key_values) == [max(lengths(one.past_key_values)[0] for one in alone)] * LAYERS


def _qwen_calls(batch: Batch) -> list[dict[str, Tensor]]:
    """The same prompts in Qwen's terms: each image between two marks, its pixels packed."""
    rows = [[t for token in _runs(row) for t in token] for row in batch.rows]
    qwen_batch = Batch(rows, "left")
    pixels = torch.randn(3, 64, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    grid = torch.tensor([[1, 8, 8]])

    def call(ids: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        mask = ids.get("attention_mask", torch.ones_like(ids["input_ids"]))
        found = {"input_ids": ids["input_ids"], "attention_mask": mask, "mm_token_type_ids": (ids["input_ids"] == IMAGE).long()}
        return found | ({"pixel_values": images.flatten(0, 1), "image_grid_thw": grid.expand(len(images), -1)} if len(images) else {})

    alone, start = [], 0
    for row in rows:
        n = row.count(IMAGE) // PATCHES
        alone.append(call({"input_ids": torch.tensor([row])}, pixels[start : start + n]))
        start += n
    both = {name: value for name, value in qwen_batch.inputs.items() if name != "pixel_values"}
    return [call(both, pixels), *alone]


def _runs(row: list[int]) -> Iterator[list[int]]:
    at = 0
    while at < len(row):
        if row[at] == IMAGE:
            yield [92, *[IMAGE] * PATCHES, 93]
            at += PATCHES
        else:
            yield [row[at]]
            at += 1


@pytest.mark.parametrize(
    "cache", ["snapkv:keep=0.5,window=4", "zipvl:tau=0.5,probes=4,every=2", "lookm:keep=9,window=2,merge=average,every=2"]
)
def test_beams_take_their_caches_along(cache: str) -> None:
    """Each beam is scored by its own cache: the sequence's likelihood is that of the same tokens handed in one by one."""
    model, batch = llava(), Batch(ROWS[:2], "left")
    with torch.no_grad(), foveate.attach(model, None, cache=cache):
        found = generated(model, batch.inputs, num_beams=3, num_return_sequences=3, output_scores=True)
        n = batch.inputs["input_ids"].shape[1]
        inputs = {name: value.repeat_interleave(3, 0) for name, value in batch.inputs.items()}
        inputs["pixel_values"] = torch.cat([batch.pixels[own] for own in ([0], [1, 2]) for _ in range(3)])
        logits, out = [], model(**inputs, use_cache=True)
        mask = inputs["attention_mask"]
        for step in range(6):
            logits.append(out.logits[:, -1].log_softmax(-1).gather(1, found.sequences[:, n + step, None]))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            if step < 5:
                token = found.sequences[:, n + step, None]
                out = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values)
    torch.testing.assert_close(found.sequences_scores, torch.cat(logits, 1).mean(1), atol=1e-4, rtol=1e-3)


@every_example
def test_a_second_turn_is_thinned_as_it_would_be_alone(cache: str) -> None:
    model, batch = llava(), Batch(ROWS[:2], "left")
    turn = torch.tensor([TURN])
    more = {"input_ids": torch.tensor([[4] + [IMAGE] * PATCHES + [8, 3]]), "pixel_values": batch.pixels[:1]}
    with torch.no_grad(), foveate.attach(model, None, cache=cache) as run:
        held = model(**batch.inputs, use_cache=True).past_key_values
        together = [model(input_ids=turn.expand(2, -1), past_key_values=held).logits[:, -1]]
        together.append(model(input_ids=turn[:, :1].expand(2, -1), past_key_values=held).logits[:, -1])
        both = {"input_ids": more["input_ids"].expand(2, -1), "pixel_values": more["pixel_values"].repeat(2, 1, 1, 1)}
        together.append(model(**both, past_key_values=held).logits[:, -1])
        assert all(run.last.stays[i] < run.last.ran[i] for i in range(LAYERS))
        for row, call in enumerate(batch.singles):
            own = model(**call, use_cache=True).past_key_values
            alone = [model(input_ids=turn, past_key_values=own).logits[0, -1]]
            alone.append(model(input_ids=turn[:, :1], past_key_values=own).logits[0, -1])
            alone.append(model(**more, past_key_values=own).logits[0, -1])
            if cache.startswith(("random", "snapkv", "lookm")):  # half of all that was said so far
                assert lengths(own) == [(len(ROWS[row]) + len(TURN) + 1 + PATCHES + 3 + 1) // 2] * LAYERS
            for a, b in zip(alone, together, strict=True):
                torch.testing.assert_close(b[row], a, atol=1e-5, rtol=1e-4)


def test_images_of_an_earlier_turn_are_still_known_as_images() -> None:
    """LOOK-M drops no text while there are images to drop, those of the first turn as well."""
    model, call = llava(), Batch(ROWS[:1]).singles[0]
    text = [i for i, token in enumerate([*ROWS[0], *TURN]) if token != IMAGE]
    with torch.no_grad(), foveate.attach(model, None, cache="lookm:keep=18,window=1"):
        cache = model(**call, use_cache=True).past_key_values
        model(input_ids=torch.tensor([TURN]), past_key_values=cache)
    for held in cache.memory.held.values():
        assert held.slots.shape[2] == 18
        assert all(set(text) <= set(head) for head in held.slots[0].tolist())


@pytest.mark.parametrize("cache", [None, "snapkv:keep=0.25,window=2"])
def test_a_thinned_cache_goes_on_under_another_attachment(cache: str | None) -> None:
    model, call = llava(), Batch(ROWS[:1]).singles[0]
    with torch.no_grad():
        with foveate.attach(model, None, cache="snapkv:keep=0.5,window=4"):
            held = model(**call, use_cache=True).past_key_values
            expected = [model(input_ids=torch.tensor([[token]]), past_key_values=held).logits for token in TURN]
            held = model(**call, use_cache=True).past_key_values
        with pytest.raises(FoveateError, match="'snapkv:window=4' has cut, and nothing is attached"):
            model(input_ids=torch.tensor([TURN]), past_key_values=held)
        with foveate.attach(model, None, cache=cache):  # single tokens are no prompt: nothing more goes
            found = [model(input_ids=torch.tensor([[token]]), past_key_values=held).logits for token in TURN]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_cache_can_be_cropped_to_tokens_that_are_still_there() -> None:
    model, call = llava(), Batch(ROWS[:1]).singles[0]
    with torch.no_grad(), foveate.attach(model, None, cache="snapkv:keep=0.5,window=4"):
        cache = model(**call, use_cache=True).past_key_values
        expected = model(input_ids=torch.tensor([[4]]), past_key_values=copy.deepcopy(cache)).logits
        for token in TURN[:3]:
            model(input_ids=torch.tensor([[token]]), past_key_values=cache)
        cache.crop(-3)
        torch.testing.assert_close(model(input_ids=torch.tensor([[4]]), past_key_values=cache).logits, expected)
        with pytest.raises(FoveateError, match="evicted from decoder layer 0"):
            cache.crop(-10)
        again = pickle.loads(pickle.dumps(cache))  # our own
        torch.testing.assert_close(
            model(input_ids=torch.tensor([[9]]), past_key_values=again).logits,
            model(input_ids=torch.tensor([[9]]), past_key_values=cache).logits,
        )


@pytest.mark.parametrize("cache", ["snapkv:keep=0.5,window=4", "prefixkv:keep=0.5"])
def test_assisted_decoding_is_greedy_decoding(cache: str) -> None:
    model, call = llava(), Batch(ROWS[:1]).singles[0]
    with torch.no_grad(), foveate.attach(model, None, cache=cache):
        plain = generated(model, call, max_new_tokens=12)
        assisted = generated(model, call, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.sequences, assisted.sequences)


# ---- while decoding --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", AGAIN)
def test_while_decoding_the_cache_stays_within_its_budget(cache: str) -> None:
    model, batch = llava(), Batch(ROWS, "left")
    with torch.no_grad(), foveate.attach(model, None, cache=cache):
        seen, out = [], model(**batch.inputs, use_cache=True)
        mask = batch.inputs["attention_mask"]
        for token in range(1, 8):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = model(input_ids=torch.full((3, 1), token), attention_mask=mask, past_key_values=out.past_key_values)
            seen.append(max(lengths(out.past_key_values)))
    if "keep=9" in cache:
        most = 9 * LAYERS if "prefix" in cache else 9
        assert max(seen) <= most + 1
        assert seen[-2] <= most
    assert seen[-2] < seen[-1] == seen[-2] + 1  # every second token decides, the others are added


def test_decisions_while_decoding_look_at_the_last_queries() -> None:
    """SnapKV after two decoded tokens is SnapKV on the whole of prompt and answer, where nothing had gone before."""
    model, row = llava(), ROWS[0]
    pixels = Batch([row]).pixels
    with torch.no_grad():
        with foveate.attach(model, None, cache="snapkv:keep=24,window=3,every=2"):
            cache = model(input_ids=torch.tensor([row]), pixel_values=pixels, use_cache=True).past_key_values
            for token in (4, 9):
                model(input_ids=torch.tensor([[token]]), past_key_values=cache)
        with foveate.attach(model, None, cache="snapkv:keep=24,window=3"):
            whole = model(input_ids=torch.tensor([[*row, 4, 9]]), pixel_values=pixels, use_cache=True).past_key_values
    assert len(row) == 23
    assert lengths(cache) == [24] * LAYERS
    for mine, right in zip(cache.memory.held.values(), whole.memory.held.values(), strict=True):
        assert torch.equal(mine.slots, right.slots)


# ---- with reducers, and in other models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reducer", "cache"),
    [
        ("divprune:keep=0.5", "snapkv:keep=0.5,window=4"),
        ("fastv:keep=0.5,layer=2", "lookm:keep=0.5,window=4"),
        ("vcc:layer=2,stride=4", "snapkv:keep=0.5,window=4"),
        ("pyramiddrop:keep=0.5", "prefixkv:keep=0.5"),
        ("pyramiddrop:keep=0.5", "random:keep=9,every=2"),
    ],
)
def test_beside_a_reducer_each_layer_keeps_of_what_it_was_given(reducer: str, cache: str) -> None:
    model, batch = llava(), Batch(ROWS, "left")
    with torch.no_grad(), foveate.attach(model, reducer, cache=cache) as run:
        together = generated(model, batch.inputs)
        ran = run.last.tokens
        assert [int(run.last.ran[i]) for i in range(LAYERS)] == ran
        if cache.startswith(("snapkv", "lookm")):
            assert all(abs(run.last.stays[i] - ran[i] / 2) <= 1.5 for i in range(LAYERS))
        for row, call in enumerate(batch.singles):
            alone = generated(model, call)
            torch.testing.assert_close(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0], atol=1e-5, rtol=1e-4)


def test_layers_that_slide_keep_their_window() -> None:
    with pytest.raises(NotApplicable, match="attends to all of the sequence"), foveate.attach(mistral(window=8), None, cache="snapkv"):
        pass


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["snapkv:keep=0.5,window=4", "random:keep=0.5", "zipvl:tau=0.8"])
def test_attention_backends_agree(attn: str, cache: str) -> None:
    batch = Batch(ROWS, "left")
    with torch.no_grad():
        found = []
        for name in (attn, "eager"):
            model = llava(name)
            with foveate.attach(model, None, cache=cache):
                found.append(torch.stack(generated(model, batch.inputs).logits))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", ["snapkv:keep=0.5,window=4", "zipvl:tau=0.8", "random:keep=9,every=2"])
def test_flash_attention_says_the_same(cache: str) -> None:
    """Heads hold different tokens, but as many; rows of a batch different numbers."""
    batch, found = Batch(ROWS, "left"), []
    with torch.no_grad():
        for backend in ("sdpa", "flash_stand_in"):
            model = text_backend(llava(), backend)
            with foveate.attach(model, None, cache=cache):
                cached = model(**batch.inputs, use_cache=True).past_key_values
                found.append([model(input_ids=torch.tensor([[token]] * 3), past_key_values=cached).logits for token in TURN])
                found[-1].append(model(input_ids=torch.tensor([TURN] * 3), past_key_values=cached).logits)
    for sdpa, flash in zip(*found, strict=True):
        torch.testing.assert_close(sdpa, flash, atol=1e-5, rtol=1e-4)


def test_flash_attention_refuses_heads_that_keep_different_numbers() -> None:
    model, call = text_backend(llava(), "flash_stand_in"), Batch(ROWS[:1]).singles[0]
    with torch.no_grad(), foveate.attach(model, None, cache=Uneven()):
        cache = model(**call, use_cache=True).past_key_values
        with pytest.raises(FoveateError, match="heads of one layer keep different numbers"):
            model(input_ids=torch.tensor([[4]]), past_key_values=cache)


def test_other_reducers_for_a_while_keep_the_policy_and_a_suspended_run_has_none() -> None:
    model, call = llava(), Batch(ROWS[:1]).singles[0]
    with torch.no_grad(), foveate.attach(model, None, cache="random:keep=0.5") as run:
        assert lengths(model(**call, use_cache=True).past_key_values) == [12] * LAYERS
        with run.instead("divprune:keep=0.5"):
            assert lengths(model(**call, use_cache=True).past_key_values) == [8] * LAYERS
        with run.suspended():
            assert lengths(model(**call, use_cache=True).past_key_values) == [23] * LAYERS


# ---- what cannot be --------------------------------------------------------------------------------------------------------------------


def test_caches_that_cannot_be_thinned_are_refused_and_nothing_stays_behind() -> None:
    model, call = llava(), Batch(ROWS[:1]).singles[0]
    with torch.no_grad():
        bare, hooks = model(**call).logits, _hooks(model)
        with foveate.attach(model, None, cache="snapkv:keep=0.5"):
            packed, moved = DynamicCache(), DynamicCache(config=model.config)
            packed.layers, moved.offloading = [Fp8QuantizedLayer() for _ in range(LAYERS)], True
            for other, what in (
                (StaticCache(model.config, max_cache_len=40), "StaticCache of StaticLayers"),
                (packed, "Fp8Quant"),
                (moved, "offloaded"),
            ):
                with pytest.raises(FoveateError, match=f"cannot thin a .*{what}.*plain DynamicCache"):
                    model(**call, past_key_values=other)
            with pytest.raises(FoveateError, match="plain DynamicCache"):
                generated(model, call, cache_implementation="static")
            assert lengths(model(**call, use_cache=True).past_key_values) == [12] * LAYERS
        assert torch.equal(model(**call).logits, bare)
        assert _hooks(model) == hooks


def test_a_rule_of_who_sees_whom_and_a_policy_are_not_attached_together() -> None:
    model, call = llava(), Batch(ROWS[:1]).singles[0]
    with torch.no_grad():
        model(**call)
        hooks = _hooks(model)
        with pytest.raises(FoveateError, match=r"yopo.* says which token sees which .* snapkv.* attach one of the two"):
            foveate.attach(model, "yopo:window=3", cache="snapkv:keep=0.5")
        with foveate.attach(model, "yopo:window=3"):
            cache = model(**call, use_cache=True).past_key_values
        with foveate.attach(model, None, cache="random:keep=0.5"):
            cache = model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache, use_cache=True).past_key_values
            with pytest.raises(FoveateError, match="only one of them can act"):
                model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    assert _hooks(model) == hooks


def _hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_embeddings_that_do_not_say_what_is_an_image() -> None:
    model = llava()
    embeds = torch.randn(1, 20, 32)
    with (
        torch.no_grad(),
        foveate.attach(model, None, cache="lookm:keep=0.5"),
        pytest.raises(FoveateError, match="which of them are of images"),
    ):
        model(inputs_embeds=embeds)
    with torch.no_grad(), foveate.attach(model, None, cache="random:keep=0.5"):
        assert lengths(model(inputs_embeds=embeds, use_cache=True).past_key_values) == [10] * LAYERS


def test_text_alone_is_thinned_too() -> None:
    model, ids = llava(), torch.tensor([[5, 6, 7, *TURN, 3, 2, 1]])
    with torch.no_grad(), foveate.attach(model, None, cache="snapkv:keep=0.5,window=2"):
        found = generated(model, {"input_ids": ids})
    assert lengths(found.past_key_values) == [6 + 5] * LAYERS


# ---- what it costs ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cache", ["random:keep=0.5", "snapkv:keep=0.25,window=4", "pyramidkv:keep=0.5,window=4,beta=4", "lookm:keep=9,merge=pivot"]
)
def test_bytes_that_ran_and_bytes_that_stay_are_told_apart(cache: str) -> None:
    model, row = llava(), prompt(1, [1, 2, 3])
    call, policy = Batch([row]).singles[0], parse(cache)
    with torch.no_grad(), foveate.attach(model, None, cache=cache) as run:
        held = model(**call, use_cache=True).past_key_values
    ledger, told = run.ledger, predict(model.config, text_tokens=len(row) - PATCHES, cache=policy)
    token = 2 * 2 * 8 * 2  # keys and values of two heads of 8, two bytes each
    assert ledger.kv_bytes == (23 * token,) * LAYERS
    assert ledger.kv_stays == tuple(n * token for n in lengths(held)) == told.kv_stays
    assert ledger.kv_peak == told.kv_peak == sum(ledger.kv_stays[:-1]) + ledger.kv_bytes[-1]
    assert ledger.flops == told.flops
    assert (ledger.flops["scores"] > 0) == (not cache.startswith("random"))
    decoding = predict(model.config, text_tokens=len(row) - PATCHES, cache=policy, mode="decode", new_tokens=3)
    assert decoding.kv_bytes == tuple(n + 3 * token for n in ledger.kv_stays)


@pytest.mark.parametrize("cache", ["zipvl:tau=0.8", "prefixkv:keep=0.5"])
def test_what_depends_on_the_prompt_is_not_predicted(cache: str) -> None:
    model, row = llava(), prompt(1, [1, 2, 3])
    with torch.no_grad(), foveate.attach(model, None, cache=cache) as run:
        held = model(**Batch([row]).singles[0], use_cache=True).past_key_values
    ledger, told = run.ledger, predict(model.config, text_tokens=len(row) - PATCHES, cache=parse(cache))
    assert ledger.kv_stays == tuple(n * 64 for n in lengths(held))
    assert told.kv_stays == ()
    late = cache.startswith("prefixkv")  # decided on after the last layer
    assert ledger.kv_peak == (sum(ledger.kv_bytes) if late else sum(ledger.kv_stays[:-1]) + ledger.kv_bytes[-1])
    with pytest.raises(FoveateError, match="depends on more than sizes"):
        predict(model.config, text_tokens=7, cache=parse(cache), mode="decode", new_tokens=3)
