"""The decoder's layers as far as their cost goes: read from the model built on the meta device, so that no weight is loaded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from foveate.accounting.counter import parameters_of
from foveate.accounting.dry_run import Told, skeleton, trained_tower
from foveate.accounting.ledger import Trained
from foveate.accounting.prompts import image_of
from foveate.anatomy import attends, grows, read
from foveate.anatomy.config import EXPERTS, experts_of, heads_of, vision_of
from foveate.bridges.vlora import RANK
from foveate.errors import FoveateError
from foveate.model.configuration import FoveateConfig


@dataclass(frozen=True)
class Stack:
    """A stack of transformer layers: multiply-adds per token in the linear maps of each layer, and widths of its attention."""

    linear: tuple[int, ...]
    linear_shapes: tuple[tuple[str, int, int], ...]  # (name, inputs, outputs) of every linear map in every layer
    attention_width: tuple[int, ...]  # heads * head_dim; 0 where a layer recurs instead of attending
    kv_width: tuple[int, ...]  # values kept per token: 2 * key-value heads * head_dim; 0 likewise
    grows: tuple[bool, ...]  # whether the layer's cache grows with the sequence: it attends, and to all of it
    head: int  # multiply-adds per predicted token in the output embeddings


def parameters(config: Any) -> dict[str, int]:
    """Parameters of tower, bridge and language model (its embeddings and head included)."""
    if vision_of(config) is None:
        return {"lm": sum(p.numel() for p in language(Told.by(config)).parameters())}
    return parameters_of(skeleton(config))


def trainable(config: Any, trained: Trained) -> dict[str, int]:
    """Parameters that a training step changes, by part. A tower's blocks and norms behind its features get no gradient: left out."""
    found = {"tower": 0, "bridge": 0} | parameters(config)
    if trained.tower and found["tower"]:
        found["tower"] = trained_tower(config, image_of(config, None, None))
    chosen = {"tower": trained.tower, "bridge": trained.bridge, "lm": trained.lm}
    lora = sum(lora_per_layer(config, trained.lora_rank, trained.lora_targets))
    return {**{part: found[part] * wanted for part, wanted in chosen.items()}, "lora": lora}


def lora_per_layer(config: Any, rank: int, targets: Sequence[str]) -> list[int]:
    """LoRA parameters in each decoder layer, `rank * (inputs + outputs)` a map; also LoRA's multiply-adds per token."""
    stack = decoder(config)
    per_layer = [0] * len(stack.linear)
    if rank < 1:
        return per_layer
    names = {name.rpartition(".")[2] for name, _, _ in stack.linear_shapes}
    if not names & set(targets):
        raise FoveateError(
            f"LoRA targets {', '.join(targets) or 'none'} are not in the decoder layers, which have {', '.join(sorted(names))}"
        )
    for name, inputs, outputs in stack.linear_shapes:
        if name.rpartition(".")[2] in targets:
            per_layer[int(name.partition(".")[0])] += rank * (inputs + outputs)
    return per_layer


def decoder(config: Any) -> Stack:
    """The language model inside `config` (or `config` itself)."""
    return _decoder(Told.by(config))


@lru_cache(maxsize=64)
def _decoder(told: Told) -> Stack:
    config = told.thing
    text = config.get_text_config()
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING or vision_of(config) is None:
        model = language(Told.by(text))
        layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == text.num_hidden_layers), None)
        if layers is None:
            raise FoveateError(f"cannot read the cost of a {text.model_type!r} model: no list of {text.num_hidden_layers} layers in it")
    else:
        model = skeleton(config)
        layers = read(model).layers
    return stack_of(layers, text, model.get_output_embeddings())  # type: ignore[operator]


@lru_cache(maxsize=8)
def language(told: Told) -> nn.Module:
    with torch.device("meta"), torch.inference_mode(False):
        # of a copy: from_config writes the attention implementation into the config, which may be that of a model in use
        found: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(told.thing), attn_implementation="eager")
    return found


def stack_of(layers: nn.ModuleList, config: Any, output: Any = None) -> Stack:
    """What can be read off any list of layers with attention in them."""
    heads = heads_of(config)
    if heads is None:
        raise FoveateError(f"cannot read the cost of a {config.model_type!r} model: no attention heads of one width in its configuration")
    try:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    except (AttributeError, ValueError, RuntimeError) as error:  # by configurations that refuse to say one for all
        raise FoveateError(f"cannot read the cost of a {config.model_type!r} model: its heads differ from layer to layer") from error
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    here = [attends(layer) for layer in layers]
    return Stack(
        tuple(macs_of(layer, config) for layer in layers),
        tuple((name, m.in_features, m.out_features) for name, m in layers.named_modules() if isinstance(m, nn.Linear)),
        tuple(heads * head_dim * attending for attending in here),
        tuple(2 * kv_heads * head_dim * attending for attending in here),
        tuple(grows(layer, config, index) for index, layer in enumerate(layers)),
        output.weight.numel() if output is not None else 0,
    )


def macs_of(layer: nn.Module, config: Any) -> int:
    """Multiply-adds per token in the weights of a layer; of experts in those that a token meets."""
    macs, sets = 0, set()
    for name, module in layer.named_modules():
        for key, weight in module.named_parameters(recurse=False):
            if weight.ndim == 2 or isinstance(module, nn.Conv1d):
                macs += weight.numel() * (weight.ndim > 1)
            elif weight.ndim == 3:  # (experts, outputs, inputs)
                chosen = experts_of(config)
                if chosen is None:
                    raise FoveateError(
                        f"cannot predict the cost of a {config.model_type!r} model: weight {name}.{key} holds {weight.shape[0]} experts, "
                        f"and none of {', '.join(EXPERTS)} in the configuration says how many of them a token meets"
                    )
                macs += weight.numel() // weight.shape[0] * chosen
                sets.add(module)
            elif weight.ndim > 3:
                raise FoveateError(
                    f"cannot predict the cost of a {config.model_type!r} model: weight {name}.{key} has {weight.ndim} dimensions"
                )
    if len(sets) > 1:
        raise FoveateError(
            f"cannot predict the cost of a {config.model_type!r} model: which of {len(sets)} sets of experts a token meets is not known"
        )
    return macs


def low_rank(config: Any) -> list[int]:
    """Multiply-adds per token of each layer in the weights that images become, A and B; zeros where they become tokens."""
    found = [0] * len(decoder(config).linear)
    if isinstance(config, FoveateConfig) and config.weighs:
        bridge = config.bridge
        for layer in bridge["layers"]:
            found[layer] = bridge.get("rank", RANK) * sum(map(sum, bridge["targets"].values()))
    return found
