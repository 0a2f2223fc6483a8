"""What a model costs, from its configuration alone: FLOPs, KV cache and parameters, by part and by layer of the language model.

Shapes are read from the model built on the meta device, so no weight is loaded and no class name is looked at. What tower and bridge make
of given images is counted by running the library's own code on shapes (`foveate.shapes`). Formulas and the traps in published numbers:
`foveate.conventions`.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from foveate.anatomy import attends, read
from foveate.bridges import Bridge, build_bridge
from foveate.encoding import Encoded
from foveate.errors import FoveateError
from foveate.reducers import Reducer
from foveate.reducers import visual_tokens as visual_tokens
from foveate.reducers.base import Step, acting
from foveate.shapes import encode, skeleton
from foveate.sites import InEncoder, ThroughLayer
from foveate.sizes import ImageSize, Sizes
from foveate.towers import TOWER_SIGNALS, blocks

CONVENTION = (
    "2 FLOPs per multiply-add; matrix products only (no norms, activations, softmax, rotary angles, recurrences); causal attention and "
    "sliding windows counted as the full N x N; of experts those that a token meets; a trained part costs 3 forwards, a frozen part behind "
    "a trained one 2 (its attention products 3), other frozen parts 1; recomputation by gradient checkpointing is not counted; scores are "
    "what reducers multiply in order to decide, in training too 1 forward"
)
PARTS = ("tower", "bridge", "lm_linear", "lm_attention", "head", "scores")


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
    attention_width: tuple[int, ...]  # heads * head_dim; 0 where a layer recurs instead of attending
    kv_width: tuple[int, ...]  # values kept per token: 2 * key-value heads * head_dim; 0 likewise
    embed: int  # multiply-adds per patch (tower) or per predicted token (the LM's head)
    prefix: int  # tower tokens that are not patches ([CLS], registers)
    parameters: int
    used: int  # parameters that get a gradient: not a tower's pooling head, nor its blocks behind the last feature level


@dataclass(frozen=True)
class Ledger:
    """Tokens, KV bytes and FLOPs of one forward pass, one training step, or some decoding; per layer where a list.

    activation_bytes  what autograd keeps of each decoder layer without gradient checkpointing, to its order: inputs and outputs of its
                      linear maps (of experts nothing is known); () in decoding
    """

    mode: str
    visual_tokens: tuple[int, ...]
    total_tokens: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    visual_kv_bytes: tuple[int, ...]
    layer_flops: tuple[int, ...]
    flops: dict[str, int]
    convention: str = CONVENTION
    activation_bytes: tuple[int, ...] = ()

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
        encoded: Sequence[tuple[Encoded, Fraction]] | None = None,
        reducers: Sequence[Reducer] = (),
        prompts: Sequence[Prompt] = (),
    ) -> Ledger:
        """From token counts as they were: `visual` and `total` hold, for each decoder layer, one count or one count per row of the batch.

        Attention's cost needs the rows apart: a layer given as one number is taken for one sequence. `head_tokens`: how many got logits;
        unless given, one per row in "prefill" and the tokens of the first layer in "train". `encoded`: the calls that encoded the images,
        each with the share of it that is theirs; without them `images` images of `grid` patches are counted. `reducers` acted on
        `prompts`; what their scores took follows from the sizes of these.
        """
        if len(visual) != len(total):
            raise FoveateError(f"visual tokens of {len(visual)} layers but total tokens of {len(total)}: give one entry per decoder layer")
        decided = _decided(config, reducers, prompts, encoded if encoded is not None else _calls(config, grid, images))
        return _ledger(config, _rows(visual), _rows(total), images, grid, mode, trained, head_tokens, dtype_bytes, encoded, decided)


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


def predict(
    config: Any,
    *,
    inputs: Mapping[str, Any] | None = None,
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
    """The cost of a batch of prompts, or of one sequence of `images` images and `text_tokens` text tokens.

    `inputs` is what the model's processor made of the prompts; then `config` may be that of any vision-language model, and the arguments
    about images and text are not used. Without it `config` is a FoveateConfig, a LlavaConfig or a bare text config; the last has no tower
    and takes `per_image` visual tokens as given. The image is `image_size` pixels square or a (rows, columns) `grid` of patches; the
    config's own size by default.
    `mode`: "prefill" (logits of one token), "decode" (`new_tokens` forwards of one token each behind that prefill, whose own cost is not
    in it), "train" (forward and backward by the rule in CONVENTION, logits of all tokens; `trained` says what is updated).
    """
    if min(images, text_tokens, new_tokens) < 0:
        raise FoveateError(f"images={images}, text_tokens={text_tokens}, new_tokens={new_tokens}: none may be negative")
    if inputs is not None:
        return _of_prompts(config, inputs, reducers, mode, new_tokens, trained, head_tokens, dtype_bytes)
    grid = grid or (_grid(config, image_size) if _vision(config) is not None else None)
    per_image = image_tokens(config, grid) if per_image is None else per_image
    layers = len(decoder(config).linear)
    visual = [[images * n] for n in visual_tokens(reducers, per_image, layers)]
    total = [[row[0] + text_tokens] for row in visual]
    if head_tokens is None:  # a reducer's outputs keep the caller's length, so a training step's head sees every token
        head_tokens = images * per_image + text_tokens if mode == "train" else 1
    if mode == "decode":
        return _decode(config, visual, total, new_tokens, dtype_bytes)
    prompt = Prompt([ImageSize.whole(per_image)] * images, text_tokens)
    decided = _decided(config, reducers, [prompt], _calls(config, grid, images))
    return _ledger(config, visual, total, images, grid, mode, trained, head_tokens, dtype_bytes, decided=decided)


def _of_prompts(
    config: Any,
    inputs: Mapping[str, Any],
    reducers: Sequence[Reducer],
    mode: Literal["prefill", "decode", "train"],
    new_tokens: int,
    trained: Trained | None,
    head_tokens: int | None,
    dtype_bytes: int,
) -> Ledger:
    prompts, encoded = read_prompts(config, inputs)
    layers = len(decoder(config).linear)
    per_image = {image.tokens: visual_tokens(reducers, image.tokens, layers) for prompt in prompts for image in prompt.images}
    visual = [[sum(per_image[image.tokens][layer] for image in prompt.images) for prompt in prompts] for layer in range(layers)]
    total = [[count + prompt.text for count, prompt in zip(row, prompts, strict=True)] for row in visual]
    if head_tokens is None and mode == "train":
        head_tokens = sum(prompt.tokens for prompt in prompts)
    if mode == "decode":
        return _decode(config, visual, total, new_tokens, dtype_bytes)
    calls = [(call, Fraction(1)) for call in encoded]
    decided = _decided(config, reducers, prompts, calls)
    return _ledger(config, visual, total, 0, None, mode, trained, head_tokens, dtype_bytes, calls, decided)


@dataclass(frozen=True)
class Prompt:
    """The images and videos of one prompt, and how many tokens beside their patches (text, newlines)."""

    images: list[ImageSize]
    text: int

    @property
    def tokens(self) -> int:
        return sum(image.tokens for image in self.images) + self.text


def read_prompts(config: Any, inputs: Mapping[str, Any]) -> tuple[list[Prompt], list[Encoded]]:
    """Reads a processor's outputs by `config` alone: the prompts, and what is encoded. FoveateError where placeholders and images do not
    match."""
    inputs = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    core: Any = read(skeleton(config)).core if any("pixel_values" in name for name in inputs) else None
    rows: list[list[ImageSize]] = [[] for _ in ids]
    calls: list[Encoded] = []
    for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if inputs.get(pixels) is None:
            continue
        method = f"get_{modality}_features" if hasattr(core, f"get_{modality}_features") else "get_image_features"
        names = inspect.signature(getattr(core, method)).parameters
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        calls.append(Encoded.of(method, given if pixels in given else {**given, "pixel_values": inputs[pixels]}))
        items = encode(config, calls[-1]).items
        made = sum(image.tokens + others for image, others in items)
        tokens = [getattr(config, f"{name}_token_id", None) for name in (modality, "image")]  # some write videos as images
        slots = next((at for at in (ids.eq(token).sum(1).tolist() for token in tokens if token is not None) if any(at)), [0] * len(ids))
        if made != sum(slots):
            raise FoveateError(
                f"the prompts have {sum(slots)} {modality} placeholders, but the {len(items)} {modality}s make {made} visual tokens; "
                "use the processor that belongs to the model"
            )
        left = iter(items)
        for row, count in zip(rows, slots, strict=True):
            while count > 0:
                image, others = next(left, (ImageSize.whole(0), 0))
                made = image.tokens + others
                if made > count or made == 0:
                    raise FoveateError(f"a prompt has placeholders for {count} visual tokens where an image makes {made}")
                row.append(image)
                count -= made
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    return [Prompt(row, length - sum(image.tokens for image in row)) for row, length in zip(rows, lengths, strict=True)], calls


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
    text = config.get_text_config()
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING or _vision(config) is None:
        return _read(text, AutoModelForCausalLM)
    key = ("decoder", config.to_json_string(use_diff=False), 0)
    if key not in _stacks:
        model = skeleton(config)
        _stacks[key] = _stack(read(model).layers, text, model.get_output_embeddings(), read(model).decoder)  # type: ignore[operator]
    return _stacks[key]


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
    encoded: Sequence[tuple[Encoded, Fraction]] | None = None,
    decided: tuple[int, int] = (0, 0),
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
    attention = [products * sum(4 * n * n * width for n in rows) for rows, width in zip(total, stack.attention_width, strict=True)]
    if head_tokens is None:
        head_tokens = sum(total[0]) if mode == "train" else len(total[0])
    head = weights * 2 * head_tokens * stack.embed
    scores, saved = decided
    flops = {"tower": 0, "bridge": 0, "lm_linear": sum(linear), "lm_attention": sum(attention), "head": head, "scores": scores}
    if encoded is not None:
        for part in ("tower", "bridge"):
            flops[part] = round(sum(encode(config, call).flops[part] * share for call, share in encoded))
    elif vision is not None and images:
        grid = grid or _grid(config, None)
        flops["tower"] = images * tower_flops(config, grid)
        flops["bridge"] = images * bridge_flops(config, grid)
    flops["tower"] = (flops["tower"] - saved) * (3 if trained.tower else 1)
    flops["bridge"] *= 3 if trained.bridge else 2 if trained.tower else 1
    return Ledger(
        mode,
        tuple(sum(rows) for rows in visual),
        tuple(sum(rows) for rows in total),
        tuple(sum(rows) * width * dtype_bytes for rows, width in zip(total, stack.kv_width, strict=True)),
        tuple(sum(rows) * width * dtype_bytes for rows, width in zip(visual, stack.kv_width, strict=True)),
        tuple(a + b for a, b in zip(linear, attention, strict=True)),
        flops,
        activation_bytes=tuple(sum(rows) * width * dtype_bytes for rows, width in zip(total, _kept(stack), strict=True)),
    )


def _kept(stack: Stack) -> list[int]:
    """Values that the linear maps of each layer take and give for a token."""
    kept = [0] * len(stack.linear)
    for name, inputs, outputs in stack.linear_shapes:
        kept[int(name.partition(".")[0])] += inputs + outputs
    return kept


def _decode(config: Any, visual: list[list[int]], total: list[list[int]], new_tokens: int, dtype_bytes: int) -> Ledger:
    """`new_tokens` forwards of one token; the i-th (from 1) attends to the prefilled tokens of its layer and to i new ones."""
    stack = decoder(config)
    linear = [2 * new_tokens * macs for macs in stack.linear]
    seen = [sum(n * new_tokens + new_tokens * (new_tokens + 1) // 2 for n in rows) for rows in total]
    attention = [4 * n * width for n, width in zip(seen, stack.attention_width, strict=True)]
    after = [sum(rows) + new_tokens for rows in total]
    return Ledger(
        "decode",
        tuple(sum(rows) for rows in visual),
        tuple(after),
        tuple(n * width * dtype_bytes for n, width in zip(after, stack.kv_width, strict=True)),
        tuple(sum(rows) * width * dtype_bytes for rows, width in zip(visual, stack.kv_width, strict=True)),
        tuple(a + b for a, b in zip(linear, attention, strict=True)),
        {
            "tower": 0,
            "bridge": 0,
            "lm_linear": sum(linear),
            "lm_attention": sum(attention),
            "head": 2 * new_tokens * stack.embed,
            "scores": 0,
        },
    )


Calls = Sequence[tuple[Encoded, Fraction]]


def _calls(config: Any, grid: tuple[int, int] | None, images: int) -> Calls:
    """What encodes `images` images of `grid` patches: one such image, as often."""
    vision = _vision(config)
    if vision is None or not images:
        return []
    rows, columns = grid or _grid(config, None)
    shape = 1, getattr(vision, "num_channels", 3), rows * vision.patch_size, columns * vision.patch_size
    return [(Encoded("get_image_features", {"pixel_values": torch.ones((1,) * 4, dtype=torch.bool).expand(shape)}), Fraction(images))]


def _decided(config: Any, reducers: Sequence[Reducer], prompts: Sequence[Prompt], calls: Calls) -> tuple[int, int]:
    """FLOPs that the reducers' scores take, and FLOPs that cuts in the vision tower save it."""
    steps = acting(reducers, len(decoder(config).linear)) if reducers else []
    needs = [signal for site, _, _ in steps for signal in site.needs if isinstance(signal, TOWER_SIGNALS)]
    scores = saved = Fraction(0)
    width = 0
    for call, share in calls if needs else ():
        counted = encode(config, call, needs)
        scores, width = scores + share * counted.flops["scores"], counted.width
        for crops, tokens, beside in counted.crops if any(isinstance(site, InEncoder) for site, _, _ in steps) else ():
            spent, less = _in_tower(config, steps, tokens, beside, width)
            scores, saved = scores + share * crops * spent, saved + share * crops * less
    return round(scores + sum(_in_lm(config, steps, prompt, width) for prompt in prompts if prompt.images)), round(saved)


def _in_tower(config: Any, steps: Sequence[Step], tokens: int, beside: int, width: int) -> tuple[int, int]:
    """FLOPs of the scores of one crop of `tokens` tokens, of which `beside` are no patches, and those that its cuts save."""
    tower = read(skeleton(config)).tower_of("image")
    stack = _stack(blocks(tower), _vision(config), None, tower)
    image = ImageSize.whole(tokens - beside)
    left, score, saved = image.tokens, 0, 0
    for block, (macs, attention) in enumerate(zip(stack.linear, stack.attention_width, strict=True)):
        for site, reducer, stage in steps:
            if isinstance(site, InEncoder) and site.block == block:
                score += reducer.score_flops(Sizes((image,), (left,), beside, tower_width=width), stage)
                left = reducer.count(left, image.tokens, stage)
        n = left + beside
        saved += 2 * (tokens - n) * macs + 4 * (tokens**2 - n**2) * attention
    return score, saved


def _in_lm(config: Any, steps: Sequence[Step], prompt: Prompt, tower_width: int) -> int:
    """FLOPs of the scores of one prompt in front of and inside the language model."""
    stack, text = decoder(config), config.get_text_config()
    counts = [[image.tokens] * len(stack.linear) for image in prompt.images]
    score = 0
    for site, reducer, stage in steps:
        at, before = site.layer, max(0, site.layer - 1)
        if not isinstance(site, InEncoder):
            sizes = Sizes(
                tuple(prompt.images),
                tuple(count[at] for count in counts),
                prompt.text,
                width=text.hidden_size,
                heads=text.num_attention_heads,
                query_width=stack.attention_width[before],
                keys=sum(count[before] for count in counts) + prompt.text,
                tower_width=tower_width,
            )
            score += reducer.score_flops(sizes, stage)
        end = at + 1 if isinstance(site, ThroughLayer) else len(stack.linear)
        for count, image in zip(counts, prompt.images, strict=True):
            count[at:end] = [reducer.count(count[at], image.tokens, stage)] * (end - at)
    return score


def tower_flops(config: Any, grid: tuple[int, int]) -> int:
    """Forward FLOPs of the vision tower for one image of `grid` patches: patch embedding, linear maps and attention of every block."""
    stack, patches = tower(config), grid[0] * grid[1]
    n = patches + stack.prefix
    return 2 * patches * stack.embed + sum(
        2 * n * macs + 4 * n * n * width for macs, width in zip(stack.linear, stack.attention_width, strict=True)
    )


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


_EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
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
    if layers is None:
        raise FoveateError(f"cannot read the cost of a {config.model_type!r} model: no list of {count} layers in it")
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = _stack(layers, config, output, model)
    if output is not None:
        return found
    embed, prefix, used = _patches(model, config, deepest)
    return replace(found, embed=embed, prefix=prefix, used=used)


def _stack(layers: nn.ModuleList, config: Any, output: Any, model: nn.Module) -> Stack:
    """What can be read off any list of layers with attention in them."""
    heads = getattr(config, "num_attention_heads", None)
    if heads is None or getattr(config, "kv_lora_rank", None) is not None:
        raise FoveateError(f"cannot read the cost of a {config.model_type!r} model: no attention heads of one width in its configuration")
    try:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    except (AttributeError, ValueError, RuntimeError) as error:  # by configurations that refuse to say one for all
        raise FoveateError(f"cannot read the cost of a {config.model_type!r} model: its heads differ from layer to layer") from error
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    here = [attends(layer) for layer in layers]
    total = sum(p.numel() for p in model.parameters())
    return Stack(
        tuple(_macs(layer, config) for layer in layers),
        tuple((name, m.in_features, m.out_features) for name, m in layers.named_modules() if isinstance(m, nn.Linear)),
        tuple(heads * head_dim * attending for attending in here),
        tuple(2 * kv_heads * head_dim * attending for attending in here),
        output.weight.numel() if output is not None else 0,
        0,
        total,
        total,
    )


def _macs(layer: nn.Module, config: Any) -> int:
    """Multiply-adds per token in the weights of a layer; of experts in those that a token meets."""
    macs, sets = 0, set()
    for name, module in layer.named_modules():
        for key, weight in module.named_parameters(recurse=False):
            if weight.ndim == 2 or isinstance(module, nn.Conv1d):
                macs += weight.numel() * (weight.ndim > 1)
            elif weight.ndim == 3:  # (experts, outputs, inputs)
                chosen = next((n for n in (getattr(config, option, None) for option in _EXPERTS) if n), None)
                if chosen is None:
                    raise FoveateError(
                        f"cannot predict the cost of a {config.model_type!r} model: weight {name}.{key} holds {weight.shape[0]} experts, "
                        f"and none of {', '.join(_EXPERTS)} in the configuration says how many of them a token meets"
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
