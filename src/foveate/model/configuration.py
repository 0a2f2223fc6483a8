"""Configuration of an assembled vision-language model."""

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from foveate.bridges import Bridge, build_bridge, complete_config
from foveate.errors import FoveateError
from foveate.tokens import ImagePlan

# What transformers' Auto classes say of a saved model where foveate has not been imported. They look for the code of an unknown model in
# the "repository" in front of the dashes; this can never be the name of one, so nothing is fetched or run in its stead.
NEEDS = "the Python package foveate is needed: pip install foveate, then `import foveate` before loading (trust_remote_code does not help)."


def plan_image(bridge: Bridge, grid: tuple[int, int]) -> ImagePlan:
    """What any image becomes where it is resized to a `grid` of patches and seen whole."""
    return ImagePlan.whole(bridge.tokens(grid), grid)


class FoveateConfig(PreTrainedConfig):
    """What `FoveateForConditionalGeneration` is made of.

    - `vision_config`, `text_config`: the backbones' own configurations (any model type that transformers knows).
    - `bridge`: {"kind": ..., constructor arguments}; widths, levels and grid that are left open are filled in from the backbones.
    - `vision_feature_layer`: hidden states of the tower that the bridge gets, shallow before deep; 0 is the embeddings, negative
      numbers count from the end. The default [-2] is LLaVA's.
    - `image_token_id`: the placeholder that visual tokens replace.
    - `image_size`: side in pixels of the (square) input image now; the tower's own size unless given. The tower's own stays in
      `vision_config.image_size`; where the two differ position embeddings are interpolated.
    - `grown`: what the tokens that a growth has added keep of those they are copies of, and how much of it is left
      (`foveate.model.grown`); None: they are counted as any others.
    - `always_run_vision`: run tower and bridge on a blank image in training steps without images also on one process. With several
      processes that happens anyway, and with this also where the model is evaluated while it is trained.
    """

    model_type = "foveate"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    # dicts, numbers or nothing on the way in, what the text above says afterwards
    vision_config: Any = None
    text_config: Any = None
    bridge: Any = None
    vision_feature_layer: Any = None
    image_token_id: int = 32000
    image_size: Any = None
    grown: Any = None
    always_run_vision: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        parts = {"vision_config": self.vision_config, "text_config": self.text_config}
        own = {name: part._attn_implementation for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
        # Left to itself the base class sets the attention of ready-made parts to None, and a language model without one is not causal.
        kwargs.setdefault("attn_implementation", {"": own.get("text_config"), **own})
        super().__post_init__(**kwargs)
        if self.vision_feature_layer is None:
            self.vision_feature_layer = [-2]
        elif isinstance(self.vision_feature_layer, int):
            self.vision_feature_layer = [self.vision_feature_layer]
        if self.image_size is None:
            self.image_size = self.native_size
        width = self._tower("hidden_size")
        attends = getattr(self.vision_config, "num_attention_heads", None) is not None  # towers of convolutions leave it to the bridge
        self.bridge = complete_config(
            self.bridge or {"kind": "mlp"},
            vision_width=width,
            width=width,
            **({"head_dim": width // self._tower("num_attention_heads")} if attends else {}),
            text_width=self.text_config.get_text_config().hidden_size,
            levels=len(self.vision_feature_layer),
            grid=self.grid[0],
        )
        self.auto_map = {"AutoConfig": f"{NEEDS}--foveate.FoveateConfig"}
        # The tying itself is the language model's own affair (it is nested whole); this is what libraries around it read.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self._tower("patch_size")

    @property
    def native_size(self) -> int:
        """Side in pixels of the images that the tower's position embeddings were made for."""
        return self._tower("image_size")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches of an input image."""
        return self.patch_grid(self.image_size, self.image_size)

    def plan_image(self, height: int, width: int) -> ImagePlan:
        """What an image of `height` x `width` pixels becomes. FoveateError if the bridge cannot take its grid."""
        with torch.device("meta"):
            return plan_image(build_bridge(self.bridge), self.grid)

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches of an image of `height` x `width` pixels; the rest that fills no patch is not seen by a tower."""
        patch = self.patch_size
        if height < patch or width < patch:
            raise FoveateError(f"an image of {height} x {width} pixels is smaller than one patch of {patch} pixels")
        return height // patch, width // patch

    def _tower(self, name: str) -> int:
        """A number of the vision tower's configuration, also where it is spelled as (height, width)."""
        value = getattr(self.vision_config, name, None)
        sides = set(value) if isinstance(value, list | tuple) else {value}
        if len(sides) != 1 or not isinstance(side := sides.pop(), int):
            raise FoveateError(
                f"a {self.vision_config.model_type!r} model cannot be the vision tower: its {name} is {value}, not one number"
            )
        return side
