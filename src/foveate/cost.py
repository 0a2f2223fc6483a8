"""What a model costs, from its configuration alone: FLOPs, KV cache and parameters, by part and by layer of the language model.

Shapes are read from the model built on the meta device, so no weight is loaded and no class name is looked at. What tower and bridge make
of images, and what that takes, is counted by running the library's own code on shapes (`foveate.shapes`), for every family alike. Formulas
and the traps in published numbers: `foveate.conventions`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from foveate.anatomy import attends, read
from foveate.counting import parameters_of
from foveate.encoding import Encoded
from foveate.errors import FoveateError
from foveate.model.configuration import FoveateConfig
from foveate.reducers import Reducer
from foveate.reducers import visual_tokens as visual_tokens
from foveate.reducers.base import Step, acting
from foveate.shapes import Told, encode, skeleton, trained_tower
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
    head: int  # multiply-adds per predicted token in the output embeddings


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
        each with the share of it that is theirs; without them `images` images of `grid` patches are counted, as in `predict`. `reducers`
        acted on `prompts`; what their scores took follows from the sizes of these.
        """
        if len(visual) != len(total):
            raise FoveateError(f"visual tokens of {len(visual)} layers but total tokens of {len(total)}: give one entry per decoder layer")
        calls = encoded if encoded is not None else _calls(config, None, grid, images)
        decided = _decided(config, reducers, prompts, calls)
        return _ledger(config, _rows(visual), _rows(total), mode, trained, head_tokens, dtype_bytes, calls, decided)


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

    `inputs` is what the model's processor made of the prompts; the arguments about images and text are not used beside it. Without it an
    image is what the vision tower takes at once: where a processor cuts a picture into tiles, each of them is one of `images`. A Foveate
    model may be asked for images of `image_size` pixels square or of a (rows, columns) `grid` of patches, others have a size of their own.
    A bare text config has no tower and takes `per_image` visual tokens as given.
    `mode`: "prefill" (logits of one token), "decode" (`new_tokens` forwards of one token each behind that prefill, whose own cost is not
    in it), "train" (forward and backward by the rule in CONVENTION, logits of all tokens; `trained` says what is updated).
    FoveateError where the configuration does not say what becomes of an image, as in families whose images keep their size.
    """
    if min(images, text_tokens, new_tokens) < 0:
        raise FoveateError(f"images={images}, text_tokens={text_tokens}, new_tokens={new_tokens}: none may be negative")
    calls: Calls
    if inputs is not None:
        prompts, encoded = read_prompts(config, inputs)
        calls = [(call, Fraction(1)) for call in encoded]
    else:
        calls = _calls(config, image_size, grid, images)
        prompts = [_prompt(config, calls, images, per_image, text_tokens)]
    layers = len(decoder(config).linear)
    left = {image.tokens: visual_tokens(reducers, image.tokens, layers) for prompt in prompts for image in prompt.images}
    visual = [[sum(left[image.tokens][layer] for image in prompt.images) for prompt in prompts] for layer in range(layers)]
    total = [[count + prompt.text for count, prompt in zip(row, prompts, strict=True)] for row in visual]
    if mode == "decode":
        return _decode(config, visual, total, new_tokens, dtype_bytes)
    if head_tokens is None and mode == "train":  # a reducer's outputs keep the caller's length, so the head sees every token
        head_tokens = sum(prompt.tokens for prompt in prompts)
    decided = _decided(config, reducers, prompts, calls)
    return _ledger(config, visual, total, mode, trained, head_tokens, dtype_bytes, calls, decided)


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


def image_tokens(config: Any) -> int:
    """Visual tokens that the model makes of one image, as in `predict`; 0 for a bare text config."""
    return sum(image.tokens for call, _ in _calls(config, None, None, 1) for image, _ in encode(config, call).items)


def image_shape(config: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) in pixels of one image, as in `predict`, and the (rows, columns) of its patches."""
    (height, width), patch = (
        _image(config, None, None).given["pixel_values"].shape[-2:],
        _sides(getattr(_vision(config), "patch_size", None)),
    )
    if patch is None:
        raise FoveateError(f"the size of a patch is not in the configuration of a {config.model_type!r} model")
    return (height, width), (height // patch[0], width // patch[1])


def parameters(config: Any) -> dict[str, int]:
    """Parameters of tower, bridge and language model (its embeddings and head included)."""
    if _vision(config) is None:
        return {"lm": sum(p.numel() for p in _language(Told.by(config)).parameters())}
    return parameters_of(skeleton(config))


def trainable(config: Any, trained: Trained) -> dict[str, int]:
    """Parameters that a training step changes, by part. A tower's blocks and norms behind its features get no gradient: left out."""
    found = {"tower": 0, "bridge": 0} | parameters(config)
    if trained.tower and found["tower"]:
        found["tower"] = trained_tower(config, _image(config, None, None))
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
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING or _vision(config) is None:
        model = _language(Told.by(text))
        layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == text.num_hidden_layers), None)
        if layers is None:
            raise FoveateError(f"cannot read the cost of a {text.model_type!r} model: no list of {text.num_hidden_layers} layers in it")
    else:
        model = skeleton(config)
        layers = read(model).layers
    return _stack(layers, text, model.get_output_embeddings())  # type: ignore[operator]


@lru_cache(maxsize=8)
def _language(told: Told) -> nn.Module:
    with torch.device("meta"), torch.inference_mode(False):
        # of a copy: from_config writes the attention implementation into the config, which may be that of a model in use
        found: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(told.thing), attn_implementation="eager")
    return found


def _ledger(
    config: Any,
    visual: list[list[int]],
    total: list[list[int]],
    mode: str,
    trained: Trained | None,
    head_tokens: int | None,
    dtype_bytes: int,
    calls: Calls,
    decided: tuple[int, int],
) -> Ledger:
    stack = decoder(config)
    if len(total) != len(stack.linear):
        raise FoveateError(f"token counts of {len(total)} layers, but the language model has {len(stack.linear)}")
    trained = (trained or Trained()) if mode == "train" else Trained(bridge=False)
    before = trained.tower or trained.bridge
    flows = before or trained.lm or trained.lora_rank > 0
    weights, products = (3 if trained.lm else 2 if flows else 1), (3 if flows else 1)
    lora = lora_per_layer(config, trained.lora_rank, trained.lora_targets) if trained.lora_rank else [0] * len(stack.linear)
    linear = [2 * sum(rows) * (weights * macs + 3 * extra) for rows, macs, extra in zip(total, stack.linear, lora, strict=True)]
    attention = [products * sum(4 * n * n * width for n in rows) for rows, width in zip(total, stack.attention_width, strict=True)]
    if head_tokens is None:
        head_tokens = sum(total[0]) if mode == "train" else len(total[0])
    head = weights * 2 * head_tokens * stack.head
    scores, saved = decided
    flops = {"tower": 0, "bridge": 0, "lm_linear": sum(linear), "lm_attention": sum(attention), "head": head, "scores": scores}
    counted = [(encode(config, call), share) for call, share in calls]
    for part in ("tower", "bridge"):
        flops[part] = round(sum(one.flops[part] * share for one, share in counted))
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
            "head": 2 * new_tokens * stack.head,
            "scores": 0,
        },
    )


Calls = Sequence[tuple[Encoded, Fraction]]


def _calls(config: Any, image_size: int | None, grid: tuple[int, int] | None, images: int) -> Calls:
    """What encodes `images` images: one of them, that often."""
    return [(_image(config, image_size, grid), Fraction(images))] if _vision(config) is not None and images else []


def _image(config: Any, image_size: int | None, grid: tuple[int, int] | None) -> Encoded:
    """The call that encodes one image. FoveateError where the configuration alone does not say what that is."""
    shape = 1, getattr(_vision(config), "num_channels", 3), *_pixels(config, image_size, grid)
    call = Encoded("get_image_features", {"pixel_values": torch.ones((1,) * 4, dtype=torch.bool).expand(shape)})
    try:
        encode(config, call)
    except FoveateError as error:
        raise FoveateError(f"what becomes of {_an_image(config)} is not in its configuration ({error}); {WAY_OUT}") from error
    return call


def _pixels(config: Any, image_size: int | None, grid: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of an image, of the tower's own size unless another is asked for."""
    vision, ours = _vision(config), isinstance(config, FoveateConfig)
    patch = _sides(getattr(vision, "patch_size", None)) or (1, 1)
    own = _sides(config.image_size if ours else getattr(vision, "image_size", None))
    wanted = (image_size, image_size) if image_size else (grid[0] * patch[0], grid[1] * patch[1]) if grid else own
    if wanted is None:
        raise FoveateError(f"the size of {_an_image(config)} is not in its configuration; {WAY_OUT}")
    if min(wanted) < min(patch):
        raise FoveateError(f"image size {min(wanted)} is smaller than one patch of {min(patch)} pixels")
    if own and [side // each for side, each in zip(wanted, patch, strict=True)] == [
        side // each for side, each in zip(own, patch, strict=True)
    ]:
        return own  # pixels that fill no patch are not seen
    if not ours:
        size, asked = (" x ".join(map(str, sides)) for sides in (own or ("?",), wanted))
        raise FoveateError(
            f"{_an_image(config)} is of {size} pixels; what its processor makes of one of {asked} is not in its configuration; {WAY_OUT}"
        )
    return wanted


WAY_OUT = "give what its processor makes of the prompt: predict(config, inputs=...)"


def _an_image(config: Any) -> str:
    return f"an image of a {config.model_type!r} model"


def _sides(value: Any) -> tuple[int, int] | None:
    """(height, width) of what a configuration spells as one number or as two."""
    sides = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else ()
    return sides if len(sides) == 2 else None


def _prompt(config: Any, calls: Calls, images: int, per_image: int | None, text: int) -> Prompt:
    """One sequence of images that are all alike; `per_image` goes before what they are by `calls`."""
    items = [item for call, _ in calls for item in encode(config, call).items]
    if per_image is not None or not items:
        return Prompt([ImageSize.whole(per_image or 0)] * images, text)
    return Prompt([image for image, _ in items] * images, text + images * sum(others for _, others in items))


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
    stack = _stack(blocks(tower), _vision(config))
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


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None)


def _rows(counts: Sequence[int | Sequence[int]]) -> list[list[int]]:
    return [[n] if isinstance(n, int) else list(n) for n in counts]


_EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")


def _stack(layers: nn.ModuleList, config: Any, output: Any = None) -> Stack:
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
    return Stack(
        tuple(_macs(layer, config) for layer in layers),
        tuple((name, m.in_features, m.out_features) for name, m in layers.named_modules() if isinstance(m, nn.Linear)),
        tuple(heads * head_dim * attending for attending in here),
        tuple(2 * kv_heads * head_dim * attending for attending in here),
        output.weight.numel() if output is not None else 0,
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
