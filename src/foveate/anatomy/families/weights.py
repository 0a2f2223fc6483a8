"""Weights: images become weights of the decoder, and no token of the sequence.

Foveate's own models with the bridge vlora, which hold them in `weighing` while a pass goes on. No reducer serves them.
"""

from __future__ import annotations

from typing import Any


def made(core: Any) -> bool:
    return getattr(core, "weighing", None) is not None
