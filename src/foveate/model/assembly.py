"""Assembling a model and its processor from pretrained backbones."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    GenerationConfig,
    PreTrainedModel,
)

from foveate.bridges import Bridge, build_bridge
from foveate.errors import FoveateError
from foveate.model.configuration import FoveateConfig
from foveate.model.modeling import FoveateForConditionalGeneration
from foveate.model.processing import FoveateProcessor, require_token
from foveate.model.towers import Normal, Towers, TowersConfig, told
from foveate.model.weights import load_weights, reading
from foveate.world import resolve


def from_backbones(
    vision: str | Path | PreTrainedModel | Sequence[str | Path | PreTrainedModel],
    text: str | Path | PreTrainedModel,
    bridge: dict[str, Any] | Bridge,
    *,
    vision_feature_layer: Any = None,
    image_size: int | None = None,
    tiling: str | None = None,
    add_image_token: bool = False,
    image_token: str = "<image>",
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    image_processor: Any = None,
    tokenizer: Any = None,
    chat_template: str | None = None,
    model_class: type[Any] = FoveateForConditionalGeneration,
) -> tuple[Any, FoveateProcessor]:
    """A model and its processor from a vision tower, a causal LM and a bridge.

    The two are hub names, folders, "asset:" or "real:" names, or modules, which are taken over.

    The language model is one that takes embeddings and keeps its past in `past_key_values`; to attach reducers to it, or to train it by a
    recipe, it also has decoder layers named `layers` that attend by the library's attention (Llama, Qwen, Mistral, Gemma, Phi, OPT,
    GPT-NeoX and their like; not GPT-2, Falcon, BLOOM, MPT, GPT-J).

    - `bridge`: {"kind": ..., arguments}; widths, levels and grid that are left open come from the backbones. Or a Bridge.
    - `vision`: a list is of several towers that see every picture (`foveate.model.towers`), of which `vision_feature_layer` then has an
      entry each, a number or several, and `image_processor` one each where they are given.
    - `vision_feature_layer`, `tiling`: see FoveateConfig. `image_size`: pixels of a view, the tower's own unless given.
    - `add_image_token`: add `image_token` to a tokenizer that lacks it and a row to the embeddings at both ends.
    - `dtype`: of all three parts; unless given, that in which the language model was saved (transformers 5's rule).
    - `image_processor`, `tokenizer`: needed with modules, else loaded from where the backbones are. Copies are changed, not these.

    FoveateError if a backbone is not there, or the parts do not fit.
    """
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    text = named(text)
    if isinstance(text, PreTrainedModel):
        language_model = text if dtype is None else converted(text, resolve_dtype(dtype))
    else:
        language_model = load_part(AutoModelForCausalLM, text, "language model", dtype=dtype or "auto", **options)
    dtype = resolve_dtype(dtype) if dtype is not None else language_model.dtype
    tower, image_processor, vision_feature_layer = open_vision(vision, image_processor, vision_feature_layer, dtype, options)
    tokenizer = copy.deepcopy(tokenizer) if tokenizer is not None else load(AutoTokenizer, source(text, "tokenizer"), "tokenizer")
    if tokenizer.pad_token is None:  # batches need one; as in LLaVA it is the unknown token where there is one
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    fit_image_token(tokenizer, language_model, image_token, add_image_token)

    config = FoveateConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        bridge=bridge.config() if isinstance(bridge, Bridge) else dict(bridge),
        vision_feature_layer=vision_feature_layer,
        image_token_id=require_token(tokenizer, image_token),
        image_size=image_size,
        tiling=tiling,
        dtype=dtype,
    )
    module = bridge if isinstance(bridge, Bridge) else build_bridge(config.bridge)
    config.plan_image(config.image_size, config.image_size)  # a grid that the bridge cannot take is told before anything runs
    model = model_class(config, vision_tower=tower, bridge=module.to(dtype), causal_lm=language_model)
    if model.generation_config is not None and language_model.generation_config is not None:
        model.generation_config = savable(copy.deepcopy(language_model.generation_config))
    processor = FoveateProcessor(
        image_processor,
        tokenizer,
        chat_template=chat_template,
        bridge=config.bridge,
        patch_size=config.patch_size,
        image_size=config.image_size,
        image_token=image_token,
        tiling=config.tiling,
    )
    return model.eval(), processor


def open_vision(
    vision: Any, image_processor: Any, layers: Any, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[PreTrainedModel, Any, list[int] | int | None]:
    """The vision tower (of several names or modules one that has them in it), its image processor, and the hidden states to read of it."""
    several = isinstance(vision, Sequence) and not isinstance(vision, str)
    given = [named(one) for one in (vision if several else [vision])]
    if not given:
        raise FoveateError("vision=[] names no tower: give at least one")
    processors = list(image_processor) if isinstance(image_processor, list | tuple) else [image_processor] * len(given)
    if len(processors) != len(given):
        raise FoveateError(f"{len(processors)} image processors were given for {len(given)} vision towers: one for each, or one for all")
    towers = [converted(one, dtype) if isinstance(one, PreTrainedModel) else load_tower(one, dtype=dtype, **options) for one in given]
    processors = [
        image_processor_of(one, tower) if of is None else copy.deepcopy(of)
        for one, tower, of in zip(given, towers, processors, strict=True)
    ]
    if not several:
        told(towers[0].config, [-2] if layers is None else [layers] if isinstance(layers, int) else layers)
        return towers[0], processors[0], layers
    config = TowersConfig.of([tower.config for tower in towers], layers, normals(processors))
    return Towers(config, towers), processors[0], -1


def image_processor_of(vision: Any, tower: PreTrainedModel) -> Any:
    """The image processor that lies beside a tower; of one of timm, whose own crops and takes no other size, CLIP's with its numbers."""
    timm: Any = getattr(tower, "timm_model", None)
    if timm is None:
        return load(AutoImageProcessor, source(vision, "image_processor"), "image processor", backend="pil")
    said = timm.pretrained_cfg | (getattr(tower.config, "pretrained_cfg", None) or {})
    return CLIPImageProcessorPil(
        image_mean=list(said["mean"]), image_std=list(said["std"]), resample=Image.Resampling[said["interpolation"].upper()]
    )


def normals(processors: Sequence[Any]) -> list[Normal] | None:
    """How each processor normalises; None where all do it alike, or one does not say."""
    found = [(getattr(one, "image_mean", None), getattr(one, "image_std", None)) for one in processors]
    told: list[Normal] = [(list(mean), list(std)) for mean, std in found if mean is not None and std is not None]
    return None if len(told) < len(found) or all(one == told[0] for one in told) else told


def named(part: Any) -> Any:
    """A backbone as it was given, or where its name leads."""
    return part if isinstance(part, PreTrainedModel) else resolve(str(part))


def savable(config: GenerationConfig) -> GenerationConfig:
    """The configuration, or only its tokens where the library loads it but would refuse to save it: Vicuna's, for one, has a temperature
    and does not sample."""
    try:
        config.validate(strict=True)
    except ValueError:
        tokens = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
        return GenerationConfig(**tokens, max_length=config.max_length)
    return config


def fit_image_token(tokenizer: Any, language_model: PreTrainedModel, token: str, add: bool) -> None:
    """See to it that tokenizer and embeddings have the image token; only `add` allows to change them."""
    if token not in tokenizer.get_vocab() and add:
        tokenizer.add_tokens([token], special_tokens=True)
    rows = language_model.get_input_embeddings().weight.shape[0]
    if require_token(tokenizer, token) < rows:
        return
    if not add:
        raise FoveateError(
            f"token {token!r} of the tokenizer {tokenizer.name_or_path!r} has number {require_token(tokenizer, token)} "
            f"but the language model has {rows} embeddings; add_image_token=True adds rows"
        )
    language_model.resize_token_embeddings(len(tokenizer))


def load_tower(name: str | Path, **options: Any) -> PreTrainedModel:
    """A vision tower; of a model with a text side, such as CLIP, the vision side."""
    config = load(AutoConfig, name, "vision tower")
    if hasattr(config, "vision_config"):
        with torch.device("meta"):  # built only to learn its class
            tower = type(AutoModel.from_config(config.vision_config))
        return load_part(tower, name, "vision tower", **options)
    return load_part(AutoModel, name, "vision tower", **options)


def load_part(loader: Any, name: str | Path, what: str, **options: Any) -> PreTrainedModel:
    """A tower or a language model with all of its weights; poolers and heads of a tower may be missing, since only its states are read."""
    refuse_file(name, what)
    message = f"the {what} {str(name)!r} could not be loaded"
    spare = ("pool", "attnpool", "attn_pool", "head", "classifier") if what == "vision tower" else ()
    found: PreTrainedModel = load_weights(loader, name, message, spare, **options)
    return found


def load(loader: Any, name: str | Path, what: str, **options: Any) -> Any:
    refuse_file(name, what)
    with reading(f"the {what} {str(name)!r} could not be loaded"):
        return loader.from_pretrained(str(name), **options)


def refuse_file(name: str | Path, what: str) -> None:
    """FoveateError where `name` is one file, which is no folder of a model; for a GGUF file it says how to unpack it."""
    path = Path(name)
    if path.suffix == ".gguf":
        raise FoveateError(
            f"the {what} {str(name)!r} is a GGUF file, packed for another runtime. Unpack it once: foveate real unpack {path} FOLDER, and "
            "give the folder; or give the original that it was packed from"
        )
    if os.path.isfile(path):
        raise FoveateError(f"the {what} {str(name)!r} is one file; give the folder with its config.json, weights and processor")


def source(backbone: Any, argument: str) -> str | Path:
    if isinstance(backbone, PreTrainedModel):
        raise FoveateError(f"a backbone that is given as a module needs its {argument} beside it: from_backbones(..., {argument}=...)")
    assert isinstance(backbone, str | Path)
    return backbone


def converted(module: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`module` in another precision. What is computed and not saved, such as rotary frequencies, keeps its own, as after loading."""
    computed = [(part, name, part._buffers[name]) for part in module.modules() for name in part._non_persistent_buffers_set]
    module.to(dtype)
    for part, name, buffer in computed:
        part._buffers[name] = buffer
    return module


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype):
        raise FoveateError(f"dtype {dtype!r} is not one of torch's; try float32 or bfloat16")
    return resolved
