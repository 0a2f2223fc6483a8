"""`micro_batch: auto`: what fits is taken, the same when a run goes on, and the losses are those of any other division."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st
from tests.train.test_run import ONE, Write

from foveate.accounting import predict
from foveate.data.collate import Collator
from foveate.data.conversations import Conversations
from foveate.errors import FoveateError
from foveate.train import micro_batch
from foveate.train.loading import Loading
from foveate.train.micro_batch import candidates, head_of, longest_of, most_logits, per_sample, runs, wordiest_of
from foveate.train.mixture import Mixture, Part
from foveate.train.opening import Opened, open_model
from foveate.train.recipe import load_recipe
from foveate.train.run import main
from foveate.train.supervised import SupervisedRows

AUTO = ["stages.0.micro_batch=auto", "stages.0.batch_size=8"]


def decided(final: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((final.parent / "0-only" / "micro-batch.json").read_text())
    return found


def losses(final: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (final.parent / "log.jsonl").read_text().splitlines()]


def mixture(root: Path, images: Path | None = None) -> Mixture:
    return Mixture([Part("data", Conversations.open(root / "data.json", images or root / "images"), "stop", None)])


def loaded(opened: Opened, root: Path, items: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = Loading(mixture(root), Collator(opened.processor, 2048), "stop", root / "skipped")(items)
    return found


def estimate(opened: Opened, root: Path, recipe: Path, overrides: list[str], *items: list[int]) -> float:
    """What a sample takes by the first of the batches, with as many logits as one of any of them gets."""
    stage, batches = load_recipe(recipe, overrides).stages[0], [loaded(opened, root, own) for own in items]
    found = per_sample(stage, opened, batches[0], most_logits(head_of(stage, opened), batches))
    assert found is not None
    return found


def supervised(batch: dict[str, Any]) -> list[int]:
    """Tokens of each sample whose next one is supervised."""
    counts: list[int] = (batch["labels"][:, 1:] >= 0).sum(1).tolist()
    return counts


@given(samples=st.integers(1, 4096))
def test_candidates_divide_and_end_with_one(samples: int) -> None:
    found = candidates(samples)
    assert (found[0], found[-1]) == (samples, 1)
    assert all(samples % micro == 0 for micro in found)
    assert all(one == 2 * other for one, other in pairwise(found) if other > 1 or samples & (samples - 1) == 0)


def test_what_fits_is_taken_and_losses_are_the_same(
    recipe_file: Write, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = [f"model.text={root}/lm-plain"]
    recipe = recipe_file("auto-estimate", ONE)
    opened = open_model(load_recipe(recipe, plain), 0, None)
    longest = longest_of(mixture(root), 8, 10)
    sample = estimate(opened, root, recipe, [*plain, *AUTO], longest, wordiest_of(mixture(root), 8))
    beside = 3 * sum(4 * parameter.numel() for parameter in opened.model.parameters() if parameter.requires_grad)
    given_ = losses(main(recipe_file("auto-given", ONE), [*plain, "stages.0.batch_size=8"]))
    for room, micro in ((8.01, 8), (7.99, 4), (2.5, 2), (0.5, 1)):
        free = math.ceil((room * sample + beside) / micro_batch.PART)
        monkeypatch.setattr(micro_batch, "free_memory", lambda device, free=free: free)
        final = main(recipe_file(f"auto-{micro}", ONE), [*plain, *AUTO])
        assert (decided(final)["micro_batch"], decided(final)["samples"]) == (micro, 8)
        assert losses(final) == pytest.approx(given_, abs=1e-5)
        assert f"stage only: micro_batch {micro} of 8 samples: a sample takes about" in capfd.readouterr().err


def test_a_run_that_goes_on_divides_as_before(recipe_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    from foveate.train.trainer import FoveateTrainer

    more = [*AUTO, "stages.0.save_steps=1"]
    monkeypatch.setattr(micro_batch, "free_memory", lambda device: 0)
    whole, recipe, step = main(recipe_file("auto-whole", ONE), more), recipe_file("auto-stopped", ONE), FoveateTrainer.training_step

    def stopping(self: FoveateTrainer, *args: Any) -> Any:
        if self.state.global_step == 2:
            raise Stopped
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FoveateTrainer, "training_step", stopping)
        with pytest.raises(Stopped):
            main(recipe, more)
    monkeypatch.setattr(micro_batch, "free_memory", lambda device: 2**50)
    again = main(recipe, more)
    assert decided(again)["micro_batch"] == decided(whole)["micro_batch"] == 1
    assert losses(again) == losses(whole)


# ---- the estimate -----------------------------------------------------------------------------------------------------------------------


def test_the_estimate_by_hand(recipe_file: Write, root: Path) -> None:
    """Decoder layers by the ledger, and three times the logits in float32: of supervised tokens, or of all where the model needs them."""
    recipe = recipe_file("by-hand", ONE)
    opened = open_model(load_recipe(recipe), 0, None)
    batch = loaded(opened, root, [0])
    length, config = batch["input_ids"].shape[1], opened.model.config
    (plan,) = batch["plans"][0]
    ledger = predict(config, images=(plan,), text_tokens=length - plan.tokens, mode="train", dtype_bytes=4)
    assert 0 < sum(supervised(batch)) < length - plan.tokens
    each = 3 * 4 * config.text_config.vocab_size
    logits = sum(supervised(batch)) * each
    assert estimate(opened, root, recipe, [], [0]) == sum(ledger.activation_bytes) + logits
    assert most_logits(SupervisedRows(None), [batch]) == length
    checkpointed = 4 * 2 * length * 32 + max(ledger.activation_bytes) + logits
    assert estimate(opened, root, recipe, ["stages.0.gradient_checkpointing=true"], [0]) == checkpointed


def test_fewer_tokens_and_halves_take_less_and_a_tower_more(recipe_file: Write, root: Path) -> None:
    recipe = recipe_file("less", ONE)
    opened = open_model(load_recipe(recipe), 0, None)
    whole = estimate(opened, root, recipe, [], [0])
    pooled = "stages.0.reducers=[{share: 1/2, reducer: 'uniform:keep=0.1'}, {share: 1/2, reducer: 'uniform:keep=0.5'}]"
    half = "stages.0.reducers=[{share: 1, reducer: 'uniform:keep=0.5'}]"
    assert estimate(opened, root, recipe, [pooled], [0]) == estimate(opened, root, recipe, [half], [0]) < whole
    assert estimate(opened, root, recipe, ["stages.0.precision=bf16"], [0]) < whole
    assert estimate(opened, root, recipe, ["stages.0.train={tower: true}"], [0]) > whole


def test_images_make_samples_long(root: Path) -> None:
    """Those with two images stand in front, and come again where there are too few."""
    data = mixture(root)
    found = longest_of(data, 4, 1000)
    assert [len(data.pictures(item)) for item in found] == [2, 2, 2, 2]
    assert [len(data.pictures(item)) for item in longest_of(data, 5, 1000)][-1] == 1
    assert len(longest_of(data, 60, 1000)) == 60


def test_what_gets_logits_is_told_by_those_with_most_text(
    recipe_file: Write, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where images make others longer."""
    turns = [("<image>\n<image>\nWhat?", "No."), ("And?", "yes" * 14)]
    rows = [{"id": said, "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": said}]} for ask, said in turns]
    (tmp_path / "data.json").write_text(json.dumps([{**rows[0], "image": ["5-0.png", "5-1.png"]}, rows[1]]))
    recipe = load_recipe(recipe_file("wordy", ONE), AUTO)
    opened, data = open_model(recipe, 0, None), mixture(tmp_path, root / "images")
    assert (longest_of(data, 1, 10), wordiest_of(data, 1), wordiest_of(data, 3)) == ([0], [1], [1, 0, 1])
    seen = []

    def noted(stage: Any, opened: Any, batch: Any, logits: int) -> float:
        seen.append(logits)
        return 1.0

    monkeypatch.setattr(micro_batch, "per_sample", noted)
    micro_batch.decide(recipe, recipe.stages[0], data, opened, None, 1, PartialState())
    assert seen == [43]  # letters, and the end of the answer


# ---- the trial --------------------------------------------------------------------------------------------------------------------------


def test_the_trial_halves_where_memory_runs_out(recipe_file: Write, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a step of more than two samples runs out of memory."""
    recipe = load_recipe(recipe_file("trial", ONE), AUTO)
    opened = open_model(recipe, 0, None)
    tried = []

    def tiny(stage: Any, model: Any, batch: dict[str, Any], device: torch.device, rows: SupervisedRows) -> bool:
        tried.append(len(batch["input_ids"]))
        forward = model.forward

        def full(**inputs: Any) -> Any:
            if len(inputs["input_ids"]) > 2:
                raise torch.OutOfMemoryError
            return forward(**inputs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "forward", full)
            return runs(stage, model, batch, torch.device("cpu"), rows)

    before, random = {name: value.clone() for name, value in opened.model.state_dict().items()}, torch.get_rng_state()
    monkeypatch.setattr(micro_batch, "runs", tiny)
    monkeypatch.setattr(micro_batch, "free_memory", lambda device: 2**50)
    monkeypatch.setattr(micro_batch, "tries", lambda device: True)
    found = micro_batch.decide(recipe, recipe.stages[0], mixture(root), opened, None, 8, PartialState())
    assert (found.micro_batch, tried) == (2, [8, 4, 2, 2])  # the longest, and those with most text
    assert "a step was tried" in found.reason
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in opened.model.state_dict().items())
    assert all(parameter.grad is None for parameter in opened.model.parameters())
    monkeypatch.setattr(micro_batch, "runs", lambda *args: False)
    with pytest.raises(FoveateError, match="not even one sample fits into a step: a sample takes about"):
        micro_batch.decide(recipe, recipe.stages[0], mixture(root), opened, None, 8, PartialState())


def test_the_trial_computes_the_logits_that_a_step_computes(recipe_file: Write, root: Path) -> None:
    stage = load_recipe(recipe_file("trial-rows", ONE)).stages[0]
    opened = open_model(load_recipe(recipe_file("trial-rows", ONE)), 0, None)
    batch, seen = loaded(opened, root, [0, 1, 2]), list[int]()
    rows = head_of(stage, opened)
    hook = opened.model.get_output_embeddings().register_forward_hook(lambda *given: seen.append(given[2].shape[:2].numel()))
    assert runs(stage, opened.model, batch, torch.device("cpu"), rows)
    assert runs(stage, opened.model, batch, torch.device("cpu"), SupervisedRows(None))
    hook.remove()
    assert seen == [sum(supervised(batch)), batch["labels"].numel()]


@pytest.mark.parametrize("wrong", ["0", "-1", "most", "1.5", "true"])
def test_other_values_are_refused(recipe_file: Write, wrong: str) -> None:
    with pytest.raises(FoveateError, match=r"stages\.0\.micro_batch: .*a number of samples above 0, or auto"):
        load_recipe(recipe_file("wrong", ONE), [f"stages.0.micro_batch={wrong}"])
