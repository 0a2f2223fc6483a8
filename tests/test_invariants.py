"""What must always hold, seven tests under the numbers and words of the design, each on the tiny models."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig, SiglipVisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

import foveate
from foveate import FoveateError
from foveate.anatomy import read
from foveate.contract import ClsAttention, View
from foveate.engine.forward import ForwardPass
from foveate.reducers import Random, parse
from tests.tiny import IMAGE, MODELS, PATCHES, ROWS, Batch, llava

every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
# Of each kind: before the LM and inside it, by chance, by scores of the tower and of the LM, pooled, merged, in stages.
KINDS = [
    "random:keep=0.5",
    "random:keep=0.3,positions=renumber",
    "fastervlm:keep=0.5",
    "fastv:keep=0.5,layer=2",
    "vcc:layer=2,stride=4",
    "tome:keep=0.4",
    "giraffe:high=0.5",
    "pyramiddrop:keep=0.5",
]
WHOLE = [
    "none",
    "random:keep=1.0,positions=renumber",
    "fastervlm:keep=1.0",
    "fastv:keep=1.0,layer=2",
    "vcc:layer=2,stride=1",
    "tome:keep=1.0",
    "giraffe:ratio=1.0",
]
KINDS_OF_NUMBERS = [
    ("sdpa", torch.float32),
    ("eager", torch.float32),
    ("sdpa", torch.bfloat16),
    ("eager", torch.float16),
    ("sdpa", torch.float64),
]
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 1000, "suppress_tokens": [IMAGE]}
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def positions_of(inputs: dict[str, Tensor]) -> Tensor:
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


# ---- 1


@every_model
@pytest.mark.parametrize(("attn", "dtype"), KINDS_OF_NUMBERS)
def test_invariant_1_a_reducer_that_keeps_everything_is_bit_identical(make: Any, attn: str, dtype: torch.dtype) -> None:
    """1. A reducer that keeps everything leaves logits, loss, gradients and generated text
    bit-identical to the bare model's. For every architecture, attention backend and dtype tested."""
    model = make(attn, dtype)

    def everything() -> dict[str, Any]:
        model.zero_grad()
        right, left = Batch(ROWS, "right", dtype), Batch(ROWS, "left", dtype)
        out = model(**right.inputs, labels=right.labels(), use_cache=False)
        out.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return grads | {"logits": out.logits, "loss": out.loss, "text": model.generate(**left.inputs, max_new_tokens=5, **GREEDY)}

    bare = everything()
    assert len(bare) > 30
    for reducer in WHOLE:
        with foveate.attach(model, reducer):
            kept = everything()
        assert kept.keys() == bare.keys()
        assert [name for name in bare if not torch.equal(kept[name], bare[name])] == [], reducer


# ---- 2


@every_model
@pytest.mark.parametrize("reducer", KINDS)
def test_invariant_2_a_sample_does_not_depend_on_its_batch(make: Any, reducer: str) -> None:
    """2. A sample's result does not depend on what shares its batch or on which side it is padded."""
    model = make()
    with foveate.attach(model, reducer), torch.no_grad():
        alone = [model(**single).logits[0] for single in Batch(ROWS).singles]
        for rows in (ROWS, ROWS[::-1], ROWS[:2]):
            for side in ("left", "right"):
                batch = Batch(rows, side)
                batch.pixels = torch.cat([s["pixel_values"] for row in rows for s in [Batch(ROWS).singles[ROWS.index(row)]] if len(s) > 1])
                together = model(**batch.inputs, position_ids=positions_of(batch.inputs)).logits
                for i, row in enumerate(rows):
                    torch.testing.assert_close(batch.own(together, i), alone[ROWS.index(row)], **CLOSE)


# ---- 3


@every_model
@pytest.mark.parametrize("reducer", [r for r in KINDS if not r.startswith(("vcc", "tome", "giraffe"))])
def test_invariant_3_survivors_keep_their_positions(make: Any, reducer: str) -> None:
    """3. Survivors keep their original positions unless the method's paper renumbers them."""
    model, single = make(), Batch(ROWS).singles[1]
    (method,) = parse(reducer)
    layers = read(model).layers
    given: list[Tensor] = []
    with foveate.attach(model, reducer) as run, torch.no_grad():
        hooks = [layer.register_forward_pre_hook(lambda m, a, kw: given.append(kw["position_ids"]), with_kwargs=True) for layer in layers]
        model(**single)
        for hook in hooks:
            hook.remove()
    N = single["input_ids"].shape[1]
    assert len(given[-1][0]) < N
    for layer, position in enumerate(given):
        slots = run.last.provenance(layer).representative
        expected = slots if method.positions == "keep" else torch.arange(slots.shape[1])[None]
        assert torch.equal(position.expand_as(slots), expected)


# ---- 4


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reducer", KINDS)
def test_invariant_4_decoding_with_the_cache_is_the_whole_sequence_again(make: Any, reducer: str, dtype: torch.dtype) -> None:
    """4. Decoding with the cache equals running the whole sequence again with the same maps."""
    model, batch = make(dtype=dtype), Batch(ROWS, "left", dtype)
    how: dict[str, Any] = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    with foveate.attach(model, reducer) as run, torch.no_grad():
        out = model.generate(**batch.inputs, max_new_tokens=5, **how)
        maps = run.maps
    longer = batch.inputs
    longer["input_ids"] = out.sequences[:, :-1]
    longer["attention_mask"] = nn.functional.pad(longer["attention_mask"], (0, 4), value=1)
    with foveate.attach(model, maps=maps), torch.no_grad():
        whole = model(**longer, position_ids=positions_of(longer), use_cache=False).logits
    # The library's generate gives logits in float32.
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, -5:].float(), **CLOSE)


# ---- 5


def state_of(model: nn.Module) -> list[Any]:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_backward_hooks", "_buffers")
    known = [getattr(m, "config", None) for m in model.modules()]
    configs = [(id(config), config._attn_implementation) for config in known if isinstance(config, PreTrainedConfig)]
    return [(name, sorted(vars(m)), *(len(getattr(m, kind)) for kind in kinds)) for name, m in model.named_modules()] + configs


def fails(*args: Any, **kwargs: Any) -> None:
    raise ZeroDivisionError


@every_model
@pytest.mark.parametrize("where", ["tower", "bridge", "attention", "last layer", "head", "method"])
@pytest.mark.parametrize("reducer", ["fastervlm:keep=0.5+fastv:keep=0.5,layer=2", "vcc:layer=2,stride=4"])
def test_invariant_5_detaching_leaves_the_model_as_it_was(make: Any, where: str, reducer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """5. Detaching leaves the model as it was: no hook, attribute or cache of ours remains, after an exception too."""
    model, inputs = make(), Batch(ROWS).inputs
    bridge = model.model.bridge if hasattr(model.model, "bridge") else model.model.multi_modal_projector
    parts = {"tower": model.model.vision_tower, "bridge": bridge, "head": model.get_output_embeddings()}
    layers: Any = read(model).layers
    parts |= {"attention": layers[1].self_attn.o_proj, "last layer": layers[-1]}  # in the midst of what FastV watches
    bare = model(**inputs, use_cache=True)
    before = state_of(model)

    def broken() -> None:
        with foveate.attach(model, reducer), monkeypatch.context() as patch, torch.no_grad():
            model(**inputs)
            if where == "method":
                patch.setattr(ForwardPass, "_view", fails)
            else:
                patch.setattr(parts[where], "forward", fails)
            model(**inputs)

    with pytest.raises(ZeroDivisionError):
        broken()
    assert state_of(model) == before
    again = model(**inputs, use_cache=True)
    assert torch.equal(again.logits, bare.logits)
    assert type(again.past_key_values) is type(bare.past_key_values)
    with foveate.attach(model, reducer) as run:  # nothing bars the way of the next
        model(**inputs)
        assert run.last.visual_tokens[-1] < 3 * PATCHES


# ---- 6


@every_model
@pytest.mark.parametrize("reducer", KINDS)
def test_invariant_6_training_sees_the_same_supervised_tokens(make: Any, reducer: str) -> None:
    """6. Training sees the same supervised tokens with and without a reducer; gradients reach the kept
    tokens; gradient checkpointing changes nothing."""
    batch = Batch(ROWS)
    labels = batch.labels()
    labels[:, :4] = -100
    found = []
    for checkpointing in (False, True):
        model = make().train()
        model.get_input_embeddings().requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        features: list[Tensor] = []
        with foveate.attach(model, reducer) as run:

            def keep(module: Any, args: Any, kwargs: dict[str, Any], features: list[Tensor] = features) -> None:
                kwargs["inputs_embeds"].retain_grad()
                features.append(kwargs["inputs_embeds"])

            hook = read(model).decoder.register_forward_pre_hook(keep, with_kwargs=True)
            out = model(**batch.inputs, labels=labels, use_cache=False)
            out.loss.backward()
            hook.remove()
            whole = run.last.provenance(len(read(model).layers) - 1)
            first = run.last.provenance(0)
        assert out.logits.shape[:2] == labels.shape
        mean = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        torch.testing.assert_close(out.loss, mean)
        (grad,) = (f.grad.abs().sum(-1) for f in features if f.grad is not None)
        for b in range(2):
            before_any_answer = (labels[b] < 0) & (torch.arange(labels.shape[1]) < int((labels[b] >= 0).nonzero()[-1]))
            visual = (batch.inputs["input_ids"][b] == IMAGE) & before_any_answer
            last = {s for m in range(whole.representative.shape[1]) for s in whole.sources(b, m)}
            entered = {s for m in range(first.representative.shape[1]) for s in first.sources(b, m)}
            for slot in visual.nonzero()[:, 0].tolist():
                assert slot not in last or grad[b, slot] > 0, "a kept token has no gradient"
                assert slot in entered or grad[b, slot] == 0, "a dropped token has one"
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": out.loss.detach()})
    assert found[0].keys() == found[1].keys()
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


# ---- 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("random:keep=0", "keep=0 is not possible: give a share"),
        ("fastervlm:keep=0.0", "keep=0.0 is not possible: give a share"),
        ("pyramiddrop:keep=1.2", "keep=1.2 is not possible: give a share"),
        ("divprune:keep=-3", "keep=-3 is not possible: give a share"),
        ("visionzip:dominant=0", "dominant=0 is not possible; give a share"),
        ("fastv:layer=0", "layer=0 is not possible, the attention of the layer before it is needed"),
        ("vcc:stride=0", "stride=0 is not possible; give an integer >= 1"),
        ("pyramiddrp:keep=0.5", "unknown reducer 'pyramiddrp' .did you mean 'pyramiddrop'"),
        ("fastv:kep=0.5", "no option 'kep' .did you mean 'keep'"),
    ],
)
def test_invariant_7_settings_that_are_impossible(text: str, message: str) -> None:
    """7. What is asked for and impossible (keep=0, a layer that is not there, a model without a [CLS] token, a
    text-only batch) gives an error or a documented fallback that says what to do, never a wrong answer."""
    model = llava()
    before = state_of(model)
    with pytest.raises(FoveateError, match=message):
        foveate.attach(model, text)
    assert state_of(model) == before


@pytest.mark.parametrize("keep", [True, False, "0.5", None, float("nan"), float("inf")])
def test_invariant_7_a_share_that_is_no_number(keep: Any) -> None:
    """7. … never a wrong answer: True is not taken for one token."""
    with pytest.raises(FoveateError, match="is not possible: give a share"):
        Random(keep=keep)


@pytest.mark.parametrize(
    "text",
    [
        "fastervlm:keep=0.5,layer=-9",
        "fastervlm:keep=0.5,layer=2",
        "random:keep=0.5,layer=4",
        "fastv:keep=0.5,layer=9",
        "dart:keep=0.5,layer=9",
    ],
)
def test_invariant_7_a_layer_that_is_not_there(text: str) -> None:
    """7. … a layer that is not there: an error that says how many there are."""
    model = llava()
    before = state_of(model)
    with pytest.raises(FoveateError, match=r"layer"), foveate.attach(model, text), torch.no_grad():
        model(**Batch(ROWS).inputs)
    assert state_of(model) == before


@pytest.mark.parametrize("text", ["vcc:layer=4,stride=4", "sparsevlm:keep=8-4,layers=4-9"])
def test_invariant_7_a_layer_that_is_not_there_where_that_is_documented(text: str) -> None:
    """7. … or a documented fallback: a later layer of these never acts, and the ledger says so."""
    model, inputs = llava(), Batch(ROWS).inputs
    (method,) = parse(text)
    assert "layer that the model does not have never" in " ".join((type(method).__doc__ or "").split())
    with torch.no_grad():
        bare = model(**inputs).logits
        with foveate.attach(model, text) as run:
            assert torch.equal(model(**inputs).logits, bare)
        assert run.last.visual_tokens == [48] * 4


class Convolutions(nn.Module):
    """A tower without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, stride=8)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([x[:, :1], x], 1)  # llava leaves the first out
        return BaseModelOutputWithPooling(last_hidden_state=x, hidden_states=(x, x, x))


@pytest.mark.parametrize("text", ["fastervlm:keep=0.5", "visionzip:dominant=4,contextual=3", "tome:keep=0.5,metric=keys"])
def test_invariant_7_a_tower_without_attention(text: str) -> None:
    """7. … a method that needs the tower's attention says that there is none; one that does not works."""
    model = llava()
    model.model.vision_tower = Convolutions()
    before = state_of(model)
    with pytest.raises(FoveateError, match="has no attention that can be read"):
        foveate.attach(model, text)
    assert state_of(model) == before
    with foveate.attach(model, "fastv:keep=0.5") as run, torch.no_grad():
        model(**Batch(ROWS).inputs)
        assert run.last.visual_tokens[-1] == 24


def test_invariant_7_a_model_without_a_cls_token() -> None:
    """7. … a documented fallback: without [CLS], the attention that a patch receives from all patches stands in for it."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99, initializer_range=0.2
    )
    how = {"image_token_id": IMAGE, "vision_feature_select_strategy": "full", "attn_implementation": "eager"}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **how)).eval()
    batch = Batch(ROWS)
    assert "In a tower without [CLS]: what `ReceivedAttention` gives" in " ".join((ClsAttention.__doc__ or "").split())
    with foveate.attach(model, "fastervlm:keep=4,layer=-1") as run, torch.no_grad():
        model(**batch.inputs)
        kept = run.last.maps[0]
        attention = model.model.vision_tower(batch.pixels, output_attentions=True).attentions[-1]
    received = attention.mean((1, 2))
    best = received.topk(4).indices.sort().values
    slots = [[s for s in kept.representative[b].tolist() if s >= 0 and ROWS[b][s] == IMAGE] for b in range(2)]
    assert slots[0] == [3 + int(i) for i in best[0]]
    assert slots[1] == [3 + int(i) for i in best[1]] + [3 + PATCHES + 1 + int(i) for i in best[2]]


@every_model
@pytest.mark.parametrize("reducer", KINDS)
def test_invariant_7_a_batch_of_text(make: Any, reducer: str) -> None:
    """7. … a text-only batch: it is run as it is, and what was recorded says that there was no image."""
    model, batch = make(), Batch([ROWS[2], [5, 6, 7, 8, 9, 10, 11, 12]], "left")
    assert "pixel_values" not in batch.inputs
    with torch.no_grad():
        bare, said = model(**batch.inputs).logits, model.generate(**batch.inputs, max_new_tokens=5, **GREEDY)
        with foveate.attach(model, reducer) as run:
            assert torch.equal(model(**batch.inputs).logits, bare)
            assert torch.equal(model.generate(**batch.inputs, max_new_tokens=5, **GREEDY), said)
            with pytest.raises(FoveateError, match="no forward pass with images was recorded"):
                _ = run.ledger


def test_invariant_7_a_model_that_sees_nothing() -> None:
    """7. … a model without visual tokens is refused, by the part that it lacks."""
    text = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8))
    with pytest.raises(FoveateError, match="LlamaForCausalLM has no part with language_model"):
        foveate.attach(text, "random:keep=0.5")


def test_invariant_7_a_signal_that_was_not_given() -> None:
    """7. … a view that lacks what the method needs says what that is."""
    (method,) = parse("fastervlm:keep=0.5")
    with pytest.raises(FoveateError, match="ClsAttention"):
        method.reduce(View.of(torch.randn(1, 16, 8), grid=(4, 4)))
