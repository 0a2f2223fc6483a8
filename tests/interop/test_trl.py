"""TRL's SFTTrainer under a schedule of reducers, beside Foveate's own trainer. Needs the environment that `make trl` builds."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate
from foveate.engine.run import RUN
from foveate.model import FoveateForConditionalGeneration
from foveate.reducers import spell
from foveate.train.order import Order
from foveate.train.run import main
from foveate.train.trainer import FoveateTrainer
from tests.situations.runs import checkpoint, prepare, recipe, rows, save_llava, stage

pytestmark = pytest.mark.skipif(
    find_spec("trl") is None, reason="TRL is not installed in this environment; `make trl` builds one that has it"
)

STEPS, BATCH = 6, 4
LLAVOLTA = [("1/3", "vcc:layer=1,stride=8"), ("1/3", "vcc:layer=1,stride=2"), ("1/3", "none")]
NAMES = ["vcc:layer=1", "vcc:layer=1", "vcc:layer=1,stride=2", "vcc:layer=1,stride=2", "none", "none"]
# Contents as text and as lists of parts; the tokens that TRL's assistant_only_loss looks at are those between the generation tags.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<user>' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ '<assistant>' }}{% else %}{% generation %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}"
    "{% endif %}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
FORMATS = {"messages": {"assistant_only_loss": True}, "prompt-completion": {}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of transformers, a Foveate model, and conversations about one or two images; every second has two turns."""
    folder = prepare(tmp_path_factory.mktemp("trl"))
    save_llava(folder / "llava")
    bridge = {"kind": "chain_of_sight", "scales": [[4, 4], [2, 3]], "width": 32, "head_dim": 16}
    torch.manual_seed(0)
    model, processor = FoveateForConditionalGeneration.from_backbones(str(folder / "tower"), str(folder / "lm"), bridge)
    model.save_pretrained(folder / "foveate")
    processor.save_pretrained(folder / "foveate")
    for name in ("llava", "foveate"):
        processor = AutoProcessor.from_pretrained(folder / name)
        processor.chat_template = TEMPLATE
        processor.save_pretrained(folder / name)
    samples = [row for row in json.loads((folder / "data.json").read_text()) if "image" in row]
    (folder / "messages.json").write_text(json.dumps(samples))
    first = [{**row, "conversations": row["conversations"][:2]} for row in samples]  # TRL supervises one completion after a prompt
    (folder / "prompt-completion.json").write_text(json.dumps(first))
    return folder


def dataset(root: Path, form: str) -> Dataset:
    """The samples of all steps in the order of Foveate's trainer, as TRL takes them."""
    samples = json.loads((root / f"{form}.json").read_text())
    order = Order(len(samples), BATCH, 0, "one")
    found: dict[str, list[Any]] = {"images": []}
    for step in range(STEPS):
        for number in order.batch(step):
            names = samples[number]["image"]
            found["images"].append([{"path": str(root / "images" / name)} for name in ([names] if isinstance(names, str) else names)])
            turns = [
                {"role": "user" if turn["from"] == "human" else "assistant", "content": turn["value"].replace("<image>\n", "")}
                for turn in samples[number]["conversations"]
            ]
            parts = {"messages": turns} if form == "messages" else {"prompt": turns[:-1], "completion": turns[-1:]}
            for name, value in parts.items():
                found.setdefault(name, []).append(value)
    turn = List({"role": Value("string"), "content": Value("string")})
    return Dataset.from_dict(found, Features({name: List(ImageFeature()) if name == "images" else turn for name in found}))


def sft(root: Path, output: Path, form: str, source: Path, schedule: Any, more: Any = None, **changes: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    class Noting(SFTTrainer):
        """Notes what is attached in each forward pass and, of the first batch, the labels."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.seen: list[tuple[bool, str]] = []
            self.batches: list[dict[str, Any]] = []

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.batches.append({name: inputs[name].clone() for name in ("input_ids", "labels", "attention_mask", "pixel_values")})
            runs = [getattr(module, RUN) for module in self.model.modules() if hasattr(module, RUN)]
            self.seen.append((model.training, spell(runs[0].reducers) if runs else "bare"))
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine", "optim": "adamw_torch", "max_length": None, "train_sampling_strategy": "sequential", "bf16": False,
        "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True,
    }  # fmt: skip
    arguments = SFTConfig(str(output), **settings | FORMATS[form] | changes)
    data = dataset(root, form)
    return Noting(
        AutoModelForImageTextToText.from_pretrained(source),
        arguments,
        train_dataset=data,
        eval_dataset=data.select(range(3)),
        processing_class=AutoProcessor.from_pretrained(source),
        callbacks=[schedule],
        **(more or {}),
    )


@pytest.fixture(scope="module")
def own(root: Path) -> Callable[[str, str], tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Foveate's trainer on the same samples: its log, and the batches that it saw."""

    def train(name: str, form: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        data = {"conversations": str(root / f"{form}.json"), "images": str(root / "images")}
        parts = [{"share": share, "reducer": reducer} for share, reducer in LLAVOLTA]
        every = {"bridge": True, "lm": True, "tower": True}
        changed = stage(0, data=data, train=every, steps=STEPS, micro_batch=BATCH // 2, learning_rate=1e-3, reducers=parts)
        batches: list[dict[str, Any]] = []
        step = FoveateTrainer.training_step

        def noting(self: FoveateTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            batches.append(dict(inputs))
            return step(self, model, inputs, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FoveateTrainer, "training_step", noting)
            main(recipe(root, f"{name}-{form}", checkpoint(root / name), changed))
        return rows(root / f"{name}-{form}"), batches

    return train


def losses(trained: Any) -> list[float]:
    return [line["loss"] for line in trained.state.log_history if "loss" in line]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["llava", "foveate"])
def test_losses_are_those_of_our_trainer(root: Path, tmp_path: Path, own: Any, name: str, form: str) -> None:
    """The same samples in the same order: the same tokens, labels and pixels, and in every step the same loss within rounding. TRL makes
    logits and losses by a kernel of its own, so that they are not the same to the last bit."""
    log, batches = own(name, form)
    trained = sft(root, tmp_path, form, root / name, foveate.ScheduleCallback(LLAVOLTA))
    trained.train()
    assert len(trained.batches) == len(batches) == 2 * STEPS
    for theirs, ours in zip(trained.batches, batches, strict=True):
        for key in theirs:
            assert torch.equal(theirs[key], ours[key]), key
    assert trained.seen == [(True, one) for one in NAMES for _ in range(2)]
    written = ["vcc:layer=1,stride=8"] * 2 + NAMES[2:]
    assert [row["reducer"] for row in log] == written
    assert [line["reducer"] for line in trained.state.log_history if "loss" in line] == written
    assert losses(trained) == pytest.approx([row["loss"] for row in log], rel=1e-6)


@pytest.mark.parametrize("name", ["llava", "foveate"])
def test_resumed_is_uninterrupted(root: Path, tmp_path: Path, name: str) -> None:
    """From a checkpoint inside a part of the schedule, to the last bit, with gradients accumulated. The model is loaded from the checkpoint
    before: the Trainer of transformers 5.23 does not find a LLaVA's weights there, which have older names."""
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    whole = sft(root, tmp_path, "messages", root / name, foveate.ScheduleCallback(LLAVOLTA), **saving)
    whole.train()
    folder = tmp_path / "checkpoint-3"
    rest = sft(root, tmp_path / "rest", "messages", folder, foveate.ScheduleCallback(LLAVOLTA), **saving)
    rest.train(resume_from_checkpoint=str(folder))
    assert rest.seen == [(True, one) for one in NAMES[3:] for _ in range(2)]
    assert losses(rest) == losses(whole)
    mine, theirs = rest.model.state_dict(), whole.model.state_dict()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.parametrize(("evaluation", "inside"), [("step", ["vcc:layer=1,stride=2", "none"]), ("none", ["none"] * 2)])
def test_evaluation_inside_training(root: Path, tmp_path: Path, evaluation: str, inside: list[str]) -> None:
    """With TRL's own settings, which recompute activations in the backward pass."""
    schedule = foveate.ScheduleCallback(LLAVOLTA, evaluation=evaluation)
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3, "gradient_checkpointing": True}
    trained = sft(root, tmp_path, "prompt-completion", root / "llava", schedule, **settings)
    trained.train()
    assert [one for training, one in trained.seen if training] == [one for one in NAMES for _ in range(2)]
    assert [one for training, one in trained.seen if not training] == inside
    plain = sft(root, tmp_path, "prompt-completion", root / "llava", foveate.ScheduleCallback(LLAVOLTA, log=False))
    plain.train()
    assert losses(plain) == losses(trained)
    last = [line["eval_loss"] for line in trained.state.log_history if "eval_loss" in line][-1]
    assert trained.evaluate()["eval_loss"] == last
    assert trained.seen[-1] == (False, "bare")


def test_lora(root: Path, tmp_path: Path) -> None:
    """Adapters that TRL injects; the steps differ with the reducer, so the losses differ from those of a training on all tokens."""
    from peft import LoraConfig

    settings = {"peft_config": LoraConfig(r=4, target_modules=r".*language_model.*(q|v)_proj")}
    found = []
    for schedule in (LLAVOLTA, None):
        trained = sft(root, tmp_path, "messages", root / "llava", foveate.ScheduleCallback(schedule), more=settings)
        trained.train()
        found.append(losses(trained))
    assert all(one != other for one, other in zip(*found, strict=True))
    assert not [module for module in trained.model.modules() if hasattr(module, RUN)]


def test_an_exception_leaves_the_model_as_it_was(root: Path, tmp_path: Path) -> None:
    schedule = foveate.ScheduleCallback(LLAVOLTA, evaluation="none")
    trained = sft(root, tmp_path, "messages", root / "llava", schedule)
    collate, calls = trained.data_collator, []

    def torn(batch: list[Any]) -> Any:
        calls.append(batch)
        if len(calls) == 5:
            raise OSError("torn")
        return collate(batch)

    trained.data_collator = torn
    with pytest.raises(OSError, match="torn"), schedule:
        trained.train()
    assert trained.seen[0] == (True, NAMES[0])
    assert not [module for module in trained.model.modules() if hasattr(module, RUN) or "train" in vars(module)]
