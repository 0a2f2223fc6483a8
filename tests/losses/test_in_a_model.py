"""A step's passes in a model, against the same made one by one on copies of it; gradients arrive in the student's graph alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.losses import Seen, Whole, parse_loss
from foveate.train.passes import ANSWERS, Passes
from tests.tiny import MODELS, ROWS, Batch, llava

ATTACHED = "dart:keep=0.5,layer=1"
KINDS = {
    "epic": (["epic"], 7),
    "slow": (["dualspeed:slow=1"], 0),
    "fast": (["dualspeed:slow=0"], 0),
    "kd": (["mdist", "rdist"], 0),
    "nested": (["matryoshka:budgets=1/0.5/0.25", "mdist"], 0),
}


def given(batch: Batch) -> dict[str, Any]:
    return {**batch.inputs, "labels": batch.labels(), "use_cache": False}


def step_of(losses: list[str], number: int) -> Passes:
    return Passes([parse_loss(loss) for loss in losses], [0.5 + i for i in range(len(losses))], seed=5, steps=10, samples=len(ROWS))


def run_step(model: nn.Module, passes: Passes, number: int, inputs: dict[str, Any], attached: str = ATTACHED) -> dict[str, Tensor]:
    tokens = int((inputs["labels"][:, 1:] != -100).sum())

    def forward() -> tuple[Tensor, Any]:
        outputs = model(**inputs, num_items_in_batch=tokens)
        return outputs.loss, outputs

    with foveate.attach(model, attached) as run:
        found = passes.terms(passes.plan(number, attached), run, attached, model, passes.whole(inputs["labels"], tokens, 1), forward)
        sum(found.values()).backward()  # type: ignore[union-attr]
    return found


def plainly(model: nn.Module, passes: Passes, number: int, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Each pass under an attachment of its own, the teachers' on a copy of the model."""
    tokens = int((inputs["labels"][:, 1:] != -100).sum())
    plan = passes.plan(number, ATTACHED)

    def one(of: nn.Module, reducers: str) -> tuple[Tensor, Seen]:
        with foveate.attach(of, reducers) as run:
            outputs = of(**inputs, num_items_in_batch=tokens)
            return outputs.loss, Seen(outputs.logits, run.last.left if run.last.maps else None)

    with torch.no_grad():
        teachers = {teacher: one(copy.deepcopy(model).eval(), teacher)[1] for teacher in plan.teachers}
    terms: dict[str, Any] = {}
    for student in plan.students:
        loss, seen = one(model, student)
        terms[ANSWERS] = terms.get(ANSWERS, 0.0) + plan.answers * loss
        for i, of, teacher in plan.pairs:
            if of == student:
                name = passes.losses[i].name
                part = passes.losses[i].between(seen, teachers[teacher], Whole(inputs["labels"], tokens, passes.samples))
                terms[name] = terms.get(name, 0.0) + passes.weights[i] * part
    sum(terms.values()).backward()
    return terms


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_is_its_passes_one_by_one(name: str, kind: str, checkpointing: bool) -> None:
    losses, number = KINDS[kind]
    passes = step_of(losses, number)
    model, other = MODELS[name]().train(), MODELS[name]().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = given(Batch(ROWS))
    found, expected = run_step(model, passes, number, inputs), plainly(other, passes, number, inputs)
    assert found.keys() == expected.keys()
    for term in found:
        assert torch.equal(found[term], expected[term])
    grads = [{key: p.grad for key, p in one.named_parameters() if p.grad is not None} for one in (model, other)]
    assert grads[0].keys() == grads[1].keys()
    for key, value in grads[0].items():
        torch.testing.assert_close(value, grads[1][key], rtol=0, atol=0)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["epic", "slow", "kd"])
def test_the_teacher_gets_no_gradient_and_draws_nothing(kind: str) -> None:
    """Where the student's part is taken out of the graph, nothing that is trained moves; and dropout does not run in the teacher."""
    losses, number = KINDS[kind]
    passes, model, inputs = step_of(losses, number), llava().train(), given(Batch(ROWS))
    seen: list[tuple[bool, bool, bool]] = []
    hook = model.model.language_model.register_forward_hook(
        lambda module, args, output: seen.append((module.training, torch.is_grad_enabled(), output[0].requires_grad))
    )
    state = torch.random.get_rng_state()
    found = run_step(model, passes, number, inputs)
    hook.remove()
    assert seen == [(False, False, False), (True, True, True)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(found) == {ANSWERS, *(loss.split(":")[0] for loss in losses)}


def test_without_images_there_is_nothing_visual_to_compare() -> None:
    model, batch = llava().train(), Batch([ROWS[2]])
    inputs = {key: value for key, value in given(batch).items() if key != "pixel_values"}
    found = run_step(model, step_of(["mdist", "rdist"], 0), 0, inputs)
    assert float(found["mdist"].detach()) == pytest.approx(0, abs=1e-6)
    assert float(found["rdist"].detach()) == 0


def test_dualspeed_that_is_never_slow_is_plain_training_to_the_bit() -> None:
    model, plain, inputs = llava().train(), llava().train(), given(Batch(ROWS))
    found = run_step(model, step_of(["dualspeed:slow=0"], 0), 0, inputs)
    with foveate.attach(plain, ATTACHED):
        loss = plain(**inputs, num_items_in_batch=int((inputs["labels"][:, 1:] != -100).sum())).loss
    loss.backward()
    assert torch.equal(found[ANSWERS], loss)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


def test_under_lora() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)
    model = peft.inject_adapter_in_model(config, llava()).train()
    found = run_step(model, step_of(["mdist"], 0), 0, given(Batch(ROWS)))
    assert float(found["mdist"].detach()) > 0
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name and "language_model" in name)
