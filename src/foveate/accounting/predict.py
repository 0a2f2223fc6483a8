"""What a model costs, from its configuration alone: FLOPs, KV cache and parameters, by part and by layer of the language model.

Shapes are read from the model built on the meta device, so no weight is loaded and no class name is looked at. What tower and bridge make
of images, and what that takes, is counted by running the library's own code on shapes (`dry_run`), for every family alike. Formulas and
the traps in published numbers: `conventions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

from foveate.accounting.dry_run import encode
from foveate.accounting.ledger import Ledger, Trained
from foveate.accounting.pairs import unseen as unseen_by
from foveate.accounting.prompts import Calls, Prompt, encodings_of, planned, prompt_of, reached, read_prompts
from foveate.accounting.scores import decided
from foveate.accounting.stack import Stack, decoder, lora_per_layer, low_rank
from foveate.cache_policies import CachePolicy
from foveate.errors import FoveateError
from foveate.probes.encoding import Encoded
from foveate.reducers import Reducer
from foveate.reducers.base import tokens_by_layer
from foveate.reducers.learned import while_trained
from foveate.tokens import ImagePlan


def predict(
    config: Any,
    *,
    inputs: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    grid: tuple[int, int] | None = None,
    images: int | Sequence[ImagePlan] = 1,
    per_image: int | None = None,
    text_tokens: int = 0,
    reducers: Sequence[Reducer] = (),
    mode: Literal["prefill", "decode", "train"] = "prefill",
    new_tokens: int = 0,
    trained: Trained | None = None,
    head_tokens: int | None = None,
    dtype_bytes: int = 2,
    cache: CachePolicy | None = None,
) -> Ledger:
    """The cost of a batch of prompts, or of one sequence of `images` images (how many, or what each becomes) and `text_tokens` text tokens.

    `inputs` is what the model's processor made of the prompts; the arguments about images and text are not used beside it. Without it an
    image is what the vision tower takes at once: where a processor cuts a picture into tiles, each of them is one of `images`. A Foveate
    model may be asked for images of `image_size` pixels square or of a (rows, columns) `grid` of patches, others have a size of their own.
    A bare text config has no tower and takes `per_image` visual tokens as given.
    `mode`: "prefill" (logits of one token of each prompt), "decode" (`new_tokens` forwards of one token of each prompt after that prefill,
    whose own cost is not in it), "train" (forward and backward by the rule in CONVENTION, logits of all tokens unless `head_tokens` says
    of how many; `trained` says what is updated). Where content decides what a reducer leaves (`Reducer.exact`), tokens and what follows
    from them, scores among it, are the most that may be.
    `cache`: what thins the caches after the prompt, in "prefill" and "decode"; where what stays depends on more than sizes, the ledger of
    a prefill leaves it out, and decoding is refused.
    FoveateError where the configuration does not say what becomes of an image, as in families whose images keep their size.
    """
    count = images if isinstance(images, int) else len(images)
    if min(count, text_tokens, new_tokens) < 0:
        raise FoveateError(f"images={count}, text_tokens={text_tokens}, new_tokens={new_tokens}: none may be negative")
    calls: Calls
    if inputs is not None:
        prompts, encoded = read_prompts(config, inputs)
        calls = [(call, Fraction(1)) for call in encoded]
    elif not isinstance(images, int):
        prompt, calls = planned(config, images, text_tokens)
        prompts = [prompt]
    else:
        calls = encodings_of(config, image_size, grid, images)
        prompts = [prompt_of(config, calls, images, per_image, text_tokens)]
    layers = len(decoder(config).linear)
    if mode == "train" and trained is not None and trained.reducers:
        reducers = while_trained(reducers)
    reduced = {images: tokens_by_layer(reducers, images, layers) for images in {tuple(prompt.images) for prompt in prompts}}
    visual = [[sum(reduced[tuple(prompt.images)][layer]) for prompt in prompts] for layer in range(layers)]
    total = [[count + prompt.text for count, prompt in zip(row, prompts, strict=True)] for row in visual]
    if cache is not None and cache.keeps_everything:
        cache = None
    left = None if cache is None else _left(config, cache, total)
    if mode == "decode":
        if cache is not None and left is None:
            raise FoveateError(f"how much {cache} leaves depends on more than sizes: what decoding costs after it cannot be predicted")
        return _decode(config, visual, left or total, new_tokens, dtype_bytes, bool(calls))
    if head_tokens is None and mode == "train":  # a reducer's outputs keep the caller's length, so the head sees every token
        head_tokens = sum(prompt.tokens for prompt in prompts)
    scores = decided(config, reducers, prompts, calls)
    unseen = unseen_by(reducers, prompts, layers)
    if cache is None or mode == "train":
        return _ledger(config, visual, total, mode, trained, head_tokens, dtype_bytes, calls, scores, unseen)
    scores = scores[0] + _thinning(config, cache, total), *scores[1:]
    found = _ledger(config, visual, total, mode, trained, head_tokens, dtype_bytes, calls, scores, unseen)
    return found if left is None else found.thinned({i: sum(rows) for i, rows in enumerate(left)}, {}, cache.together)


def observed(
    config: Any,
    visual: Sequence[int | Sequence[int]],
    total: Sequence[int | Sequence[int]],
    *,
    images: int = 1,
    grid: tuple[int, int] | None = None,
    mode: Literal["prefill", "decode", "train"] = "prefill",
    new_tokens: int = 0,
    trained: Trained | None = None,
    head_tokens: int | None = None,
    dtype_bytes: int = 2,
    encoded: Sequence[tuple[Encoded, Fraction]] | None = None,
    reducers: Sequence[Reducer] = (),
    prompts: Sequence[Prompt] = (),
    cache: CachePolicy | None = None,
    unseen: Sequence[Sequence[int]] = (),
    in_tower: Sequence[Mapping[int, int]] = (),
) -> Ledger:
    """From token counts as they were: `visual` and `total` hold, for each decoder layer, one count or one count per row of the batch.

    Attention's cost needs the rows apart: a layer given as one number is taken for one sequence. `mode` "decode": `new_tokens` forwards of
    one token of each row after a prefill of these tokens, whose own cost is not in it. `head_tokens`: how many got logits;
    unless given, one per row in "prefill" and the tokens of the first layer in "train". `encoded`: the calls that encoded the images,
    each with the share of it that is theirs; without them `images` images of `grid` patches are counted, as in `predict`. `reducers`
    acted on `prompts`; what their scores took follows from the sizes of these and from what was `left` of them, and what the policy `cache`
    took from those of the layers.
    `unseen`: by layer and row, (query, key) pairs that a rule hides; without it none. `in_tower`: of each crop that the tower saw, by block
    in front of which something was cut, the tokens that were left; without it as many as the reducers say.
    """
    if len(visual) != len(total):
        raise FoveateError(f"visual tokens of {len(visual)} layers but total tokens of {len(total)}: give one entry per decoder layer")
    if mode == "decode":
        return _decode(config, _rows(visual), _rows(total), new_tokens, dtype_bytes, bool(images))
    calls = encoded if encoded is not None else encodings_of(config, None, grid, images)
    scores = decided(config, reducers, prompts, calls, in_tower)
    if cache is not None:
        scores = scores[0] + _thinning(config, cache, _rows(total)), *scores[1:]
    return _ledger(config, _rows(visual), _rows(total), mode, trained, head_tokens, dtype_bytes, calls, scores, unseen)


def _ledger(
    config: Any,
    visual: list[list[int]],
    total: list[list[int]],
    mode: str,
    trained: Trained | None,
    head_tokens: int | None,
    dtype_bytes: int,
    calls: Calls,
    decided: tuple[int, int, int],
    unseen: Sequence[Sequence[int]],
) -> Ledger:
    stack = _fitting(config, total)
    trained = (trained or Trained()) if mode == "train" else Trained(bridge=False)
    before = trained.tower or trained.bridge
    flows = before or trained.lm or trained.lora_rank > 0 or trained.reducers
    weights, products = (3 if trained.lm else 2 if flows else 1), (3 if flows else 1)
    lora = lora_per_layer(config, trained.lora_rank, trained.lora_targets) if trained.lora_rank else [0] * len(stack.linear)
    made = _weights(config, calls, products)
    first = 0 if trained.lm or trained.lora_rank else next((layer for layer, own in enumerate(made) if own), 0)
    through = [layer >= first for layer in range(len(made))]  # in front of the first weights of images no gradient comes
    linear = [
        2 * sum(rows) * ((weights if back else 1) * macs + 3 * extra + own)
        for rows, macs, extra, own, back in zip(total, stack.linear, lora, made, through, strict=True)
    ]
    unseen = unseen or [[0] * len(rows) for rows in total]
    pairs = [sum(n * n for n in rows) - sum(less) for rows, less in zip(total, unseen, strict=True)]
    attention = [
        (products if back else 1) * 4 * seen * width for seen, width, back in zip(pairs, stack.attention_width, through, strict=True)
    ]
    if head_tokens is None:
        head_tokens = sum(total[0]) if mode == "train" else len(total[0])
    head = weights * 2 * head_tokens * stack.head
    scores, saved, below = decided
    flops = {"tower": 0, "bridge": 0, "lm_linear": sum(linear), "lm_attention": sum(attention), "head": head, "scores": scores}
    counted = [(encode(config, call), share) for call, share in calls]
    for part in ("tower", "bridge"):
        flops[part] = round(sum(one.flops[part] * share for one, share in counted))
    flops["tower"] -= saved
    if trained.tower:
        deep = reached(config)
        flops["tower"] += 2 * (round(sum(encode(deep, call).flops["tower"] * share for call, share in calls)) - below)
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


def _fitting(config: Any, total: list[list[int]]) -> Stack:
    """The decoder's layers. FoveateError where tokens of another number of layers are given."""
    stack = decoder(config)
    if len(total) != len(stack.linear):
        raise FoveateError(f"token counts of {len(total)} layers, but the language model has {len(stack.linear)}")
    return stack


def _weights(config: Any, images: Any, times: int = 1) -> list[int]:
    """By layer, multiply-adds per token in the weights that images become, each of whose products costs so many forwards; none without
    images."""
    return [times * macs if images else 0 for macs in low_rank(config)]


def _left(config: Any, cache: CachePolicy, total: list[list[int]]) -> list[list[int]] | None:
    """By layer, what a policy leaves of the tokens of each row; None where that depends on more than sizes."""
    grows = decoder(config).grows
    layers = [site.layer for site in cache.sites(len(grows)) if grows[site.layer]]
    found = [list(rows) for rows in total]
    for number, layer in enumerate(layers):
        left = [cache.count(n, number, len(layers)) for n in total[layer]]
        if None in left:
            return None
        found[layer] = [n for n in left if n is not None]
    return found


def _thinning(config: Any, cache: CachePolicy, total: list[list[int]]) -> int:
    """What a policy multiplies in order to decide on a prompt."""
    stack = decoder(config)
    layers = [site.layer for site in cache.sites(len(stack.grows)) if stack.grows[site.layer]]
    return sum(cache.score_flops(n, stack.attention_width[i], stack.kv_width[i] // 2) for i in layers for n in total[i])


def _kept(stack: Stack) -> list[int]:
    """Values that the linear maps of each layer take and give for a token."""
    kept = [0] * len(stack.linear)
    for name, inputs, outputs in stack.linear_shapes:
        kept[int(name.partition(".")[0])] += inputs + outputs
    return kept


def _decode(config: Any, visual: list[list[int]], total: list[list[int]], new_tokens: int, dtype_bytes: int, images: bool) -> Ledger:
    """`new_tokens` forwards of one token of each row; the i-th (from 1) attends to the prefilled tokens of its row in that layer and to i
    new ones."""
    stack = _fitting(config, total)
    new = new_tokens * len(total[0])
    linear = [2 * new * (macs + own) for macs, own in zip(stack.linear, _weights(config, images), strict=True)]
    seen = [sum(n * new_tokens + new_tokens * (new_tokens + 1) // 2 for n in rows) for rows in total]
    attention = [4 * n * width for n, width in zip(seen, stack.attention_width, strict=True)]
    after = [sum(rows) + new for rows in total]
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
            "head": 2 * new * stack.head,
            "scores": 0,
        },
    )


def _rows(counts: Sequence[int | Sequence[int]]) -> list[list[int]]:
    return [[n] if isinstance(n, int) else list(n) for n in counts]
