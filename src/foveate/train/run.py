"""A recipe from beginning to end: check everything, then train stage after stage, going on where an earlier run was.

Every stage but the first begins with the model folder that the one before it has saved, also when nothing was interrupted: a resumed
run and an uninterrupted one go through the same files and are the same run, to the last bit on a CPU.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging as transformers_logging

import foveate.model  # noqa: F401  registers the Auto classes
from foveate.anatomy import read
from foveate.bridges import build_bridge
from foveate.data.chat import Renderer
from foveate.data.collate import Collator, Cut, Fit, image_tokens, told
from foveate.data.conversations import MARKER, Conversations, cache_file, find_bad, refuse_or_skip
from foveate.data.library import LibraryCollator, image_length
from foveate.errors import FoveateError
from foveate.model.assembly import from_backbones, refuse_file, savable
from foveate.model.configuration import FoveateConfig
from foveate.model.processing import FoveateProcessor, default_template
from foveate.reducers import parse, save_reducers
from foveate.train import files
from foveate.train.loading import Loading
from foveate.train.order import Order, division, seed_of
from foveate.train.recipe import LoraOf, Recipe, Stage, Trained, load_recipe
from foveate.train.schedule import NONE, stage_steps
from foveate.train.trainer import Costs, FoveateTrainer, StageInfo, Totals
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
    files.compare(recipe.output, {"recipe": plain})
    if files.is_complete(final):
        return final
    check_reporting(recipe)
    counts = check_bridges(recipe)
    renderer = open_renderer(recipe)
    if renderer.end and state.is_main_process:
        log.warning("the chat template writes no token behind an answer: %s is put there, so that the model learns to stop", renderer.end)
    for stage in recipe.stages:
        division(stage.batch_size, stage.micro_batch, state.num_processes, stage.name)
    data = [open_data(recipe, stage, Fit(renderer, n, stage.max_length), state) for stage, n in zip(recipe.stages, counts, strict=True)]
    facts = {stage.name: {"data": d.source.fingerprint, "samples": len(d)} for stage, d in zip(recipe.stages, data, strict=True)}
    files.compare(recipe.output, {"recipe": plain, "facts": facts})
    state.wait_for_everyone()
    if state.is_main_process:
        files.claim(recipe.output, {"recipe": plain, "facts": facts})

    previous: Path | None = None
    for index in range(len(recipe.stages)):
        finished = stage_folder(recipe, index) / "model"
        if not files.is_complete(finished):
            run_stage(recipe, index, data[index], previous, state)
        if state.is_main_process:
            files.drop_checkpoints(stage_folder(recipe, index))
        previous = finished
    assert previous is not None
    if state.is_main_process:
        files.publish(previous, final)
    state.wait_for_everyone()
    return final


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
    spec = recipe.model
    if spec.checkpoint is not None:
        config = load_config(spec.checkpoint, "checkpoint")
        if not isinstance(config, FoveateConfig):
            for stage in recipe.stages:
                refuse_resizing(stage, config)
            return [image_length(open_processor(spec.checkpoint, spec.chat_template))] * len(recipe.stages)
    else:
        assert spec.vision is not None
        assert spec.text is not None
        vision, text = load_config(spec.vision, "vision tower"), load_config(spec.text, "language model")
        first = recipe.stages[0]
        config = FoveateConfig(
            vision_config=getattr(vision, "vision_config", vision),
            text_config=text,
            bridge=first_bridge(recipe),
            vision_feature_layer=spec.vision_feature_layer,
            image_size=first.image_size,
        )
    counts = []
    with torch.device("meta"):
        bridge = build_bridge(config.bridge)
        for index, stage in enumerate(recipe.stages):
            size = stage.image_size or config.image_size
            try:
                if wants_scaling(stage, bridge.config(), built=index == 0 and spec.checkpoint is None):
                    assert stage.bridge is not None
                    bridge = bridge.scaled(scales=stage.bridge.scales, grid=config.patch_grid(size, size)[0], sources=stage.bridge.sources)
                counts.append(bridge.tokens(config.patch_grid(size, size)))
            except FoveateError as error:
                raise FoveateError(f"stage {stage.name}: {error}") from None
            config.image_size = size
    return counts


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
        processor = AutoProcessor.from_pretrained(resolve(name))
        if template is not None:
            own = isinstance(processor, FoveateProcessor)
            processor.chat_template = default_template(processor.tokenizer, processor.image_token, template) if own else template
        return processor
    except (OSError, ValueError) as error:
        raise FoveateError(f"the processor of {name!r} could not be loaded: {str(error).strip().splitlines()[0]}") from None


def load_config(name: str, what: str) -> Any:
    refuse_file(name, what)
    try:
        return AutoConfig.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        raise FoveateError(f"the {what} {name!r} could not be loaded: {str(error).strip().splitlines()[0]}") from None


def first_bridge(recipe: Recipe) -> dict[str, Any]:
    """A new bridge is built with the scales of the first stage at once; there is nothing to inflate yet."""
    bridge = dict(recipe.model.bridge or {})
    first = recipe.stages[0]
    if first.bridge is not None:
        bridge["scales"] = first.bridge.scales
    return bridge


def wants_scaling(stage: Stage, bridge: dict[str, Any], built: bool) -> bool:
    return stage.bridge is not None and not built and [tuple(s) for s in bridge.get("scales", [])] != stage.bridge.scales


def refuse_resizing(stage: Stage, config: Any) -> None:
    if stage.bridge is not None:
        raise FoveateError(f"stage {stage.name}: a {config.model_type} model has no bridge that can be scaled; leave `bridge` out")
    native = getattr(getattr(config, "vision_config", None), "image_size", None)
    if stage.image_size is not None and stage.image_size != native:
        raise FoveateError(
            f"stage {stage.name}: a {config.model_type} model takes images of {native} pixels, not image_size {stage.image_size}"
        )


def open_data(recipe: Recipe, stage: Stage, fits: Fit, state: PartialState) -> Conversations:
    """The stage's samples, each of them and each image checked; the processes share the work."""
    spec = stage.data
    data = Conversations.open(spec.conversations, spec.images, spec.dataset, spec.split, spec.limit, spec.config)
    rows = range(len(data.source))[state.process_index :: state.num_processes]
    columns = (TextColumn("checking {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not state.is_main_process) as bar:
        task = bar.add_task(data.source.name, total=len(rows))
        bad = find_bad(data.source, cache_file(data.source), rows, fits, lambda done, total: bar.update(task, completed=done))
    bad = sorted(gather_object(bad), key=lambda sample: sample.index)
    cut: list[Cut] = gather_object(fits.cut)
    if state.is_main_process and cut:
        log.warning("stage %s: %s", stage.name, told(cut, data.source.name, len(data.source), stage.max_length))
    report = recipe.output / f"bad-samples-{stage.name}.txt"
    refuse_or_skip(data, bad, spec.on_bad_sample, report if state.is_main_process else None)
    return data


# ---- the model of a stage ------------------------------------------------------------------------------------------------------------


@dataclass
class Opened:
    """A model ready to be trained on a stage. `tuner` is PEFT's, where LoRA was injected; `use_cache` what its config said, which the
    Trainer overwrites."""

    model: Any
    processor: Any
    tuner: Any
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
            first_bridge(recipe),
            vision_feature_layer=spec.vision_feature_layer,
            image_size=stage.image_size,
            add_image_token=spec.add_image_token,
            dtype=spec.dtype,
            attn_implementation=spec.attn_implementation,
        )
        if spec.chat_template is not None:
            processor.chat_template = default_template(processor.tokenizer, processor.image_token, spec.chat_template)
    else:
        source = str(previous or resolve(spec.checkpoint or ""))
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                source, dtype=getattr(torch, spec.dtype), attn_implementation=spec.attn_implementation
            )
        except (OSError, ValueError) as error:
            raise FoveateError(f"the model {source} could not be loaded: {str(error).strip().splitlines()[0]}") from None
        processor = open_processor(source, spec.chat_template)
    save_end(model, processor)
    if isinstance(model.config, FoveateConfig):
        size = stage.image_size or model.config.image_size
        if wants_scaling(stage, model.config.bridge, built):
            assert stage.bridge is not None
            model.scale_bridge(stage.bridge.scales, size, stage.bridge.sources)
        model.set_image_size(size)
        processor.set_bridge(model.config.bridge, size)
        # so that a step without any image does to the bridge what it does in several processes (gradients of zero, not none at all)
        model.config.always_run_vision = True
    tuner = choose_trained(model, stage.train)
    return Opened(model, processor, tuner, getattr(model.config, "use_cache", None))


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


def part_modules(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(tower, bridge) of a vision-language model; everything else is the language model. FoveateError if one is not found."""
    core = read(model).core
    found = []
    for what, names in {
        "vision tower": ("vision_tower", "vision_model", "visual"),
        "bridge": ("bridge", "multi_modal_projector", "connector", "mm_projector"),
    }.items():
        module = next((getattr(core, name) for name in names if isinstance(getattr(core, name, None), nn.Module)), None)
        if module is None:
            raise FoveateError(f"{type(model).__name__} has no {what}: none of {', '.join(names)} is there")
        found.append(module)
    return found[0], found[1]


def choose_trained(model: Any, trained: Trained) -> Any:
    """Freeze what is not trained and inject LoRA into the decoder layers. Returns PEFT's tuner, or None."""
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

    layers = read(model).layers
    inside = {id(module) for module in layers.modules()}
    names = [name for name, module in model.named_modules() if id(module) in inside and name.rpartition(".")[2] in lora.targets]
    if not names:
        linear = sorted({name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, nn.Linear)})
        raise FoveateError(f"LoRA targets {', '.join(lora.targets)} are not in the decoder layers, which have {', '.join(linear)}")
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, bias="none")
    tuner = LoraModel(model, {"default": config}, "default")
    for name, parameter in model.named_parameters():  # PEFT freezes all that is not LoRA
        if "lora_" not in name:
            parameter.requires_grad_(wanted.get(name, False))
    return tuner


# ---- one stage -----------------------------------------------------------------------------------------------------------------------


def run_stage(recipe: Recipe, index: int, data: Conversations, previous: Path | None, state: PartialState) -> None:
    stage, folder = recipe.stages[index], stage_folder(recipe, index)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        files.clean(folder)
    state.wait_for_everyone()
    checkpoint = files.newest(folder)
    opened = open_model(recipe, index, previous)
    trainer = make_trainer(recipe, index, data, opened, state)
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
        report_notes(recipe, stage, data.source.name, trainer.stage.steps * stage.batch_size)
    finish(recipe, index, previous, opened, trainer, folder)
    state.wait_for_everyone()


def make_trainer(recipe: Recipe, index: int, data: Conversations, opened: Opened, state: PartialState) -> FoveateTrainer:
    stage = recipe.stages[index]
    steps = stage_steps(len(data), stage.batch_size, epochs=stage.epochs, steps=stage.steps)
    micro, accumulation = division(stage.batch_size, stage.micro_batch, state.num_processes, stage.name)
    anatomy = read(opened.model)
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(stage_folder(recipe, index)),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="constant_with_warmup" if stage.lr_schedule == "constant" and stage.warmup else stage.lr_schedule,
        warmup_steps=math.ceil(stage.warmup * steps),
        weight_decay=stage.weight_decay,
        optim=stage.optimizer,
        adam_beta1=stage.adam_betas[0],
        adam_beta2=stage.adam_betas[1],
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.precision == "bf16",
        use_cpu=not cuda,
        activation_checkpointing=stage.gradient_checkpointing,
        average_tokens_across_devices=True,
        # a Foveate model uses every trained parameter in every batch; others leave the projector out where a batch has no image
        ddp_find_unused_parameters=False if isinstance(opened.model.config, FoveateConfig) else None,
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
    passes = steps * stage.batch_size / len(data)
    per_image = image_tokens(opened.processor)
    collator: Any
    if isinstance(opened.processor, FoveateProcessor):
        collator = Collator(opened.processor, stage.max_length, remember=passes > 1)
    else:
        collator = LibraryCollator(opened.processor, stage.max_length)
    skipped, lost = notes(recipe, stage)
    sizes = data.source.sizes()[data.index] if stage.group_by_length else None
    return FoveateTrainer(
        model=opened.model,
        args=arguments,
        train_dataset=range(len(data)),
        data_collator=Loading(data, collator, stage.data.on_bad_sample, skipped, None if per_image else lost),
        order=Order(len(data), stage.batch_size, recipe.seed, stage.name, sizes),
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
        costs=Costs(opened.model.config, stage.train.updated) if per_image else None,
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
