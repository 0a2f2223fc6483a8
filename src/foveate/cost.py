"""What a model costs, from its configuration alone: FLOPs, KV cache and parameters, by part and by layer of the language model.

Shapes are read from the model built on the meta device, so no weight is loaded and no class name is looked at. Formulas and the traps in
published numbers: FastV (arXiv 2403.06764), PyramidDrop (2410.17247), AIM (2412.03248), LLaVolta (2406.20092), Chain-of-Sight (2407.15819).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from foveate.bridges import Bridge, build_bridge
from foveate.errors import FoveateError
from foveate.reducers import Reducer
from foveate.reducers import visual_tokens as visual_tokens

CONVENTION = (
    "2 FLOPs per multiply-add; matrix products only (no norms, activations, softmax, rotary angles); causal attention counted as the "
    "full N x N; a trained part costs 3 forwards, a frozen part behind a trained one 2 (its attention products 3), other frozen parts 1; "
    "recomputation by gradient checkpointing is not counted"
)
PARTS = ("tower", "bridge", "lm_linear", "lm_attention", "head")


@dataclass(frozen=True)
class Trained:
    """Which parts a training step updates. `lora_rank` > 0 adapts the frozen language model's linear maps named in `lora_targets`."""

    tower: bool = False
    bridge: bool = True
    lm: bool = False
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """A stack of transformer layers: multiply-adds per token in the linear maps of each layer, and widths of its attention."""

    linear: tuple[int, ...]
    linear_shapes: tuple[tuple[str, int, int], ...]  # (name, inputs, outputs) of every linear map in every layer
    attention_width: int  # heads * head_dim
    kv_width: int  # values kept per token and layer: 2 * key-value heads * head_dim
    embed: int  # multiply-adds per patch (tower) or per predicted token (the LM's head)
    prefix: int  # tower tokens that are not patches ([CLS], registers)
    parameters: int
    used: int  # parameters that get a gradient: not a tower's pooling head, nor its blocks behind the last feature level


@dataclass(frozen=True)
class Ledger:
    """Tokens, KV bytes and FLOPs of one forward pass, one training step, or some decoding; per layer where a list."""

    mode: str
    visual_tokens: tuple[int, ...]
    total_tokens: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    visual_kv_bytes: tuple[int, ...]
    layer_flops: tuple[int, ...]
    flops: dict[str, int]
    convention: str = CONVENTION

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    @classmethod
    def observed(
        cls,
        config: Any,
        visual: Sequence[int | Sequence[int]],
        total: Sequence[int | Sequence[int]],
        *,
        images: int = 1,
        grid: tuple[int, int] | None = None,
        mode: Literal["prefill", "train"] = "prefill",
        trained: Trained | None = None,
        head_tokens: int | None = None,
        dtype_bytes: int = 2,
    ) -> Ledger:
        """From token counts as they were: `visual` and `total` hold, for each decoder layer, one count or one count per row of the batch.

        Attention's cost needs the rows apart: a layer given as one number is taken for one sequence. `head_tokens`: how many got logits;
        unless given, one per row in "prefill" and the tokens of the first layer in "train".
        """
        if len(visual) != len(total):
            raise FoveateError(f"visual tokens of {len(visual)} layers but total tokens of {len(total)}: give one entry per decoder layer")
        return _ledger(config, _rows(visual), _rows(total), images, grid, mode, trained, head_tokens, dtype_bytes)


def compression_ratio(tokens: Sequence[int] | Fraction | int, per_image: int, num_layers: int) -> Fraction:
    """LLaVolta's CR (arXiv 2406.20092, eq. 3): `layers * per_image / #Tokens`, #Tokens summed over the layers (or already a sum)."""
    total = Fraction(sum(tokens)) if isinstance(tokens, Sequence) else Fraction(tokens)
    if total <= 0:
        raise FoveateError(f"compression ratio of {total} visual tokens: there must be at least one left")
    return num_layers * per_image / total


def schedule_tokens(parts: Iterable[tuple[Fraction, Sequence[int]]]) -> Fraction:
    """Mean #Tokens of a schedule: the sum of share * (tokens summed over layers). The shares must add up to 1."""
    parts = list(parts)
    if (shares := sum((Fraction(share) for share, _ in parts), Fraction(0))) != 1:
        raise FoveateError(f"the shares of a schedule add up to {shares}, not to 1")
    return sum((Fraction(share) * sum(tokens) for share, tokens in parts), Fraction(0))


def llavolta_tflops(tokens: float) -> float:
    """LLaVolta's printed TFLOPs (7B) at #Tokens visual tokens summed over layers: linear maps only, without attention's own products."""
    return 0.804 + 4.047e-4 * tokens


def predict(
    config: Any,
    *,
    image_size: int | None = None,
    grid: tuple[int, int] | None = None,
    images: int = 1,
    per_image: int | None = None,
    text_tokens: int = 0,
    reducers: Sequence[Reducer] = (),
    mode: Literal["prefill", "decode", "train"] = "prefill",
    new_tokens: int = 0,
    trained: Trained | None = None,
    head_tokens: int | None = None,
    dtype_bytes: int = 2,
) -> Ledger:
    """The cost of one sequence of `images` images and `text_tokens` text tokens.

    `config` is a FoveateConfig, a LlavaConfig or a bare text config; the last has no tower and takes `per_image` visual tokens as given.
    The image is `image_size` pixels square or a (rows, columns) `grid` of patches; the config's own size by default.
    `mode`: "prefill" (logits of one token), "decode" (`new_tokens` forwards of one token each behind that prefill, whose own cost is not
    in it), "train" (forward and backward by the rule in CONVENTION, logits of all tokens; `trained` says what is updated).
    """
    if min(images, text_tokens, new_tokens) < 0:
        raise FoveateError(f"images={images}, text_tokens={text_tokens}, new_tokens={new_tokens}: none may be negative")
    grid = grid or (_grid(config, image_size) if _vision(config) is not None else None)
    per_image = image_tokens(config, grid) if per_image is None else per_image
    layers = len(decoder(config).linear)
    visual = [[images * n] for n in visual_tokens(reducers, per_image, layers)]
    total = [[row[0] + text_tokens] for row in visual]
    if head_tokens is None:  # a reducer's outputs keep the caller's length, so a training step's head sees every token
        head_tokens = images * per_image + text_tokens if mode == "train" else 1
    if mode == "decode":
        return _decode(config, visual, total, new_tokens, dtype_bytes)
    return _ledger(config, visual, total, images, grid, mode, trained, head_tokens, dtype_bytes)


def image_tokens(config: Any, grid: tuple[int, int] | None) -> int:
    """Visual tokens that the model puts into the prompt for one image; 0 for a bare text config."""
    if _vision(config) is None or grid is None:
        return 0
    if isinstance(bridge := getattr(config, "bridge", None), dict):
        return _bridge(bridge).tokens(grid)
    whole = getattr(config, "vision_feature_select_strategy", "default") == "full"
    return grid[0] * grid[1] + (tower(config).prefix if whole else 0)


def parameters(config: Any) -> dict[str, int]:
    """Parameters of tower, bridge and language model (its embeddings and head included)."""
    found = {"tower": tower(config).parameters, "bridge": bridge_parameters(config)} if _vision(config) is not None else {}
    return found | {"lm": decoder(config).parameters}


def trainable(config: Any, trained: Trained) -> dict[str, int]:
    """Parameters that a training step changes, by part. A tower's blocks and norms behind its features get no gradient: left out."""
    vision = _vision(config) is not None
    counts = {"tower": tower(config).used if vision and trained.tower else 0}
    counts["bridge"] = bridge_parameters(config) if vision and trained.bridge else 0
    counts["lm"] = decoder(config).parameters if trained.lm else 0
    counts["lora"] = sum(lora_per_layer(config, trained.lora_rank, trained.lora_targets))
    return counts


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


def bridge_parameters(config: Any) -> int:
    if isinstance(bridge := getattr(config, "bridge", None), dict):
        return sum(p.numel() for p in _bridge(bridge).parameters())
    width, text = _llava_widths(config)
    bias = 2 * text if getattr(config, "multimodal_projector_bias", True) else 0
    return width * text + text * text + bias


def decoder(config: Any) -> Stack:
    """The language model inside `config` (or `config` itself)."""
    return _read(config.get_text_config(), AutoModelForCausalLM)


def tower(config: Any) -> Stack:
    """The vision tower inside `config`: all blocks that its configuration has, since all of them run."""
    levels = getattr(config, "vision_feature_layer", -1)
    vision = _vision(config)
    indices = levels if isinstance(levels, list | tuple) else [levels]
    return _read(vision, AutoModel, max(i if i >= 0 else vision.num_hidden_layers + 1 + i for i in indices))


def _ledger(
    config: Any,
    visual: list[list[int]],
    total: list[list[int]],
    images: int,
    grid: tuple[int, int] | None,
    mode: str,
    trained: Trained | None,
    head_tokens: int | None,
    dtype_bytes: int,
) -> Ledger:
    stack, vision = decoder(config), _vision(config)
    if len(total) != len(stack.linear):
        raise FoveateError(f"token counts of {len(total)} layers, but the language model has {len(stack.linear)}")
    trained = (trained or Trained()) if mode == "train" else Trained(bridge=False)
    before = trained.tower or trained.bridge
    flows = before or trained.lm or trained.lora_rank > 0
    weights, products = (3 if trained.lm else 2 if flows else 1), (3 if flows else 1)
    lora = lora_per_layer(config, trained.lora_rank, trained.lora_targets)
    linear = [2 * sum(rows) * (weights * macs + 3 * extra) for rows, macs, extra in zip(total, stack.linear, lora, strict=True)]
    attention = [products * sum(4 * n * n * stack.attention_width for n in rows) for rows in total]
    if head_tokens is None:
        head_tokens = sum(total[0]) if mode == "train" else len(total[0])
    head = weights * 2 * head_tokens * stack.embed
    flops = {"tower": 0, "bridge": 0, "lm_linear": sum(linear), "lm_attention": sum(attention), "head": head}
    if vision is not None and images:
        grid = grid or _grid(config, None)
        flops["tower"] = (3 if trained.tower else 1) * images * tower_flops(config, grid)
        flops["bridge"] = (3 if trained.bridge else 2 if trained.tower else 1) * images * bridge_flops(config, grid)
    return Ledger(
        mode,
        tuple(sum(rows) for rows in visual),
        tuple(sum(rows) for rows in total),
        tuple(sum(rows) * stack.kv_width * dtype_bytes for rows in total),
        tuple(sum(rows) * stack.kv_width * dtype_bytes for rows in visual),
        tuple(a + b for a, b in zip(linear, attention, strict=True)),
        flops,
    )


def _decode(config: Any, visual: list[list[int]], total: list[list[int]], new_tokens: int, dtype_bytes: int) -> Ledger:
    """`new_tokens` forwards of one token; the i-th (from 1) attends to the prefilled tokens of its layer and to i new ones."""
    stack = decoder(config)
    linear = [2 * new_tokens * macs for macs in stack.linear]
    seen = [sum(n * new_tokens + new_tokens * (new_tokens + 1) // 2 for n in rows) for rows in total]
    attention = [4 * n * stack.attention_width for n in seen]
    after = [sum(rows) + new_tokens for rows in total]
    return Ledger(
        "decode",
        tuple(sum(rows) for rows in visual),
        tuple(after),
        tuple(n * stack.kv_width * dtype_bytes for n in after),
        tuple(sum(rows) * stack.kv_width * dtype_bytes for rows in visual),
        tuple(a + b for a, b in zip(linear, attention, strict=True)),
        {"tower": 0, "bridge": 0, "lm_linear": sum(linear), "lm_attention": sum(attention), "head": 2 * new_tokens * stack.embed},
    )


def tower_flops(config: Any, grid: tuple[int, int]) -> int:
    """Forward FLOPs of the vision tower for one image of `grid` patches: patch embedding, linear maps and attention of every block."""
    stack, patches = tower(config), grid[0] * grid[1]
    n = patches + stack.prefix
    return 2 * patches * stack.embed + sum(2 * n * macs + 4 * n * n * stack.attention_width for macs in stack.linear)


def bridge_flops(config: Any, grid: tuple[int, int]) -> int:
    """Forward FLOPs of the bridge for one image."""
    if isinstance(bridge := getattr(config, "bridge", None), dict):
        return _bridge(bridge).flops(grid)
    width, text = _llava_widths(config)
    return 2 * image_tokens(config, grid) * (width * text + text * text)


def _llava_widths(config: Any) -> tuple[int, int]:
    """LLaVA's projector: input width (all feature levels side by side) and text width."""
    levels = getattr(config, "vision_feature_layer", -2)
    count = len(levels) if isinstance(levels, list | tuple) else 1
    return _vision(config).hidden_size * count, config.get_text_config().hidden_size


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None)


def _grid(config: Any, image_size: int | None) -> tuple[int, int]:
    """Patches of a square image; pixels that fill no patch are not seen by a tower."""
    vision = _vision(config)
    size = image_size or getattr(config, "image_size", None) or vision.image_size
    if size < vision.patch_size:
        raise FoveateError(f"image size {size} is smaller than one patch of {vision.patch_size} pixels")
    return size // vision.patch_size, size // vision.patch_size


@cache
def _built(config: str) -> Bridge:
    with torch.device("meta"):
        return build_bridge(json.loads(config))


def _bridge(config: dict[str, Any]) -> Bridge:
    return _built(json.dumps(config, sort_keys=True))


def _rows(counts: Sequence[int | Sequence[int]]) -> list[list[int]]:
    return [[n] if isinstance(n, int) else list(n) for n in counts]


_stacks: dict[tuple[str, str, int], Stack] = {}


def _read(config: Any, auto: Any, deepest: int = 0) -> Stack:
    """Build on the meta device and read the shapes; once per configuration. `deepest`: the last hidden state of a tower that is used."""
    key = (auto.__name__, config.to_json_string(use_diff=False), deepest)
    if key not in _stacks:
        with torch.device("meta"), torch.enable_grad():
            # of a copy: from_config writes the attention implementation into the config, which may be that of a model in use
            _stacks[key] = _measure(auto.from_config(copy.deepcopy(config), attn_implementation="eager"), config, deepest)
    return _stacks[key]


def _measure(model: Any, config: Any, deepest: int) -> Stack:
    count = config.num_hidden_layers
    layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)
    heads = getattr(config, "num_attention_heads", None)
    if layers is None or heads is None:
        raise FoveateError(f"cannot read the cost of a {config.model_type!r} model: no list of {count} layers with attention heads in it")
    for name, weight in layers.named_parameters():
        if weight.ndim > 2:  # experts: not every weight meets every token
            raise FoveateError(f"cannot predict the cost of a {config.model_type!r} model: weight {name} has {weight.ndim} dimensions")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    names = [(name, m) for name, m in layers.named_modules() if isinstance(m, nn.Linear)]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embed, prefix, used = (output.weight.numel(), 0, 0) if output is not None else _patches(model, config, deepest)
    total = sum(p.numel() for p in model.parameters())
    return Stack(
        tuple(sum(p.numel() for p in layer.parameters() if p.ndim == 2) for layer in layers),
        tuple((name, m.in_features, m.out_features) for name, m in names),
        heads * head_dim,
        2 * kv_heads * head_dim,
        embed,
        prefix,
        total,
        used or total,
    )


def _patches(model: Any, config: Any, deepest: int) -> tuple[int, int, int]:
    """A tower's patch embedding (multiply-adds per patch), tokens beside the patches, and parameters behind hidden state `deepest`."""
    size = config.image_size
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None:
        raise FoveateError(f"cannot read a {config.model_type!r} tower: it has no patch embedding by convolution")
    states = model(pixel_values=torch.empty(1, conv.in_channels, size, size, device="meta"), output_hidden_states=True).hidden_states
    states[deepest].sum().backward()
    used = sum(p.numel() for p in model.parameters() if p.grad is not None)
    return conv.weight.numel(), states[-1].shape[1] - (size // config.patch_size) ** 2, used
