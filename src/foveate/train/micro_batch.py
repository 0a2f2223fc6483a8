"""`micro_batch: auto`: the most samples that fit into a forward and backward pass, by an estimate, and on a GPU by trying.

The longest samples of the stage, as many as a process has in a step, stand for all, and those with most text for what gets logits: the
supervised tokens alone, where the trainer computes no others. The estimate is high rather than low."""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from foveate.accounting import predict
from foveate.data.features import FeatureStore
from foveate.data.library import image_plan
from foveate.errors import FoveateError
from foveate.files import write_json
from foveate.machine import free_memory
from foveate.reducers import parse
from foveate.tokens import ImagePlan
from foveate.train.loading import Loading
from foveate.train.mixture import Mixture
from foveate.train.opening import Opened
from foveate.train.order import division
from foveate.train.samples import make_collator, notes
from foveate.train.schedule import NONE
from foveate.train.settings import Recipe, Stage
from foveate.train.sizes import written
from foveate.train.stages import is_assembled, naming
from foveate.train.supervised import SupervisedRows
from foveate.train.trials import try_rows

RECORD = "micro-batch.json"
PART = 0.8  # of the free memory; the rest is for what is not counted
OTHERS = 256  # samples whose images are counted beside those with most text
BYTES = 4  # of text in a token
LOGITS = 3  # as they are, in float32 for the loss, and their gradients


@dataclass(frozen=True)
class Decision:
    """A micro-batch, for how many samples a process has in a step, and why it was taken."""

    micro_batch: int
    samples: int
    reason: str


def choose(
    recipe: Recipe, index: int, samples: Mixture, opened: Opened, features: FeatureStore | None, folder: Path, state: PartialState
) -> int | None:
    """The micro-batch of a stage: what the recipe says, or what was decided when the stage began, or is decided now and written into its
    folder. All processes take the same. FoveateError where nothing is known of what a sample takes."""
    stage = recipe.stages[index]
    if stage.micro_batch != "auto":
        return stage.fixed_micro_batch
    share, _ = division(stage.batch_size, None, state.num_processes, stage.name)
    with naming(stage):
        found = read(folder / RECORD, share) or decide(recipe, stage, samples, opened, features, share, state)
    least = min(gather_object([found.micro_batch]))
    state.wait_for_everyone()
    if state.is_main_process:
        if least < found.micro_batch:
            found = Decision(least, share, "another process has room for no more")
        write_json(folder / RECORD, asdict(found))
        print(f"stage {stage.name}: micro_batch {least} of {share} samples: {found.reason}", file=sys.stderr, flush=True)
    return least


def read(path: Path, samples: int) -> Decision | None:
    """What was decided before; None if nothing, or for another number of processes."""
    try:
        found = Decision(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.samples == samples and found.micro_batch in candidates(samples) else None


def candidates(samples: int) -> list[int]:
    """What is tried: all samples of a process in a step, then ever the half while it comes out, and one."""
    found = [samples]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return list(dict.fromkeys([*found, 1]))


def decide(
    recipe: Recipe, stage: Stage, samples: Mixture, opened: Opened, features: FeatureStore | None, share: int, state: PartialState
) -> Decision:
    """The first of the candidates that the estimate, and on a GPU a step, has room for."""
    skipped, _ = notes(recipe, stage)
    load = Loading(samples, make_collator(opened, stage.max_length, features=features), samples.policy, skipped)
    most = [longest_of(samples, share, image_of(opened).tokens), wordiest_of(samples, share)]
    device = torch.device(state.device)
    opened.model.to(device)
    room = PART * free_memory(device.type) - to_come(stage, opened.model)
    rows, batches = head_of(stage, opened), list(map(load, most))
    taken = per_sample(stage, opened, batches[0], most_logits(rows, batches))
    if taken is None and not tries(device):
        raise FoveateError("micro_batch: auto does not know what a sample of this model takes; give a number of samples")
    fitting = [micro for micro in candidates(share) if taken is None or micro * taken <= room] or [1]
    said = "" if taken is None else f"a sample takes about {written(int(taken))}, {written(max(0, int(room)))} are free for them"
    if not tries(device):
        return Decision(fitting[0], share, said)
    for micro in fitting:
        if all(runs(stage, opened.model, load(items[:micro]), device, rows) for items in most):
            return Decision(micro, share, f"{said}; a step was tried" if said else "a step was tried")
    raise FoveateError(f"not even one sample fits into a step: {said}. Take gradient_checkpointing, fewer tokens, or LoRA")


def tries(device: torch.device) -> bool:
    """Whether running out of memory is an error that can be caught, and not the end of the process."""
    return device.type == "cuda"


def longest_of(samples: Mixture, count: int, image: int) -> list[int]:
    """Items that are among the longest, longest first, over again where there are too few: of those with most text and of some others,
    since only reading one shows its images, of `image` tokens each."""
    sizes = samples.sizes()
    order = np.argsort(-sizes, kind="stable").tolist()
    pool = dict.fromkeys([*order[: count + OTHERS], *order[:: max(1, len(order) // OTHERS)]])
    found = sorted(pool, key=lambda item: -(sizes[item] + BYTES * image * len(samples.pictures(item))))
    return (found * count)[:count]


def wordiest_of(samples: Mixture, count: int) -> list[int]:
    """Those with most text, likewise."""
    found = np.argsort(-samples.sizes(), kind="stable")[:count].tolist()
    return (found * count)[:count]


def head_of(stage: Stage, opened: Opened) -> SupervisedRows:
    """Which tokens get logits in a step, as in `FoveateTrainer.compute_loss`."""
    if stage.kind == "align":
        return SupervisedRows(None)
    return try_rows(opened, True, tell=False)  # where a loss takes no number of items, all tokens: rather too many


def most_logits(rows: SupervisedRows, batches: Sequence[dict[str, Any]]) -> int:
    """The most tokens of a sample that get logits."""
    return max(batch["labels"].shape[1] if count is None else count for batch in batches for count in rows.count(batch["labels"]))


def image_of(opened: Opened) -> ImagePlan:
    config = opened.model.config
    if is_assembled(config):
        plan: ImagePlan = config.plan_image(config.image_size, config.image_size)
        return plan
    return image_plan(opened.processor) or ImagePlan.whole(0)


def to_come(stage: Stage, model: torch.nn.Module) -> int:
    """Bytes that gradients, optimiser (two moments) and a copy in bfloat16 will take beside the model."""
    trained = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters() if parameter.requires_grad)
    copy = sum(2 * parameter.numel() for parameter in model.parameters()) if stage.precision == "bf16-copy" else 0
    return 3 * trained + copy


def per_sample(stage: Stage, opened: Opened, batch: dict[str, Any], logits: int) -> float | None:
    """Bytes that autograd keeps of a sample, mean of a batch, under the schedule's most expensive reducer; None if that is not known.

    Of the language model by `Ledger.activation_bytes`, or with gradient checkpointing one state a layer and one layer's; of a trained
    tower, as much as of as many tokens in such a layer of its own width; of the head the `logits` of so many tokens."""
    config: Any = opened.model.config
    rows, length = batch["input_ids"].shape
    text, size = config.get_text_config(), 2 if stage.precision in ("bf16", "fp16", "bf16-copy") else 4
    most = 0.0
    for spelled in {one for part in stage.parts for one in part.cycle} or {NONE}:
        kept = 0.0
        for plans in batch["plans"]:
            try:
                kept += decoder(config, plans, length, spelled, stage.gradient_checkpointing, text.hidden_size, size, opened.trained)
            except Exception:  # whatever a configuration of another make brings about
                return None
        most = max(most, kept / rows)
    vision, crops = getattr(config, "vision_config", None), sum(len(plan.crops) for row in batch["plans"] for plan in row) / rows
    tower = 0.0
    if stage.train.tower and vision is not None and "pixel_values" in batch:
        if not hasattr(vision, "num_hidden_layers"):  # convolutions
            return None
        patches = math.prod(batch["pixel_values"].shape[-2:]) / getattr(vision, "patch_size", 14) ** 2
        width = 8 * vision.hidden_size + 2 * getattr(vision, "intermediate_size", 4 * vision.hidden_size)
        tower = crops * patches * width * vision.num_hidden_layers * size
    return most + tower + LOGITS * 4 * logits * text.vocab_size


def decoder(
    config: Any, plans: Sequence[ImagePlan], length: int, reducers: str, checkpointed: bool, width: int, size: int, trained: Any
) -> float:
    text = length - sum(plan.tokens for plan in plans)
    given: dict[str, Any] = {"images": tuple(plans), "text_tokens": text, "reducers": parse(reducers), "mode": "train", "trained": trained}
    ledger = predict(config, **given, dtype_bytes=size)
    if checkpointed:
        return sum(ledger.total_tokens) * width * size + max(ledger.activation_bytes)
    return sum(ledger.activation_bytes)


def runs(stage: Stage, model: Any, batch: dict[str, Any], device: torch.device, rows: SupervisedRows) -> bool:
    """Whether a forward and backward pass of the batch has room, with logits of the `rows` that get them. The model, its gradients and the
    random numbers are as before."""
    inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    halves = {"bf16": torch.bfloat16, "bf16-copy": torch.bfloat16, "fp16": torch.float16}
    training = model.training
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with torch.autocast(device.type, halves.get(stage.precision), enabled=stage.precision in halves), rows.alone(inputs) as given:
                loss = model.train()(**given)["loss"]
            if loss.requires_grad:  # nothing is trained by a batch of text alone, where only the bridge is
                loss.backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        model.train(training).zero_grad(set_to_none=True)
        if stage.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True
