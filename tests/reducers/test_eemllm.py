"""EE-MLLM: the published numbers, and both of its readings against their equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.accounting import predict
from foveate.accounting.conventions import aim, eemllm
from foveate.contract import View, Workload
from foveate.engine.rulings import hidden_by
from foveate.errors import FoveateError
from foveate.reducers import EEMLLM
from tests.reducers.plain_decoder import causal, decode, embedded, feed_forward, norm, project
from tests.tiny import IMAGE, LAYERS, PATCHES, ROWS, Batch, llava

WIDTH, MLP = 4096, 11008  # of Vicuna-7B


def view(visual: int, text: int) -> View:
    return View.of(torch.zeros(1, visual + text, 1), text=text)


def test_two_visual_tokens_and_two_of_text_have_nine_pairs_or_seven() -> None:
    """Of the 10 under a causal mask."""
    layout = view(2, 2).layout
    triangle = torch.ones(4, 4, dtype=torch.bool).tril()
    assert int(triangle.sum()) == 10
    hidden = hidden_by((EEMLLM().reduce(view(2, 2)),), layout, layout)
    assert hidden is not None
    seen = (triangle & ~hidden)[0]
    assert seen.sum(1).tolist() == [1, 1, 3, 4]
    assert int(seen.sum()) == 9
    assert int(seen[~layout.visual[0]].sum()) == 7


@pytest.mark.parametrize(("visual", "text", "itself", "frozen"), [(576, 64, 0.90, 0.25), (2304, 256, 0.85, 0.24), (4900, 256, 0.77, 0.18)])
def test_the_ratios_of_flops(visual: int, text: int, itself: float, frozen: float) -> None:
    full = aim([visual], text, width=WIDTH, mlp=MLP)
    for update, ratio in (("self", itself), ("none", frozen)):
        assert round(eemllm([visual], text, width=WIDTH, mlp=MLP, visual_update=update) / full, 2) == ratio


@pytest.mark.parametrize(("update", "left"), [("self", 7 * 23 + 16), ("none", 7 * 23), ("full", 23 * 23)])
def test_pairs_are_told_and_seen(update: str, left: int) -> None:
    """16 visual tokens and 7 of text."""
    model, row = llava(), ROWS[0]
    reducer = EEMLLM(visual_update=update)
    with foveate.attach(model, reducer) as run, torch.no_grad():
        model(**Batch([row]).inputs)
    told = predict(model.config, text_tokens=len(row) - PATCHES, reducers=[reducer])
    assert run.ledger == told
    assert told.flops["lm_attention"] == 4 * left * 32 * LAYERS
    assert 23 * 23 - reducer.unseen(Workload((), (16,), 7)) == left


def test_a_training_step_counts_fewer_pairs_too() -> None:
    """Of both images of a prompt, forward and backward; a text alone has none to hide."""
    config = llava().config
    how: dict[str, Any] = {"images": 2, "text_tokens": 8, "mode": "train"}
    full, less = predict(config, **how), predict(config, **how, reducers=[EEMLLM(layer=1)])
    assert full.flops["lm_attention"] - less.flops["lm_attention"] == 3 * 4 * 32 * 39 * 32 * (LAYERS - 1)
    assert {part for part in full.flops if full.flops[part] != less.flops[part]} == {"lm_attention"}
    assert full.total_tokens == less.total_tokens
    assert predict(config, images=0, text_tokens=8, reducers=[EEMLLM()]) == predict(config, images=0, text_tokens=8)


def plain(model: Any, x: Tensor, visual: list[bool]) -> Tensor:
    """The first reading as its equations have it: no attention at all for visual tokens, their values go on as they are."""
    decoder, text = model.model.language_model, model.config.text_config
    groups = text.num_attention_heads // text.num_key_value_heads
    seen: list[Tensor] = []
    for layer in decoder.layers:
        seen.append(x)
        value = project(layer.self_attn.v_proj, norm(layer.input_layernorm, x)).view(len(x), text.num_key_value_heads, -1)
        alone = x + project(layer.self_attn.o_proj, value.repeat_interleave(groups, 1).flatten(1))
        alone = alone + feed_forward(layer, alone)
        x = torch.where(torch.tensor(visual)[:, None], alone, x)
    return x


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("update", ["self", "none"])
def test_it_is_what_the_equations_say(attn: str, update: str) -> None:
    model, row = llava(attn), ROWS[1]
    visual = [token == IMAGE for token in row]
    inputs = Batch([row]).inputs
    x = embedded(model, inputs)

    def added(layer: int, i: int, j: int) -> float:
        return float("-inf") if visual[i] and i != j else causal(layer, i, j)

    expected = decode(model, x, range(len(row)), added, (lambda _, i: visual[i]) if update == "none" else None)
    if update == "self":
        last = norm(model.model.language_model.norm, plain(model, x, visual))
        torch.testing.assert_close(project(model.lm_head, last)[visual], expected[visual])
    with foveate.attach(model, EEMLLM(visual_update=update)), torch.no_grad():
        found = model(**inputs).logits[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_one_visual_token_changes_no_other() -> None:
    model, batch = llava(), Batch([ROWS[0]])
    inputs = batch.inputs
    x = embedded(model, inputs).float()[None]
    states = []
    for change in (0.0, 1.0):
        x[0, 5] += change

        def put(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "inputs_embeds": x.clone()}

        hook = model.model.language_model.register_forward_pre_hook(put, with_kwargs=True)
        with foveate.attach(model, "eemllm"), torch.no_grad():
            states.append(model(**inputs, output_hidden_states=True).hidden_states)
        hook.remove()
    visual = batch.inputs["input_ids"][0] == IMAGE
    for level, (a, b) in enumerate(zip(*states, strict=True)):
        changed = (a[0] != b[0]).any(-1)
        assert changed[visual].nonzero()[:, 0].tolist() == [2]  # token 5 is the third visual one
        assert bool(changed[~visual].any()) == (level > 0)


def test_impossible_options() -> None:
    with pytest.raises(FoveateError, match="visual_update='both' is not possible"):
        EEMLLM(visual_update="both")
    with pytest.raises(FoveateError, match="positions='renumber' does nothing"):
        EEMLLM(positions="renumber")


def test_outside_of_a_model_there_is_nothing_to_reduce() -> None:
    for method in ("eemllm", "v2pe", "ppe:keep=0.5"):
        with pytest.raises(FoveateError, match="which only a model can do: attach it to one"):
            foveate.reduce(method, torch.zeros(1, 4, 8), layers=LAYERS)
