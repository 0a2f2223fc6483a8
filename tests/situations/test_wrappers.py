"""What attach is given is not always what is called: wrappers, base models, methods of the caller's own, embeddings, compiled models."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn

import foveate
from foveate import FoveateError
from foveate.engine.run import RUN
from tests.situations.models import GREEDY, MODELS, inputs
from tests.tiny import IMAGE, PATCHES, llava

ONE = [5, 6, 7] + [IMAGE] * PATCHES + [1, 2, 3]
METHODS = ["divprune:keep=0.5", "fastv:keep=0.25,layer=2", "pyramiddrop:keep=0.5", "sparsevlm:keep=0.3,layers=2"]
every_model = pytest.mark.parametrize("name", MODELS)
every_method = pytest.mark.parametrize("reducer", METHODS)


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)).eval()


class Wrapper(nn.Module):
    """A user's own module around a model."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **kwargs: Any) -> Any:
        return self.inner(**kwargs)

    def generate(self, **kwargs: Any) -> Any:
        return self.inner.generate(**kwargs)


@every_model
@every_method
@pytest.mark.parametrize("given", ["PeftModel", "base model", "the model in PEFT", "a wrapper", "a wrapper's model"])
def test_assistants_say_what_greedy_says(name: str, reducer: str, given: str) -> None:
    model = MODELS[name]()
    if given in ("PeftModel", "the model in PEFT"):
        model = adapted(model)
    elif "wrapper" in given:
        model = Wrapper(model)
    handed = {
        "PeftModel": lambda: model,
        "base model": lambda: model.model,
        "the model in PEFT": lambda: model.base_model.model,
        "a wrapper": lambda: model,
        "a wrapper's model": lambda: model.inner,
    }[given]()
    call = inputs(name, [[*ONE, 4, 1, 2, 3]])
    with torch.no_grad():
        with foveate.attach(handed, reducer) as run:
            greedy = model.generate(**call, max_new_tokens=6, **GREEDY)
            for how in ({"prompt_lookup_num_tokens": 3}, {"use_cache": False}):
                assert torch.equal(greedy, model.generate(**call, max_new_tokens=6, **how, **GREEDY))
            assert run.last.visual_tokens[-1] < PATCHES
        assert not any("generate" in vars(m) or hasattr(m, RUN) for m in model.modules())


@pytest.mark.parametrize("reducer", METHODS)
def test_ddp(reducer: str, tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inner = llava()
        model, call = torch.nn.parallel.DistributedDataParallel(inner), inputs("llava", [[*ONE, 11, 12]])
        labels = torch.tensor([[-100] * len(ONE) + [11, 12]])
        with foveate.attach(inner, reducer) as run:
            alone = inner(**call, labels=labels).loss
        with foveate.attach(model, reducer) as run:
            loss = model(**call, labels=labels).loss
            loss.backward()
            assert run.ledger.total_flops if hasattr(run.ledger, "total_flops") else run.ledger
            config: Any = run.config
            assert str(config.model_type) == "llava"
        assert torch.equal(loss, alone)
        assert inner.model.language_model.layers[0].self_attn.q_proj.weight.grad is not None
    finally:
        dist.destroy_process_group()


@every_model
@pytest.mark.parametrize("reducer", ["divprune:keep=0.5", "fastv:keep=0.5,layer=2", "none"])
def test_what_a_caller_has_put_on_the_instance(name: str, reducer: str) -> None:
    """Own versions of the watched methods are called while attached, and stand there afterwards."""
    model, heard = MODELS[name](), []

    def spy(method: Any) -> Any:
        @functools.wraps(method)
        def heard_of(*args: Any, **kwargs: Any) -> Any:
            heard.append(method.__name__)
            return method(*args, **kwargs)

        return heard_of

    own = {(model, "generate"), (model.model, "get_image_features"), (model.model, "get_placeholder_mask")}
    for owner, method in own:
        setattr(owner, method, spy(getattr(owner, method)))
    before = {(owner, method): vars(owner)[method] for owner, method in own}
    with torch.no_grad(), foveate.attach(model, reducer) as run:
        model.generate(**inputs(name, [ONE]), max_new_tokens=2, **GREEDY)
        assert reducer == "none" or run.last.visual_tokens[-1] == 8
    assert {"generate", "get_image_features", "get_placeholder_mask"} <= set(heard)
    assert all(vars(owner)[method] is before[owner, method] for owner, method in own)
    # What is put there while attached is the caller's as well.
    with foveate.attach(model, reducer):
        model.generate = before[model, "generate"]
    assert model.generate is before[model, "generate"]


@every_model
@every_method
def test_embeddings_merged_by_the_caller_are_refused(name: str, reducer: str) -> None:
    model, call = MODELS[name](), inputs(name, [ONE])
    more = {k: v for k, v in call.items() if k == "image_grid_thw"}
    with torch.no_grad():
        features = model.model.get_image_features(call["pixel_values"], **more, return_dict=True).pooler_output
        at = (call["input_ids"] == IMAGE)[..., None]
        embeds = model.get_input_embeddings()(call["input_ids"]).masked_scatter(at, torch.cat(list(features)))
        with foveate.attach(model, reducer) as run:
            for ask in (lambda: model(inputs_embeds=embeds), lambda: model.generate(inputs_embeds=embeds, max_new_tokens=2, **GREEDY)):
                with pytest.raises(FoveateError, match="inputs_embeds do not say"):
                    ask()
            assert not run.passes
            model(**call)
            assert run.last.visual_tokens[-1] < PATCHES
        with foveate.attach(model, None):
            model(inputs_embeds=embeds)


@pytest.mark.parametrize("reducer", ["divprune:keep=0.5", "fastv:keep=0.5,layer=2", "vcc:layer=1,stride=4"])
def test_fullgraph_is_refused_in_our_own_words(reducer: str) -> None:
    model, call = llava(), inputs("llava", [ONE])
    whole = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad(), foveate.attach(model, reducer):
        with pytest.raises(Exception, match=r"compile the model without\s+fullgraph=True"):
            whole(**call)
        model.forward = torch.compile(model.forward, backend="eager")
        reduced = model(**call).logits
        del model.forward
        torch.testing.assert_close(reduced, model(**call).logits)
