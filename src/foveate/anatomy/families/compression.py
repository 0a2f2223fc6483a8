"""Compression: frames of a video that are like the one before give fewer features to the language model.

VideoLLaMA 3. An argument of the core says which features enter.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def kept(kwargs: dict[str, Any]) -> dict[str, Tensor | None]:
    return {"video": kwargs.get("video_compression_mask")}
