"""Ledger: tokens, KV bytes and FLOPs of a run, by part and by layer of the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from foveate.errors import FoveateError

CONVENTION = (
    "2 FLOPs per multiply-add; matrix products only (no norms, activations, softmax, rotary angles, recurrences); causal attention and "
    "sliding windows counted as the full N x N, less what a method's rule of who sees whom hides (which a kernel under a mask computes "
    "too); of experts those that a token meets; a trained part costs 3 forwards, a frozen part behind a trained one 2 (its attention "
    "products 3), other frozen parts 1; recomputation by gradient checkpointing is not counted; scores are what reducers multiply in order "
    "to decide, in training too 1 forward"
)

PARTS = ("tower", "bridge", "lm_linear", "lm_attention", "head", "scores")


@dataclass(frozen=True)
class Trained:
    """Which parts a training step updates. `lora_rank` > 0 adapts the frozen language model's linear maps named in `lora_targets`;
    `reducers`: the weights of those that have some."""

    tower: bool = False
    bridge: bool = True
    lm: bool = False
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    reducers: bool = False


@dataclass(frozen=True)
class Ledger:
    """Tokens, KV bytes and FLOPs of one forward pass, one training step, or some decoding, all rows of the batch together; per layer where
    a list.

    flops             by part; "scores" of a run by the tokens that were there, predicted ones where content decides by those that may be
    kv_bytes          of the tokens that ran, `visual_kv_bytes` of those of images among them
    kv_stays          where a cache policy acts and it is known: what is left of them after the pass; () without one. `kv_peak`: the most
                      that there was at a time, each layer's cache being thinned once it has run
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
    kv_stays: tuple[int, ...] = ()
    kv_peak: int = 0

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    def thinned(self, stays: Mapping[int, Fraction | int], ran: Mapping[int, Fraction | int], together: bool) -> Ledger:
        """With what a cache policy has left: by layer, tokens that stay and tokens that the layer attended to, earlier turns' among them.
        together: whether they all stayed until the last layer had run."""
        token = [Fraction(kv, n) if n else Fraction(0) for kv, n in zip(self.kv_bytes, self.total_tokens, strict=True)]
        left = [round(stays[i] * size) if i in stays else self.kv_bytes[i] for i, size in enumerate(token)]
        full = [round(ran[i] * size) if i in ran else self.kv_bytes[i] for i, size in enumerate(token)]
        # While layer i runs those before it are thinned, and those after it hold what earlier turns have left them.
        earlier = [whole - own for whole, own in zip(full, self.kv_bytes, strict=True)]
        peak = sum(full) if together else max(sum(left[:i]) + full[i] + sum(earlier[i + 1 :]) for i in range(len(token)))
        return replace(self, kv_stays=tuple(left), kv_peak=peak)


def answered(prefill: Ledger, decoding: Ledger) -> Ledger:
    """A prompt and the answer to it: `total_tokens` are all that went through each layer, bytes those at the end."""
    return replace(
        decoding,
        mode="answer",
        layer_flops=tuple(a + b for a, b in zip(prefill.layer_flops, decoding.layer_flops, strict=True)),
        flops={part: decoding.flops[part] + flops for part, flops in prefill.flops.items()},
    )


def together(ledgers: Sequence[Ledger]) -> Ledger:
    """Several prompts at the same time, with their answers: tokens, FLOPs and bytes are sums. FoveateError for none at all."""
    if len(ledgers) == 1:
        return ledgers[0]
    stays = [one.kv_stays or one.kv_bytes for one in ledgers] if any(one.kv_stays for one in ledgers) else []
    return replace(
        summed(ledgers),
        mode=ledgers[0].mode,
        kv_bytes=tuple(map(sum, zip(*(one.kv_bytes for one in ledgers), strict=True))),
        visual_kv_bytes=tuple(map(sum, zip(*(one.visual_kv_bytes for one in ledgers), strict=True))),
        kv_stays=tuple(map(sum, zip(*stays, strict=True))),
        kv_peak=sum(one.kv_peak for one in ledgers),
    )


def summed(ledgers: Sequence[Ledger]) -> Ledger:
    """Several prompts one after the other, with their answers: tokens and FLOPs are sums, bytes those of the prompt that had the most,
    since each gives its memory back. FoveateError for none at all."""
    if not ledgers:
        raise FoveateError("nothing was asked, so there is no cost to add up")
    most = max(ledgers, key=lambda one: sum(one.kv_bytes))
    return replace(
        most,
        mode="session",
        visual_tokens=tuple(map(sum, zip(*(one.visual_tokens for one in ledgers), strict=True))),
        total_tokens=tuple(map(sum, zip(*(one.total_tokens for one in ledgers), strict=True))),
        layer_flops=tuple(map(sum, zip(*(one.layer_flops for one in ledgers), strict=True))),
        flops={part: sum(one.flops[part] for one in ledgers) for part in most.flops},
        activation_bytes=(),
    )
