"""What a run asks of the machine and of its packages, tried before the first step: precision, optimiser, attention, reporting, reducers."""

from __future__ import annotations

import logging
import math
import sys
from copy import deepcopy
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_optimizer import is_optimizer_factory

from foveate.data.conversations import MARKER, Conversation
from foveate.engine.attach import attach
from foveate.errors import FoveateError
from foveate.machine import has_bfloat16
from foveate.reducers import parse
from foveate.reducers.learned import lent_weights
from foveate.train.account import Costs
from foveate.train.opening import Opened
from foveate.train.order import division, seed_of
from foveate.train.packing import Packing, goes_by_sample, refuse
from foveate.train.samples import make_collator
from foveate.train.schedule import NONE
from foveate.train.settings import Recipe, Stage
from foveate.train.stages import first_line
from foveate.train.supervised import SupervisedRows, tried

log = logging.getLogger(__name__)


def check_reporting(recipe: Recipe) -> None:
    available = get_available_reporting_integrations()
    for name in recipe.report_to:
        if name not in available:
            raise FoveateError(f"report_to: {name!r} is not known or not installed; available here: {', '.join(available) or 'none'}")


def check_machine(recipe: Recipe, config: Any, state: PartialState) -> None:
    """What this machine, its device and its packages have to give: batches that divide, precision, attention, optimisers."""
    for index, stage in enumerate(recipe.stages):
        micro, accumulation = division(stage.batch_size, stage.fixed_micro_batch, state.num_processes, stage.name)
        try:
            arguments = training_arguments(recipe, index, 1, micro, accumulation)
            if stage.precision == "fp16" and not torch.cuda.is_available():
                raise ValueError("needs a GPU, which scales its losses; use fp32 or bf16 here")
        except (ValueError, ImportError, RuntimeError) as error:
            raise FoveateError(f"stage {stage.name}: precision {stage.precision} cannot be trained here: {first_line(error)}") from None
        if stage.precision in ("bf16", "bf16-copy") and not has_bfloat16(state.device.type):
            log.warning(
                f"stage {stage.name}: precision {stage.precision}, but this {state.device.type} has no instructions for bfloat16, "
                "which takes many times as long as fp32 here; precision: auto chooses what is fast"
            )
        if arguments.mixed_precision != (stage.precision if stage.precision in ("bf16", "fp16") else "no"):
            raise FoveateError(
                f"stage {stage.name}: precision {stage.precision}, but accelerate's configuration has mixed_precision "
                f"{arguments.mixed_precision}, which would win; set it to no: each stage says its own"
            )
        check_optimizer(stage, arguments)
    try:
        with torch.device("meta"):
            AutoModelForImageTextToText.from_config(
                deepcopy(config), attn_implementation=recipe.model.attn_implementation, dtype=getattr(torch, recipe.model.dtype)
            )
    except (ValueError, ImportError) as error:
        raise FoveateError(f"model.attn_implementation {recipe.model.attn_implementation} cannot be used: {first_line(error)}") from None


def check_optimizer(stage: Stage, arguments: TrainingArguments) -> None:
    """Makes one step with the stage's optimiser: some names belong to packages that are not here, or to other devices."""
    tiny = nn.Sequential(nn.Linear(4, 4)).to(arguments.device)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, tiny)
        whole = is_optimizer_factory(kind) or any(key in options for key in ("params", "model", "optimizer_dict"))
        optimizer = kind()(tiny, **options) if is_optimizer_factory(kind) else kind(options.pop("params", tiny.parameters()), **options)
        for parameter in tiny.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except Exception as error:  # each of these packages has errors of its own
        raise FoveateError(f"stage {stage.name}: optimizer {stage.optimizer} cannot be used here: {first_line(error)}") from None
    if whole and stage.rates is not None:
        raise FoveateError(
            f"stage {stage.name}: optimizer {stage.optimizer} divides the weights by itself and takes one learning_rate for all"
        )


def rehearse(recipe: Recipe, index: int, opened: Opened, state: PartialState) -> None:
    """One forward pass of one image with every reducer of the stages from `index` on: what no configuration tells fails here, and not at
    the step that needs it."""
    spelled = {spelled: stage for stage in recipe.stages[index:] for spelled in stage.spelled if spelled != NONE}
    if not spelled:
        return
    model, training = opened.model.to(state.device), opened.model.training
    batch = {name: value.to(state.device) for name, value in make_collator(opened, sys.maxsize)([shown()]).items()}
    with torch.random.fork_rng(), torch.no_grad():
        for reducers, stage in spelled.items():
            try:
                with lent_weights(model.eval(), parse(reducers)), attach(model, parse(reducers), record="none"):
                    model(**batch)
            except (FoveateError, ValueError, RuntimeError) as error:
                raise FoveateError(f"stage {stage.name}: {reducers} cannot run on this model: {first_line(error)}") from error
    model.train(training)


def try_rows(opened: Opened, scaled: bool, tell: bool = True) -> SupervisedRows:
    """Whether this model's head and loss can do with the supervised rows, as `foveate.train.supervised.tried` says."""
    device = next(opened.model.parameters()).device
    batch = {name: value.to(device) for name, value in make_collator(opened, sys.maxsize)([shown()]).items()}
    return tried(opened.model, batch, scaled, tell)


def try_packing(stage: Stage, opened: Opened, costs: Costs) -> Packing:
    """What packs the samples of the stage. FoveateError where those of one row would not come to what they come to alone in this model."""
    device, collator = next(opened.model.parameters()).device, make_collator(opened, sys.maxsize)
    batch = {name: value.to(device) for name, value in collator([shown(), shown("white", "What colour is it?"), shown()]).items()}
    try:
        refuse(opened.model, batch, collator.pad)
    except FoveateError as error:
        raise FoveateError(f"stage {stage.name}: {error}") from None
    if stage.pack is not True:
        return Packing(stage.pack, opened.model, costs, collator.pad)
    return Packing(None, opened.model, costs, collator.pad, goes_by_sample(opened.model, batch, collator.pad, stage.spelled))


def shown(colour: str = "grey", question: str = "What is this?") -> Conversation:
    """A sample to try things with."""
    turns = [("user", f"{MARKER}\n{question}"), ("assistant", f"{colour.capitalize()}.")]
    return Conversation(len(question), "rehearsal", turns, [Image.new("RGB", (64, 64), colour)])


def training_arguments(
    recipe: Recipe, index: int, steps: int, micro: int, accumulation: int, find_unused: bool = False
) -> TrainingArguments:
    """A stage as the Trainer takes it."""
    stage, cuda = recipe.stages[index], torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(recipe.folder(index)),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=stage.learning_rate if stage.rates is None else max(stage.rates.values()),
        lr_scheduler_type="constant_with_warmup" if stage.lr_schedule == "constant" and stage.warmup else stage.lr_schedule,
        warmup_steps=math.ceil(stage.warmup * steps),
        weight_decay=stage.weight_decay,
        optim=stage.optimizer,
        adam_beta1=stage.adam_betas[0],
        adam_beta2=stage.adam_betas[1],
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.precision == "bf16",
        fp16=stage.precision == "fp16",
        use_cpu=not cuda,
        activation_checkpointing=stage.gradient_checkpointing,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=find_unused,
        seed=seed_of(recipe.seed, stage.name, "training"),
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to=recipe.report_to or "none",
        run_name=f"{recipe.name}-{stage.name}",
        disable_tqdm=True,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        log_level="error",
    )
