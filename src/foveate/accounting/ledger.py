"""Ledger: tokens, KV bytes and FLOPs of a run, by part and by layer of the language model."""

from __future__ import annotations

from dataclasses import dataclass

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
