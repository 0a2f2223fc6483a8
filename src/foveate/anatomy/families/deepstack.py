"""DeepStack: features are added to the visual slots between the first layers of the decoder.

Qwen3-VL (a list of features: what stands first is added after the first layer), Granite 4 Vision (by the layer that they are added in
front of; all its features may enter so), and Foveate's own models, which hold them in `entering` until the layer comes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Arguments of a decoder: visual slots, features to be added to them, and the offset from the features' number to the layer that sees them.
_INJECTED = (("visual_pos_masks", "deepstack_visual_embeds", 1), ("vision_mask", "deepstack_features", 0))


def injected(kwargs: dict[str, Any]) -> tuple[dict[str, Any], Tensor, dict[int, Tensor]] | None:
    for slots, features, behind in _INJECTED:
        given = kwargs.get(features)
        if given is None:
            continue
        layers = given.items() if isinstance(given, dict) else enumerate(given)
        mask = kwargs[slots]
        mask = mask[..., 0] if mask.ndim == 3 else mask
        return {**kwargs, slots: None, features: None}, mask, {layer + behind: f for layer, f in layers}
    return None


def held(core: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Tensor, dict[int, Tensor]] | None:
    entering: Any = getattr(core, "entering", None)
    layers = getattr(entering, "layers", None)
    return (kwargs, entering.slots, layers) if layers else None


def features(outputs: Any) -> Any:
    """(L, D) features of each item, from what encoding has returned; None where none enter so. Each level has the same items."""
    levels = getattr(outputs, "deepstack_features", None)
    return levels[0][1] if levels else None
