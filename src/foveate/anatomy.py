"""How a Hugging Face VLM is opened: where its images enter and where its decoder layers are.

One generic reading by the names that the library's VLMs share (`get_image_features`, `get_placeholder_mask`, `language_model`).
What cannot be read gives an error that names the missing part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveate.errors import FoveateError

_ATTENTION_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "attention")


@dataclass(frozen=True)
class Anatomy:
    """The parts of a VLM that Foveate needs.

    core      the module that puts image features into the sequence (its forward takes input_ids and pixel_values)
    decoder   the text model under it: runs `layers` one after another
    layers    the decoder layers
    """

    core: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    image_token_id: int

    @property
    def text_config(self) -> Any:
        return self.decoder.config

    @property
    def rotary(self) -> nn.Module | None:
        """The module that turns positions into rotary embeddings, once for all layers."""
        module = getattr(self.decoder, "rotary_emb", None)
        return module if isinstance(module, nn.Module) else None

    @property
    def tower(self) -> nn.Module:
        """The vision tower. FoveateError if the model has none by a usual name."""
        for name in ("vision_tower", "vision_model", "visual", "image_tower"):
            module = getattr(self.core, name, None)
            if isinstance(module, nn.Module):
                return module
        raise FoveateError(f"{type(self.core).__name__} has no vision tower by a known name, so its attention cannot be read")

    @property
    def grouped(self) -> bool:
        """Whether the tower orders its patches so that those of one token stand side by side (the Qwen-VL way)."""
        return hasattr(self.tower, "spatial_merge_size")

    def recurrent(self, layer: int) -> bool:
        """Whether a decoder layer recurs or convolves along the sequence instead of attending."""
        types = getattr(self.text_config, "layer_types", None)
        return types is not None and types[layer] not in _ATTENTION_TYPES

    def visual_slots(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, N) bool: the placeholders of visual tokens."""
        if input_ids is not None:
            return input_ids == self.image_token_id
        if inputs_embeds is None:
            raise FoveateError("the model was called with neither input_ids nor inputs_embeds")
        embed: Any = self.core.get_input_embeddings()  # type: ignore[operator]
        placeholder = embed.weight[self.image_token_id].to(inputs_embeds.dtype)
        visual: Tensor = (inputs_embeds == placeholder).all(-1)
        return visual


def read(model: nn.Module) -> Anatomy:
    """Opens a model, wrapped (PEFT, DDP) or not. Raises FoveateError naming the part that is missing."""
    core = next((m for m in model.modules() if _is_core(m)), None)
    name = type(model).__name__
    if core is None:
        raise FoveateError(
            f"{name} has no part with `get_placeholder_mask` and `language_model`: it is not a vision-language model that "
            "interleaves visual tokens with text, or its family needs an anatomy of its own"
        )
    language: Any = core.language_model
    decoder = language if isinstance(getattr(language, "layers", None), nn.ModuleList) else language.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise FoveateError(f"{name}: {type(decoder).__name__} has no decoder layers named `layers`; its family needs its own anatomy")
    config: Any = core.config
    token = getattr(config, "image_token_id", None)
    if token is None:
        token = getattr(config, "image_token_index", None)
    if token is None:
        raise FoveateError(f"{name}: its config has no image_token_id, so its visual tokens cannot be told from text")
    return Anatomy(core, decoder, layers, int(token))


def _is_core(module: nn.Module) -> bool:
    return hasattr(module, "get_placeholder_mask") and isinstance(getattr(module, "language_model", None), nn.Module)
