"""Asked: the model asks which slots are those of one modality, by the id of its placeholder, in place of all of them at once.

MiniCPM-V and MiniCPM-OCR. `get_placeholder_mask` takes a `token_id`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def modality(config: Any, given: dict[str, Any], modalities: Sequence[str]) -> str | None:
    """The modality that a call asks about; None where it asks about none of its own."""
    token = given.get("token_id")
    return next((m for m in modalities if token is not None and getattr(config, f"{m}_token_id", None) == token), None)
