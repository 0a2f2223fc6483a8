"""What must hold for every reducer on a live model. A method listed in REDUCERS inherits all of it."""

import copy
import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate import FoveateError
from foveate.contract import View
from foveate.engine.chunk import Chunk
from foveate.engine.replay import ReplayVisible
from foveate.reducers import (
    METHODS,
    VCC,
    Downsample,
    Random,
    Reducer,
    parse,
    spell,
)
from foveate.tokens import Layout, TokenMap
from tests.reducers.ragged import edges
from tests.tiny import IMAGE, MODELS, PATCHES, ROWS, Batch, llava, prompt

INSIDE = [method for method in METHODS.values() if method is not Downsample]  # it acts on the image, in front of the processor
# What each method says of itself, and some that act together.
REDUCERS = [
    *(example for method in INSIDE for example in method.examples),
    "random:keep=3,layer=2+vcc:layer=3,stride=3",
    "fastv:keep=0.3,layer=1,rows=all,positions=renumber+vcc:layer=3,stride=2",
    "fastervlm:keep=0.5,scope=image+fastv:keep=0.5",
]
# Whose choice follows the prompt: behind a longer prompt it would be another one.
LOOK_AT_TEXT = {method for method in INSIDE if "text" in method.looks_at}
# Whose choice follows the positions: L1 norms of rotated keys.
LOOK_AT_POSITIONS = {method for method in INSIDE if "positions" in method.looks_at}
# Chain-of-Sight's tokens are no raster, and none of them is one patch.
REFUSED = {
    **{("foveate", text): "not one of each: what is merged in the tower" for text in METHODS["pixelprune"].examples},
    ("foveate", "avgpool2d:stride=2"): "16 tokens of image 0 are no full grid of rows and columns",
    ("foveate", "fopru:keep=0.5,strategy=row"): 'strategy="row" needs the grid of every image',
    ("foveate", "yopo:window=3"): "yopo: the tokens of image 0 do not lie in a raster",
    ("foveate", "yopo:window=5,causal=true,layer=1"): "yopo: the tokens of image 0 do not lie in a raster",
}
SERVED = [(model, reducer) for model in MODELS for reducer in REDUCERS if (model, reducer) not in REFUSED]
# Each way of attaching, at every backend and in every dtype; the other methods, which come to the same, once.
KEEP_ALL = [
    "none",
    "vcc:layer=2,stride=1",
    "random:keep=1.0,positions=renumber",
    "visionzip:dominant=8,contextual=8+pyramiddrop:keep=1.0",
]
FACTORS = ("gain", "passing", "steps")  # of a recorded decision, one for each slot
KEEP_ALL_TOO = [whole for method in INSIDE for whole in method.keeps_all if whole not in KEEP_ALL]


every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
every_reducer = pytest.mark.parametrize("reducer", REDUCERS)
every_pair = pytest.mark.parametrize(("make", "reducer"), [pytest.param(MODELS[m], r, id=f"{m}-{r}") for m, r in SERVED])


def every_pair_and(name: str, first: object, *others: object) -> pytest.MarkDecorator:
    """Every pair with `first`, and each method's first spelling with `others`: the engine alone sees to these."""
    once = {method.examples[0] for method in INSIDE}
    cases = [(m, r, value) for value in (first, *others) for m, r in SERVED if value == first or r in once]
    return pytest.mark.parametrize(("make", "reducer", name), [pytest.param(MODELS[m], r, v, id=f"{m}-{r}-{v}") for m, r, v in cases])


def test_every_method_is_tested() -> None:
    for method in INSIDE:
        for spelling in (*method.examples[:1], *method.keeps_all[:1], *method.multiplies):
            assert [type(r) for r in parse(spelling)] == [method], f"{method.name}: {spelling} is of other methods"
        assert method.examples, f"{method.name} has no examples: the common tests would run nothing of it"
        assert method.keeps_all, f"{method.name} does not say how it keeps everything"
        assert method.looks_at <= {"text", "attention", "keys", "positions", "tower", "states", "pixels"}
    assert {reducer for _, reducer in SERVED} == set(REDUCERS)


@pytest.mark.parametrize(("model", "reducer"), REFUSED)
def test_what_a_model_cannot_serve_is_refused(model: str, reducer: str) -> None:
    with foveate.attach(MODELS[model](), reducer) as run, pytest.raises(FoveateError, match=REFUSED[model, reducer]):
        run.anatomy.core(**Batch(ROWS).inputs)


def maps_of(model: Any, reducer: str, inputs: dict[str, Tensor]) -> list[Any]:
    """What the reducer decides on these prompts; nothing without images."""
    if "pixel_values" not in inputs:
        return []
    with foveate.attach(model, reducer) as run, torch.no_grad():
        model(**inputs, use_cache=False)
    return run.maps


def follows(reducer: str, methods: set[type[Reducer]]) -> bool:
    return any(type(r) in methods for r in parse(reducer))


def check_same(found: list[Any], recorded: list[Any]) -> None:
    """The same decisions, for a batch that goes on after the recorded one."""
    now = before = None
    assert [step for step in found if isinstance(step, ReplayVisible)] == [step for step in recorded if isinstance(step, ReplayVisible)]
    for new, old in zip(with_maps(found), with_maps(recorded), strict=True):
        here = old.reduce(View(new.map.source if before is None else before.target)).map
        to_new, to_old = (new.map, here) if now is None or before is None else (now.then(new.map), before.then(here))
        for b in range(here.source.shape[0]):
            assert edges(to_new, b) == edges(to_old, b)
        if not new.through:  # else the next layer sees all again
            now, before = to_new, to_old


def with_maps(steps: list[Any]) -> list[Any]:
    """Those that are decisions about tokens, not about who sees whom."""
    return [step for step in steps if not isinstance(step, ReplayVisible)]


def joined(first: list[Any], second: list[Any]) -> list[Any]:
    """The maps of two passes, one chunk after the other, as those of one pass."""
    found = [step for step in second if isinstance(step, ReplayVisible)]
    for one, other in zip(with_maps(first), with_maps(second), strict=True):
        a, b = one.map, other.map
        N, E = a.source.shape[1], max(a.member.shape[2], b.member.shape[2])
        members = [torch.nn.functional.pad(m.member, (0, E - m.member.shape[2]), value=-1) for m in (a, b)]
        weights = [
            torch.nn.functional.pad(m.weight if m.weight is not None else (m.member >= 0).double(), (0, E - m.member.shape[2]))
            for m in (a, b)
        ]
        member = torch.cat([members[0], torch.where(members[1] >= 0, members[1] + N, -1)], 1)
        representative = torch.cat([a.representative, torch.where(b.representative >= 0, b.representative + N, -1)], 1)
        names = [f.name for f in dataclasses.fields(Layout)]
        source = Layout(**{name: torch.cat([getattr(a.source, name), getattr(b.source, name)], 1) for name in names})
        whole = TokenMap.merge(source, member, torch.cat(weights, 1), representative)
        factors = {name: torch.cat([getattr(one, name), getattr(other, name)], 1) for name in FACTORS if getattr(one, name) is not None}
        found.append(dataclasses.replace(one, map=dataclasses.replace(whole, mean=a.mean), **factors))
    return found


def everything(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Logits, loss, gradients and generated tokens."""
    model.zero_grad()
    out = model(**batch.inputs, labels=batch.labels(), use_cache=False)
    out.loss.backward()
    found = {f"grad {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found |= {"logits": out.logits.detach(), "loss": out.loss.detach()}
    left = Batch(batch.rows, "left", batch.dtype)
    found["generated"] = model.generate(**left.inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return found


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("shortcuts", [True, False], ids=["shortcuts", "no-shortcuts"])
def test_keep_all_is_bit_identical(make: Any, attn: str, dtype: torch.dtype, shortcuts: bool) -> None:
    model = make(attn, dtype)
    once = (attn, dtype) == ("sdpa", torch.float32)
    for batch in (Batch(ROWS, "right", dtype), Batch(ROWS, "left", dtype), Batch([ROWS[0]], "right", dtype)):
        bare = everything(model, batch)
        for reducer in KEEP_ALL + (KEEP_ALL_TOO if once else []):
            if make is MODELS["foveate"] and reducer in METHODS["pixelprune"].keeps_all:
                continue  # see REFUSED
            with foveate.attach(model, reducer, record="all", shortcuts=shortcuts):
                kept = everything(model, batch)
            assert kept.keys() == bare.keys()
            for name, value in bare.items():
                assert torch.equal(kept[name], value), (reducer, name)


@every_pair_and("attn", "sdpa", "eager")
def test_a_sample_does_not_depend_on_its_batch(make: Any, attn: str, reducer: str) -> None:
    model = make(attn)
    with foveate.attach(model, reducer), torch.no_grad():
        for side in ("left", "right"):
            batch = Batch(ROWS, side)
            inputs = batch.inputs
            if follows(reducer, LOOK_AT_POSITIONS):
                inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            together = model(**inputs).logits
            for i, single in enumerate(batch.singles):
                torch.testing.assert_close(batch.own(together, i), model(**single).logits[0], rtol=1e-4, atol=1e-5)


def test_samples_differ_when_the_mask_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail: one survivor's mask column flipped is seen."""
    model = llava()
    batch = Batch(ROWS, "left")
    cut = Chunk._cut_mask

    def faulty(self: Chunk, *args: Any) -> Tensor:
        mask = cut(self, *args).clone()
        mask[0, 0, :, 4] ^= True
        return mask

    with foveate.attach(model, "vcc:layer=2,stride=4"), torch.no_grad():
        right = model(**batch.inputs).logits
        monkeypatch.setattr(Chunk, "_cut_mask", faulty)
        wrong = model(**batch.inputs).logits
    assert (batch.own(right, 0) - batch.own(wrong, 0)).abs().max() > 1e-3


def words(logits: Tensor) -> Tensor:
    """The logits without that of another image's placeholder."""
    return logits.index_fill(-1, torch.tensor([IMAGE]), float("-inf"))


@torch.no_grad()
def check_decoding(model: Any, reducers: str | list[Reducer], side: str) -> tuple[list[Any], dict[str, Tensor]]:
    """Greedy steps with the cache against the extended sequence run whole with the same maps; also right-padded, without `generate`.

    Returns the maps, and the whole sequence as it was before the last token."""
    inputs = Batch(ROWS, side).inputs
    N = inputs["input_ids"].shape[1]
    found = []
    with foveate.attach(model, reducers) as run:
        steps = model(**inputs, use_cache=True)
        maps, cache = run.maps, steps.past_key_values
        rows, last = torch.arange(len(ROWS)), inputs["attention_mask"].cumsum(1).argmax(1)
        token = words(steps.logits[rows, last]).argmax(-1)[:, None]
        # Positions as the prompt had them: the library counts slots, padding included, when none are given.
        position = torch.full_like(token, N) if side == "left" else last[:, None] + 1
        seen = {**inputs, "position_ids": torch.arange(N).expand(len(ROWS), N)}
        for _ in range(4):
            more = {"input_ids": token, "attention_mask": torch.ones_like(token), "position_ids": position}
            seen = {name: torch.cat([value, more[name]], 1) if name in more else value for name, value in seen.items()}
            mask = seen["attention_mask"]
            step = model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True).logits[:, -1]
            found.append((seen, step))
            token, position = words(step).argmax(-1)[:, None], position + 1
    with foveate.attach(model, maps=maps):
        for whole, step in found:
            torch.testing.assert_close(step, model(**whole, use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-5)
    return maps, found[-1][0]


@every_pair_and("side", "left", "right")
def test_decoding_with_the_cache_is_the_whole_run_again(make: Any, side: str, reducer: str) -> None:
    model = make()
    maps, whole = check_decoding(model, reducer, side)
    if not follows(reducer, LOOK_AT_TEXT):
        check_same(maps_of(model, reducer, whole), maps)


@every_pair
def test_generate_is_greedy_by_hand(make: Any, reducer: str) -> None:
    model = make()
    batch = Batch(ROWS, "left")
    with foveate.attach(model, reducer), torch.no_grad():
        how: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 1000, "suppress_tokens": [IMAGE]}
        found = model.generate(**batch.inputs, max_new_tokens=5, **how)
    for i, single in enumerate(batch.singles):
        inputs = dict(single)
        with foveate.attach(model, maps=maps_of(model, reducer, single)), torch.no_grad():
            for _ in range(5):
                token = words(model(**inputs, use_cache=False).logits[:, -1]).argmax(-1)[:, None]
                inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        assert found[i, -5:].tolist() == inputs["input_ids"][0, -5:].tolist()


@every_reducer
def test_beams_share_their_maps(reducer: str) -> None:
    """Beam search with one beam a sample more than needed gives what each sample alone gives."""
    model = llava()
    batch = Batch(ROWS[:2], "left")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "pad_token_id": 0, "eos_token_id": 1000}
    with foveate.attach(model, reducer), torch.no_grad():
        together = model.generate(**batch.inputs, **options)
        for i, single in enumerate(batch.singles):
            assert together[i, -4:].tolist() == model.generate(**single, **options)[0, -4:].tolist()


@every_reducer
def test_a_second_turn_on_a_kept_cache_is_not_cut_again(reducer: str) -> None:
    model = llava()
    first, second = prompt(1, [1, 2]), [3, 4, 5]
    pixels = Batch([first]).pixels
    with foveate.attach(model, reducer) as run, torch.no_grad():
        cache = model(input_ids=torch.tensor([first]), pixel_values=pixels, use_cache=True).past_key_values
        turn = model(input_ids=torch.tensor([second]), past_key_values=cache, use_cache=True).logits
        maps = run.maps
    both = {"input_ids": torch.tensor([first + second]), "pixel_values": pixels}
    with foveate.attach(model, maps=maps), torch.no_grad():
        whole = model(**both, use_cache=False).logits
    torch.testing.assert_close(turn, whole[:, -len(second) :], rtol=1e-4, atol=1e-5)
    if not follows(reducer, LOOK_AT_TEXT):
        check_same(maps_of(model, reducer, both), maps)


@every_reducer
def test_a_new_image_on_a_kept_cache_is_cut_as_in_one_go(reducer: str) -> None:
    model = llava()
    first, second = prompt(1, [1, 2]), [IMAGE] * PATCHES + [3, 4]
    batch = Batch([first + second])
    with foveate.attach(model, reducer) as run, torch.no_grad():
        cache = model(input_ids=torch.tensor([first]), pixel_values=batch.pixels[:1], use_cache=True).past_key_values
        before = run.maps
        turn = model(input_ids=torch.tensor([second]), pixel_values=batch.pixels[1:], past_key_values=cache, use_cache=True).logits
        maps = joined(before, run.maps)
    with foveate.attach(model, maps=maps), torch.no_grad():
        whole = model(**batch.singles[0], use_cache=False).logits
    torch.testing.assert_close(turn[:, -2:], whole[:, -2:], rtol=1e-4, atol=1e-5)
    if not follows(reducer, LOOK_AT_TEXT):
        check_same(maps_of(model, reducer, batch.singles[0]), maps)


@every_pair
def test_training_sees_the_same_supervised_tokens(make: Any, reducer: str) -> None:
    """The loss is the mean over the caller's own labels, recomputed from logits that keep the caller's length."""
    model = make()
    batch = Batch(ROWS)
    labels = batch.labels()
    with foveate.attach(model, reducer):
        out = model(**batch.inputs, labels=labels, use_cache=False)
    assert out.logits.shape[:2] == labels.shape
    logits, targets = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100))
    out.loss.backward()
    bridge = model.model.bridge if hasattr(model.model, "bridge") else model.model.multi_modal_projector
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in bridge.parameters())


@every_reducer
def test_maps_do_not_depend_on_the_answer(reducer: str) -> None:
    """Whatever answer is trained on or scored, the map is that of the prompt alone."""
    model, row = llava(), ROWS[1]
    batch = Batch([row])
    maps = maps_of(model, reducer, batch.singles[0])
    for answer in ([11, 12, 13], [14, 15, 16, 17]):
        labels = torch.tensor([[-100] * len(row) + answer])
        with foveate.attach(model, reducer) as run, torch.no_grad():
            model(input_ids=torch.tensor([row + answer]), pixel_values=batch.pixels, labels=labels, use_cache=False)
        check_same(run.maps, maps)


@every_pair_and("reentrant", False, True)
def test_gradient_checkpointing_changes_nothing(make: Any, reentrant: bool, reducer: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = make().train()
        replays = 0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with foveate.attach(model, reducer):

            def count(*args: Any) -> None:
                nonlocal replays
                replays += 1

            hook = model.model.language_model.layers[-1].self_attn.register_forward_pre_hook(count)
            batch = Batch(ROWS)
            model.get_input_embeddings().requires_grad_(True)
            loss = model(**batch.inputs, labels=batch.labels(), use_cache=False).loss
            loss.backward()
            hook.remove()
        assert replays == (2 if checkpointing else 1)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        # A reentrant checkpoint adds up gradients of a state that is used twice (a tower's two levels, one that is held) in another order.
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if reentrant else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(grads[0][name], grads[1][name], **tolerance, msg=partial("{}: {}".format, name))


def test_random_choice_follows_the_image_not_the_row() -> None:
    model = llava()
    inputs = Batch([ROWS[0], ROWS[0]]).inputs
    same = inputs["pixel_values"][:1].repeat(2, 1, 1, 1)
    maps = []
    with foveate.attach(model, Random(keep=0.5)) as run, torch.no_grad():
        for pixels in (same, inputs["pixel_values"], inputs["pixel_values"].flip(0)):
            model(**{**inputs, "pixel_values": pixels})
            maps.append(run.last.maps[0].representative)
    assert torch.equal(maps[0][0], maps[0][1])
    assert torch.equal(maps[1], maps[2].flip(0))
    assert not torch.equal(maps[1][0], maps[1][1])
    with foveate.attach(model, Random(keep=0.5, seed=1)) as run, torch.no_grad():
        model(**inputs)
        assert not torch.equal(run.last.maps[0].representative, maps[1])


def test_the_pass_says_what_went_through_each_layer() -> None:
    model = llava()
    lengths: list[int] = []

    def measure(module: Any, args: Any, kwargs: Any) -> None:
        lengths.append(kwargs["hidden_states"].shape[1])

    hooks = [layer.self_attn.register_forward_pre_hook(measure, with_kwargs=True) for layer in model.model.language_model.layers]
    with foveate.attach(model, "vcc:layer=1,stride=2+vcc:layer=3,stride=4") as run, torch.no_grad():
        model(**Batch([ROWS[1]]).inputs)
    for hook in hooks:
        hook.remove()
    assert run.last.visual_tokens == [32, 16, 16, 4]
    text = len(ROWS[1]) - 32
    assert run.last.tokens == [32 + text, 16 + text, 16 + text, 4 + text] == lengths == run.last.lengths
    assert run.last.provenance(3).sources(0, 3) == list(range(3, 11))  # one token of layer 3 holds eight patches of image 1
    assert run.last.provenance(0).is_identity


def test_the_ledger_is_what_was_predicted() -> None:
    from foveate.accounting import predict

    model = llava()
    for reducer in ("none", *REDUCERS):
        with foveate.attach(model, reducer) as run, torch.no_grad():
            model(**Batch([ROWS[1]]).inputs)
        seen = run.ledger
        predicted = predict(model.config, images=2, text_tokens=len(ROWS[1]) - 2 * PATCHES, reducers=parse(reducer), mode="prefill")
        if reducer.startswith("atpllava"):  # what is above its thresholds is not known before
            assert all(0 < left <= most for left, most in zip(seen.visual_tokens, predicted.visual_tokens, strict=True))
        else:
            assert seen == predicted, reducer


def state_of(model: torch.nn.Module) -> list[Any]:
    return [
        (name, sorted(m.__dict__), len(m._forward_pre_hooks), len(m._forward_hooks), len(m._forward_hooks_always_called))
        for name, m in model.named_modules()
    ]


def test_detach_leaves_nothing_behind_after_an_exception_too() -> None:
    model = llava()
    bare = model(**Batch(ROWS).inputs).logits  # first, since the library itself keeps things of its first call
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), foveate.attach(model, VCC(2, 4)):
        model(**Batch(ROWS).inputs, labels=Batch(ROWS).labels() + 1 // 0)
    with pytest.raises(ValueError, match="match"), foveate.attach(model, VCC(2, 4)):
        model(input_ids=torch.tensor([ROWS[0]]), pixel_values=Batch(ROWS).pixels)
    assert state_of(model) == before
    assert torch.equal(model(**Batch(ROWS).inputs).logits, bare)
    handle = foveate.attach(model, VCC(2, 4))
    handle.detach()
    handle.detach()
    assert state_of(model) == before


@pytest.mark.parametrize("reducer", ["vcc:layer=0,stride=4", "vcc:layer=2,stride=4"])
def test_padding_of_the_prompt_is_remembered(reducer: str) -> None:
    """Behind a right-padded prompt, decoding without a mask is decoding with the right one."""
    model, batch = llava(), Batch(ROWS, "right")
    token = torch.full((len(ROWS), 1), 7)
    position = batch.inputs["attention_mask"].sum(1, keepdim=True)
    mask = torch.nn.functional.pad(batch.inputs["attention_mask"], (0, 1), value=1)
    logits = []
    for given in (mask, None, torch.ones_like(mask)):
        with foveate.attach(model, reducer), torch.no_grad():
            cache = model(**batch.inputs, use_cache=True).past_key_values
            step = model(input_ids=token, attention_mask=given, position_ids=position, past_key_values=cache, use_cache=True)
        logits.append(step.logits)
    assert torch.equal(logits[0], logits[1])
    # A cut in front of the first layer has taken the padding out of every layer; behind a later one, taking it for tokens is seen.
    assert torch.allclose(logits[0], logits[2], atol=1e-3) == ("layer=0" in reducer)


def test_memory_goes_with_its_cache() -> None:
    """A copy of a cache decodes like the original; cropped by what was decoded, it is the prompt's again; cut tokens cannot be cropped."""
    model, batch = llava(), Batch(ROWS, "left")
    N = batch.inputs["input_ids"].shape[1]
    token = torch.full((len(ROWS), 1), 7)

    def step(cache: Any) -> Tensor:
        mask = torch.nn.functional.pad(batch.inputs["attention_mask"], (0, cache.get_seq_length() + 1 - N), value=1)
        return model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True).logits

    with foveate.attach(model, VCC(2, 4)), torch.no_grad():
        cache = model(**batch.inputs, use_cache=True).past_key_values
        assert cache.get_seq_length() == N
        assert cache.layers[2].get_seq_length() < N
        copied = copy.deepcopy(cache)
        first = step(cache)
        assert cache.get_seq_length() == N + 1
        assert torch.equal(first, step(copied))
        copied.crop(-1)
        assert copied.get_seq_length() == N
        assert torch.equal(first, step(copied))
        with pytest.raises(FoveateError, match="cannot be cropped"):
            copied.crop(-(N - 2))


def test_a_second_attach_is_refused() -> None:
    model = llava()
    with foveate.attach(model, VCC(2, 4)), pytest.raises(FoveateError, match=r"already has 'vcc:stride=4' attached"):
        foveate.attach(model, VCC(2, 8))


def test_wrapped_by_peft() -> None:
    from peft import LoraConfig, get_peft_model

    batch = Batch(ROWS)
    model = llava()
    with foveate.attach(model, VCC(2, 4)), torch.no_grad():
        plain = model(**batch.inputs).logits
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()  # starts as the identity
    with foveate.attach(peft, VCC(2, 4)) as run:
        wrapped = peft(**batch.inputs, labels=batch.labels(), use_cache=False)
        wrapped.loss.backward()
        assert run.last.visual_tokens == [48, 48, 12, 12]
    torch.testing.assert_close(wrapped.logits, plain)
    assert all(p.grad is not None for n, p in peft.named_parameters() if "lora_B" in n and "language_model" in n)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vvc:layer=2", "unknown reducer 'vvc' \\(did you mean 'vcc'\\?\\)"),
        ("vcc:stride=0", "stride=0 is not possible"),
        ("vcc:layer=-1", "layer=-1 is not possible"),
        ("vcc:strid=2", "no option 'strid' \\(did you mean 'stride'\\?\\)"),
        ("vcc:stride", "cannot read 'stride'"),
        ("random:keep=0", "keep=0 is not possible"),
        ("random:keep=1.5", "keep=1.5 is not possible"),
        ("vcc:positions=middle", "positions='middle' is not possible"),
    ],
)
def test_impossible_reducers(text: str, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        parse(text)


@pytest.mark.parametrize("text", [*REDUCERS, *KEEP_ALL, *KEEP_ALL_TOO])
def test_spelling_round_trips(text: str) -> None:
    reducers = parse(text)
    assert parse(spell(reducers)) == reducers
    assert [type(r).from_dict(r.to_dict()) for r in reducers] == reducers


def test_a_stride_larger_than_the_image_is_an_error() -> None:
    model = llava()
    with foveate.attach(model, VCC(2, 64)), pytest.raises(FoveateError, match="stride 64 is larger than the 16 visual tokens"):
        model(**Batch(ROWS).inputs)


def test_models_that_cannot_be_opened_name_the_missing_part() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    text = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8))
    with pytest.raises(FoveateError, match="get_placeholder_mask"):
        foveate.attach(text, VCC())


@pytest.mark.parametrize("reducer", ["vcc:layer=2,stride=4", "random:keep=0.5"])
def test_samples_packed_into_one_row_do_not_mix(reducer: str) -> None:
    model, row = llava(), ROWS[0]
    ids = torch.tensor([row + row])
    positions = torch.arange(len(row)).repeat(2)[None]
    pixels = Batch([row, row]).pixels
    with foveate.attach(model, reducer), torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, pixel_values=pixels, use_cache=False).logits[0]
        for i in range(2):
            alone = model(input_ids=torch.tensor([row]), pixel_values=pixels[i : i + 1], use_cache=False).logits[0]
            torch.testing.assert_close(packed[i * len(row) : (i + 1) * len(row)], alone, rtol=1e-4, atol=1e-5)


def test_saved_reducers_are_read_back(tmp_path: Any) -> None:
    from foveate.reducers import save_reducers

    model = llava()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with pytest.raises(FoveateError, match=r"no foveate.json"):
        foveate.attach(loaded)
    save_reducers([VCC(1, 2)], tmp_path)
    with foveate.attach(loaded) as run:
        assert run.reducers == [VCC(1, 2)]
