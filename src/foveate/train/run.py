"""A recipe from beginning to end: check everything, then train stage after stage, going on where an earlier run was.

Every stage but the first begins with the model folder that the one before it has saved, also when nothing was interrupted: a resumed
run and an uninterrupted one go through the same files and are the same run, to the last bit on a CPU.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.utils import logging as transformers_logging

import foveate.model  # noqa: F401  registers the Auto classes
from foveate.accounting import Trained as Updated
from foveate.anatomy import read
from foveate.data.chat import Renderer
from foveate.data.collate import Collator, Cut, Fit, image_tokens, told
from foveate.data.conversations import MARKER, Conversation, Conversations, cache_file, find_bad, refuse_or_skip
from foveate.data.library import LibraryCollator, image_length
from foveate.engine.attach import attach
from foveate.errors import FoveateError
from foveate.model.assembly import from_backbones, refuse_file, savable
from foveate.model.configuration import FoveateConfig
from foveate.model.processing import FoveateProcessor, default_template
from foveate.reducers import parse, save_reducers
from foveate.train import files
from foveate.train.loading import Loading
from foveate.train.lock import locked
from foveate.train.order import Order, division, seed_of
from foveate.train.recipe import Data, LoraOf, Recipe, Stage, Trained, load_recipe
from foveate.train.schedule import NONE, stage_steps
from foveate.train.stages import build, cautions, check, first_bridge, model_folder, part_modules, trained_parts, walk, wants_scaling
from foveate.train.stand_in import StandIn
from foveate.train.trainer import Costs, FoveateTrainer, Held, StageInfo, Totals
from foveate.world import resolve

log = logging.getLogger(__name__)
TIMEOUT = timedelta(hours=2)  # processes wait for each other while images are checked


def main(recipe_path: Path, overrides: Sequence[str] = ()) -> Path:
    """What `foveate train` does. Returns the folder of the finished model."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    return train(load_recipe(recipe_path, list(overrides)))


def train(recipe: Recipe) -> Path:
    """Run a recipe, or go on with it. Returns `<output>/final`: model, processor and, if the last step had a reducer, foveate.json."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    final, plain = recipe.output / "final", json.loads(recipe.model_dump_json())
    new = files.compare(recipe.output, {"recipe": plain})
    if files.is_complete(final) and not new:
        return final
    with locked(recipe.output, state):
        try:
            run_stages(recipe, plain, state)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            raise FoveateError(f"{recipe.output}: {error.strerror}. What was complete stays: make room and give the same command") from None
    return final


def run_stages(recipe: Recipe, plain: dict[str, Any], state: PartialState) -> None:
    check_reporting(recipe)
    stages = list(walk(recipe, load_config))
    for stage, config in stages:
        check(stage, config)
    counts = [tokens_per_image(recipe, config) for _, config in stages]
    check_machine(recipe, stages[0][1], state)
    renderer = open_renderer(recipe)
    if renderer.end and state.is_main_process:
        log.warning("the chat template writes no token behind an answer: %s is put there, so that the model learns to stop", renderer.end)
    data = [open_data(recipe, stage, renderer, count, state) for stage, count in zip(recipe.stages, counts, strict=True)]
    facts = {stage.name: facts_of(found) for stage, found in zip(recipe.stages, data, strict=True)}
    files.compare(recipe.output, {"recipe": plain, "facts": facts})
    state.wait_for_everyone()
    if state.is_main_process:
        files.claim(recipe.output, {"recipe": plain, "facts": facts})
        for stage, config in stages:
            for note in cautions(stage, config):
                log.warning("stage %s: %s", stage.name, note)

    folders = [stage_folder(recipe, index) / "model" for index in range(len(recipe.stages))]
    done = max((index for index, folder in enumerate(folders) if files.is_complete(folder)), default=-1)
    for index in range(done + 1, len(folders)):
        run_stage(recipe, index, data[index], folders[index - 1] if index else None, state, first=index == done + 1)
    if state.is_main_process:
        for folder in folders:
            files.drop_checkpoints(folder.parent)
        files.publish(folders[-1], recipe.output / "final")
    state.wait_for_everyone()


def stage_folder(recipe: Recipe, index: int) -> Path:
    return recipe.output / f"{index}-{recipe.stages[index].name}"


# ---- before training -----------------------------------------------------------------------------------------------------------------


def check_reporting(recipe: Recipe) -> None:
    available = get_available_reporting_integrations()
    for name in recipe.report_to:
        if name not in available:
            raise FoveateError(f"report_to: {name!r} is not known or not installed; available here: {', '.join(available) or 'none'}")


def check_bridges(recipe: Recipe) -> list[int]:
    """Visual tokens per image of every stage, by building its bridge without weights.

    FoveateError that names the stage if the bridge does not fit its grid of patches."""
    return [tokens_per_image(recipe, config) for _, config in walk(recipe, load_config)]


def tokens_per_image(recipe: Recipe, config: Any) -> int:
    if isinstance(config, FoveateConfig):
        return build(config.bridge).tokens(config.grid)
    return image_length(open_processor(recipe.model.checkpoint or "", recipe.model.chat_template))


def check_machine(recipe: Recipe, config: Any, state: PartialState) -> None:
    """What this machine, its device and its packages have to give: batches that divide, precision, attention, optimisers."""
    for index, stage in enumerate(recipe.stages):
        micro, accumulation = division(stage.batch_size, stage.micro_batch, state.num_processes, stage.name)
        try:
            arguments = training_arguments(recipe, index, 1, micro, accumulation)
            if stage.precision == "fp16" and not torch.cuda.is_available():
                raise ValueError("needs a GPU, which scales its losses; use fp32 or bf16 here")
        except (ValueError, ImportError, RuntimeError) as error:
            raise FoveateError(f"stage {stage.name}: precision {stage.precision} cannot be trained here: {first_line(error)}") from None
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


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def facts_of(data: StageData) -> dict[str, Any]:
    """What must not change about the data while a run goes on."""
    found: dict[str, Any] = {"data": data.train.source.fingerprint, "samples": len(data.train)}
    if data.validation is not None:
        found["validation"] = {"data": data.validation.source.fingerprint, "samples": len(data.validation)}
    return found


def open_renderer(recipe: Recipe) -> Renderer:
    """The chat format that the model will have. FoveateError if the language model has no image token and the recipe adds none."""
    spec = recipe.model
    if spec.checkpoint is not None:
        return Renderer(open_processor(spec.checkpoint, spec.chat_template))
    assert spec.text is not None
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(spec.text))
    except (OSError, ValueError) as error:
        raise FoveateError(f"the tokenizer of {spec.text!r} could not be loaded: {str(error).strip().splitlines()[0]}") from None
    if spec.add_image_token:
        tokenizer.add_tokens([MARKER], special_tokens=True)
    elif MARKER not in tokenizer.get_vocab():
        raise FoveateError(f"the tokenizer of {spec.text!r} has no token {MARKER!r}; set model.add_image_token: true to add it")
    template = default_template(tokenizer, MARKER, spec.chat_template)
    return Renderer(SimpleNamespace(tokenizer=tokenizer, chat_template=template, image_token=MARKER))


def open_processor(name: str, template: str | None = None) -> Any:
    """The processor of a model, with another chat template where one is given."""
    try:
        processor = AutoProcessor.from_pretrained(model_folder(name))
        if template is not None:
            own = isinstance(processor, FoveateProcessor)
            processor.chat_template = default_template(processor.tokenizer, processor.image_token, template) if own else template
        return processor
    except (OSError, ValueError) as error:
        raise FoveateError(f"the processor of {name!r} could not be loaded: {str(error).strip().splitlines()[0]}") from None


def load_config(name: str, key: str) -> Any:
    what = {"vision": "vision tower", "text": "language model", "checkpoint": "checkpoint"}[key]
    refuse_file(name, what)
    try:
        return AutoConfig.from_pretrained(model_folder(name))
    except (OSError, ValueError) as error:
        raise FoveateError(f"the {what} {name!r} could not be loaded: {first_line(error)}") from None


@dataclass(frozen=True)
class StageData:
    train: Conversations
    validation: Conversations | None


def open_data(recipe: Recipe, stage: Stage, renderer: Renderer, per_image: int, state: PartialState) -> StageData:
    """What a stage trains on, and what it holds back."""

    def opened(spec: Data, name: str) -> Conversations:
        return open_samples(recipe, spec, name, Fit(renderer, per_image, stage.max_length), state)

    held = None if stage.validation is None else opened(stage.validation, f"{stage.name}-validation")
    return StageData(opened(stage.data, stage.name), held)


def open_samples(recipe: Recipe, spec: Data, name: str, fits: Fit, state: PartialState) -> Conversations:
    """Samples, each of them and each image checked; the processes share the work."""
    data = Conversations.open(spec.conversations, spec.images, spec.dataset, spec.split, spec.limit, spec.config)
    rows = range(len(data.source))[state.process_index :: state.num_processes]
    columns = (TextColumn("checking {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not state.is_main_process) as bar:
        task = bar.add_task(data.source.name, total=len(rows))
        bad = find_bad(data.source, cache_file(data.source), rows, fits, lambda done, total: bar.update(task, completed=done))
    bad = sorted(gather_object(bad), key=lambda sample: sample.index)
    cut: list[Cut] = gather_object(fits.cut)
    if state.is_main_process and cut:
        log.warning("stage %s: %s", name, told(cut, data.source.name, len(data.source), fits.max_length))
    report = recipe.output / f"bad-samples-{name}.txt"
    refuse_or_skip(data, bad, spec.on_bad_sample, report if state.is_main_process else None)
    return data


# ---- the model of a stage ------------------------------------------------------------------------------------------------------------


@dataclass
class Opened:
    """A model ready to be trained on a stage. `tuner` is PEFT's, where LoRA was injected; `trained` what is trained, for the cost model;
    `use_cache` what its config said, which the Trainer overwrites."""

    model: Any
    processor: Any
    tuner: Any
    trained: Updated
    use_cache: bool | None


def open_model(recipe: Recipe, index: int, previous: Path | None) -> Opened:
    """The model that stage `index` begins with: that of the stage before, or the recipe's; bridge scaled, parts frozen, LoRA in place.

    Deterministic: called again for a resumed run it gives the same bits."""
    stage, spec = recipe.stages[index], recipe.model
    torch.manual_seed(seed_of(recipe.seed, stage.name, "model"))
    built = previous is None and spec.checkpoint is None
    if built:
        assert spec.vision is not None
        assert spec.text is not None
        model, processor = from_backbones(
            resolve(spec.vision),
            resolve(spec.text),
            first_bridge(spec, stage),
            vision_feature_layer=spec.vision_feature_layer,
            image_size=stage.image_size,
            add_image_token=spec.add_image_token,
            dtype=spec.dtype,
            attn_implementation=spec.attn_implementation,
        )
        if spec.chat_template is not None:
            processor.chat_template = default_template(processor.tokenizer, processor.image_token, spec.chat_template)
    else:
        source = str(previous or model_folder(spec.checkpoint or ""))
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                source, dtype=getattr(torch, spec.dtype), attn_implementation=spec.attn_implementation
            )
        except (OSError, ValueError, ImportError) as error:
            raise FoveateError(f"the model {source} could not be loaded: {first_line(error)}") from None
        processor = open_processor(source, spec.chat_template)
    save_end(model, processor)
    if isinstance(model.config, FoveateConfig):
        size = stage.image_size or model.config.image_size
        if wants_scaling(stage, model.config.bridge):
            assert stage.bridge is not None
            model.scale_bridge(stage.bridge.scales, size, stage.bridge.sources)
        model.set_image_size(size)
        processor.set_bridge(model.config.bridge, size)
        # so that a step without any image does to the bridge what it does in several processes (gradients of zero, not none at all)
        model.config.always_run_vision = True
    trained = trained_parts(stage, model)
    tuner = choose_trained(model, stage.train, trained.lora_targets)
    return Opened(model, processor, tuner, trained, getattr(model.config, "use_cache", None))


def save_end(model: Any, processor: Any) -> None:
    """See to it that what is saved stops where its answers have ended in training: at the token that the chat template writes there.

    Base models often have another end of sequence. It stays an end in the configurations, after the new one; the tokenizer's becomes the
    new one, unless the template writes the old one by its name."""
    renderer = Renderer(processor)
    if renderer.end_id is None:
        return  # no sample can be written with such a template, which is said where they are checked
    model.generation_config = savable(model.generation_config)
    holders = [model.generation_config, model.config.get_text_config()]
    if getattr(model.config, "eos_token_id", None) is not None:
        holders.append(model.config)
    for holder in holders:
        old = holder.eos_token_id
        listed = list(old) if isinstance(old, list | tuple) else [] if old is None else [old]
        if renderer.end_id not in listed:
            holder.eos_token_id = [renderer.end_id, *listed] if listed else renderer.end_id
    if not renderer.end and "eos_token" not in renderer.template:
        processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(renderer.end_id)


def choose_trained(model: Any, trained: Trained, targets: Sequence[str]) -> Any:
    """Freeze what is not trained and inject LoRA into the linear maps of the decoder layers that are called `targets`.

    Returns PEFT's tuner, or None."""
    tower, bridge = part_modules(model)
    lora = trained.lm.lora if isinstance(trained.lm, LoraOf) else None
    model.requires_grad_(trained.lm is True)
    tower.requires_grad_(trained.tower)
    bridge.requires_grad_(trained.bridge)
    if trained.tower and hasattr(model, "model") and hasattr(model.model, "unused_tower_parameters"):
        unused = set(model.model.unused_tower_parameters())
        for name, parameter in tower.named_parameters():
            if name in unused:
                parameter.requires_grad_(False)
    if lora is None:
        return None
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    inside = {id(module) for module in read(model).layers.modules() if isinstance(module, nn.Linear)}
    names = [name for name, module in model.named_modules() if id(module) in inside and name.rpartition(".")[2] in targets]
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, bias="none")
    tuner = LoraModel(model, {"default": config}, "default")
    for name, parameter in model.named_parameters():  # PEFT freezes all that is not LoRA
        if "lora_" not in name:
            parameter.requires_grad_(wanted.get(name, False))
    return tuner


def rehearse(recipe: Recipe, index: int, opened: Opened, state: PartialState) -> None:
    """One forward pass of one image with every reducer of the stages from `index` on: what no configuration tells fails here, and not at
    the step that needs it."""
    spelled = {spelled: stage for stage in recipe.stages[index:] for part in stage.parts for spelled in part.cycle if spelled != NONE}
    if not spelled:
        return
    model, training = opened.model.to(state.device), opened.model.training
    sample = Conversation(
        0, "rehearsal", [("user", f"{MARKER}\nWhat is this?"), ("assistant", "Grey.")], [Image.new("RGB", (64, 64), "grey")]
    )
    batch = {
        name: value.to(state.device) for name, value in make_collator(opened.processor, sys.maxsize)([sample]).items() if name != "images"
    }
    with torch.random.fork_rng(), torch.no_grad():
        for reducers, stage in spelled.items():
            try:
                with attach(model.eval(), parse(reducers), record="none"):
                    model(**batch)
            except (FoveateError, ValueError, RuntimeError) as error:
                raise FoveateError(f"stage {stage.name}: {reducers} cannot run on this model: {first_line(error)}") from error
    model.train(training)


# ---- one stage -----------------------------------------------------------------------------------------------------------------------


def run_stage(recipe: Recipe, index: int, data: StageData, previous: Path | None, state: PartialState, first: bool) -> None:
    stage, folder = recipe.stages[index], stage_folder(recipe, index)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        files.clean(folder)
    state.wait_for_everyone()
    checkpoint = files.newest(folder)
    opened = open_model(recipe, index, previous)
    trainer = make_trainer(recipe, index, data, opened, state)
    if first and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # what is sharded may have no room on one device
        rehearse(recipe, index, opened, state)
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise FoveateError("DeepSpeed's ZeRO stage 3 is not supported, stages 1 and 2 are; to shard the weights as well use FSDP")
    if stage.precision == "bf16-copy" and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise FoveateError(f"stage {stage.name}: precision bf16-copy is not for sharded training, use bf16 (autocast)")
    if state.is_main_process:
        done = 0 if checkpoint is None else files.step_of(checkpoint)
        trainer.progress.announce(done)
        earlier = {s.name for s in recipe.stages[:index]}
        trainer.log_file.keep(lambda row: row["stage"] in earlier or (row["stage"] == stage.name and row["step"] <= done))
    if checkpoint is None and previous is not None:
        trainer.totals = Totals(**json.loads((previous / "totals.json").read_text(encoding="utf-8")))
    trainer.run(checkpoint)
    if state.is_main_process:
        report_notes(recipe, stage, data.train.source.name, trainer.stage.steps * stage.batch_size)
    finish(recipe, index, previous, opened, trainer, folder)
    state.wait_for_everyone()


def training_arguments(
    recipe: Recipe, index: int, steps: int, micro: int, accumulation: int, find_unused: bool = False
) -> TrainingArguments:
    """A stage as the Trainer takes it."""
    stage, cuda = recipe.stages[index], torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(stage_folder(recipe, index)),
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


def make_collator(processor: Any, max_length: int, remember: bool = False) -> Any:
    """What makes batches for a Foveate model, or for one of the library."""
    if isinstance(processor, FoveateProcessor):
        return Collator(processor, max_length, remember)
    return LibraryCollator(processor, max_length)


def make_trainer(recipe: Recipe, index: int, data: StageData, opened: Opened, state: PartialState) -> FoveateTrainer:
    stage, samples = recipe.stages[index], data.train
    steps = stage_steps(len(samples), stage.batch_size, epochs=stage.epochs, steps=stage.steps)
    micro, accumulation = division(stage.batch_size, stage.micro_batch, state.num_processes, stage.name)
    anatomy = read(opened.model)
    # A Foveate model uses every trained parameter in every batch; others have blocks of the tower whose output they leave aside.
    foreign = not isinstance(opened.model.config, FoveateConfig)
    arguments = training_arguments(recipe, index, steps, micro, accumulation, find_unused=foreign)
    per_image = image_tokens(opened.processor)
    skipped, lost = notes(recipe, stage)
    held = None
    if stage.validation is not None and data.validation is not None:
        loading = Loading(data.validation, make_collator(opened.processor, stage.max_length, True), stage.validation.on_bad_sample, skipped)
        held = Held(loading, stage.validation.every)
    passes = steps * stage.batch_size / len(samples)
    collator = make_collator(opened.processor, stage.max_length, remember=passes > 1)
    sizes = samples.source.sizes()[samples.index] if stage.group_by_length else None
    return FoveateTrainer(
        model=opened.model,
        args=arguments,
        train_dataset=range(len(samples)),
        data_collator=Loading(samples, collator, stage.data.on_bad_sample, skipped, None if per_image else lost),
        order=Order(len(samples), stage.batch_size, recipe.seed, stage.name, sizes),
        stage=StageInfo(
            index=index,
            count=len(recipe.stages),
            name=stage.name,
            steps=steps,
            parts=stage.parts,
            per_image=per_image,
            layers=len(anatomy.layers),
            image_token_id=opened.model.config.image_token_id,
            bf16_copy=stage.precision == "bf16-copy",
        ),
        totals=Totals(),
        log_file=files.RunLog(recipe.output / "log.jsonl"),
        log_steps=recipe.log_steps,
        save_steps=stage.save_steps,
        costs=Costs(opened.model.config, opened.trained) if per_image else None,
        rates=stage.rates,
        validation=held,
        stand_in=StandIn(opened.model, opened.processor) if foreign and state.num_processes > 1 else None,
    )


def notes(recipe: Recipe, stage: Stage) -> tuple[Path, Path]:
    """Where it is noted which samples were skipped in training, and what `max_length` cut off them."""
    return recipe.output / f"skipped-{stage.name}.txt", recipe.output / f"cut-{stage.name}.txt"


def report_notes(recipe: Recipe, stage: Stage, name: str, read: int) -> None:
    """What the notes of a finished stage, in which `read` samples were read, come to."""
    skipped, lost = notes(recipe, stage)
    if skipped.is_file():
        count = len(set(skipped.read_text(encoding="utf-8").splitlines()))
        log.warning("stage %s: %d samples turned out bad in training and were skipped (list: %s)", stage.name, count, skipped)
    if lost.is_file():
        rows = [Cut(*map(int, line.split())) for line in lost.read_text(encoding="utf-8").splitlines()]
        log.warning("stage %s: as read, %s", stage.name, told(rows, name, read, stage.max_length))


def finish(recipe: Recipe, index: int, previous: Path | None, opened: Opened, trainer: FoveateTrainer, folder: Path) -> None:
    """Save the stage's model, whole and with LoRA merged into its weights."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if not trainer.is_world_process_zero():
        return
    if sharded:
        opened = open_model(recipe, index, previous)
        opened.model.load_state_dict(state)
    model = opened.model
    if opened.tuner is not None:
        model = opened.tuner.merge_and_unload()
    bad = next((name for name, parameter in model.named_parameters() if not parameter.isfinite().all()), None)
    if bad is not None:
        raise FoveateError(
            f"stage {trainer.stage.name}: after its last step {bad} holds numbers that are not finite. Nothing was saved of it"
        )
    model.requires_grad_(True)
    if isinstance(model.config, FoveateConfig):
        model.config.always_run_vision = False
    if opened.use_cache is None:
        del model.config.use_cache
    else:
        model.config.use_cache = opened.use_cache
    target = folder / "model"
    model.save_pretrained(target)
    opened.processor.save_pretrained(target)
    # What the model was trained with to the end is what it needs; several that take turns teach it to do with any of them, or none.
    ends_with = set(trainer.stage.parts[-1].cycle) if trainer.stage.parts else {NONE}
    if len(ends_with) == 1 and ends_with != {NONE}:
        save_reducers(parse(ends_with.pop()), target)
    (target / "totals.json").write_text(json.dumps(vars(trainer.totals)) + "\n", encoding="utf-8")
    files.mark(target)
