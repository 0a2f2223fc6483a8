"""Ledger: tokens, KV bytes and FLOPs of a run, by part and by layer of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from foveate.errors import FoveateError

CONVENTION = (
    "2 FLOPs per multiply-add; matrix products only (no norms, activations, softmax, rotary angles, recurrences); causal attention and "
    "sliding windows counted as the full N x N; of experts those that a token meets; a trained part costs 3 forwards, a frozen part behind "
    "a trained one 2 (its attention products 3), other frozen parts 1; recomputation by gradient checkpointing is not counted; scores are "
    "what reducers multiply in order to decide, in training too 1 forward"
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


def answered(prefill: Ledger, decoding: Ledger) -> Ledger:
    """A prompt and the answer to it: `total_tokens` are all that went through each layer, bytes those at the end."""
    return replace(
        decoding,
        mode="answer",
        layer_flops=tuple(a + b for a, b in zip(prefill.layer_flops, decoding.layer_flops, strict=True)),
        flops={part: decoding.flops[part] + flops for part, flops in prefill.flops.items()},
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
