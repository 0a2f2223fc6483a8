"""Windows: the tower puts its groups of patches in order of windows, and only some of its blocks attend to the whole picture.

Qwen2.5-VL, EXAONE 4.5, whose towers number the blocks that do (`fullatt_block_indexes`); Muse Glimmer, whose tower names the kind of each
block and puts single patches so.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.vision_utils import get_vision_window_index


def order(tower: Any, grids: Tensor) -> Tensor | None:
    """(groups,) int64 where the tower puts each group; None where it leaves them as they are."""
    kinds = getattr(getattr(tower, "config", None), "layer_types", None) or ()
    if not hasattr(tower, "fullatt_block_indexes") and "window_attention" not in kinds:
        return None
    found: Tensor
    found, _ = get_vision_window_index(
        grids, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size, kwargs={}
    )
    return found
