"""Several vision towers as one: each sees the image at its own size, and what they see lies side by side in the channels.

So a bridge can read CLIP beside DINOv2 (COMM, arXiv 2310.08825), or a tower that sees the image small beside one that sees it large
(MG-LLaVA, arXiv 2406.17770): `comm` and `mg_gate` tell the towers apart, `mlp` and its like read all channels at once. The first tower is
the one that reducers ask for scores.

All towers give one grid of patches. An image comes in at the size that the largest patches want; a tower with smaller ones sees it resized,
bilinearly, to as many of its own, and one whose processor normalises otherwise than the first's sees it normalised as it is used to.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from foveate.errors import FoveateError

Normal = tuple[Sequence[float], Sequence[float]]
"""(mean, standard deviation) of each channel that a processor subtracts and divides by."""


class TowersConfig(PreTrainedConfig):
    """What several towers are made of.

    - `towers`: their configurations, as dicts. `layers`: of each the hidden states that are read, shallow before deep.
    - `normal`: of each the (mean, std) of its processor; None: as the first's.
    - `patches`, `widths`: of each the side of a patch in pixels and the width of its states; found out by a run without weights.
    - `hidden_size`, `patch_size`, `image_size`: of all together, found out from these. The image has as many patches as the first tower's.
    """

    model_type = "foveate_towers"
    towers: Any = None
    layers: Any = None
    normal: Any = None
    patches: Any = None
    widths: Any = None
    hidden_size: int = 0
    patch_size: int = 0
    image_size: int = 0
    num_channels: int = 3

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.towers and self.patches is None:
            found = [measured(config, layers) for config, layers in zip(self.configs, self.layers, strict=True)]
            self.patches, self.widths = [patch for patch, _ in found], [width for _, width in found]
            self.patch_size = max(self.patches)
            self.image_size = number(self.configs[0], "image_size") // self.patches[0] * self.patch_size
            self.hidden_size = sum(count * width for count, width in self.shapes)

    @classmethod
    def of(cls, configs: Sequence[Any], layers: Any, normal: Sequence[Normal] | None = None) -> TowersConfig:
        """Of the towers' own configurations (of a model with a text side, such as CLIP, the vision side is taken). `layers`: one number for
        all, or an entry for each tower, a number or several; None: -2 of each. FoveateError for entries of other towers."""
        if layers is None or isinstance(layers, int):
            layers = [-2 if layers is None else layers] * len(configs)
        if len(layers) != len(configs):
            raise FoveateError(
                f"vision_feature_layer {layers} has {len(layers)} entries, but there are {len(configs)} vision towers: give one entry for "
                "each, a number or several, as in [[-3, -2], -1]"
            )
        read = [[of] if isinstance(of, int) else list(of) for of in layers]
        seeing = [getattr(config, "vision_config", config) for config in configs]
        for config, own in zip(seeing, read, strict=True):
            told(config, own)
        given = [config.to_dict() for config in seeing]
        for tower in given:
            tower.pop("_name_or_path", None)  # where it was read from
        return cls(towers=given, layers=read, normal=None if normal is None else [list(map(list, one)) for one in normal])

    @property
    def configs(self) -> list[Any]:
        """The towers' configurations."""
        return [AutoConfig.for_model(**deepcopy(tower)) for tower in self.towers or ()]

    @property
    def shapes(self) -> list[list[int]]:
        """[levels, width] of each tower, as a bridge gets them."""
        return [[len(layers), width] for layers, width in zip(self.layers, self.widths, strict=True)]


class Towers(PreTrainedModel):
    """Towers that see every picture."""

    config_class = TowersConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # of each as it can

    def __init__(self, config: TowersConfig, towers: Sequence[PreTrainedModel] | None = None) -> None:
        super().__init__(config)
        self.towers = nn.ModuleList(towers or [built(of, config._attn_implementation) for of in config.configs])
        self._told = [interpolates(tower) for tower in self.towers]
        self.post_init()

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None, **_: Any) -> BaseModelOutput | tuple[Any, ...]:
        """Pictures (images, channels, height, width), normalised as the first tower's, -> one state (images, patches, hidden_size): tower
        after tower, level after level. FoveateError where a tower does not take its size, or gives another grid."""
        grid = pixel_values.shape[-2] // self.config.patch_size, pixel_values.shape[-1] // self.config.patch_size
        found = []
        for index, (tower, layers) in enumerate(zip(self.towers, self.config.layers, strict=True)):
            output = run(tower, self._seen(pixel_values, index, grid), layers, self._told[index])
            found += [patch_states(output.hidden_states, layer, grid) for layer in layers]
        joined = torch.cat(found, dim=-1)
        output = BaseModelOutput(last_hidden_state=joined, hidden_states=(joined,))
        return output if return_dict is not False else output.to_tuple()

    def _seen(self, pixels: Tensor, index: int, grid: tuple[int, int]) -> Tensor:
        """What a tower is given of the pixels."""
        patch, normal = self.config.patches[index], self.config.normal
        if patch != self.config.patch_size:
            size = grid[0] * patch, grid[1] * patch
            pixels = F.interpolate(pixels.float(), size=size, mode="bilinear").to(pixels.dtype)
        if normal is None or normal[index] == normal[0]:
            return pixels
        (mean, spread), (own, of) = (
            [torch.tensor(one, device=pixels.device).view(-1, 1, 1) for one in normal[which]] for which in (0, index)
        )
        return ((pixels.float() * spread + mean - own) / of).to(pixels.dtype)


# ---- one tower -------------------------------------------------------------------------------------------------------------------------


def number(config: Any, name: str) -> int:
    """A number of a tower's configuration, also where it is spelled as (height, width). FoveateError where it is not there."""
    value = getattr(config, name, None)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise FoveateError(f"a {config.model_type!r} model cannot be the vision tower: its {name} is {value}, not one number")
    return side


def built(config: Any, attention: str | None) -> PreTrainedModel:
    """A tower without weights of its own, with the attention that is wanted where it has any."""
    tower: PreTrainedModel = AutoModel.from_config(config)
    if attention is not None and attention != tower.config._attn_implementation:
        with suppress(ValueError):  # a network of convolutions has none
            tower.set_attn_implementation(attention)
    return tower


def told(config: Any, layers: Sequence[int]) -> None:
    """Writes into the configuration of a tower of timm the sizes that it does not say: `image_size`, and `patch_size` and `hidden_size` of
    what it gives at these layers. FoveateError where timm is not there, or the tower gives no states by layer."""
    if getattr(config, "image_size", None) is not None or not isinstance(getattr(config, "architecture", None), str):
        return
    try:
        with torch.device("meta"):
            pretrained = AutoModel.from_config(deepcopy(config)).timm_model.pretrained_cfg
        said = pretrained | (getattr(config, "pretrained_cfg", None) or {})
        config.image_size = (config.model_args or {}).get("img_size") or said["input_size"][-1]
        config.patch_size, config.hidden_size = measured(config, layers)
    except (ImportError, ValueError, RuntimeError, AssertionError, TypeError) as error:
        config.image_size = None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FoveateError(f"the tower {config.architecture!r} of timm cannot be the vision tower: {reason}") from error


def measured(config: Any, layers: Sequence[int]) -> tuple[int, int]:
    """(side of a patch in pixels, width) of what a tower gives at some layers, by a run without weights. FoveateError where that is of
    several widths or grids."""
    side = number(config, "image_size")
    with torch.device("meta"), torch.no_grad():
        tower = AutoModel.from_config(deepcopy(config)).eval()
        states = run(tower, torch.empty(1, getattr(config, "num_channels", 3), side, side), layers, interpolates(tower)).hidden_states
    found = set()
    for layer in layers:
        state = at(states, layer)
        if state.dim() == 4:
            found.add((side // state.shape[-1], state.shape[1]))
        else:
            found.add((number(config, "patch_size"), state.shape[-1]))
    if len(found) != 1:
        raise FoveateError(
            f"the layers {list(layers)} of a {config.model_type!r} tower give states of (pixels a patch, width) {sorted(found)}: take "
            "layers that agree"
        )
    return found.pop()


def interpolates(tower: nn.Module) -> bool:
    """Whether a tower takes other sizes than its own where it is told to."""
    return "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters


def run(tower: Any, pixel_values: Tensor, layers: Sequence[int], told: bool, **kwargs: Any) -> Any:
    """A tower's output on pictures of any size, with its hidden states at `layers`. `told`: see `interpolates`. FoveateError where it does
    not take that size."""
    # Asked for some layers, a tower of timm gives these alone, by other numbers.
    kwargs["output_hidden_states"] = kwargs.get("output_hidden_states") or hasattr(tower, "timm_model") or list(layers)
    (height, width), native = pixel_values.shape[-2:], number(tower.config, "image_size")
    if height == width == native:
        return tower(pixel_values, **kwargs)
    # transformers' towers interpolate bicubically without aligned corners; the code that goes with Chain-of-Sight aligns them.
    if told:
        return tower(pixel_values, interpolate_pos_encoding=True, **kwargs)
    try:  # towers with rotary or always interpolated positions take any size
        return tower(pixel_values, **kwargs)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise FoveateError(
            f"{type(tower).__name__} was made for images of {native} x {native} pixels and does not take {height} x {width}: {error}. Set "
            f"image_size to {native}"
        ) from error


def at(hidden_states: Sequence[Tensor | None] | None, layer: int) -> Tensor:
    """Hidden state `layer` of a tower. FoveateError where it is not there."""
    if hidden_states is None:
        raise FoveateError("the vision tower does not give its hidden states")
    if not -len(hidden_states) <= layer < len(hidden_states):
        raise FoveateError(f"vision_feature_layer {layer} is not there: the tower has hidden states 0 to {len(hidden_states) - 1}")
    state = hidden_states[layer]
    if state is None:
        raise FoveateError(f"the tower does not give its hidden state {layer}")
    return state


def patch_states(hidden_states: Sequence[Tensor | None] | None, layer: int, grid: tuple[int, int]) -> Tensor:
    """The patches (images, rows * columns, width) of hidden state `layer`: what a tower puts before them ([CLS], registers) is left out,
    and a map (images, width, rows, columns) is laid out row after row."""
    states, patches = at(hidden_states, layer), grid[0] * grid[1]
    if states.dim() == 4 and states.shape[-2:] == grid:
        return states.flatten(2).transpose(1, 2)
    if states.dim() != 3 or states.shape[1] < patches:
        raise FoveateError(
            f"the tower's hidden state {layer} of shape {tuple(states.shape)} lacks one entry for each of {grid[0]} x {grid[1]} patches"
        )
    return states[:, states.shape[1] - patches :]
