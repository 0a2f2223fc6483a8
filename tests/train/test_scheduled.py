"""The callback for anybody's Trainer: each step under its reducer, to the last bit, and the model as it was when training is over."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.situations.models import MODELS, inputs
from tests.tiny import IMAGE, llava, prompt
from tests.train.processes import ROOT, in_two
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedConfig, Trainer, TrainerCallback, TrainingArguments

import foveate
from foveate.contract import BeforeLM, Cut, View, Workload
from foveate.engine.run import RUN
from foveate.errors import FoveateError
from foveate.reducers import VCC, Reducer, parse, spell
from foveate.tokens import TokenMap

STEPS = 6
LLAVOLTA: list[Any] = [("1/3", "vcc:layer=1,stride=8"), {"share": "1/3", "cycle": ["none", "fastv:keep=0.25,layer=2"]}, ("1/3", None)]
WRITTEN = ["vcc:layer=1,stride=8", "vcc:layer=1,stride=8", "none", "fastv:keep=0.25,layer=2", "none", "none"]  # of LLAVOLTA's six steps
NAMES = [spell(parse(name)) for name in WRITTEN]  # without 8 and 2, which are the defaults
SAVING: dict[str, Any] = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1}
Items = list[tuple[int, list[int]]]


def samples(count: int) -> Items:
    """Prompts of one image each and an answer of three tokens; no two alike."""
    return [(number, prompt(1, [1 + number % 7, 2, 3 + number % 5, 4, 5])) for number in range(count)]


@dataclass
class Collate:
    """Samples with the pixels of their number, and labels on the last three tokens."""

    name: str

    def __call__(self, items: Items) -> dict[str, Tensor]:
        found = [inputs(self.name, [row], seed=number) for number, row in items]
        batch = {key: torch.cat([one[key] for one in found]) for key in found[0]}
        return {**batch, "labels": batch["input_ids"].where(torch.arange(batch["input_ids"].shape[1]) >= len(items[0][1]) - 3, -100)}


class Counting(Trainer):
    """Notes what is attached in every forward pass, by the mode that the model is in."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[bool, str]] = []

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((model.training, attached(self.model)))
        return super().compute_loss(model, *args, **kwargs)

    @property
    def trained(self) -> list[str]:
        return [name for training, name in self.seen if training]

    @property
    def evaluated(self) -> list[str]:
        return [name for training, name in self.seen if not training]


class ByHand(Trainer):
    """The same schedule without any callback: `attach` around each forward and backward pass."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        with foveate.attach(self.model, NAMES[self.state.global_step]):
            return super().training_step(model, *args, **kwargs)


def attached(model: nn.Module) -> str:
    runs = [getattr(module, RUN) for module in model.modules() if hasattr(module, RUN)]
    return spell(runs[0].reducers) if runs else "bare"


def traces(model: nn.Module) -> list[str]:
    """What of an attachment is on the model: hooks, and attributes of instances. The Trainer itself leaves some of its own."""
    found = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inside = list(value.values()) if isinstance(value, dict) and "hooks" in key else [value]
            # What a model of our own consists of is no attachment's.
            kinds = [type(one).__module__ for one in inside if not isinstance(one, PreTrainedConfig)]
            found += [f"{name}.{key}" for kind in kinds if kind.startswith("foveate.") and not kind.startswith("foveate.model.")]
    return found


def trainer(
    folder: Path, model: Any, kind: type[Trainer] = Counting, name: str = "llava", callbacks: Any = (), data: Any = None, **changes: Any
) -> Any:
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
    arguments = TrainingArguments(
        str(folder), report_to="none", remove_unused_columns=False, disable_tqdm=True, use_cpu=True, log_level="error", **settings | changes
    )
    return kind(model, arguments, Collate(name), data or samples(24), eval_dataset=samples(3), callbacks=list(callbacks))


def losses(trained: Any) -> list[float]:
    return [line["loss"] for line in trained.state.log_history if "loss" in line]


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.parametrize(
    ("name", "log", "changes"),
    [
        ("llava", False, {}),
        ("llava", True, {"gradient_accumulation_steps": 2}),
        ("foveate", True, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}),
        ("foveate", False, {"bf16": True}),
        ("qwen2_5_vl", True, {"activation_checkpointing": True}),
    ],
)
def test_every_step_is_as_by_hand(tmp_path: Path, name: str, log: bool, changes: dict[str, Any]) -> None:
    model, other = MODELS[name](), MODELS[name]()
    done = trainer(tmp_path, model, name=name, callbacks=[foveate.ScheduleCallback(LLAVOLTA, log=log)], **changes)
    done.train()
    by_hand = trainer(tmp_path, other, ByHand, name, **changes)
    by_hand.train()
    assert len(losses(done)) == STEPS
    assert losses(done) == losses(by_hand)
    assert_same_weights(model, other)
    micro = changes.get("gradient_accumulation_steps", 1)
    bare = {"none": "none" if log else "bare"}
    assert done.trained == [bare.get(one, one) for one in NAMES for _ in range(micro)]
    assert traces(model) == []


def test_the_log_says_what_was_on(tmp_path: Path) -> None:
    done = trainer(tmp_path, llava(), callbacks=[foveate.ScheduleCallback(LLAVOLTA)], eval_strategy="steps", eval_steps=3)
    done.train()
    lines = done.state.log_history
    assert [line["reducer"] for line in lines if "loss" in line] == WRITTEN
    counts = {"vcc:layer=1,stride=8": [16, 2, 2, 2], "none": [16] * 4, "fastv:keep=0.25,layer=2": [16, 16, 4, 4]}
    assert [line["visual_tokens_per_layer"] for line in lines if "loss" in line] == [counts[name] for name in WRITTEN]
    assert [line["reducer"] for line in lines if "eval_loss" in line] == ["none", "none"]
    assert "reducer" not in lines[-1]  # the summary
    silent = trainer(tmp_path, llava(), callbacks=[foveate.ScheduleCallback(LLAVOLTA, log=False)])
    silent.train()
    assert [line for line in silent.state.log_history if "reducer" in line] == []
    assert losses(silent) == losses(done)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A training that was never interrupted, with a checkpoint after every step."""

    @cache
    def train(name: str) -> Any:
        torch.manual_seed(0)
        done = trainer(tmp_path_factory.mktemp(name), MODELS[name](), name=name, callbacks=[foveate.ScheduleCallback(LLAVOLTA)], **SAVING)
        done.train()
        return done

    return train


@pytest.mark.parametrize(("name", "stop"), [("foveate", 1), ("foveate", 2), ("foveate", 3), ("llava", 3), ("llava", 5)])
def test_resumed_is_uninterrupted(tmp_path: Path, whole: Callable[[str], Any], name: str, stop: int) -> None:
    """From a checkpoint in any part, also between the turns of a cycle, with gradients accumulated. The Trainer of transformers 5.23 does
    not find a LLaVA's weights in its own checkpoint, which has older names: the model is loaded from there before."""
    done = whole(name)
    checkpoint = f"{done.args.output_dir}/checkpoint-{stop}"
    model = MODELS[name]() if name == "foveate" else LlavaForConditionalGeneration.from_pretrained(checkpoint)
    rest = trainer(tmp_path, model, name=name, callbacks=[foveate.ScheduleCallback(LLAVOLTA)], **SAVING)
    rest.train(resume_from_checkpoint=checkpoint)
    assert rest.trained == [name for name in NAMES[stop:] for _ in range(2)]
    lines = [[line for line in one.state.log_history if "loss" in line] for one in (done, rest)]
    assert len(lines[0]) == STEPS
    assert lines[0] == lines[1]
    assert_same_weights(done.model, model)


def test_a_finished_run_is_resumed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": STEPS, "num_train_epochs": 1, "max_steps": -1}
    data = samples(2 * STEPS)
    trainer(tmp_path, llava(), callbacks=[foveate.ScheduleCallback(LLAVOLTA)], data=data, **settings).train()
    again = trainer(tmp_path, llava(), callbacks=[foveate.ScheduleCallback(LLAVOLTA)], data=data, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.trained == []


def test_steps_are_those_of_the_epochs(tmp_path: Path) -> None:
    """12 samples in batches of 2 x 2, twice: three optimiser steps an epoch."""
    settings: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    done = trainer(tmp_path, llava(), callbacks=[foveate.ScheduleCallback(LLAVOLTA)], data=samples(12), **settings)
    done.train()
    assert done.trained == [name for name in NAMES for _ in range(2)]


# ---- evaluation


@pytest.mark.parametrize(
    ("evaluation", "at_start", "inside"),
    [
        ("step", "vcc:layer=1", ["vcc:layer=1", "fastv:keep=0.25", "none"]),
        ("none", "none", ["none"] * 3),
        (None, "none", ["none"] * 3),
        ("divprune:keep=0.5", "divprune:keep=0.5", ["divprune:keep=0.5"] * 3),
        (VCC(layer=0, stride=4), "vcc:layer=0,stride=4", ["vcc:layer=0,stride=4"] * 3),
    ],
)
def test_evaluation_inside_training(tmp_path: Path, evaluation: Any, at_start: str, inside: list[str]) -> None:
    """Batches of 2 and 1 of the three samples that are held back; what is trained does not depend on it."""
    model, other = llava(), llava()
    schedule = foveate.ScheduleCallback(LLAVOLTA, evaluation=evaluation)
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "per_device_eval_batch_size": 2}
    done = trainer(tmp_path, model, callbacks=[schedule], **settings)
    done.train()
    assert done.evaluated == [name for name in [at_start, *inside] for _ in range(2)]
    assert done.trained == NAMES
    plain = trainer(tmp_path, other, callbacks=[foveate.ScheduleCallback(LLAVOLTA)])
    plain.train()
    assert losses(done) == losses(plain)
    assert_same_weights(model, other)

    assert traces(model) == []
    last = [line["eval_loss"] for line in done.state.log_history if "eval_loss" in line][-1]
    with foveate.attach(model, inside[-1]):
        assert done.evaluate()["eval_loss"] == last


class EvaluatesItself(TrainerCallback):
    """Stands after the schedule among the callbacks and asks nobody."""

    trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (1, 4):
            self.trainer.predict(samples(1))


@pytest.mark.parametrize(("evaluation", "expected"), [("step", ["vcc:layer=1", "fastv:keep=0.25"]), ("none", ["none", "none"])])
def test_predictions_of_another_callback(tmp_path: Path, evaluation: str, expected: list[str]) -> None:
    other = EvaluatesItself()
    done = trainer(tmp_path, llava(), callbacks=[foveate.ScheduleCallback(LLAVOLTA, evaluation=evaluation), other])
    other.trainer = done
    done.train()
    assert done.evaluated == expected
    assert done.trained == NAMES


def test_evaluation_after_training_is_of_all_tokens(tmp_path: Path) -> None:
    done = trainer(tmp_path, llava(), callbacks=[foveate.ScheduleCallback("vcc:layer=1", evaluation="divprune:keep=0.5")])
    done.train()
    done.evaluate()
    assert set(done.trained) == {"vcc:layer=1"}
    assert set(done.evaluated) == {"bare"}


# ---- exceptions


class Failing(TrainerCallback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            raise self.error


class Torn(list[Any]):
    """Samples of which the last cannot be read."""

    def __getitem__(self, item: Any) -> Any:
        if item == len(self) - 1:
            raise OSError("torn")
        return super().__getitem__(item)


@pytest.mark.parametrize("evaluation", ["step", "none"])
@pytest.mark.parametrize("place", ["callback", "interrupt", "data", "forward"])
def test_an_exception_leaves_the_model_as_it_was(tmp_path: Path, place: str, evaluation: str) -> None:
    model, more = llava(), list[Any]()
    error: type[BaseException] = OSError
    data: list[Any] = samples(24)
    if place == "data":
        data = Torn(samples(8))
    elif place == "forward":
        data[5] = (5, [*data[5][1][:-1], IMAGE])  # one placeholder more than there are features
        error = ValueError
    else:
        error = KeyboardInterrupt if place == "interrupt" else OSError
        more = [Failing(error("stopped"))]
    schedule = foveate.ScheduleCallback(LLAVOLTA, evaluation=evaluation)
    done = trainer(tmp_path, model, callbacks=[schedule, *more], data=data, train_sampling_strategy="sequential")
    with pytest.raises(error), schedule:
        done.train()
    assert done.trained[:1] == NAMES[:1]
    assert traces(model) == []
    assert schedule.current == "none"


def test_without_the_block_the_next_training_begins_anew(tmp_path: Path) -> None:
    model, schedule = llava(), foveate.ScheduleCallback(LLAVOLTA)
    failing = Failing(OSError("stopped"))
    done = trainer(tmp_path, model, callbacks=[schedule, failing])
    with pytest.raises(OSError, match="stopped"):
        done.train()
    assert attached(model) == "vcc:layer=1"
    with pytest.raises(FoveateError, match="already has 'vcc:layer=1' attached; detach it first"):
        foveate.attach(model, "divprune")
    done.remove_callback(failing)
    done.seen.clear()
    done.train()
    assert done.trained == NAMES
    assert traces(model) == []
    schedule.detach()  # nothing is left to do
    assert traces(model) == []


# ---- models in wrappers, and methods of one's own


def test_peft(tmp_path: Path) -> None:
    def adapted() -> Any:
        torch.manual_seed(0)
        return get_peft_model(llava(), LoraConfig(r=4, target_modules=r".*language_model.*(q|v)_proj", lora_dropout=0.1))

    model, other = adapted(), adapted()
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    done = trainer(tmp_path, model, callbacks=[foveate.ScheduleCallback(LLAVOLTA, evaluation="none")], **settings)
    done.train()
    by_hand = trainer(tmp_path, other, ByHand, **settings)
    by_hand.train()
    assert losses(done) == losses(by_hand)
    assert_same_weights(model, other)
    assert done.evaluated == ["none"] * len(done.evaluated) != []
    assert traces(model) == []


def test_a_model_made_anew_for_every_training(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", remove_unused_columns=False, use_cpu=True, disable_tqdm=True
    )
    schedule = foveate.ScheduleCallback("vcc:layer=1")
    done = Counting(
        args=arguments, data_collator=Collate("llava"), train_dataset=samples(16), model_init=lambda: llava(), callbacks=[schedule]
    )
    first = done.model
    done.train()
    second = done.model
    done.train()
    assert first is not second is not done.model
    assert done.trained == ["vcc:layer=1"] * 4
    assert [attached(model) for model in (first, second, done.model)] == ["bare"] * 3


class First(Reducer):
    """The first tokens of each image: a method that nobody has listed."""

    name = "first"

    def sites(self, layers: int) -> list[Any]:
        return [BeforeLM()]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        return Cut(TokenMap.keep(view.layout, torch.arange(4).expand(view.layout.shape[0], 4)))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return [4 for _ in work.arriving]


@pytest.mark.parametrize(
    ("schedule", "names"),
    [
        ("vcc:layer=1", ["vcc:layer=1"] * STEPS),
        (VCC(layer=1), ["vcc:layer=1"] * STEPS),
        ([VCC(layer=1, stride=2), VCC(layer=2, stride=2)], ["vcc:layer=1,stride=2+vcc:stride=2"] * STEPS),
        ([(0.5, VCC(layer=1)), (0.5, [VCC(layer=2, stride=2)])], ["vcc:layer=1"] * 3 + ["vcc:stride=2"] * 3),
        (None, ["none"] * STEPS),
        ([], ["none"] * STEPS),
    ],
)
def test_spellings(tmp_path: Path, schedule: Any, names: list[str]) -> None:
    done = trainer(tmp_path, llava(), callbacks=[foveate.ScheduleCallback(schedule)])
    done.train()
    assert done.trained == names


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([("1/3", "vcc"), ("1/3", "none")], r"must add up to 1, but 1/3 \+ 1/3 = 2/3"),
        ([(0, "vcc"), (1, "none")], "0 is no share of the steps"),
        ([("half", "vcc")], "'half' is no share of the steps"),
        ([("1/0", "vcc")], "'1/0' is no share of the steps"),
        ([("1/1", "vcw")], "unknown reducer 'vcw'"),
        ([(1, 7)], "7 is no reducer"),
        ([(1, ["vcc", "fastv"])], "is no reducer"),
        (["vcc", "none"], "'vcc' is no part of a schedule"),
        ([{"share": 1}], "is no part of a schedule"),
        ([{"share": 1, "reducer": "vcc", "cycle": ["none"]}], "is no part of a schedule"),
        ([{"share": 1, "cycle": []}], "is no part of a schedule"),
        ([{"share": 1, "cycle": "vcc"}], "is no part of a schedule"),
        ([(1, "downsample:keep=0.25")], "acts on the images, in front of the processor"),
    ],
)
def test_no_schedule(schedule: Any, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        foveate.ScheduleCallback(schedule)


def test_what_the_model_cannot_take_is_said_before_the_first_step(tmp_path: Path) -> None:
    for schedule, evaluation in (([("1/2", "vcc:layer=1"), ("1/2", "fastv:layer=9")], "step"), ("vcc:layer=1", "fastv:layer=9")):
        model = llava()
        done = trainer(tmp_path, model, callbacks=[foveate.ScheduleCallback(schedule, evaluation=evaluation)])
        with pytest.raises(FoveateError, match="there is no decoder layer 9"):
            done.train()
        assert done.seen == []
        assert traces(model) == []


# ---- several processes


def distributed(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """The log of a training whose optimiser steps have two samples, however many processes there are."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    settings |= {"train_sampling_strategy": "sequential"}
    schedule = foveate.ScheduleCallback(LLAVOLTA, evaluation="divprune:keep=0.5")
    with schedule:
        done = trainer(folder, llava(), callbacks=[schedule], **settings | changes)
        done.train()
    assert traces(done.model) == []
    assert set(done.evaluated) == {"divprune:keep=0.5"}
    return [{key: line[key] for key in ("step", "loss", "eval_loss", "reducer") if key in line} for line in done.state.log_history[:-1]]


def test_two_processes(tmp_path: Path) -> None:
    """The model in DDP's wrapping; the three samples of the evaluation are shared as well, the third twice, which the Trainer drops."""
    one = distributed(tmp_path / "one", gradient_accumulation_steps=2)
    in_two(
        tmp_path,
        f"import json, os, sys\nsys.path.insert(0, {str(ROOT)!r})",
        "from tests.train.test_scheduled import distributed",
        f"log = distributed(Path({str(tmp_path / 'two')!r}))",
        f"if os.environ['RANK'] == '0':\n    Path({str(tmp_path / 'log.json')!r}).write_text(json.dumps(log))",
    )
    two = json.loads((tmp_path / "log.json").read_text())
    assert [line["reducer"] for line in one if "loss" in line] == WRITTEN
    assert len(one) == STEPS + 2
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == (value if key == "reducer" else pytest.approx(value, rel=1e-5))
