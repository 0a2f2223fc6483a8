"""Training whose weights, gradients and optimiser are divided over the processes: FSDP2 and DeepSpeed's ZeRO, as accelerate launches them.

The recipe stays what it is. What cannot be trained so is refused before anything is read, and checkpoints hold the same weights as others:
the trained ones, whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    is_deepspeed_available,
    parse_flag_from_env,
    save_fsdp_optimizer,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from foveate.anatomy import read
from foveate.errors import FoveateError
from foveate.train.settings import Recipe, Stage
from foveate.train.stages import first_line

FSDP, DEEPSPEED = "FSDP", "DeepSpeed"


def launched() -> str:
    """Which of the two accelerate was told to launch, "" if neither."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return FSDP
    return DEEPSPEED if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else ""


def check_sharding(recipe: Recipe) -> None:
    """FoveateError for what accelerate's configuration or a stage asks for and sharded training does not do."""
    by = launched()
    if not by:
        return
    try:
        problem = fsdp_problem() if by == FSDP else deepspeed_problem()
    except (ValueError, OSError) as error:  # accelerate's own checks, and a file of DeepSpeed's that is not there
        problem = first_line(error)
    if problem:
        raise FoveateError(f"accelerate's configuration: {problem}")
    for stage in recipe.stages:
        if problem := stage_problem(stage, by):
            raise FoveateError(f"stage {stage.name}: {problem}")


def fsdp_problem() -> str:
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        return f"fsdp_version {plugin.fsdp_version} wraps modules, which reducers then do not find; set fsdp_version: 2"
    if plugin.cpu_ram_efficient_loading:
        return (
            "fsdp_cpu_ram_efficient_loading leaves the weights of all processes but the first empty, of which bridges grow and losses are "
            "tried; set it to false"
        )
    if plugin.activation_checkpointing:
        return "fsdp_activation_checkpointing: leave it out and set gradient_checkpointing: true in the recipe's stages"
    return ""


def deepspeed_problem() -> str:
    if not is_deepspeed_available():
        return "distributed_type is DEEPSPEED, but DeepSpeed is not installed here: pip install deepspeed"
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return "with use_cpu accelerate leaves DeepSpeed out; set use_cpu: false, a machine without GPU is known as one"
    config = DeepSpeedPlugin().deepspeed_config
    if config["zero_optimization"]["stage"] == 3:
        return "DeepSpeed's ZeRO stage 3 is not supported, stages 1 and 2 are; to shard the weights as well use FSDP"
    for key, says in (("gradient_accumulation_steps", "micro_batch"), ("gradient_clipping", "max_grad_norm")):
        if config.get(key, "auto") != "auto":
            return f"{key} is {config[key]}, but the recipe says it ({says}); set {key}: auto"
    for key, says in (("optimizer", "optimizer"), ("scheduler", "lr_schedule")):
        if key in config:
            return f"{key} is what the recipe says ({says}); leave it out of DeepSpeed's configuration"
    return ""


def stage_problem(stage: Stage, by: str) -> str:
    if stage.evaluate is not None and by == FSDP:
        return "evaluate needs the whole model in each process, which FSDP divides; leave it out"
    before = stage.train.bridge or stage.train.tower or stage.train.lm is True
    if stage.train.reducers and not before and by == FSDP:  # their gradients were seen not to come to the optimiser
        return "FSDP does not train reducers where nothing in front of the decoder layers is; train the bridge too, or leave out FSDP"
    if stage.micro_batch == "auto":
        return "micro_batch auto is not for sharded training, give a number of samples"
    if stage.kind == "align":
        return "kind align is not for sharded training; it is small enough for one device"
    if stage.precision == "bf16-copy":
        return "precision bf16-copy is not for sharded training; bf16 is, which keeps float32 weights too and computes with a copy of them"
    return ""


class ShardedTrainer(Trainer):
    """The Hugging Face Trainer where the model may be divided by FSDP2 or ZeRO. Its checkpoints have the trained weights alone."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:  # accelerate stops at a name of `_no_split_modules` that is not in the model
            units = {type(layer).__name__ for layer in read(self.model).layers}
            there = {type(module).__name__ for module in self.model.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(units | there & set(self.model._no_split_modules or ()))
        if (policy := plugin.mixed_precision_policy) is not None:  # accelerate's rounds the loss and the sums of gradients too
            plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=policy.param_dtype, reduce_dtype=torch.float32)

    def create_accelerator_and_postprocess(self) -> None:
        """Also on CPUs: accelerate gives FSDP to GPUs and their like alone and trains as without it, while torch divides over gloo too."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if launched() == FSDP and state.distributed_type is DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            if state.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    @property
    def divided(self) -> str:
        """By what the model is divided, and into which kind of checkpoint; "" if each process has the whole model."""
        if self.is_fsdp_enabled:
            return f"{FSDP}, {self.accelerator.state.fsdp_plugin.state_dict_type.name}"
        return f"{DEEPSPEED} on {self.args.world_size} processes" if self.is_deepspeed_enabled else ""

    def check_divided(self, checkpoint: Path, before: str) -> None:
        """FoveateError if a checkpoint is of a run that was divided otherwise (`divided`): its optimiser's state then is."""
        if before != self.divided:
            was, now = (what or "no FSDP and no DeepSpeed" for what in (before, self.divided))
            raise FoveateError(
                f"{checkpoint} was made with {was}, but this run has {now}. Launch it as it was launched before, or remove the stage's "
                "checkpoints to begin the stage again"
            )

    def trained_weights(self) -> dict[str, Tensor]:
        """The trained weights and the buffers by name, whole, as the optimiser has them. Every process has to call this; where they are
        divided only the first gets them."""
        model = self.accelerator.unwrap_model(self.model)
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        wanted |= {name for name, _ in model.named_buffers()}
        if self.is_fsdp_enabled:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            whole: Any = get_model_state_dict(model, options=options)
        else:
            whole = model.state_dict()
        kept = {name: value.detach() for name, value in whole.items() if name in wanted}
        if self.is_deepspeed_enabled:  # the model itself may be a bfloat16 copy of what the optimiser has
            from deepspeed.utils import safe_get_full_fp32_param

            for name, parameter in model.named_parameters():
                if name in kept and (full := safe_get_full_fp32_param(parameter)) is not None:
                    kept[name] = full.cpu() if self.args.should_save else full.new_zeros(0)
        return kept

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """With FSDP without the whole model, which the Trainer would save beside the trained weights."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_fsdp_optimizer(self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights = load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
        found = set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True, strict=False))
        self._issue_warnings_after_load(found)
