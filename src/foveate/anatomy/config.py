"""What configurations say, in the names and spellings that families have for it; all of it is read without a model."""

from __future__ import annotations

from typing import Any

EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""Names of the number of experts that a token meets."""


def vision_of(config: Any) -> Any:
    """The tower's configuration; None of a language model."""
    return getattr(config, "vision_config", None)


def channels_of(vision: Any) -> int:
    """Channels of a tower's pictures."""
    return int(getattr(vision, "num_channels", 3))


def sides_of(config: Any, name: str) -> tuple[int, int] | None:
    """(height, width) of what a configuration has under `name`, "patch_size" or "image_size": one number or two; None where it says
    neither."""
    value = getattr(config, name, None)
    sides = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else ()
    return sides if len(sides) == 2 else None


def placeholders_of(config: Any, modality: str) -> list[int]:
    """Ids of the tokens that may stand for pictures of a modality; some models write videos as images."""
    tokens = [getattr(config, f"{name}_token_id", None) for name in (modality, "image")]
    return [token for token in tokens if token is not None]


def experts_of(config: Any) -> int | None:
    """How many experts a token meets; None where no name says so."""
    return next((n for n in (getattr(config, option, None) for option in EXPERTS) if n), None)


def latent(config: Any) -> bool:
    """Whether the layers attend to keys and values that they make anew from a latent, which is what they cache."""
    return getattr(config, "kv_lora_rank", None) is not None


def heads_of(config: Any) -> int | None:
    """Attention heads; None where there are none, or where they share keys and values of another shape (latent attention)."""
    return None if latent(config) else getattr(config, "num_attention_heads", None)
