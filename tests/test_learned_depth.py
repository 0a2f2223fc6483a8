"""γ-MoD and ATP-LLaVA on live models: the dense model, soft and hard choices, gradients, and where their weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import foveate
from foveate import FoveateError
from foveate.anatomy import read
from foveate.reducers import ATPLLaVA, GammaMoD, add_weights, parse, save_reducers, save_weights, saved_weights, take_weights
from tests.test_attach import every_model, everything
from tests.test_learned import recorded, with_weights
from tests.tiny import LAYERS, ROWS, Batch, llava

BOTH = "atpllava:layers=1-3+gammamod:keep=0.6,layers=1-3"


@every_model
def test_an_undecided_router_is_the_dense_model_at_keep_1(make: Any) -> None:
    """Through all of the machinery: every token goes through, weighed by 1."""
    model, batch = make(), Batch(ROWS)
    bare = everything(model, batch)
    add_weights(model, [GammaMoD()])
    with foveate.attach(model, "gammamod:keep=1.0,layers=1-2,weigh=2p", shortcuts=False):
        kept = everything(model, batch)
    assert all(torch.equal(kept[name], value) for name, value in bare.items())
    with foveate.attach(model, "gammamod:keep=1.0,layers=1-2"), torch.no_grad():  # by halves, as the paper has it
        assert not torch.allclose(model(**batch.inputs).logits, bare["logits"], atol=1e-3)


def test_what_passes_by_is_as_it_came_and_what_goes_through_is_weighed() -> None:
    """Against a model whose branches are weighed by hand, where all go through."""
    model, batch = with_weights(llava(), "gammamod"), Batch([ROWS[1]])
    with foveate.attach(model, "gammamod:keep=1.0,layers=1-2") as run, torch.no_grad():
        found = model(**batch.inputs, use_cache=False).logits
        weights = {step.layer: step.gain for step in recorded(run)}
    visual = run.last.entered.visual
    assert all(bool((gain[~visual] == 1).all() and (gain[visual] < 1).all()) for gain in weights.values())
    layers: Any = read(model).layers
    hooks = [layers[at].mlp.register_forward_hook(lambda *given, w=w: given[2] * w[..., None]) for at, w in weights.items()]
    with torch.no_grad():
        expected = model(**batch.inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    assert torch.equal(found, expected)
    with foveate.attach(model, "gammamod:keep=0.25,layers=2") as run, torch.no_grad():
        states = model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states
        (step,) = recorded(run)
    by = torch.ones(len(ROWS[1]), dtype=torch.bool)
    by[step.map.representative[0]] = False
    assert int(by.sum()) == 2 * 12
    assert torch.equal(states[3][0, by], states[2][0, by])
    assert not torch.equal(states[3][0, ~by], states[2][0, ~by])


def test_thresholds_are_soft_in_training_and_hard_in_evaluation() -> None:
    model, batch = with_weights(llava(), "atpllava"), Batch(ROWS)
    with foveate.attach(model, "atpllava:layers=1-3") as run:
        model.train()(**batch.inputs, labels=batch.labels(), use_cache=False)
        assert run.last.visual_tokens == [48] * LAYERS
        ((reducer, loss),) = run.take_losses()
        assert reducer == ATPLLaVA(layers="1-3")
        assert loss[2] == 0  # a row of text
        assert bool((loss[:2] == loss[0]).all())
        model.eval()(**batch.inputs, use_cache=False)
        counts = run.last.visual_tokens
        assert run.take_losses() == []
        ends = [int((run.last.layouts[1].visual & (run.last.layouts[1].image == image)).sum()) for image in range(3)]
    assert counts[0] == 48 > counts[1] == counts[2] == sum(ends) >= counts[3] >= 3
    assert len(set(ends)) > 1  # pictures differ


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_the_weights_and_checkpointing_changes_nothing(reentrant: bool) -> None:
    found = []
    for again in (None, reentrant):
        model, batch = with_weights(llava(), BOTH).train(), Batch(ROWS)
        model.get_input_embeddings().requires_grad_(True)
        if again is not None:
            model.gradient_checkpointing_enable({"use_reentrant": again})
        with foveate.attach(model, BOTH) as run:
            loss = model(**batch.inputs, labels=batch.labels(), use_cache=False).loss
            terms = run.take_losses()
            assert [reducer.name for reducer, _ in terms] == ["gammamod", "atpllava", "gammamod"]
            (loss + torch.stack([term.mean() for _, term in terms]).sum()).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()})
    own = {name.rpartition("foveate_reducers.")[2]: value for name, value in found[0].items() if "foveate_reducers" in name}
    assert own["atpllava.bias"].any(1).tolist() == [False, True, False, True]
    assert bool(own["gammamod.weight"].any())
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_saved_loaded_attached(tmp_path: Path) -> None:
    model, batch = with_weights(llava(), BOTH), Batch(ROWS)
    with foveate.attach(model, BOTH), torch.no_grad():
        expected = model(**batch.inputs).logits
    weights = take_weights(model)
    model.save_pretrained(tmp_path)
    save_weights(weights, tmp_path)
    save_reducers(parse(BOTH), tmp_path)
    assert {key: tuple(value.shape) for key, value in (saved_weights(tmp_path) or {}).items()} == {
        "atpllava.weight": (LAYERS, 2, 2),
        "atpllava.bias": (LAYERS, 2),
        "gammamod.weight": (2, 32),
    }
    again = type(model).from_pretrained(tmp_path).eval()
    with foveate.attach(again), torch.no_grad():
        assert torch.equal(again(**batch.inputs).logits, expected)


@pytest.mark.parametrize(
    ("method", "module", "says"),
    [
        ("gammamod", GammaMoD.module(16, LAYERS), "weight 2 x 16, where this one, of 4 .* 32 values, has weight 2 x 32"),
        (
            "atpllava",
            ATPLLaVA.module(32, LAYERS + 1),
            "bias 5 x 2, weight 5 x 2 x 2, where this one, of 4 .* has bias 4 x 2, weight 4 x 2 x 2",
        ),
    ],
)
def test_missing_weights_and_those_of_another_model(method: str, module: nn.Module, says: str, tmp_path: Path) -> None:
    model = llava()
    with pytest.raises(
        FoveateError, match=f"{method} decides by weights that are trained, and the foveate.safetensors of the model is not"
    ):
        foveate.attach(model, f"{method}:layers=1")
    save_weights({method: module}, tmp_path)
    model.config.name_or_path = str(tmp_path)
    with pytest.raises(FoveateError, match=f"weights of {method} for another model: {says}"):
        foveate.attach(model, f"{method}:layers=1,untrained=true")
