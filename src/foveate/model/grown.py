"""Growth of a Chain-of-Sight bridge that changes nothing at first: grown tokens stand in the language model for the one they are copies of.

The paper (arXiv 2407.15819) inflates the bridge's weights and lets the language model meet the longer sequence as it comes: the new tokens
are counted as any others. A token that became r² copies then draws r² times its attention, the text stands r² times as far away, and a copy
sees only those of the others that happen to lie in front of it. What follows is not of the paper and, as far as we know, new. A grown token
i, one of c_i that token p(i) of the smaller bridge has become, may keep

    positions   the rotary position of p(i); the text after the image is as far away as if it had the few tokens
    keys        a weight of 1 / c_i in every softmax, an additive bias of -log c_i on the column of its key
    order       whom it sees of its image: j if p(j) <= p(i), all copies of what its parent saw, and not j <= i

Where the copies equal their parents, as on features that do not vary within a window, all three together leave the text's logits what they
were, to rounding: a softmax over c copies of weight 1 / c is the softmax over the one. With `left` below 1 each is a mean between that and
the plain state, linear in positions and in the weights of the softmax (of which the bias is the logarithm): at 0 nothing is left of it.

Positions are fractional on the way; the rotary embeddings of transformers 5 take them as they are, in float32. The mask is an additive one,
(batch, 1, positions, keys), which eager attention and sdpa take, flash and flex attention do not.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from foveate.anatomy import read
from foveate.bridges.chain_of_sight import parents
from foveate.errors import FoveateError

KEPT = ("positions", "keys", "order")
ATTENTIONS = ("sdpa", "eager")
STATE = "foveate_grown"  # the attribute of a cache that holds what its columns have kept


# ---- what a growth keeps ---------------------------------------------------------------------------------------------------------------


def lineage(config: Any, sources: Sequence[int] | None, keep: Collection[str]) -> dict[str, Any] | None:
    """What `config.grown` is after a growth from `config.bridge`: JSON-able, None where nothing is kept.

    `sources` as `ChainOfSight.scaled` takes them. `before` is what the smaller bridge had kept of a growth of its own."""
    unknown = [name for name in keep if name not in KEPT]
    if unknown:
        raise FoveateError(f"a growth cannot keep {unknown[0]!r}; it can keep {', '.join(KEPT)}")
    if not keep:
        return None
    return {
        "scales": [list(scale) for scale in config.bridge["scales"]],
        "grid": config.bridge["grid"],
        "sources": None if sources is None else list(sources),
        "kept": [name for name in KEPT if name in keep],
        "left": 1.0,
        "before": config.grown,
    }


def refuse_tiling(config: Any) -> None:
    """FoveateError for a model with a tiling: tokens of several views, and marks between them, are not told apart here."""
    if config.tiling is not None:
        raise FoveateError(f"a growth cannot keep positions, keys or order with the tiling {config.tiling}. Leave `keep` out")


def refuse_few(config: Any) -> None:
    """FoveateError for a model whose views have fewer tokens than its bridge makes, where each grown one is to be told its parent."""
    if config.view_tokens is not None:
        raise FoveateError(f"a growth cannot keep positions, keys or order of {config.view_tokens} view_tokens. Leave one of the two out")


def refuse_growth(config: Any, what: str) -> None:
    """FoveateError for a model whose grown tokens still keep something, where `what` would lose it."""
    if config.grown is not None:
        raise FoveateError(f"the model keeps something of a growth, which {what} would lose: anneal_growth(0) first")


def annealed(grown: Mapping[str, Any] | None, left: float) -> dict[str, Any] | None:
    """The same with `left` of it, from 0 to 1; None where nothing is."""
    return None if grown is None or left <= 0 else {**grown, "left": min(float(left), 1.0)}


def check_language_model(model: nn.Module) -> None:
    """FoveateError for a language model that cannot be told that grown tokens are copies."""
    anatomy = read(model)
    name = getattr(anatomy.text_config, "model_type", type(anatomy.decoder).__name__)
    layers = range(len(anatomy.layers))
    if anatomy.rotary is None:
        reason = "has no rotary positions, which alone may be shared and fractional"
    elif any(anatomy.recurrent(layer) for layer in layers):
        reason = "has recurrent layers, in which a key has no weight"
    elif any(anatomy.window(layer) is not None for layer in layers):
        reason = "has sliding windows, which count tokens"
    else:
        return
    raise FoveateError(f"a growth cannot keep positions, keys or order here: the language model ({name}) {reason}. Leave `keep` out")


def check_attention(implementation: str | None) -> None:
    """FoveateError for a backend that takes no additive mask."""
    if implementation not in ATTENTIONS:
        raise FoveateError(
            f"a growth that is kept needs an additive mask, which {implementation} does not take: load the model with "
            f"attn_implementation {' or '.join(ATTENTIONS)}"
        )


@dataclass(frozen=True)
class Table:
    """The T tokens of an image as the language model is told of them.

    position  (T,) float32, counted from the image's beginning
    length    how many positions the image takes
    weight    (T,) float32: with which a token's key enters a softmax
    seen      (T, T) float32: of token i's own image, what of that weight of token j is left for it; 0 where it does not see it
    """

    position: Tensor
    length: float
    weight: Tensor
    seen: Tensor

    @classmethod
    def plain(cls, tokens: int) -> "Table":
        """Of tokens that are counted as any others."""
        return cls(torch.arange(tokens, dtype=torch.float32), float(tokens), torch.ones(tokens), torch.ones(tokens, tokens).tril())

    @classmethod
    def of(cls, bridge: Mapping[str, Any], grown: Mapping[str, Any]) -> "Table":
        return _table(json.dumps({key: bridge[key] for key in ("scales", "grid")}), json.dumps(grown))


@lru_cache(maxsize=8)
def _table(bridge: str, grown: str) -> Table:
    target, growth = json.loads(bridge), json.loads(grown)
    of = parents(growth["scales"], growth["grid"], target["scales"], target["grid"], growth["sources"])
    tokens = sum((growth["grid"] // window) ** 2 * queries for window, queries in growth["scales"])
    plain = Table.plain(len(of))
    small = Table.plain(tokens) if growth["before"] is None else _table(json.dumps(growth), json.dumps(growth["before"]))
    copies = torch.bincount(of, minlength=tokens)[of]
    left = {name: growth["left"] if name in growth["kept"] else 0.0 for name in KEPT}
    return Table(
        torch.lerp(plain.position, small.position[of], left["positions"]),
        plain.length + left["positions"] * (small.length - plain.length),
        torch.lerp(plain.weight, small.weight[of] / copies, left["keys"]),
        torch.lerp(plain.seen, small.seen[of][:, of], left["order"]),
    )


# ---- in the language model -------------------------------------------------------------------------------------------------------------


@dataclass
class Columns:
    """What a cache must remember of its L columns: `weight` (B, L) of their keys, and by how much positions are smaller than their count
    after each, `shift` (B, L), both float32."""

    weight: Tensor
    shift: Tensor

    @classmethod
    def before(cls, cache: Any, rows: int, device: torch.device) -> "Columns":
        """Of the columns that are cached now; FoveateError if rows of the batch have come or gone."""
        past = 0 if cache is None else int(cache.get_seq_length())
        held = getattr(cache, STATE, None) if past else None
        if held is None:
            return cls(torch.ones(rows, past, device=device), torch.zeros(rows, past, device=device))
        if held.weight.shape[0] != rows or held.weight.shape[1] < past:
            raise FoveateError(
                f"the cache was filled by {held.weight.shape[0]} rows of {held.weight.shape[1]} tokens and is now used for {rows} rows of "
                f"{past}, but what a growth has kept is known by row: begin anew without the cache"
            )
        return cls(held.weight[:, :past], held.shift[:, :past])

    @property
    def plain(self) -> bool:
        return bool((self.weight == 1).all()) and not bool(self.shift.any())

    def then(self, weight: Tensor, shift: Tensor) -> "Columns":
        return Columns(torch.cat([self.weight, weight], 1), torch.cat([self.shift, shift], 1))

    def remember(self, cache: Any) -> None:
        if cache is not None:
            setattr(cache, STATE, self)


def place(
    config: Any, inputs_embeds: Tensor, slots: Tensor | None, given: dict[str, Any], merged: bool = False
) -> tuple[dict[str, Any], Columns]:
    """The decoder's arguments `given` with the mask and the positions of grown tokens, and what its cache must remember afterwards.

    `inputs_embeds` (B, N, width) and `slots` (B, N) bool: where visual tokens are, None for nowhere. A sequence without any gets what was
    given. Positions of packed samples begin at 0, each of them. FoveateError where a sequence begins with embeddings (`merged`) of which
    nobody says which are of images."""
    text, cache, device = config.get_text_config(), given["past_key_values"], inputs_embeds.device
    (B, N), table = inputs_embeds.shape[:2], Table.of(config.bridge, config.grown)
    before = Columns.before(cache, B, device)
    if merged and slots is None and before.weight.shape[1] == 0:
        raise FoveateError(
            "inputs_embeds do not say which of them are of images, so that grown tokens would be counted as any others: hand in input_ids "
            "with pixel_values or mm_encoder_outputs (text alone: input_ids)"
        )
    if slots is None and before.plain:
        return given, before.then(torch.ones(B, N, device=device), torch.zeros(B, N, device=device))
    check_attention(text._attn_implementation)
    slots = torch.zeros(B, N, dtype=torch.bool, device=device) if slots is None else slots.to(device)
    tokens, count = len(table.position), slots.cumsum(1)
    done = (count - slots.int()) // tokens  # images that have ended in front of a slot
    at = torch.where(slots, (count - 1) % tokens, 0)
    past = before.weight.shape[1]
    counted = given["position_ids"]
    counted = torch.arange(past, past + N, device=device)[None] if counted is None else counted.to(device)
    begun = torch.where(counted == 0, done, 0).cummax(1).values  # those of earlier samples of a packed row
    shift = (done - begun) * (tokens - table.length) + (before.shift[:, -1:] if past else 0.0)
    own = torch.where(slots, table.position.to(device)[at] - at, 0.0)
    weight = torch.where(slots, table.weight.to(device)[at], 1.0)
    after = before.then(weight, shift + torch.where(slots & (at == tokens - 1), tokens - table.length, 0.0))
    mask = causal_mask(config, inputs_embeds, given)
    mask[..., : past + N] += after.weight.log()[:, None, None]
    if bool(slots.any()):
        image = torch.where(slots, done, -1)
        same = (image[:, :, None] == image[:, None]) & slots[:, None]
        seen = table.seen.to(device)[at].gather(2, at[:, None].expand(B, N, N)) * weight[:, None]
        block = mask[..., past : past + N]
        block.copy_(torch.where(same[:, None], seen.log()[:, None], block))
    low = torch.finfo(inputs_embeds.dtype).min
    mask = mask.clamp(min=low).to(inputs_embeds.dtype)
    return {**given, "attention_mask": mask, "position_ids": counted - shift + own}, after


def causal_mask(config: Any, inputs_embeds: Tensor, given: dict[str, Any]) -> Tensor:
    """(B, 1, N, K) float32, additive: what the language model would have made of the caller's mask, its own to be written to."""
    mask, counted = given["attention_mask"], given["position_ids"]
    if not isinstance(mask, Tensor) or mask.ndim == 2:
        if mask is not None and not isinstance(mask, Tensor):
            raise FoveateError(f"with grown tokens that are kept a mask is a 2-D or a 4-D tensor, not a {type(mask).__name__}")
        mask = create_causal_mask(
            config.get_text_config(),
            inputs_embeds,
            attention_mask=mask,
            past_key_values=given["past_key_values"],
            position_ids=counted,
            allow_is_causal_skip=False,
        )
    low = torch.finfo(torch.float32).min
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, low)
    return mask.to(torch.float32).expand(inputs_embeds.shape[0], 1, -1, -1).clone()
