"""Shared keys: the last layers of the decoder read keys and values of earlier ones.

Gemma 3n, small Gemma 4. No reducer serves them.
"""

from __future__ import annotations

from typing import Any

from foveate.errors import NotApplicable, Reason


def refuse(name: str, config: Any) -> None:
    """NotApplicable for such a decoder of a model called `name`."""
    if getattr(config, "num_kv_shared_layers", 0):
        raise NotApplicable(
            Reason.SHARED_KEYS,
            f"{name}: its last layers read the keys of earlier ones, so that a cut in front of them would not meet its keys",
        )
