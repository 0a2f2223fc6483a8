"""Writes a Foveate model as transformers' own LLaVA, where it is one in all but name: then nothing of Foveate is needed to load it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

from foveate.errors import FoveateError
from foveate.model.modeling import FoveateForConditionalGeneration
from foveate.model.processing import FoveateProcessor, forget_last_call
from foveate.model.towers import TowersConfig
from foveate.reducers import save_reducers, save_weights, saved_reducers, saved_weights


def to_llava(model: Any, processor: Any) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """`model` and `processor` as LLaVA's. The weights are shared, not copied, and the logits of a trial are the same to the last bit.

    FoveateError that says why where LLaVA cannot be this model: another bridge than an MLP, or one with norms or places, a tiling, several
    towers, images of another size than the tower's own, several tokens before the patches, a language model that does more than multiply
    between its last hidden state and the logits.
    """
    if not isinstance(model, FoveateForConditionalGeneration) or not isinstance(processor, FoveateProcessor):
        raise FoveateError(f"only Foveate's own models are exported; a {type(model).__name__} is what the library knows already")
    config, parts = model.config, model.model
    kind, native = parts.bridge.kind, config.native_size
    if kind != "mlp":
        raise FoveateError(
            f"a {kind} bridge cannot be exported: LLaVA's projector is an MLP that makes one token of each patch (kind: mlp)"
        )
    if parts.bridge.config()["norm"]:
        raise FoveateError("the mlp bridge normalises levels (norm: true), and LLaVA's projector does not: it cannot be exported")
    if parts.bridge.config()["places"]:
        raise FoveateError("the mlp bridge says where tokens are (places: true), and LLaVA's projector does not: it cannot be exported")
    if config.tiling is not None:
        raise FoveateError(f"the model cuts images by {config.tiling}, and LLaVA sees each whole, once: it cannot be exported")
    if isinstance(config.vision_config, TowersConfig):
        raise FoveateError("the model has several vision towers, and LLaVA has one: it cannot be exported")
    if config.image_size != native:
        raise FoveateError(
            f"the model takes images of {config.image_size} pixels and its tower was made for {native}: LLaVA does not interpolate "
            f"positions; train with image_size: {native} to export"
        )
    pixels = torch.rand(1, getattr(config.vision_config, "num_channels", 3), native, native, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(model.device, model.dtype)
    patches = parts.grid[0] * parts.grid[1]
    with torch.no_grad():
        states = parts.get_image_features(pixels, return_dict=True).hidden_states
    levels = config.vision_feature_layer
    before = states[levels[0]].shape[1] - patches
    if before > 1:
        raise FoveateError(f"the tower puts {before} tokens before its patches: LLaVA can leave out one, a [CLS]")

    strategy = "default" if before else "full"
    plain = LlavaConfig(
        vision_config=copy.deepcopy(config.vision_config),
        text_config=copy.deepcopy(config.text_config),
        image_token_index=config.image_token_id,
        image_seq_length=patches,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=levels[0] if len(levels) == 1 else list(levels),
        dtype=model.dtype,
    )
    try:
        with torch.device("meta"):
            llava = LlavaForConditionalGeneration(plain)
    except (AttributeError, ValueError) as error:
        name = type(parts.causal_lm).__name__
        raise FoveateError(f"LLaVA cannot be built around a {name}: {error}") from error
    head = model.get_output_embeddings()
    _put(llava.model, "vision_tower", parts.vision_tower)
    _put(llava.model, "language_model", parts.causal_lm.base_model)
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise FoveateError(f"the head of {type(parts.causal_lm).__name__} is no matrix alone, as LLaVA's is: it cannot be exported")
    llava.lm_head = head
    llava.model.multi_modal_projector.linear_1 = parts.bridge.linear_1
    llava.model.multi_modal_projector.linear_2 = parts.bridge.linear_2
    llava.generation_config = copy.deepcopy(model.generation_config)
    llava.train(model.training)
    _compare(model, llava, pixels, patches)

    image_processor, tokenizer = copy.deepcopy(processor.image_processor), copy.deepcopy(processor.tokenizer)
    return llava, LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=before,
    )


def export(model: Any, processor: Any, out: str | Path) -> Path:
    """Writes what `to_llava` makes of them into the folder `out`, which is new or empty. FoveateError as there.

    Reducers that the model was saved with go with it: they need Foveate, and `attach` finds them.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FoveateError(f"{out} is there already; name a new or an empty folder")
    llava, plain = to_llava(model, processor)
    llava.save_pretrained(out)
    forget_last_call(plain.tokenizer)
    plain.save_pretrained(out)
    if reducers := saved_reducers(model.config.name_or_path):
        save_reducers(reducers, out)
        save_weights({}, out, saved_weights(model.config.name_or_path))
    return out


def _put(parent: Any, name: str, part: PreTrainedModel) -> None:
    """`part` in the place of one that has no weights yet; its own attention and precision stay."""
    expected = type(getattr(parent, name))
    if type(part) is not expected:
        raise FoveateError(
            f"LLaVA would make a {expected.__name__} of this configuration, not a {type(part).__name__}: it cannot be exported"
        )
    setattr(parent, name, part)


def _compare(model: Any, llava: Any, pixels: torch.Tensor, patches: int) -> None:
    """One image among text through both. FoveateError where a bit differs."""
    token = model.config.image_token_id
    text = [number for number in range(8) if number != token]
    ids = torch.tensor([[*text[:2], *[token] * patches, *text[2:]]], device=model.device)
    training = model.training
    model.eval(), llava.eval()
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids, pixel_values=pixels).logits for each in (model, llava))
    model.train(training), llava.train(training)
    if not torch.equal(ours, theirs):
        raise FoveateError(
            f"with {type(model.model.causal_lm).__name__} LLaVA's logits differ from this model's, by up to "
            f"{float((ours - theirs).abs().max()):.2g}: LLaVA does no more than a matrix product after the last hidden state; not exported"
        )
