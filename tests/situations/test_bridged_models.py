"""The assembled model with each bridge, at all of its tokens and at fewer: what it counts, keeps, saves and decodes, also in batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate
from foveate.accounting import predict
from foveate.bridges import BRIDGES
from foveate.data.collate import Collator
from foveate.errors import FoveateError
from foveate.inference.asking import ask, prompts
from foveate.model.assembly import from_backbones
from foveate.reducers import parse
from foveate.train.order import Order, ProcessBatches
from foveate.train.run import main
from foveate.train.trainer import FoveateTrainer
from tests.bridges.test_every_bridge import NO_TOKENS, SMALL
from tests.situations.test_tiled_models import inputs, samples
from tests.train.tiny_training import save_backbones, save_samples

FEWER = {"mqt": (4, [4, 7, 1, 9]), "chain_of_sight": (3, [11, 3, 3, 11])}  # for all images; and for each of the samples' four
TOKENS = [kind for kind in BRIDGES if kind not in NO_TOKENS]  # of the others see tests/model/test_vlora.py
MADE = [(kind, None) for kind in TOKENS] + [(kind, few) for kind, (few, _) in FEWER.items()]
both = pytest.mark.parametrize("kind", FEWER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("bridged")
    save_backbones(found)
    return found


def spelled(kind: str) -> dict[str, Any]:
    """The bridge as the other tests have it, with the widths of this tower and its one level, whose halves stand for two towers."""
    own = {"towers": [[1, 16], [1, 16]]} if kind == "mg_gate" else {}
    left = {name: value for name, value in SMALL[kind].items() if name not in ("width", "head_dim", "reads", "towers")}
    return {"kind": kind, **left, **own}


def assembled(folder: Path, kind: str, few: int | None = None, tiling: str | None = None) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, processor = from_backbones(folder / "tower", folder / "lm", spelled(kind), tiling=tiling)
    model.set_view_tokens(few)
    processor.set_view_tokens(few)
    return model, processor


@pytest.fixture(scope="module", params=MADE, ids=lambda given: f"{given[0]}-{given[1] or 'all'}")
def made(request: pytest.FixtureRequest, folder: Path) -> tuple[Any, Any]:
    return assembled(folder, *request.param)


def test_every_bridge_is_here() -> None:
    assert {kind for kind, _ in MADE} == set(BRIDGES) - set(NO_TOKENS)


def test_placeholders_are_what_the_bridge_makes(made: tuple[Any, Any]) -> None:
    model, processor = made
    chosen = samples()
    batch, own = Collator(processor, 999)(chosen), inputs(processor, chosen)
    assert set(own) == set(batch) - {"labels"}
    assert all(torch.equal(own[name], batch[name]) for name in own)
    each = processor.view_tokens or model.model.bridge.tokens((4, 4))
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [each, 2 * each, 0, each]
    with torch.no_grad(), foveate.attach(model, "fastervlm:keep=0.5") as run:
        model(**own)
    assert run.last.ledger(model.config) == predict(model.config, inputs=own, reducers=parse("fastervlm:keep=0.5"))
    few = [] if processor.view_tokens is None else [processor.view_tokens]
    planned = predict(model.config, images=chosen[1].plans, text_tokens=9)
    assert planned.flops["bridge"] == 2 * model.model.bridge.flops((4, 4), *few)


def test_a_sample_is_the_same_alone_and_in_a_batch_and_keeping_all(made: tuple[Any, Any]) -> None:
    model, processor = made
    with torch.no_grad():
        right, left = (model(**inputs(processor, samples(), side)).logits for side in ("right", "left"))
        with foveate.attach(model, "random:keep=1.0"):
            assert torch.equal(model(**inputs(processor, samples())).logits, right)
        for row, one in enumerate(samples()):
            alone = model(**inputs(processor, [one])).logits[0]
            torch.testing.assert_close(right[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(left[row, -len(alone) :], alone, rtol=1e-4, atol=1e-5)


def test_decoding_is_running_it_again(made: tuple[Any, Any]) -> None:
    model, processor = made
    batch = inputs(processor, samples()[:2], "left")
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    for reducer in ("none", "divprune:keep=0.5"):
        with foveate.attach(model, reducer):
            cached = model.generate(**batch, **options)
            if reducer == "none":
                assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
            assert model.generate(**batch, **options, num_beams=2).shape[0] == 2


def test_a_saved_model_is_the_same(made: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = made
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, read = AutoModelForImageTextToText.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    assert (loaded.config.bridge, loaded.config.view_tokens, read.view_tokens) == (model.config.bridge, *(2 * [processor.view_tokens]))
    batch = inputs(read, samples())
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


# ---- a budget for each call --------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("tiling", [None, "internvl:tiles=3"])
def test_a_budget_for_each_call_and_each_image(folder: Path, kind: str, tiling: str | None) -> None:
    """A batch of several budgets is each of its samples alone; a saved budget gives way to a call's."""
    model, processor = assembled(folder, kind, FEWER[kind][0], tiling)
    several, everything = FEWER[kind][1], model.model.bridge.tokens((4, 4))
    batch = inputs(processor, samples(), view_tokens=several)
    assert batch["view_tokens"].tolist() == several
    with torch.no_grad():
        logits, at = model(**batch).logits, 0
        for row, one in enumerate(samples()):
            own = several[at : at + len(one.images)]
            alone = inputs(processor, [one], view_tokens=own) if own else inputs(processor, [one])
            at += len(one.images)
            torch.testing.assert_close(model(**alone).logits[0], logits[row, : alone["input_ids"].shape[1]], rtol=1e-4, atol=1e-5)
        whole = inputs(processor, samples(), view_tokens=everything)
        model.set_view_tokens(None)
        processor.set_view_tokens(None)
        again = inputs(processor, samples())
        assert "view_tokens" not in again
        assert torch.equal(again["input_ids"], whole["input_ids"])
        assert torch.equal(model(**again).logits, model(**whole).logits)
    with foveate.attach(model, "random:keep=0.5") as run:
        model.generate(**batch, max_new_tokens=2, num_beams=2, do_sample=False)
        with torch.no_grad():
            model(**batch)
    assert run.last.ledger(model.config) == predict(model.config, inputs=batch, reducers=parse("random:keep=0.5"))


@both
def test_questions_that_share_an_image_have_the_processors_budget(folder: Path, kind: str) -> None:
    model, processor = assembled(folder, kind, FEWER[kind][0])
    shown = samples()[1].images
    answers = ask(model, processor, shown, [[0], [1, 0]], prompts(processor, ["a", "b"], [1, 2]), 2)
    assert answers.placeholders == [FEWER[kind][0], 2 * FEWER[kind][0]]


def test_what_a_call_cannot_ask_for(folder: Path) -> None:
    model, processor = assembled(folder, "chain_of_sight")
    batch = inputs(processor, samples(), view_tokens=3)
    plain, pooled = assembled(folder, "avg_pool2d")
    for wrong, said in ((4, "makes 3 or 11 tokens"), ([3, 3], "says of 2 images"), (0, "at least 1, not 0"), ([3, 3, 3, 99], "not 99")):
        with pytest.raises(FoveateError, match=said):
            inputs(processor, samples(), view_tokens=wrong)
    for reject in (lambda: inputs(pooled, samples(), view_tokens=2), lambda: plain.set_view_tokens(2), lambda: pooled.set_view_tokens(2)):
        with pytest.raises(FoveateError, match="the avg_pool2d bridge makes 4 tokens of a view of 4 x 4 patches, not 2"):
            reject()
    with pytest.raises(FoveateError, match="the model needs all that the processor says, view_tokens too"):
        model(**{name: value for name, value in batch.items() if name != "view_tokens"})
    with pytest.raises(FoveateError, match="view_tokens says of 3 images"):
        model(**{**batch, "view_tokens": batch["view_tokens"][:3]})
    model.scale_bridge([[8, 3], [4, 2]], 64, keep=["keys"])
    with pytest.raises(FoveateError, match="keeps something of a growth, which another number of view_tokens would lose"):
        model.set_view_tokens(3)


# ---- training ----------------------------------------------------------------------------------------------------------------------------


def recipe(folder: Path, out: Path, kind: str, more: str = "") -> Path:
    path = out / "recipe.yaml"
    save_samples(out, samples())
    path.write_text(f"""
name: t
output: {out}/out
model: {{vision: {folder}/tower, text: {folder}/lm, bridge: {json.dumps(spelled(kind))}}}
log_steps: 1
workers: 0
stages:
  - name: s
    data: {{conversations: {out}/data.json, images: {out}/images}}
    train: {{bridge: true, lm: true}}
    steps: {4 if kind in FEWER else 2}
    batch_size: 2
    learning_rate: 1.0e-2
    max_length: 400
    save_steps: 1
    {more}
""")
    return path


@pytest.mark.parametrize("kind", TOKENS)
def test_training_is_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A run that was stopped comes to the same weights, also where each step draws its number of tokens."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    step, found, seen = FoveateTrainer.training_step, {}, list[int]()
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
        path = recipe(folder, tmp_path / name, kind, "view_tokens: any" if kind in FEWER else "")

        def noting(self: FoveateTrainer, model: Any, batch: Any, *more: Any, stop: bool = name == "stopped") -> torch.Tensor:
            if stop and self.state.global_step == 1:
                raise KeyboardInterrupt
            if not stop and "view_tokens" in batch:
                seen.append(int(batch["view_tokens"].unique()))
            return step(self, model, batch, *more)

        with monkeypatch.context() as patch:
            patch.setattr(FoveateTrainer, "training_step", noting)
            if name == "stopped":
                with pytest.raises(KeyboardInterrupt):
                    main(path)
            else:
                main(path)
        if name == "stopped":
            main(path)
        found[name] = AutoModelForImageTextToText.from_pretrained(tmp_path / name / "out" / "final").state_dict()
    assert all(torch.equal(found["stopped"][name], tensor) for name, tensor in found["straight"].items())
    assert (len(set(seen)) > 1) == (kind in FEWER)


def test_one_draw_a_step_is_a_function_of_seed_and_step() -> None:
    order = Order(24, 4, 7, "s", budgets=range(1, 257))
    parts = [list(ProcessBatches(order, 30, process, 2, 2)) for process in (0, 1)]
    drawn = [{each for part in parts for micro in part[2 * step : 2 * step + 2] for _, each in micro} for step in range(30)]  # type: ignore[misc]
    assert all(found == {order.view_tokens(step)} for step, found in enumerate(drawn))
    again, other = Order(24, 4, 7, "s", budgets=range(1, 257)), Order(24, 4, 8, "s", budgets=range(1, 257))
    assert [again.view_tokens(step) for step in range(30)] == [order.view_tokens(step) for step in range(30)]
    assert [other.view_tokens(step) for step in range(30)] != [order.view_tokens(step) for step in range(30)]
    counts = torch.bincount(torch.tensor([Order(1, 1, 0, "s", budgets=[3, 5]).view_tokens(step) for step in range(2000)]))
    assert counts.nonzero()[:, 0].tolist() == [3, 5]
    assert abs(int(counts[3]) - 1000) < 100
    assert Order(24, 4, 7, "s").view_tokens(0) is None


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("avg_pool2d", "view_tokens: any", "view_tokens: any draws of several numbers, but the avg_pool2d bridge makes 4 of every view"),
        ("avg_pool2d", "view_tokens: 3", "the avg_pool2d bridge makes 4 tokens of a view of 4 x 4 patches, not 3"),
        ("chain_of_sight", "view_tokens: [3, 8]", "makes 3 or 11 tokens of a view of 4 x 4 patches, not 8"),
        ("mqt", "view_tokens: few", "a number of visual tokens of each view; a list of them, or any"),
        ("mqt", "view_tokens: [1, 0]", "a number of visual tokens of each view; a list of them, or any"),
    ],
)
def test_what_a_stage_cannot_ask_for(folder: Path, tmp_path: Path, kind: str, more: str, said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        main(recipe(folder, tmp_path, kind, more))
