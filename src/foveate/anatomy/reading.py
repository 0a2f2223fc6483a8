"""How a Hugging Face VLM is opened: where its images enter and where its decoder layers are.

One generic reading by the names that the library's VLMs share (`get_image_features`, `get_placeholder_mask`, `language_model`).
What cannot be read gives an error that names the missing part.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from foveate.errors import FoveateError, NotApplicable, Reason

# By model type, what a model wants beside transformers. Any model that shares these shapes is served; these are tested.
TESTED = {
    "aria": "",
    "aya_vision": "",
    "cohere2_vision": "torchvision",
    "deepseek_vl": "",
    "ernie4_5_vl_moe": "torchvision",
    "exaone4_5": "torchvision",
    "fast_vlm": "timm",
    "foveate": "",
    "gemma3": "",
    "gemma3n": "timm",
    "gemma4": "torchvision",
    "glm46v": "torchvision",
    "glm4v": "torchvision",
    "glm_ocr": "torchvision",
    "got_ocr2": "",
    "granite4_vision": "",
    "hunyuan_vl": "",
    "idefics3": "",
    "internvl": "torchvision",
    "lfm2_vl": "torchvision",
    "lighton_ocr": "",
    "llama4": "torchvision",
    "llava": "",
    "llava_next": "",
    "llava_next_video": "torchvision",
    "llava_onevision": "torchvision",
    "mistral3": "torchvision",
    "ovis2": "",
    "paddleocr_vl": "",
    "paligemma": "",
    "perception_lm": "timm",
    "qianfan_ocr": "",
    "qwen2_5_vl": "torchvision",
    "qwen2_vl": "torchvision",
    "qwen3_5": "torchvision",
    "qwen3_vl": "torchvision",
    "qwen3_vl_moe": "torchvision",
    "smolvlm": "num2words, torchvision",
    "video_llama_3": "torchvision",
    "video_llava": "torchvision",
    "vipllava": "",
}
MODALITIES = ("image", "video")
_LANGUAGE = ("language_model", "text_model")
_SLOT_METHODS = ("get_placeholder_mask", "inputs_merger")  # know which slots the features go to, the first of them by its result
_TOWERS = ("vision_tower", "vision_model", "visual", "image_tower", "vision_encoder")
# Arguments of a decoder: visual slots, features to be added to them, and the offset from the features' number to the layer that sees them.
_INJECTED = (("visual_pos_masks", "deepstack_visual_embeds", 1), ("vision_mask", "deepstack_features", 0))


@dataclass(frozen=True)
class Anatomy:
    """The parts of a VLM that Foveate needs, and what else it has to know of the model. A model of your own overrides what differs, see
    `register_reader`.

    core      the module that puts image features into the sequence (its forward takes input_ids and pixel_values)
    decoder   the text model under it: runs `layers` one after another
    layers    the decoder layers
    """

    core: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList

    @property
    def text_config(self) -> Any:
        return self.decoder.config

    @property
    def rotary(self) -> nn.Module | None:
        """The module that turns positions into rotary embeddings, once for all layers."""
        module = getattr(self.decoder, "rotary_emb", None)
        return module if isinstance(module, nn.Module) else None

    # ---- where images enter

    @property
    def encodings(self) -> dict[str, str]:
        """By the name of a method of the core that encodes pictures, their modality. It returns features (L, D) of each item, or an output
        whose `pooler_output` they are."""
        return {f"get_{m}_features": m for m in MODALITIES if hasattr(self.core, f"get_{m}_features")}

    def rasters(self, given: dict[str, Any]) -> list[tuple[int, int]] | None:
        """(rows, columns) of each item's tokens, from the arguments of a call that encodes; None where Foveate is to find out itself."""
        return None

    @property
    def slot_method(self) -> str | None:
        """The method of the core that is called when features enter the sequence; None: `placeholders` says which slots they fill."""
        return next((name for name in _SLOT_METHODS if hasattr(self.core, name)), None)

    def slots(self, result: Any, given: dict[str, Any], parameters: Iterable[str]) -> tuple[dict[str, Tensor], bool]:
        """By modality the slots (B, N) bool that features go to now, from a call of the slot method (its result, its arguments by name,
        the names that it takes), and whether they are those of features that the call was given."""
        if self.slot_method != _SLOT_METHODS[0]:
            return {"image": self.placeholders(given.get("input_ids"), given["inputs_embeds"])}, False
        masks = result if isinstance(result, tuple) else (result,)
        asked = any(f"{modality}_features" in parameters for modality in MODALITIES)
        named = zip(MODALITIES, masks, strict=False)
        found = {m: mask for m, mask in named if not asked or given.get(f"{m}_features") is not None}
        return {m: mask[..., 0] if mask.ndim == 3 else mask for m, mask in found.items()}, asked

    @property
    def has_tower(self) -> bool:
        return any(isinstance(getattr(self.core, name, None), nn.Module) for name in _TOWERS)

    def tower_of(self, modality: str) -> nn.Module:
        """The tower of images or of videos, mostly one and the same."""
        own = getattr(self.core, f"{modality}_tower", None)
        return own if isinstance(own, nn.Module) else self.tower

    @property
    def tower(self) -> nn.Module:
        """The vision tower. FoveateError if the model has none by a usual name."""
        for name in _TOWERS:
            module = getattr(self.core, name, None)
            if isinstance(module, nn.Module):
                return module
        name = type(self.core).__name__
        raise NotApplicable(Reason.NO_TOWER_ATTENTION, f"{name} has no vision tower by a known name, so its attention cannot be read")

    @property
    def visual(self) -> dict[nn.Module, str]:
        """The modules beside the language model that see or pass on images and videos, each with its part: "tower" or "bridge"."""
        towers = {self.tower_of(modality) for modality in ("image", "video")} if self.has_tower else set()
        parts: dict[nn.Module, str] = {}
        for child in self.core.children():
            if any(module is self.decoder for module in child.modules()):
                continue
            called = child if isinstance(child, nn.ModuleList | nn.ModuleDict) else [child]
            for module in called.values() if isinstance(called, nn.ModuleDict) else called:
                parts[module] = "tower" if module in towers else "bridge"
        return parts

    @property
    def merge(self) -> int | None:
        """Sides of the block of patches that becomes one token, where the vision configuration says so (the Qwen-VL way)."""
        config = getattr(getattr(self.core, "config", None), "vision_config", None)
        side = getattr(config, "spatial_merge_size", None)
        return None if side is None else int(side)

    @property
    def resampled(self) -> bool:
        """Whether learned queries make the tokens, so that none of them belongs to certain patches."""
        projector = getattr(self.core, "multi_modal_projector", None)
        return isinstance(projector, nn.Module) and any("quer" in name for name, _ in projector.named_parameters(recurse=False))

    @property
    def grouped(self) -> bool:
        """Whether the tower orders its patches so that those of one token stand side by side."""
        return hasattr(self.tower, "spatial_merge_size")

    @property
    def marks(self) -> tuple[bool, bool, bool]:
        """Whether the tower itself puts a mark in front of each picture, a newline after each row of tokens, a mark after the picture."""
        named = {name.rpartition(".")[2] for name, _ in self.tower.named_parameters()} if self.has_tower else set()
        return "image_begin" in named, "image_newline" in named, "image_end" in named

    def recurrent(self, layer: int) -> bool:
        """Whether a decoder layer recurs or convolves along the sequence instead of attending, whatever its type is called."""
        return self._recurrent[layer]

    @functools.cached_property
    def _recurrent(self) -> list[bool]:
        return [not attends(layer) for layer in self.layers]

    def window(self, layer: int) -> int | None:
        """How many tokens a decoder layer reaches back to, its own among them; None: to all."""
        return self._windows[layer]

    @functools.cached_property
    def _windows(self) -> list[int | None]:
        return [self._window(layer) for layer in range(len(self.layers))]

    def _window(self, layer: int) -> int | None:
        named = [vars(module)["sliding_window"] for module in self.layers[layer].modules() if "sliding_window" in vars(module)]
        if named:
            return next((int(window) for window in named if window), None)
        types = getattr(self.text_config, "layer_types", None)
        window = getattr(self.text_config, "sliding_window", None)
        return int(window) if window and (types is None or "sliding" in types[layer]) else None

    def kept(self, kwargs: dict[str, Any]) -> dict[str, Tensor | None]:
        """By modality, which of its features enter the language model, (tokens,) bool, from the arguments of the core; None: all."""
        return {"video": kwargs.get("video_compression_mask")}

    def placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """(B, N) bool: the slots of image features, for models that have no method to say so."""
        config: Any = self.core.config
        token = config.image_token_id
        if input_ids is not None:
            return input_ids.eq(token)
        embed: Any = self.core.get_input_embeddings()  # type: ignore[operator]
        slots: Tensor = (inputs_embeds == embed.weight[token].to(inputs_embeds.dtype)).all(-1)
        return slots

    def boxes(self, pixels: Tensor) -> tuple[list[tuple[int, int, int, int]], tuple[int, int]] | None:
        """Of a model whose bridge says so: from which box of patches each token is made, and the grid of patches."""
        bridge: Any = getattr(self.core, "bridge", None)
        if not hasattr(bridge, "boxes"):
            return None
        config: Any = self.core.config
        grid = config.patch_grid(*pixels.shape[-2:])
        return bridge.boxes(grid), grid

    def window_order(self, grids: Tensor | None) -> Tensor | None:
        """Of a tower that puts its groups of patches in order of windows: that order."""
        tower: Any = self.tower
        if grids is None or not hasattr(tower, "fullatt_block_indexes"):
            return None
        order, _ = get_vision_window_index(
            grids, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size, kwargs={}
        )
        return order

    def injected(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Tensor, dict[int, Tensor]] | None:
        """What the decoder adds to its visual slots in front of some layers (DeepStack): its arguments without that, the slots (B, N), and
        by layer the features (tokens, D). None where nothing is added."""
        for slots, features, behind in _INJECTED:
            given = kwargs.get(features)
            if given is None:
                continue
            layers = given.items() if isinstance(given, dict) else enumerate(given)
            mask = kwargs[slots]
            mask = mask[..., 0] if mask.ndim == 3 else mask
            return {**kwargs, slots: None, features: None}, mask, {layer + behind: f for layer, f in layers}
        return None


Reader = Callable[[nn.Module], Anatomy | None]
_readers: list[Reader] = []


def register_reader(reader: Reader) -> None:
    """Makes models of a family of your own known: `reader(model)` gives the anatomy of one, None for any other model.

    It is asked before Foveate's own reading, by `attach` and by everything else that opens a model. Most families need a subclass of
    `Anatomy` with two or three methods, and the parts: `MyAnatomy(core=model, decoder=model.lm, layers=model.lm.blocks)`.
    """
    _readers.insert(0, reader)


def forget_reader(reader: Reader) -> None:
    """Takes a reader back."""
    _readers.remove(reader)


def read(model: nn.Module) -> Anatomy:
    """Opens a model, wrapped (PEFT, DDP) or not. Raises FoveateError naming the part that is missing."""
    for reader in _readers:
        for module in model.modules():
            if (found := reader(module)) is not None:
                return found
    core = next((m for m in model.modules() if _is_core(m)), None)
    name = type(model).__name__
    if core is None:
        raise FoveateError(
            f"{name} has no part with {' or '.join(_LANGUAGE)} and {' or '.join(_SLOT_METHODS)}: it is not a vision-language model that "
            "interleaves visual tokens with text, or its family needs a reader of its own (foveate.anatomy.register_reader)"
        )
    language = next(part for part in (getattr(core, attribute, None) for attribute in _LANGUAGE) if isinstance(part, nn.Module))
    decoder = next((m for m in language.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList)), None)
    if decoder is None:
        raise FoveateError(
            f"{name}: {type(language).__name__} has no decoder layers named `layers`: reducers cannot be attached to it, nor is it "
            "trained by a recipe; its family needs a reader of its own"
        )
    if not (getattr(decoder, "_supports_sdpa", True) or getattr(decoder, "_supports_attention_backend", True)):
        raise FoveateError(
            f"{name}: {type(decoder).__name__} attends (or recurs) by code of its own and not by the library's attention, whose masks and "
            "scores a reducer needs: reducers cannot be attached to it, nor is it trained by a recipe"
        )
    layers: Any = decoder.layers
    if getattr(decoder.config, "num_kv_shared_layers", 0):
        raise NotApplicable(
            Reason.SHARED_KEYS,
            f"{name}: its last layers read the keys of earlier ones, so that a cut in front of them would not meet its keys",
        )
    return Anatomy(core, decoder, layers)


def attends(layer: nn.Module) -> bool:
    """Whether a layer attends: a part of it calls the library's attention interface (or torch's attention), whose masks have four
    dimensions. What recurs or convolves along the sequence has a mask (batch, tokens) at most, whatever the configuration calls it."""
    kinds: set[Any] = {type(module) for module in layer.modules()}
    return any(map(_calls_interface, kinds))


@functools.cache
def _calls_interface(kind: Any) -> bool:
    for base in kind.__mro__:  # a subclass may hand on to its base
        code = getattr(inspect.unwrap(vars(base).get("forward", kind)), "__code__", None)
        if code is not None and {"ALL_ATTENTION_FUNCTIONS", "scaled_dot_product_attention"} & set(code.co_names):
            return True
    return False


def tensor_parallel_group(layer: nn.Module) -> Any:
    """The ranks over which a layer's heads are shared out (a torch.distributed.ProcessGroup), None where this rank has all of them."""
    parameter: Any
    for parameter in layer.parameters():
        mesh = getattr(parameter, "device_mesh", None)  # of a DTensor
        if mesh is None or "tp" not in (mesh.mesh_dim_names or ()):
            continue
        dimension = mesh.mesh_dim_names.index("tp")
        if mesh.size(dimension) > 1 and parameter.placements[dimension].is_shard():
            return mesh.get_group(dimension)
    return None


def _is_core(module: nn.Module) -> bool:
    speaks = any(isinstance(getattr(module, name, None), nn.Module) for name in _LANGUAGE)
    return speaks and any(name in dir(type(module)) for name in _SLOT_METHODS)
