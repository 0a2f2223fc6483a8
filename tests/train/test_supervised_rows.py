"""The head at supervised rows alone: the same losses and gradients as with logits of all tokens, whatever the model does to its logits."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from tests.situations.models import media, mistral, qwen
from tests.tiny import IMAGE, ROWS, Batch, assembled, llava
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Qwen2_5_VLForConditionalGeneration

from foveate.engine.attach import attach
from foveate.reducers import parse
from foveate.train.bf16_copy import BFloat16Copy
from foveate.train.run import main
from foveate.train.supervised import SupervisedRows, next_tokens, tried
from foveate.train.trainer import FoveateTrainer

HEADS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # a bias
}


def over(name: str) -> Any:
    """Our own model over a language model whose logits are more, or less, than a product."""
    given: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    given |= {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = assembled()
    model.model.causal_lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**given, **HEADS[name]))
    return model.eval()


MODELS: dict[str, Callable[[], Any]] = {"llava": llava, "foveate": assembled, "qwen2_5_vl": qwen, "mistral": mistral}
MODELS |= {name: lambda name=name: over(name) for name in HEADS}  # type: ignore[misc]


def inputs_of(model: Any) -> dict[str, Any]:
    batch = Batch(ROWS)
    inputs = batch.inputs | {"labels": batch.labels()}
    if isinstance(model, Qwen2_5_VLForConditionalGeneration):
        inputs |= media("qwen2_5_vl", len(batch.pixels)) | {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}
    return inputs


def step(model: Any, call: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and gradients of all that has one."""
    model.zero_grad()
    loss = call(**inputs)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model: Any, rows: SupervisedRows, inputs: dict[str, Any], call: Any = None, rtol: float = 1e-5) -> None:
    loss, gradients = step(model, call or model, inputs)
    with rows.alone(inputs) as given:
        found, others = step(model, call or model, dict(given))
    torch.testing.assert_close(found, loss, rtol=rtol, atol=0)
    assert others.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=0, atol=rtol * largest, msg=name)


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_all_logits(name: str, items: int | None, caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS[name]()
    inputs = inputs_of(model)
    rows = tried(model, inputs, True)
    assert rows.head is model.get_output_embeddings()
    assert not caplog.records
    compare(model, rows, inputs if items is None else {**inputs, "num_items_in_batch": torch.tensor(items)})


@pytest.mark.parametrize("reducer", ["vcc:layer=1,stride=4", "fastv:layer=2,keep=0.5", "random:keep=0.5", "divprune:keep=0.25"])
@pytest.mark.parametrize("name", ["llava", "foveate"])
def test_under_reducers_too(name: str, reducer: str) -> None:
    model = MODELS[name]().train()
    inputs = inputs_of(model)
    with attach(model, parse(reducer)):
        compare(model, tried(model, inputs, True), inputs)


def test_on_a_copy_in_bfloat16_and_with_checkpoints() -> None:
    model = assembled().train()
    inputs = inputs_of(model)
    rows = tried(model, inputs, True)
    compare(model, rows, inputs, BFloat16Copy().of(model), rtol=2e-2)
    model.gradient_checkpointing_enable()
    compare(model, rows, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        compare(model, rows, inputs, rtol=2e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_with_adapters_on_a_head_that_may_be_tied(tied: bool) -> None:
    model = assembled()
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    adapted = LoraModel(model, {"default": LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)}, "default")
    inputs = inputs_of(model)
    rows = tried(model, inputs, True)
    assert rows.head is model.lm_head is not None
    compare(adapted.model, rows, inputs)


def test_the_head_sees_the_supervised_rows_and_nothing_else() -> None:
    model, seen = assembled(), list[tuple[int, ...]]()
    inputs = inputs_of(model)
    rows = tried(model, inputs, True)
    model.lm_head.register_forward_hook(lambda _, args, output: seen.append(tuple(output.shape)))
    with rows.alone(inputs) as given:
        output = model(**given)
    count = int((inputs["labels"][:, 1:] >= 0).sum())
    assert seen == [(1, count, 99)] == [tuple(output.logits.shape)]
    assert sum(n or 0 for n in rows.count(inputs["labels"])) == count
    whole = model(**inputs).logits
    torch.testing.assert_close(output.logits[0], whole[next_tokens(inputs["labels"]) >= 0])
    assert whole.shape[:2] == inputs["input_ids"].shape  # the hook has gone


class Own(nn.Module):
    """A model whose loss is its own: a mean over all rows, or one that does not take `shift_labels`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = llava(), kind

    def get_output_embeddings(self) -> Any:
        return None if self.kind == "headless" else self.inner.lm_head

    def forward(self, labels: Tensor, shift_labels: Tensor | None = None, **inputs: Any) -> Any:
        if self.kind == "strict" and shift_labels is not None:
            raise TypeError("got an unexpected keyword argument 'shift_labels'")
        output = self.inner(**inputs)
        if self.kind == "normed":
            output.logits = output.logits - output.logits.mean((0, 1))
        wanted = next_tokens(labels) if shift_labels is None or self.kind == "shifts itself" else shift_labels
        losses = nn.functional.cross_entropy(output.logits.flatten(0, 1), wanted.flatten(), reduction="none")
        output.loss = losses.mean() if self.kind == "mean of all" else losses.sum() / (wanted >= 0).sum()
        return output


@pytest.mark.parametrize("kind", ["headless", "strict", "normed", "shifts itself", "mean of all"])
def test_a_model_that_needs_all_rows_keeps_them_and_says_so_once(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    batch = Batch(ROWS)
    with caplog.at_level(logging.WARNING):
        rows = tried(Own(kind), batch.inputs | {"labels": batch.labels()}, False)
    assert rows.head is None
    assert [record.getMessage().startswith("logits are computed for all tokens") for record in caplog.records] == [True]
    assert tried(Own(kind), batch.inputs | {"labels": batch.labels()}, False, tell=False).head is None
    assert len(caplog.records) == 1
    inputs = {"labels": batch.labels()}
    with rows.alone(inputs) as given:
        assert given is inputs
    assert rows.count(batch.labels()) == [None] * 3


STAGES = """
  - name: pretrain
    data: &data {{conversations: {root}/data.json, images: {root}/images}}
    validation: {{conversations: {root}/data.json, images: {root}/images, every: 2}}
    train: {{bridge: true}}
    steps: 2
    batch_size: 6
    micro_batch: 2
    learning_rate: 1.0e-2
  - name: all
    data: *data
    train: {{bridge: true, lm: true}}
    steps: 4
    batch_size: 6
    micro_batch: 3
    learning_rate: 1.0e-2
    reducers: [{{share: 1/2, reducer: "vcc:layer=1,stride=4"}}, {{share: 1/2, cycle: [none, "random:keep=0.5"]}}]
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-copy"])
def test_a_run_has_the_losses_of_one_with_all_logits(
    precision: str, recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.train.tiny_training import RECIPE

    text = (
        RECIPE.partition("stages:")[0].replace("log_steps: 2", "log_steps: 1").replace("{root}/lm", "{root}/lm-plain") + "stages:" + STAGES
    )
    more = [f"stages.{stage}.precision={precision}" for stage in (0, 1)]
    logs = []
    for way in ("rows", "all"):
        if way == "all":
            monkeypatch.setattr(
                FoveateTrainer, "rows", property(lambda self: SupervisedRows(None), lambda self, value: None), raising=False
            )
        final = main(recipe_file(f"{way}-{precision}", text), more)
        logs.append([json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()])
    tolerance = 2e-5 if precision == "fp32" else 2e-2
    for ours, theirs in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
        assert ours["flops"] < theirs["flops"]
    held = [[row["validation_loss"] for row in log if "validation_loss" in row] for log in logs]
    assert len(held[0]) == 1
    assert held[0] == pytest.approx(held[1], rel=tolerance)
