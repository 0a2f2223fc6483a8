"""Reducers with weights on live models: what a gain does, what trains them, and where the weights come from."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate import FoveateError, NotApplicable
from foveate.anatomy import read
from foveate.reducers import PMoD, VisionSelector, add_weights, parse, save_reducers, save_weights, saved_weights, take_weights
from foveate.reducers.learned import lent_weights, registered
from tests.test_attach import check_decoding, every_model, everything, state_of
from tests.tiny import LAYERS, ROWS, Batch, llava

BOTH = "visionselector:keep=0.8+pmod:dense=1.0"


def with_weights(model: Any, reducers: str = BOTH) -> Any:
    """The model with weights of these reducers as training may have left them, drawn at random."""
    torch.manual_seed(3)
    for parameter in add_weights(model, parse(reducers)).parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def recorded(run: foveate.Run) -> list[Any]:
    return list(run.maps)


def routers(model: Any) -> Any:
    """p-MoD's, as they are on the model."""
    found = registered(read(model))
    assert found is not None
    return found["pmod"]


# ---- what acts


@every_model
def test_a_gain_is_what_it_says(make: Any) -> None:
    """Against a model whose branches and states are weighed by hand, by hooks that know what was decided."""
    model, batch = with_weights(make()), Batch([ROWS[1]])
    with foveate.attach(model, "pmod:dense=1.0,floor=1.0") as run, torch.no_grad():  # all go through
        found = model(**batch.inputs, use_cache=False).logits
        weights = [step.gain for step in recorded(run)]
    assert all(float((weight - 1).abs().max()) > 0.05 for weight in weights)
    layers: Any = read(model).layers
    hooks = [layer.mlp.register_forward_hook(lambda *given, w=w: given[2] * w[..., None]) for layer, w in zip(layers, weights, strict=True)]
    with torch.no_grad():
        expected = model(**batch.inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    assert torch.equal(found, expected)


def test_what_passes_by_is_scaled() -> None:
    model, batch = with_weights(llava()), Batch([ROWS[0]])
    model(**batch.inputs, output_hidden_states=True)  # the library hooks the layers by itself, here before we do
    with foveate.attach(model, "pmod:shift=-0.4,floor=0.2") as run, torch.no_grad():
        states = model(**batch.inputs, output_hidden_states=True, use_cache=False).hidden_states
        steps = recorded(run)
    assert [step.layer for step in steps] == list(range(LAYERS))
    for step in steps[:-1]:
        by = torch.ones(len(ROWS[0]), dtype=torch.bool)
        by[step.map.representative[0]] = False
        assert int(by.sum()) == 16 - 3
        assert torch.equal(states[step.layer + 1][0, by], states[step.layer][0, by] * step.passing[0, by, None])


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reducers", [BOTH, "pmod:shift=0.3,positions=renumber"])
def test_decoding_and_batches_with_trained_weights(make: Any, side: str, reducers: str) -> None:
    model = with_weights(make(), reducers)
    check_decoding(model, reducers, side)
    batch = Batch(ROWS, side)
    with foveate.attach(model, reducers), torch.no_grad():
        together = model(**batch.inputs).logits
        for i, single in enumerate(batch.singles):
            torch.testing.assert_close(batch.own(together, i), model(**single).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_reach_the_weights_and_checkpointing_changes_nothing(reentrant: bool | None) -> None:
    found = []
    for again in (None, reentrant):
        model, batch = with_weights(llava()).train(), Batch(ROWS)
        model.get_input_embeddings().requires_grad_(True)
        if again is not None:
            model.gradient_checkpointing_enable({"use_reentrant": again})
        functions = [vars(layer).get("_gradient_checkpointing_func") for layer in read(model).layers]
        with foveate.attach(model, BOTH) as run:
            loss = model(**batch.inputs, labels=batch.labels(), use_cache=False).loss
            ((reducer, own),) = run.take_losses()
            assert run.take_losses() == []
            assert (reducer.name, own.shape) == ("visionselector", (len(ROWS),))
            (loss + own.mean()).backward()
        assert [vars(layer).get("_gradient_checkpointing_func") for layer in read(model).layers] == functions
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()})
    own_names = [name for name in found[0] if "foveate_reducers" in name]
    assert len(own_names) == 6
    assert found[0][next(name for name in own_names if "pmod.weight" in name)].any(1).tolist() == [True] * (LAYERS - 1) + [False]
    assert all(found[0][name].any() for name in own_names)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_the_gain_has_the_gradient_that_a_small_step_shows() -> None:
    """All go through, so that no choice changes; the library's loss is float32, hence the large step."""
    model, batch = with_weights(llava(dtype=torch.float64)).train(), Batch(ROWS, dtype=torch.float64)
    bias = routers(model).bias
    losses = []
    with foveate.attach(model, "pmod:dense=1.0,floor=1.0"):
        model(**batch.inputs, labels=batch.labels(), use_cache=False).loss.backward()
        for step in (0.02, -0.04):
            with torch.no_grad():
                bias[1] += step
                losses.append(float(model(**batch.inputs, labels=batch.labels(), use_cache=False).loss))
    assert bias.grad is not None
    assert (losses[0] - losses[1]) / 0.04 == pytest.approx(float(bias.grad[1]), rel=2e-2)


def test_soft_in_training_hard_in_evaluation() -> None:
    model, batch = with_weights(llava()), Batch(ROWS)
    with foveate.attach(model, "visionselector:keep=0.5") as run:
        for training, left in ((True, 48), (False, 24)):
            model.train(training)(**batch.inputs, use_cache=False)
            assert run.last.visual_tokens == [left] * LAYERS
            assert bool(run.take_losses()) == training
        model.train().requires_grad_(False)
        model(**batch.inputs, use_cache=False)  # nothing of it is trained
        assert run.last.visual_tokens == [24] * LAYERS


@every_model
def test_new_routers_are_the_dense_model(make: Any) -> None:
    model, batch = make(), Batch(ROWS)
    bare = everything(model, batch)
    add_weights(model, [PMoD()])
    with foveate.attach(model, "pmod:dense=1.0,floor=1.0"):
        kept = everything(model, batch)
    assert all(torch.equal(kept[name], value) for name, value in bare.items())


def test_text_alone_is_as_ever() -> None:
    model, batch = with_weights(llava()), Batch([ROWS[2]])
    bare = model(**batch.inputs).logits
    with foveate.attach(model, BOTH):
        assert torch.equal(model(**batch.inputs).logits, bare)


def test_layers_whose_branch_is_not_known_are_refused() -> None:
    model, batch = llava(), Batch(ROWS)
    for layer in read(model).layers:
        layer.feed_forward = nn.Identity()  # a second one
    with foveate.attach(model, "pmod:untrained=true"), pytest.raises(NotApplicable, match="no feed-forward branch that is known"):
        model(**batch.inputs)


def test_copies_and_pickles_decide_alike() -> None:
    model, batch = llava(), Batch(ROWS)
    with foveate.attach(model, "pmod:untrained=true+visionselector:keep=0.5,untrained=true"), torch.no_grad():
        others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        here = model(**batch.inputs).logits
        for other in others:
            assert torch.equal(other(**batch.inputs).logits, here)


# ---- where the weights are


def test_saved_loaded_attached(tmp_path: Path) -> None:
    model, batch = with_weights(llava()), Batch(ROWS)
    with foveate.attach(model, BOTH), torch.no_grad():
        expected = model(**batch.inputs).logits
    weights = take_weights(model)
    assert not take_weights(model)
    model.save_pretrained(tmp_path)
    save_weights(weights, tmp_path)
    save_reducers(parse(BOTH), tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    before = state_of(again)
    with foveate.attach(again) as run, torch.no_grad():
        assert torch.equal(again(**batch.inputs).logits, expected)
        with run.instead("pmod:dense=1.0"):
            again(**batch.inputs)
            assert run.last.visual_tokens[0] == 48
    assert [name for name, *_ in state_of(again)] == [name for name, *_ in before]


@every_model
def test_without_weights_nothing_is_attached(make: Any, tmp_path: Path) -> None:
    model = make()
    before = state_of(model)
    with pytest.raises(FoveateError, match=r"pmod decides by weights that are trained, and the foveate\.safetensors of the model is not"):
        foveate.attach(model, "random:keep=0.5+pmod")
    save_weights({"visionselector": VisionSelector.module(32, LAYERS)}, tmp_path)
    model.config.name_or_path = str(tmp_path)
    with pytest.raises(FoveateError, match="holds weights of visionselector only"):
        foveate.attach(model, "pmod")
    foveate.attach(model, "visionselector").detach()
    assert state_of(model) == before


@pytest.mark.parametrize("sizes", [(16, LAYERS), (32, LAYERS + 1)])
def test_weights_of_another_model_are_refused(sizes: tuple[int, int], tmp_path: Path) -> None:
    model = llava()
    save_weights({"pmod": PMoD.module(*sizes)}, tmp_path)
    model.config.name_or_path = str(tmp_path)
    layers, width = sizes[1], sizes[0]
    says = f"weights of pmod for another model: bias {layers}, weight {layers} x {width}, where this one, of 4 .* 32 values, has .* 4 x 32"
    with pytest.raises(FoveateError, match=says):
        foveate.attach(model, "pmod:untrained=true")
    with pytest.raises(FoveateError, match=says):
        add_weights(model, [PMoD()], saved=saved_weights(tmp_path))
    assert registered(read(model)) is None


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x08" + b"\0" * 7 + b"{}      "])
def test_a_broken_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "foveate.safetensors").write_bytes(content)
    if content.endswith(b"{}      "):  # whole, and empty
        assert saved_weights(tmp_path) == {}
        return
    with pytest.raises(FoveateError, match=r"foveate\.safetensors cannot be read"):
        saved_weights(tmp_path)


def test_weights_are_lent_for_a_while() -> None:
    model = llava()
    with lent_weights(model, parse("pmod")):
        foveate.attach(model, "pmod").detach()
    assert registered(read(model)) is None
    own = add_weights(model, parse("visionselector"))["visionselector"]
    with lent_weights(model, parse(BOTH)):
        assert set(registered(read(model)) or {}) == {"visionselector", "pmod"}
    assert dict((registered(read(model)) or {}).items()) == {"visionselector": own}


def test_they_are_in_the_models_precision_and_mode_and_drawn_by_a_seed() -> None:
    model, drawn = llava(dtype=torch.bfloat16).train(), torch.get_rng_state()
    first = add_weights(model, parse("visionselector"), seed=1)["visionselector"]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert first.training
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}

    def drawn_by(seed: int) -> Tensor:
        found: Tensor = add_weights(llava(), parse("visionselector"), seed=seed)["visionselector"].query.weight  # type: ignore[union-attr, assignment]
        return found

    assert torch.equal(drawn_by(1), drawn_by(1))
    assert not torch.equal(drawn_by(1), drawn_by(2))
