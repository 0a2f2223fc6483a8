"""Answers that are contrasted with a second pass: the rule by hand, both passes against whole sequences that are run again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import foveate
from foveate.accounting import Ledger, answered, predict, summed, together
from foveate.errors import FoveateError
from foveate.evaluation.evaluate import evaluate
from foveate.inference import load_model
from foveate.inference.contrast import Contrast, contrasted
from foveate.inference.noise import STEPS, left, noised
from foveate.inference.strategies import DAMRO, VCD, Contrasting, opened, parse
from foveate.inference.strategies.damro import outliers
from foveate.inspect.look import look_for, open_image
from tests.conformance.family import families
from tests.situations.models import GREEDY, qwen
from tests.situations.models import inputs as made
from tests.tiny import IMAGE, LAYERS, PATCHES, ROWS, Batch, assembled, llava

ALL = [5, 6, 7] + [IMAGE] * PATCHES + [1, 2, 3]
EVERY = Contrast("the same", 1.0, 0.0)  # a second pass that differs in nothing


def batch(model: Any, rows: list[list[int]] = ROWS) -> dict[str, Any]:
    """Prompts of several lengths; of Qwen, whose pixels are packed, two of one length."""
    if model.config.model_type != "qwen2_5_vl":
        return Batch(rows, "left").inputs
    found = made("qwen2_5_vl", [ALL, [9, *ALL[1:]]])
    return {**found, "attention_mask": torch.ones_like(found["input_ids"])}


def generated(model: Any, inputs: dict[str, Any], new: int, **options: Any) -> tuple[Tensor, Tensor]:
    """(B, new) tokens, greedy unless told, and (B, new, V) scores that they were chosen by."""
    more = {**GREEDY, **options, "return_dict_in_generate": True, "output_scores": True}
    found = model.generate(**inputs, max_new_tokens=new, **more)
    return found.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(found.scores, 1)


# ---- the rule


def test_the_hand_example() -> None:
    found = contrasted(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[3.0, 0.0, 0.0]]), 0.5, 0.1)
    assert found.tolist() == [[3.0, 1.5, -math.inf]]
    assert 3 + math.log(0.1) == pytest.approx(0.697, abs=1e-3)


logits = st.lists(st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=4), min_size=2, max_size=2)


@settings(max_examples=60, deadline=None)
@given(logits, logits, st.floats(0, 4), st.sampled_from([0.0, 1e-3, 0.1, 0.5, 1.0]))
def test_the_rule_is_the_equation(scores: list[list[float]], other: list[list[float]], alpha: float, beta: float) -> None:
    found = contrasted(torch.tensor(scores), torch.tensor(other), alpha, beta)
    for row, (first, second) in enumerate(zip(scores, other, strict=True)):
        for token in range(4):
            bound = max(first) + math.log(beta) if beta else -math.inf
            if abs(first[token] - bound) < 1e-4 and first[token] != max(first):
                continue  # float32 may fall on either side
            right = (1 + alpha) * first[token] - alpha * second[token] if first[token] >= bound else -math.inf
            assert float(found[row, token]) == pytest.approx(right, rel=1e-5, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(logits, st.floats(0, 4))
def test_passes_that_say_the_same_change_no_bit_and_the_best_token_may_always_be_said(scores: list[list[float]], alpha: float) -> None:
    own = torch.tensor(scores)
    assert torch.equal(contrasted(own, own, alpha, 0.0), own)
    assert torch.equal(contrasted(own, -own, 0.0, 0.0), own)
    only = contrasted(own, -own, alpha, 1.0)
    assert bool((only.isfinite() == (own == own.amax(-1, keepdim=True))).all())


def test_what_may_not_be_said_stays_so_and_what_is_no_number_shows() -> None:
    own = torch.tensor([[-math.inf, 1.0, 2.0]])
    assert contrasted(own, own, 1.0, 0.0).tolist() == own.tolist()
    assert contrasted(torch.tensor([[math.nan, 1.0]]), torch.tensor([[0.0, 1.0]]), 1.0, 0.1).isnan().any()
    assert contrasted(torch.tensor([[2.0, 1.0]]), torch.tensor([[math.nan, 1.0]]), 1.0, 0.1).isnan().any()


# ---- the noise


def test_how_much_of_a_picture_is_left() -> None:
    added = torch.sigmoid(torch.linspace(-6, 6, STEPS, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    right = torch.cumprod(1 - added, 0)
    for step in (0, 1, 499, 500, 999):
        assert left(step) == pytest.approx(float(right[step]), rel=1e-12)


def test_the_noise_is_normal_and_follows_from_seed_and_picture() -> None:
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = noised({"pixel_values": pixels, "input_ids": torch.ones(1)}, 500)["pixel_values"]
    noise = (found - math.sqrt(left(500)) * pixels) / math.sqrt(1 - left(500))
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.var()) == pytest.approx(1, abs=0.03)
    assert float((noise.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=0.01)
    for axis in (1, 2, 3):  # neighbours have nothing to do with each other
        assert abs(float((noise * noise.roll(1, axis)).mean())) < 0.02
    assert abs(float((noise[0] * noise[1]).mean())) < 0.03
    assert torch.equal(noised({"pixel_values": pixels.flip(0)}, 500)["pixel_values"].flip(0), found)
    assert torch.equal(noised({"pixel_values": pixels[1:]}, 500)["pixel_values"][0], found[1])
    other = noised({"pixel_values": pixels}, 500, seed=1)["pixel_values"]
    assert not torch.equal(other, found)
    assert torch.equal(
        noised({"pixel_values": pixels}, 0)["pixel_values"].bfloat16(),
        (math.sqrt(left(0)) * pixels + math.sqrt(1 - left(0)) * noise).bfloat16(),
    )


def test_what_fills_a_batch_up_changes_no_noise_and_gets_none() -> None:
    one = torch.randn(1, 2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(one, (0, 4, 0, 2, 0, 0, 0, 3))
    alone, together_ = (noised({"pixel_values": pixels}, 300)["pixel_values"] for pixels in (one, padded))
    assert torch.equal(together_[:, :2, :, :8, :12], alone)
    assert not together_[:, 2:].any()
    packed = {"pixel_values": torch.randn(6 + 4, 5), "image_grid_thw": torch.tensor([[1, 2, 3], [1, 2, 2]])}
    found = noised(packed, 300)["pixel_values"]
    second = noised({"pixel_values": packed["pixel_values"][6:], "image_grid_thw": torch.tensor([[1, 2, 2]])}, 300)["pixel_values"]
    assert torch.equal(found[6:], second)
    several = noised({"pixel_values": [[one[0, 0]], one[0, 1]], "pixel_values_videos": None}, 300)
    right = noised({"pixel_values": one[0]}, 300)["pixel_values"]
    assert torch.equal(several["pixel_values"][0][0], right[0])
    assert torch.equal(several["pixel_values"][1], right[1])
    assert several["pixel_values_videos"] is None
    with pytest.raises(FoveateError, match="pixel_values is uint8: let the processor normalise"):
        noised({"pixel_values": torch.zeros(1, 3, 2, 2, dtype=torch.uint8)}, 1)


# ---- two passes against whole sequences without a cache

MODELS: dict[str, Callable[[], Any]] = {"llava": llava, "foveate": assembled, "qwen2_5_vl": qwen}
REDUCERS = [None, "fastv:keep=0.5,layer=2", "random:keep=0.3,positions=renumber"]


def again(model: Any, inputs: dict[str, Any], reducer: str | None) -> Callable[[Tensor], Tensor]:
    """What a pass says behind any tokens: the whole sequence, with the cuts that its prompt had."""
    maps = None
    if reducer is not None:
        with foveate.attach(model, reducer) as run:
            model.generate(**inputs, max_new_tokens=1, **GREEDY)
            maps = run.maps

    def says(ids: Tensor) -> Tensor:
        new = ids.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
        seen = {**inputs, "input_ids": ids, "attention_mask": mask}
        if "mm_token_type_ids" in seen:
            seen["mm_token_type_ids"] = torch.nn.functional.pad(seen["mm_token_type_ids"], (0, new))
        else:
            seen["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        with nullcontext() if maps is None else foveate.attach(model, maps=maps), torch.no_grad():
            found: Tensor = model(**seen, use_cache=False).logits[:, -1]
        return found

    return says


def by_hand(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], ids: Tensor, new: int, how: Contrasting
) -> tuple[Tensor, Tensor]:
    start, scores = ids.shape[1], []
    for _ in range(new):
        own, other = first(ids), second(ids)
        own[:, GREEDY["suppress_tokens"]] = -math.inf
        found = (1 + how.alpha) * own - how.alpha * other
        found[own < own.amax(-1, keepdim=True) + math.log(how.beta)] = -math.inf
        scores.append(found)
        ids = torch.cat([ids, found.argmax(-1, keepdim=True)], 1)
    return ids[:, start:], torch.stack(scores, 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reducer", REDUCERS)
def test_vcd_is_two_whole_sequences_run_again_for_each_token(name: str, reducer: str | None) -> None:
    model, how = MODELS[name](), VCD(alpha=1.5, beta=0.02, noise=700)
    inputs = batch(model)
    with foveate.attach(model, reducer):
        _, plain = generated(model, inputs, 1)
        tokens, scores = generated(model, inputs, 5, logits_processor=[how.beside(model, inputs)])
    second = again(model, noised(inputs, 700), reducer)
    right, expected = by_hand(again(model, inputs, reducer), second, inputs["input_ids"], 5, how)
    assert torch.equal(tokens, right)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)
    said = scores[:, 0].isfinite()
    assert not torch.allclose(scores[:, 0][said], plain[:, 0][said], atol=0.01)


def outliers_by_hand(model: Any, single: dict[str, Tensor], keep: int, order: str) -> Callable[[Tensor], Tensor]:
    """The decoder on text and the best patches of each image alone, as embeddings; scores from the tower's own projections."""
    core, seen = model.model, dict[str, Tensor]()
    attention = core.vision_tower.encoder.layers[-2].self_attn
    hooks = [
        getattr(attention, f"{one}_proj").register_forward_hook(lambda module, args, output, one=one: seen.__setitem__(one, output))
        for one in "qk"
    ]
    with torch.no_grad():
        features = torch.stack(list(core.get_image_features(single["pixel_values"], return_dict=True).pooler_output))
    for hook in hooks:
        hook.remove()
    weights = (seen["q"] @ seen["k"].transpose(1, 2) / math.sqrt(seen["q"].shape[-1])).softmax(-1)[:, 0, 1:]
    best = weights.topk(keep, 1).indices
    best = best if order == "attention" else best.sort(1).values
    kept = features.gather(1, best[..., None].expand(-1, -1, features.shape[-1]))

    def says(ids: Tensor) -> Tensor:
        table, parts, image, slot = core.get_input_embeddings(), [], 0, 0
        row = ids[0]
        while slot < len(row):
            if int(row[slot]) == IMAGE:
                parts.append(kept[image])
                image, slot = image + 1, slot + PATCHES
            else:
                parts.append(table(row[slot : slot + 1]))
                slot += 1
        with torch.no_grad():
            hidden = core.language_model(inputs_embeds=torch.cat(parts)[None], use_cache=False).last_hidden_state
            found: Tensor = model.lm_head(hidden)[:, -1]
        return found

    return says


@pytest.mark.parametrize("order", ["raster", "attention"])
@pytest.mark.parametrize("reducer", [None, "fastv:keep=0.5,layer=2"])
def test_damro_is_the_decoder_on_the_outliers_alone(order: str, reducer: str | None) -> None:
    """A batch of one image and of two, and each row by itself."""
    model, how, rows = llava(), DAMRO(alpha=2.0, beta=0.02, keep=3, order=order), ROWS[:2]
    prompts = Batch(rows, "left")
    with foveate.attach(model, reducer) as run:
        plain, _ = generated(model, prompts.inputs, 5)
        second = how.beside(model, prompts.inputs)
        tokens, scores = generated(model, prompts.inputs, 5, logits_processor=[second])
        assert run.last is second.passes[0]
    assert second.passes[1] is not None
    assert second.passes[1].visual_tokens == [3 * 3] * LAYERS
    for row, single in enumerate(prompts.singles):
        inputs = {**single, "attention_mask": torch.ones_like(single["input_ids"])}
        right, expected = by_hand(again(model, inputs, reducer), outliers_by_hand(model, single, 3, order), single["input_ids"], 5, how)
        assert torch.equal(tokens[row], right[0])
        torch.testing.assert_close(scores[row], expected[0], rtol=1e-3, atol=1e-4)
    assert not torch.equal(tokens, plain)


def test_as_many_outliers_as_there_are_patches_are_no_contrast() -> None:
    model = llava()
    for order in ("raster", "attention"):
        with foveate.attach(model, None):
            inputs = batch(model)
            plain, scores = generated(model, inputs, 4)
            found = generated(model, inputs, 4, logits_processor=[DAMRO(keep=1.0, beta=0.0, order=order).beside(model, inputs)])
        assert torch.equal(found[0], plain)
        torch.testing.assert_close(found[1], scores)


@pytest.mark.parametrize("how", [VCD(alpha=0.0), DAMRO(alpha=0.0)])
def test_without_weight_there_is_no_second_pass(how: Contrasting) -> None:
    model = llava()
    inputs = batch(model)
    with foveate.attach(model, "fastv:keep=0.5,layer=2", record="all") as run:
        plain, scores = generated(model, inputs, 4)
        second = how.beside(model, inputs)
        found, kept = generated(model, inputs, 4, logits_processor=[second])
        assert torch.equal(found, plain)
        assert torch.equal(kept, scores.masked_fill(scores < scores.amax(-1, keepdim=True) + math.log(0.1), -math.inf))
        assert (len(run.passes), len(second.passes)) == (2, 1)
        assert second.ledger == second.costs[0]
        free = type(how)(alpha=0.0, beta=0.0)
        torch.manual_seed(1)
        sampled = model.generate(**inputs, max_new_tokens=4, do_sample=True, pad_token_id=0)
        torch.manual_seed(1)
        again_ = model.generate(**inputs, max_new_tokens=4, do_sample=True, pad_token_id=0, logits_processor=[free.beside(model, inputs)])
        assert torch.equal(sampled, again_)


@pytest.mark.parametrize(
    ("reducer", "policy", "options"),
    [
        ("fastv:keep=0.5,layer=2", None, {}),
        ("pyramiddrop:keep=0.5", None, {"do_sample": True, "top_k": 4}),
        ("tome:keep=0.5,site=tower,blocks=1", None, {}),
        ("yopo:window=3+pmod:untrained=true", None, {}),
        (None, "snapkv:keep=0.5,window=4", {}),
        ("divprune:keep=0.5", "random:keep=0.5", {}),
        (None, None, {"cache_implementation": "static"}),
        ("fastv:keep=0.5,layer=2", None, {"use_cache": False}),
    ],
    ids=str,
)
def test_a_second_pass_that_differs_in_nothing_says_the_same(reducer: str | None, policy: str | None, options: dict[str, Any]) -> None:
    """Under whatever is attached: to the bit, so that the scores are the first pass'."""
    model = llava()
    inputs = batch(model)
    with foveate.attach(model, reducer, cache=policy):
        found = []
        for processors in ([], [EVERY.beside(model, inputs)]):
            torch.manual_seed(2)
            found.append(generated(model, inputs, 5, logits_processor=processors, **options))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("name", MODELS)
def test_several_sequences_of_a_prompt_are_the_prompt_several_times(name: str) -> None:
    model, options = MODELS[name](), {"do_sample": True, "pad_token_id": 0, "eos_token_id": 1000, "max_new_tokens": 4}
    inputs = batch(model, ROWS[:2])
    many = {key: value.repeat_interleave(3, 0) for key, value in inputs.items() if key != "pixel_values"}
    counts = [64, 64] if name == "qwen2_5_vl" else [1, 2]
    many["pixel_values"] = torch.cat([part for own in inputs["pixel_values"].split(counts) for part in [own] * 3])
    found = []
    with foveate.attach(model, "fastv:keep=0.5,layer=2"):
        for given_, number in ((inputs, 3), (many, 1)):
            torch.manual_seed(5)
            processors = [VCD(alpha=0.7, beta=0.0).beside(model, given_)]
            found.append(model.generate(**given_, num_return_sequences=number, logits_processor=processors, **options))
    assert torch.equal(*found)
    assert len({tuple(row) for row in found[0][:3].tolist()}) > 1


# ---- what it costs


@pytest.mark.parametrize("how", [VCD(), DAMRO(keep=3)], ids=str)
@pytest.mark.parametrize("reducer", ["none", "fastv:keep=0.5,layer=2"])
def test_both_passes_are_in_the_ledger(how: Contrasting, reducer: str) -> None:
    model, rows = llava(), ROWS[:2]
    inputs, new = Batch(rows, "left").inputs, 4
    with foveate.attach(model, reducer, record="all") as run:
        second = how.beside(model, inputs)
        generated(model, inputs, new, logits_processor=[second])
        passes, own = list(run.passes), run.reducers
    assert [one is seen for one, seen in zip(second.passes, passes, strict=True)] == [True, True]
    acting = own if isinstance(how, VCD) else [outliers(3, -2, "raster")]

    def priced(reducers: Any) -> Ledger:
        """Row by row, since each row reads its own tokens."""
        found = []
        for row in rows:
            told: dict[str, Any] = {"images": row.count(IMAGE) // PATCHES, "text_tokens": len(row) - row.count(IMAGE), "dtype_bytes": 4}
            seen = predict(model.config, reducers=reducers, **told)
            found.append(answered(seen, predict(model.config, reducers=reducers, mode="decode", new_tokens=new - 1, **told)))
        return together(found)

    expected = [priced(own), priced(acting)]
    for cost, right in zip(second.costs, expected, strict=True):
        assert cost is not None
        assert (cost.flops, cost.total_tokens, cost.kv_bytes) == (right.flops, right.total_tokens, right.kv_bytes)
    assert second.ledger is not None
    assert second.ledger.total_flops == sum(one.total_flops for one in expected)
    assert second.ledger.kv_bytes == tuple(a + b for a, b in zip(expected[0].kv_bytes, expected[1].kv_bytes, strict=True))
    if isinstance(how, DAMRO):
        assert expected[1].flops["scores"] == 3 * 2 * (PATCHES + 1) * 32  # of three images the row of [CLS], 32 wide
        assert expected[1].visual_tokens == (9,) * LAYERS


def test_ledgers_of_one_time_and_of_one_after_another() -> None:
    one, two = (predict(llava().config, images=images, text_tokens=5) for images in (1, 2))
    assert together([one]) is one
    both, after = together([one, two]), summed([one, two])
    assert (both.flops, both.total_tokens) == (after.flops, after.total_tokens)
    assert both.kv_bytes == tuple(a + b for a, b in zip(one.kv_bytes, two.kv_bytes, strict=True))
    assert after.kv_bytes == two.kv_bytes


def test_nothing_recorded_is_nothing_known() -> None:
    model = llava()
    inputs = batch(model)
    found = []
    for record in ("last", "none"):
        with foveate.attach(model, "divprune:keep=0.5", record=record):
            second = VCD().beside(model, inputs)
            found.append(generated(model, inputs, 3, logits_processor=[second])[0])
    assert second.ledger is None
    assert torch.equal(*found)


# ---- what cannot be


def test_what_the_second_pass_cannot_follow_is_refused() -> None:
    model = llava()
    inputs = batch(model)
    single = {**Batch([ROWS[0]]).singles[0], "attention_mask": torch.ones(1, len(ROWS[0]), dtype=torch.int64)}
    with pytest.raises(FoveateError, match=r"vcd needs .* an attachment: attach\(model, None\)"):
        VCD().beside(model, inputs)
    with foveate.attach(model, None) as run:
        with pytest.raises(FoveateError, match="vcd contrasts logits, and beam search adds up log-probabilities"):
            generated(model, inputs, 3, num_beams=2, logits_processor=[VCD().beside(model, inputs)])
        used = VCD().beside(model, inputs)
        generated(model, inputs, 2, logits_processor=[used])
        with pytest.raises(FoveateError, match="vcd: these tokens do not go on with those before"):
            generated(model, inputs, 2, logits_processor=[used])
        with pytest.raises(FoveateError, match="damro was made for other prompts, of"):
            generated(model, inputs, 2, logits_processor=[DAMRO().beside(model, single)])
        with pytest.raises(FoveateError, match="there are no pixel_values here"):
            VCD().beside(model, {name: inputs[name] for name in ("input_ids", "attention_mask")})
        with pytest.raises(FoveateError, match="vcd needs the attention_mask that the processor has made"):
            VCD().beside(model, {name: inputs[name] for name in ("input_ids", "pixel_values")})
        with pytest.raises(FoveateError, match="has no generate"):
            VCD().beside(model.model, inputs)
        with pytest.raises(FoveateError, match="assisted decoding try several ways"):
            generated(model, single, 6, prompt_lookup_num_tokens=2, logits_processor=[VCD().beside(model, single)])
        assert run.reducers == []


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        ("vcd:alpha=-1", "alpha=-1 is not possible; give a number of at least 0"),
        ("vcd:beta=2", "beta=2 is not possible; give a number between 0 and 1"),
        ("vcd:noise=1000", "noise=1000 is not possible; give a number between 0 and 999"),
        ("vcd:noise=0.5", "noise=0.5 is not possible; give a whole number"),
        ("damro:keep=0", "keep=0 is not possible"),
        ("damro:layer=0.5", "layer=0.5 is not possible"),
        ("damro:order=score", "order='score' is not possible"),
        ("damo", "unknown strategy 'damo' \\(did you mean 'damro'\\?\\)"),
    ],
)
def test_impossible_settings_are_said(spelled: str, said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        parse(spelled)


def test_settings_that_are_equal_numbers_are_not_one() -> None:
    assert type(outliers(1, -2, "raster").keep) is int
    assert type(outliers(1.0, -2, "raster").keep) is float
    assert outliers(1, -2, "raster") is outliers(1, -2, "raster")


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_streamers_hear_the_contrasted_answer() -> None:
    model, heard = llava(), Heard()
    single = {**Batch([ROWS[0]]).singles[0], "attention_mask": torch.ones(1, len(ROWS[0]), dtype=torch.int64)}
    with foveate.attach(model, None):
        tokens, _ = generated(model, single, 4, logits_processor=[VCD().beside(model, single)], streamer=heard)
    assert heard.tokens == [*ROWS[0], *tokens[0].tolist(), -1]


# ---- families, and where strategies are asked for


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "gemma3", "paddleocr_vl"])
def test_families_of_the_library_are_contrasted(name: str, tmp_path: Path) -> None:
    """The first token against two plain calls; a second pass without a difference over several tokens."""
    model, processor = families()[name].load(tmp_path)
    inputs = families()[name].inputs(processor, families()[name].rows()[:2], "left")
    how = VCD(alpha=1.3, beta=0.01, noise=999)
    with foveate.attach(model, "random:keep=0.5"):
        _, scores = generated(model, inputs, 1, suppress_tokens=None, logits_processor=[how.beside(model, inputs)])
        plain, first = generated(model, inputs, 3, suppress_tokens=None)
        _, second = generated(model, noised(inputs, 999), 1, suppress_tokens=None)
        same, _ = generated(model, inputs, 3, suppress_tokens=None, logits_processor=[EVERY.beside(model, inputs)])
    torch.testing.assert_close(scores[:, 0], contrasted(first[:, 0], second[:, 0], 1.3, 0.01), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(first[:, 0], second[:, 0], atol=1e-3)
    assert torch.equal(same, plain)


@pytest.fixture(scope="module")
def vlm() -> tuple[Any, Any]:
    return load_model("asset:vlm", "cpu")


QUESTION = "what digit is handwritten?"


@pytest.mark.parametrize(
    ("spelled", "reducer"),
    [("vcd:words=world", "fastv:keep=0.25"), ("damro:words=world,keep=4", None), ("damro:words=world,keep=4,alpha=0", "fastv:keep=0.25")],
)
def test_a_strategy_answers_by_two_passes_and_keeps_to_its_budget(vlm: tuple[Any, Any], spelled: str, reducer: str | None) -> None:
    model, processor = vlm
    picture, how = open_image("scene:13"), parse(spelled)
    assert how.contrast is not None
    with opened(model, processor, reducer) as eyes:
        found = how.run(eyes, [picture], QUESTION, new_tokens=4)
        inputs = eyes.write([picture], QUESTION)
        most = eyes.price_contrasted(inputs, 4, how.contrast)
        second = how.contrast.beside(model, inputs)
        tokens = model.generate(**inputs, max_new_tokens=4, logits_processor=[second])[0, inputs["input_ids"].shape[1] :]
        assert found.answer in processor.tokenizer.decode(tokens)
        parse(f"{spelled},flops={most}").run(eyes, [picture], QUESTION, new_tokens=4)
        with pytest.raises(FoveateError, match="one answer about this picture takes up to"):
            parse(f"{spelled},flops={most - 1}").run(eyes, [picture], QUESTION, new_tokens=4)
        assert found.ledger is not None
        assert found.ledger.total_flops == eyes.price_contrasted(inputs, found.passes[-1].new, how.contrast)
    wanted = ["answer"] if "alpha" in spelled else ["contrast", "answer"]
    assert [one.what for one in found.passes] == wanted
    ledgers = [one.ledger for one in found.passes if one.ledger is not None]
    assert sum(found.ledger.kv_bytes) == sum(sum(one.kv_bytes) for one in ledgers)
    assert found.passes[0].visual == (4 if how.contrast.reducers and how.contrast.alpha else 64)
    assert (found.boxes, found.ended, len(found.seen)) == ((), "searched", 1)


def test_eval_and_look_take_them(vlm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = vlm
    images = tmp_path / "images" / "test"
    images.mkdir(parents=True)
    open_image("scene:13").save(images / "0.png")
    row = {"id": "0", "image": "test/0.png", "question": QUESTION, "answer": "6", "family": "reading"}
    (tmp_path / "test.json").write_text(json.dumps([row]))
    result = evaluate(model, tmp_path, processor=processor, strategy="damro:words=world,keep=4", progress=False)
    assert (result.strategy, result.visual_tokens) == ("damro:words=world,keep=4", 64 + 4)
    figure = look_for(model, [open_image("scene:13")], QUESTION, ["vcd:words=world"], ["none"], processor=processor)
    written = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    assert "vcd:words=world" in written
    assert "1 part, 2 passes" in written
