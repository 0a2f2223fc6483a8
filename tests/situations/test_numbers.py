"""Numbers that are none stop a run and leave what was good; numbers that cannot be counted do not."""

import json
from pathlib import Path

import pytest
import torch

from foveate.errors import FoveateError
from foveate.train import account, files
from foveate.train.recipe import load_recipe
from foveate.train.run import main
from foveate.train.trainer import FoveateTrainer
from tests.situations.runs import Change, model, prepare, recipe, rows, same, stage, stages

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("numbers"))


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, what: str) -> None:
    """Makes the loss or the gradients of an optimiser step infinite, or the weights after it NaN."""
    loss_of = FoveateTrainer.compute_loss

    def compute_loss(self: FoveateTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        loss: torch.Tensor = loss_of(self, *args, **kwargs)  # type: ignore[arg-type]
        if self.state.global_step + 1 < step:
            return loss
        if what == "loss":
            return loss * torch.inf
        bridge = next(self.model.model.bridge.parameters())
        if what == "gradients":
            bridge.register_hook(lambda gradient: gradient * torch.nan)
        else:
            self.optimizer.optimizer.register_step_post_hook(lambda *rest: bridge.data.fill_(torch.nan))
        return loss

    monkeypatch.setattr(FoveateTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize(
    ("what", "step", "message"),
    [
        ("loss", 3, r"stage one, step 3: the loss is inf \(samples s\d+, s\d+\)"),
        ("loss", 1, r"stage one, step 1: the loss is inf \(samples s\d+, s\d+\)"),
        ("gradients", 3, r"stage one, step 3: the gradients are not finite \(samples s\d+, s\d+, s\d+, s\d+\)"),
        ("weights", 2, r"stage one, step 2: .*bridge.* holds numbers that are not finite. No checkpoint"),
        ("weights", 3, r"stage one: after its last step .*bridge.* not finite. Nothing was saved"),
    ],
)
def test_a_run_whose_numbers_are_none_stops(root: Path, monkeypatch: pytest.MonkeyPatch, what: str, step: int, message: str) -> None:
    name = f"{what}-{step}"
    path = recipe(root, name, stages(1), stage(0, micro_batch=2, save_steps=1))
    with monkeypatch.context() as patch:
        spoil(patch, step, what)
        with pytest.raises(FoveateError, match=message):
            main(path)
    output = root / name
    assert not files.is_complete(output / "final")
    assert not files.is_complete(output / "0-one" / "model")
    newest = files.newest(output / "0-one")
    assert (None if newest is None else newest.name) == (None if step == 1 else f"checkpoint-{min(step, 3) - 1}")
    if (what, step) not in (("loss", 3), ("weights", 2)):
        return
    whole = root / "whole"
    if not whole.exists():
        main(recipe(root, "whole", stages(1), stage(0, micro_batch=2, save_steps=1)))
    main(path)  # the good checkpoint is gone on with, and the run becomes what it would have been
    assert same(output, whole)


def test_without_clipping_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 2, "gradients")
    with pytest.raises(FoveateError, match="step 2: the gradients are not finite"):
        main(recipe(root, "unclipped", stages(1), stage(0, max_grad_norm=0.0)))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_float16_weights_are_refused_with_a_reason(root: Path, precision: str) -> None:
    with pytest.raises(FoveateError, match=r"model\.dtype: 'float16': weights in float16 cannot be trained: .*dtype: bfloat16"):
        load_recipe(recipe(root, "float16", model(dtype="float16"), stage(0, precision=precision)))


# ---- FLOPs that cannot be counted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [TypeError("'<' not supported"), RuntimeError("no meta"), FoveateError("cannot read the cost")])
def test_flops_that_cannot_be_counted_cost_a_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def predict(*args: object, **kwargs: object) -> None:
        raise error

    name = f"uncounted-{type(error).__name__}"
    path = recipe(root, name, stages(1))
    with monkeypatch.context() as patch:
        patch.setattr(account, "predict", predict)
        main(path)
    assert [record.getMessage() for record in caplog.records if "FLOPs" in record.getMessage()] == [
        f"FLOPs are not logged, they cannot be counted for this model: {error}"
    ]
    assert [row["step"] for row in rows(root / name)] == [1, 2, 3]
    assert not any("flops" in row for row in rows(root / name))
    assert json.loads((root / name / "final" / "totals.json").read_text())["flops"] is None


# ---- a rate for each part, and a validation set --------------------------------------------------------------------------------------

ALL = {"bridge": True, "lm": True, "tower": True}
HELD = {"limit": 5, "every": 2}


def held(root: Path) -> Change:
    data = {"conversations": str(root / "data.json"), "images": str(root / "images")}
    return stage(0, validation={**data, **HELD})


def test_equal_rates_by_part_are_one_rate(root: Path) -> None:
    one = main(recipe(root, "one-rate", stages(1), stage(0, train=ALL)))
    by_part = main(recipe(root, "by-part", stages(1), stage(0, train=ALL, learning_rate=dict.fromkeys(ALL, 1e-2))))
    log = rows(by_part.parent)
    assert [row["loss"] for row in log] == [row["loss"] for row in rows(one.parent)]
    assert [row["learning_rate"] for row in log] == [dict.fromkeys(ALL, row["learning_rate"]) for row in rows(one.parent)]


def test_a_rate_is_that_of_its_part(root: Path) -> None:
    """The first step of Adam moves each weight by its rate, as far as it has a gradient."""
    from safetensors.torch import load_file

    from foveate.train.opening import open_model

    rates = {"bridge": 1e-2, "tower": 1e-4, "lm": 1e-3}
    path = recipe(root, "rates", stages(1), stage(0, train=ALL, learning_rate=rates, steps=1))
    begin = open_model(load_recipe(path), 0, None).model.state_dict()
    end = load_file(main(path) / "model.safetensors")
    for part, name in {"bridge": ".bridge.", "tower": ".vision_tower.", "lm": ".causal_lm."}.items():
        moved = max(float((end[key] - begin[key]).abs().max()) for key in end if name in key)
        assert moved == pytest.approx(rates[part], rel=1e-2)
    assert rows(root / "rates")[0]["learning_rate"] == rates


def test_validation_is_logged_and_changes_nothing(root: Path) -> None:
    plain = main(recipe(root, "plain", stages(1), stage(0, steps=5)))
    path = recipe(root, "validated", stages(1), stage(0, steps=5), held(root))
    found = rows(main(path).parent)
    assert [row["step"] for row in found if "validation_loss" in row] == [2, 4, 5]
    assert [{k: v for k, v in row.items() if k != "validation_loss"} for row in found] == rows(plain.parent)


def test_validation_is_the_loss_of_its_samples(root: Path) -> None:
    """The same by hand: every supervised token of the samples that are held back, with the finished model."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from foveate.data.collate import Collator
    from foveate.data.conversations import Conversations

    final = main(recipe(root, "by-hand", stages(1), stage(0, train=ALL, micro_batch=2), held(root)))
    trained = AutoModelForImageTextToText.from_pretrained(final).eval()
    collate = Collator(AutoProcessor.from_pretrained(final), 2048)
    total = count = 0.0
    trained.requires_grad_(False)
    samples = Conversations.open(root / "data.json", root / "images", limit=5)
    for index in range(len(samples)):
        batch = collate([samples[index]])
        tokens = int((batch["labels"][:, 1:] >= 0).sum())
        total, count = total + float(trained(**batch).loss) * tokens, count + tokens
    assert rows(root / "by-hand")[-1]["validation_loss"] == pytest.approx(total / count, rel=1e-5)


def test_resumed_with_rates_and_validation(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"bridge": 1e-2, "lm": 1e-3}
    changes = stages(1), stage(0, train={"bridge": True, "lm": True}, learning_rate=rates, steps=5, save_steps=2), held(root)
    whole = main(recipe(root, "whole-rates", *changes))
    step, path = FoveateTrainer.training_step, recipe(root, "stopped-rates", *changes)

    def stopping(self: FoveateTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(FoveateTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            main(path)
    assert same(main(path).parent, whole.parent)
