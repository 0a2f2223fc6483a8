"""The model that a stage trains: opened or assembled, its bridge scaled, its parts frozen, LoRA in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate.model  # noqa: F401  registers the Auto classes
from foveate.accounting import Trained as Updated
from foveate.anatomy import read
from foveate.data.chat import Renderer
from foveate.model.assembly import from_backbones, savable
from foveate.model.processing import FoveateProcessor, default_template
from foveate.model.weights import load_weights, reading
from foveate.reducers import add_weights, parse, saved_weights
from foveate.reducers.learned import registered
from foveate.train.order import seed_of
from foveate.train.settings import LoraOf, Recipe, Trained
from foveate.train.stages import advance, first_bridge, growth, is_assembled, model_folder, part_modules, tiling_of, trained_parts


@dataclass
class Opened:
    """A model ready to be trained on a stage. `tuner` is PEFT's, where LoRA was injected; `trained` what is trained, for the cost model;
    `use_cache` what its config said, which the Trainer overwrites; `weights` those of reducers that it came with, this stage's and
    others'."""

    model: Any
    processor: Any
    tuner: Any
    trained: Updated
    use_cache: bool | None
    weights: Mapping[str, Tensor] = field(default_factory=dict)


def open_model(recipe: Recipe, index: int, previous: Path | None) -> Opened:
    """The model that stage `index` begins with: that of the stage before, or the recipe's; bridge scaled, parts frozen, LoRA in place.

    Deterministic: called again for a resumed run it gives the same bits."""
    stage, spec = recipe.stages[index], recipe.model
    torch.manual_seed(seed_of(recipe.seed, stage.name, "model"))
    built = previous is None and spec.checkpoint is None
    weights: Mapping[str, Tensor] = {}
    if built:
        assert spec.vision is not None
        assert spec.text is not None
        model, processor = from_backbones(
            spec.vision,
            spec.text,
            first_bridge(spec, stage),
            vision_feature_layer=spec.vision_feature_layer,
            image_size=stage.image_size,
            tiling=stage.tiling or spec.tiling,
            add_image_token=spec.add_image_token,
            dtype=spec.dtype,
            attn_implementation=spec.attn_implementation,
        )
        if spec.chat_template is not None:
            processor.chat_template = default_template(processor.tokenizer, processor.image_token, spec.chat_template)
    else:
        source = str(previous or model_folder(spec.checkpoint or ""))
        options = {"dtype": getattr(torch, spec.dtype), "attn_implementation": spec.attn_implementation}
        model = load_weights(AutoModelForImageTextToText, source, f"the model {source} could not be loaded", **options)
        processor = open_processor(source, spec.chat_template)
        weights = saved_weights(source) or {}
    named = [one for spelled in stage.spelled for one in parse(spelled)]
    add_weights(model, named, saved=weights, seed=seed_of(recipe.seed, stage.name, "reducers"))
    save_end(model, processor)
    if is_assembled(model.config):
        after = advance(model.config, stage)
        size, model.config.view_tokens = after.image_size, None
        if (to := growth(stage, model.config)) is not None:
            model.scale_bridge(to.scales, size, to.sources, () if to.keep is None else to.keep.kept)
        model.set_image_size(size)
        if (tiling := tiling_of(stage, model.config)) is not None:
            model.set_tiling(tiling)
        processor.set_tiling(model.config.tiling)
        if after.view_tokens is not None:
            model.set_view_tokens(after.view_tokens)
        processor.view_tokens = model.config.view_tokens
        processor.set_bridge(model.config.bridge, size)
        # so that a step without any image does to the bridge what it does in several processes (gradients of zero, not none at all)
        model.config.always_run_vision = True
    trained = trained_parts(stage, model)
    tuner = choose_trained(model, stage.train, trained.lora_targets, stage.learned)
    return Opened(model, processor, tuner, trained, getattr(model.config, "use_cache", None), weights)


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


def choose_trained(model: Any, trained: Trained, targets: Sequence[str], learned: Sequence[str] = ()) -> Any:
    """Freeze what is not trained and inject LoRA into the linear maps of the decoder layers that are called `targets`; of the reducers'
    weights those of the methods `learned` may be trained.

    Returns PEFT's tuner, or None."""
    tower, bridge = part_modules(model)
    lora = trained.lm.lora if isinstance(trained.lm, LoraOf) else None
    model.requires_grad_(trained.lm is True)
    tower.requires_grad_(trained.tower)
    bridge.requires_grad_(trained.bridge)
    for name, module in (registered(read(model)) or {}).items():
        module.requires_grad_(trained.reducers and name in learned)
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


def open_processor(name: str, template: str | None = None) -> Any:
    """The processor of a model, with another chat template where one is given."""
    with reading(f"the processor of {name!r} could not be loaded"):
        processor = AutoProcessor.from_pretrained(model_folder(name))
    if template is not None:
        own = isinstance(processor, FoveateProcessor)
        processor.chat_template = default_template(processor.tokenizer, processor.image_token, template) if own else template
    return processor
