"""How a Hugging Face VLM is opened: where its images enter and where its decoder layers are.

One generic reading by the names that the library's VLMs share (`get_image_features`, `get_placeholder_mask`, `language_model`). What only
some families have is in `families`, one such shape a file. What cannot be read gives an error that names the missing part.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveate.anatomy import families
from foveate.anatomy.layers import attends, window_of
from foveate.anatomy.media import Arrangement, Boxes, Media, Patches
from foveate.anatomy.raster import places
from foveate.anatomy.units import Crops, in_rows
from foveate.errors import FoveateError, NotApplicable, Reason

# By model type, what a model wants beside transformers. Any model that shares these shapes is served; these are tested.
TESTED = {
    "aria": "",
    "aya_vision": "",
    "cohere2_vision": "torchvision",
    "cohere_compass": "torchvision",
    "cosmos3_omni": "torchvision",
    "deepseek_vl": "",
    "deepseek_vl_hybrid": "",
    "ernie4_5_vl_moe": "torchvision",
    "exaone4_5": "torchvision",
    "fast_vlm": "timm",
    "foveate": "",
    "gemma3": "",
    "gemma3n": "timm",
    "gemma4": "torchvision",
    "glm46v": "torchvision",
    "glm4v": "torchvision",
    "glm4v_moe": "torchvision",
    "glm_ocr": "torchvision",
    "glmga": "torchvision",
    "got_ocr2": "",
    "granite4_vision": "",
    "granite_docling": "",
    "hunyuan_vl": "",
    "hyperclovax_vision_v2": "torchvision",
    "idefics2": "",
    "idefics3": "",
    "internvl": "torchvision",
    "janus": "",
    "kimi_k25": "torchvision",
    "lfm2_vl": "torchvision",
    "lighton_ocr": "",
    "llama4": "torchvision",
    "llava": "",
    "llava_next": "",
    "llava_next_video": "torchvision",
    "llava_onevision": "torchvision",
    "minicpmv4_6": "torchvision",
    "minicpmv4_7": "torchvision",
    "mistral3": "torchvision",
    "molmo2": "torchvision",
    "muse_glimmer": "torchvision",
    "ovis2": "",
    "paddleocr_vl": "",
    "paligemma": "",
    "perception_lm": "timm",
    "pp_chart2table": "",
    "qianfan_ocr": "",
    "qwen2_5_omni_thinker": "torchvision",
    "qwen2_5_vl": "torchvision",
    "qwen2_vl": "torchvision",
    "qwen3_5": "torchvision",
    "qwen3_5_moe": "torchvision",
    "qwen3_omni_moe_thinker": "torchvision",
    "qwen3_vl": "torchvision",
    "qwen3_vl_moe": "torchvision",
    "smolvlm": "num2words, torchvision",
    "video_llama_3": "torchvision",
    "video_llava": "torchvision",
    "vipllava": "",
}
MODALITIES = ("image", "video")
_LANGUAGE = ("language_model", "text_model")
_SLOT_METHODS = ("get_placeholder_mask", families.merger.METHOD)  # know which slots the features go to, the first of them by its result
_TOWERS = ("vision_tower", "vision_model", "visual", "image_tower", "vision_encoder")


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

    @property
    def frequencies(self) -> Tensor | None:
        """(F,) by how much the rotary module turns in one step; None where that is not one table, or follows the length of the sequence."""
        found, kind = getattr(self.rotary, "inv_freq", None), getattr(self.rotary, "rope_type", "default")
        stays = isinstance(kind, str) and kind != "longrope" and "dynamic" not in kind
        return found if stays and isinstance(found, Tensor) and found.ndim == 1 else None

    def rotary_at(self, frequencies: Tensor) -> Callable[..., Any]:
        """The rotary module as it turns by other frequencies (F,), in place of `self.frequencies`; the model's own is left as it is, and
        no hook on it hears of this."""
        own = self.rotary
        assert own is not None
        copied = copy.copy(own)
        copied.__dict__["_buffers"] = {**own._buffers, "inv_freq": frequencies}
        return functools.partial(type(copied).forward, copied)

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
        one = families.asked.modality(self.core.config, given, MODALITIES)
        if one is not None:
            return {one: result[..., 0] if result.ndim == 3 else result}, True
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
        own = families.two_towers.tower_of(self.core, modality)
        return self.tower if own is None else own

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
                parts[module] = "tower" if any(inner in towers for inner in module.modules()) else "bridge"
        return parts

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
        return [window_of(module, self.text_config, layer) for layer, module in enumerate(self.layers)]

    # ---- how the tokens of a picture lie, and what else only some families have: see `families`

    @property
    def overheard(self) -> dict[str, Callable[[dict[str, Any], Any], Any]]:
        """By the name of a method of the core that is called while pictures are encoded, what to remember of its arguments and result."""
        return {name: remember for name, remember in families.OVERHEARD.items() if hasattr(self.core, name)}

    def arrangement(self, media: Media) -> Arrangement:
        """How the tokens of a call that encodes lie in their pictures."""
        packed = families.plans.arranged(media) or families.mosaic.arranged(media)
        if packed is not None:
            return packed
        rasters = self.rasters(media.given)
        if rasters is None:
            laid = next(found for shape in families.LAID if (found := shape(media)) is not None)
        else:
            laid = [places(n, shape=shape, device=media.device) for n, shape in zip(media.lengths, rasters, strict=True)]
        return Arrangement([families.newlines.told_apart(self.core, *each) for each in zip(laid, media.features, strict=True)])

    def patches(self, media: Media) -> Patches:
        """How the tower's patches become the tokens of a call. NotApplicable where that is not known."""
        families.plans.refuse_shapes(media)
        found = families.pooling.patches(media) or families.grids.patches(media) or families.plans.patches(media)
        return found or Patches(boxes=media.boxes)

    def contents(self, media: Media) -> list[Tensor]:
        """What each item of a call is told apart by: its pixels, or its features where these are all there is."""
        pixels = media.pixels_given
        if pixels is not None:
            crops, plans = media.given.get("image_crops"), families.plans.plans_of(media)  # of our own model
            counts = [len(plan.crops) for plan in plans] if plans is not None else None if crops is None else crops.tolist()
            by_grid = families.grids.pixels_of(media, pixels) if counts is None else pixels.split(counts)
            pixels = families.crops.pixels_of(pixels) if by_grid is None else by_grid
        return media.features if pixels is None or len(pixels) != len(media.features) else list(pixels)

    @property
    def merge(self) -> int | None:
        """Sides of the block of patches that becomes one token, where the vision configuration says so (the Qwen-VL way)."""
        return families.grids.merge(self.core)

    @property
    def grouped(self) -> bool:
        """Whether the tower orders its patches so that those of one token stand side by side."""
        return families.grids.grouped(self.tower)

    @property
    def marks(self) -> tuple[bool, bool, bool]:
        """Whether the tower itself puts a mark in front of each picture, a newline after each row of tokens, a mark after the picture."""
        return families.marks.marks(self.tower) if self.has_tower else (False, False, False)

    @property
    def resampled(self) -> bool:
        """Whether learned queries make the tokens, so that none of them belongs to certain patches."""
        return families.queries.resampled(self.core)

    def boxes(self, pixels: Tensor) -> Boxes | None:
        """Of a model whose bridge says so: from which box of patches each token is made, and the grid of patches."""
        return families.boxes.boxes(self.core, pixels)

    def crops(self, tower: nn.Module, given: dict[str, Any], shape: Sequence[int]) -> Crops:
        """How the crops of a call of a tower lie, from the call's arguments by name and the shape of its blocks' states without their
        width. NotApplicable where that is not known."""
        found = families.grids.crops(self, tower, given, shape)
        if found is not None:
            return found
        pixels = next((value for name, value in given.items() if name.startswith("pixel_values") and isinstance(value, Tensor)), None)
        return in_rows(tower, families.shuffles.side(self.core), pixels, shape)

    def window_order(self, grids: Tensor | None) -> Tensor | None:
        """Of a tower that puts its groups of patches in order of windows: that order."""
        return None if grids is None else families.windows.order(self.tower, grids)

    @property
    def weighs(self) -> bool:
        """Whether images become weights of the decoder, and no tokens of the sequence."""
        return families.weights.made(self.core)

    def placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """(B, N) bool: the slots of image features, for models that have no method to say so."""
        return families.merger.placeholders(self.core, input_ids, inputs_embeds)

    def kept(self, kwargs: dict[str, Any]) -> dict[str, Tensor | None]:
        """By modality, which of its features enter the language model, (tokens,) bool, from the arguments of the core; None: all."""
        return families.compression.kept(kwargs)

    def injected(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Tensor, dict[int, Tensor]] | None:
        """What the decoder adds to its visual slots in front of some layers (DeepStack): its arguments without that, the slots (B, N), and
        by layer the features (tokens, D). None where nothing is added. With those arguments the decoder adds what has not been taken out
        of the features."""
        return families.deepstack.injected(kwargs) or families.deepstack.held(self.core, kwargs)


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
    if getattr(getattr(language, "config", None), "is_encoder_decoder", False):
        raise FoveateError(
            f"{name}: {type(language).__name__} reads pictures with an encoder and answers with a decoder that looks at it from outside; "
            "no visual tokens stand in the sequence that is decoded, so that there are none to be reduced"
        )
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
    families.shared_keys.refuse(name, decoder.config)
    return Anatomy(core, decoder, layers)


def features_of(outputs: Any) -> list[Tensor]:
    """(L, D) features of each item that a model's encoding has returned."""
    features = outputs.pooler_output if hasattr(outputs, "pooler_output") else outputs
    if features is None:  # not pooled, or all of them enter between the layers
        features = families.deepstack.features(outputs)
    return list(outputs.last_hidden_state if features is None else features)


def _is_core(module: nn.Module) -> bool:
    speaks = any(isinstance(getattr(module, name, None), nn.Module) for name in _LANGUAGE)
    return speaks and any(name in dir(type(module)) for name in _SLOT_METHODS)
