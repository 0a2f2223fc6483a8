"""Other reducers than those attached, or none, for the calls inside of a `with` block: in one thread, one step, one backward pass."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import foveate
from foveate.engine.run import MOST
from foveate.errors import FoveateError
from tests.tiny import MODELS, ROWS, Batch, assembled, llava

KINDS = [  # in the language model by attention, in front of it by states, pooled, by the tower's scores, in the tower, around a layer
    "fastv:keep=0.5,layer=2",
    "divprune:keep=0.5",
    "vcc:layer=1,stride=4",
    "fastervlm:keep=0.5",
    "tome:keep=0.5,site=tower,blocks=1",
    "random:keep=0.5",
]
OTHER = {"fastv:keep=0.5,layer=2": "fastv:keep=0.2,layer=2", "fastervlm:keep=0.5": "fastervlm:keep=0.2"}  # of the same watched layer


def logits(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch.inputs).logits
    return found


def alone(model: Any, reducers: str, batch: Batch) -> Tensor:
    with foveate.attach(model, reducers):
        return logits(model, batch)


@pytest.mark.parametrize("inner", [*KINDS, "none"])
@pytest.mark.parametrize("outer", [*KINDS, "none"])
def test_each_call_is_as_if_its_reducers_alone_were_attached(outer: str, inner: str) -> None:
    model, batch = llava(), Batch(ROWS)
    inner = OTHER.get(inner, inner) if inner == outer else inner
    bare, first, second = logits(model, batch), alone(model, outer, batch), alone(model, inner, batch)
    with foveate.attach(model, outer) as run:
        for _ in range(2):
            assert torch.equal(logits(model, batch), first)
            seen = run.last
            with run.suspended():
                assert torch.equal(logits(model, batch), bare)
                assert run.last is seen
                with run.instead(inner):
                    assert torch.equal(logits(model, batch), second)
                    assert run.last is not seen
                    maps = run.maps
                    with run.suspended():
                        assert torch.equal(logits(model, batch), bare)
                    assert torch.equal(logits(model, batch), second)
                assert torch.equal(logits(model, batch), bare)
    assert torch.equal(logits(model, batch), bare)
    with foveate.attach(model, maps=maps):
        torch.testing.assert_close(logits(model, batch), second)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_more_sets_of_reducers_than_stay_wired(name: str) -> None:
    model, batch = MODELS[name](), Batch(ROWS)
    spelled = [f"fastv:keep={keep},layer=2" for keep in range(1, MOST + 4)]
    wanted = [alone(model, one, batch) for one in spelled]
    with foveate.attach(model, "none") as run:
        for one, expected in zip(spelled * 2, wanted * 2, strict=True):
            with run.instead(one):
                assert torch.equal(logits(model, batch), expected)
        assert len(run._others) <= MOST


@pytest.mark.parametrize("make", [llava, assembled])
def test_nothing_stays_on_the_model(make: Any) -> None:
    model, batch = make(), Batch(ROWS)
    logits(model, batch)  # the library hangs hooks of its own on a model at its first call

    def state() -> list[Any]:
        return [
            (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)), type(getattr(m, "config", None))) for m in model.modules()
        ]

    before = state()
    with foveate.attach(model, "fastv:keep=0.5,layer=2") as run:
        for one in ("fastv:keep=0.3,layer=2", "fastervlm:keep=0.5", "dart:keep=0.5,layer=2", "tome:keep=0.5"):
            with run.instead(one):
                logits(model, batch)
    assert before == state()
    with pytest.raises(FoveateError, match="detached"), run.instead("none"):
        pass


def test_what_cannot_be_is_refused_and_leaves_all_as_it_was() -> None:
    model, batch = llava(), Batch(ROWS)
    with foveate.attach(model, "random:keep=0.5") as run:
        wanted = logits(model, batch)
        for bad, why in (("fastv:layer=99", "no decoder layer 99"), ("downsample:keep=0.5", "acts on the images"), ("nothing", "unknown")):
            with pytest.raises(FoveateError, match=why), run.instead(bad):
                raise AssertionError("unreachable")
        with pytest.raises(KeyError), run.instead("fastv:keep=0.5,layer=2"):
            raise KeyError
        with pytest.raises(KeyError), run.suspended():
            raise KeyError
        assert torch.equal(logits(model, batch), wanted)


def test_an_exception_inside_of_a_layer_ends_with_its_block() -> None:
    model, batch = llava(), Batch(ROWS)
    bare = logits(model, batch)
    with foveate.attach(model, "random:keep=0.5") as run:
        wanted = logits(model, batch)

        def stop(*_: Any) -> None:
            raise KeyError

        hook = model.model.language_model.layers[2].register_forward_pre_hook(stop)
        for block in (run.suspended(), run.instead("fastv:keep=0.5,layer=2")):
            with pytest.raises(KeyError), block:
                logits(model, batch)
        hook.remove()
        with run.suspended():
            assert torch.equal(logits(model, batch), bare)
        assert torch.equal(logits(model, batch), wanted)


def test_each_thread_has_its_own() -> None:
    """Every thread stands in another block at the same time, call by call."""
    model, batch = llava(), Batch(ROWS)
    spelled = ["fastv:keep=0.5,layer=2", "random:keep=0.25", "none"]
    wanted = [alone(model, one, batch) for one in spelled]
    wrong: list[str] = []
    barrier = threading.Barrier(len(spelled) + 1)

    def work(number: int) -> None:
        try:
            with run.instead(spelled[number]):
                for _ in range(4):
                    barrier.wait(60)
                    if not torch.equal(logits(model, batch), wanted[number]):
                        wrong.append(spelled[number])
        except BaseException as error:
            wrong.append(repr(error))
            barrier.abort()

    with foveate.attach(model, "vcc:layer=1,stride=4") as run:
        attached = logits(model, batch)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(spelled))]
        for thread in threads:
            thread.start()
        for _ in range(4):
            barrier.wait(60)
            assert torch.equal(logits(model, batch), attached)
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("student", ["fastv:keep=0.5,layer=2", "vcc:layer=1,stride=4", "fastervlm:keep=0.5"])
def test_recomputation_in_the_backward_pass_sees_the_students_reducer(student: str, reentrant: bool) -> None:
    """The teacher's passes stand before and after the student's, and the backward pass comes when the student's block has been left."""
    grads = []
    for checkpointing in (False, True):
        model, batch = llava().train(), Batch(ROWS)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.get_input_embeddings().weight.requires_grad_(True)
        given: dict[str, Any] = {**batch.inputs, "labels": batch.labels(), "use_cache": False}
        with foveate.attach(model, "random:keep=0.25") as run:
            with run.suspended(), torch.no_grad():
                model(**given)
            with run.instead(student):
                loss = model(**given).loss
            with run.instead(OTHER.get(student, "fastv:keep=0.2,layer=2")), torch.no_grad():
                model(**given)
            loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()})
    assert grads[0].keys() == grads[1].keys()
    for name, value in grads[0].items():
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if reentrant else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(value, grads[1][name], **tolerance)
    reference = llava().train()
    batch = Batch(ROWS)
    with foveate.attach(reference, student):
        reference(**batch.inputs, labels=batch.labels(), use_cache=False).loss.backward()
    for name, p in reference.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[0][name], p.grad, rtol=0, atol=0)


def test_under_peft() -> None:
    peft = pytest.importorskip("peft")
    batch, config = Batch(ROWS), peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(llava(), config)
    bare, second = logits(model, batch), alone(model, "fastv:keep=0.5,layer=2", batch)
    with foveate.attach(model, "random:keep=0.5") as run:
        with run.instead("fastv:keep=0.5,layer=2"):
            assert torch.equal(logits(model, batch), second)
        with run.suspended():
            assert torch.equal(logits(model, batch), bare)


def test_copies_go_on_by_themselves() -> None:
    model, batch = llava(), Batch(ROWS)
    wanted = alone(model, "random:keep=0.5", batch)
    with foveate.attach(model, "random:keep=0.5") as run:
        with run.instead("fastv:keep=0.5,layer=2"):
            logits(model, batch)
            other = copy.deepcopy(model)
        assert torch.equal(logits(other, batch), wanted)
        with run.suspended():
            assert torch.equal(logits(other, batch), wanted)


def test_generation_inside_of_a_block() -> None:
    model, batch = llava(), Batch([ROWS[1]])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    bare = model.generate(**batch.inputs, **options)
    with foveate.attach(model, "fastv:keep=0.2,layer=1"):
        cut = model.generate(**batch.inputs, **options)
    with foveate.attach(model, "random:keep=0.1") as run:
        with run.suspended():
            assert torch.equal(model.generate(**batch.inputs, **options), bare)
        with run.instead("fastv:keep=0.2,layer=1"):
            assert torch.equal(model.generate(**batch.inputs, **options), cut)


def test_a_layer_that_is_watched_twice_is_told_to_each_of_the_two() -> None:
    """Two probes on one layer, one armed at a time: neither sees the other's calls, and the backend runs once."""
    model, batch = llava(), Batch(ROWS)
    calls = []
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counting(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(module.layer_idx if hasattr(module, "layer_idx") else None)
        return plain(module, *args, **kwargs)

    with foveate.attach(model, "fastv:keep=0.5,layer=2") as run, run.instead("fastv:keep=0.2,layer=2"):
        logits(model, batch)
        ALL_ATTENTION_FUNCTIONS.register("sdpa", counting)
        try:
            logits(model, batch)
        finally:
            ALL_ATTENTION_FUNCTIONS.register("sdpa", plain)
    assert [call for call in calls if call is not None].count(1) == 1
