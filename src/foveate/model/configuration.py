"""Configuration of an assembled vision-language model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from foveate.bridges import VLoRA, complete_config
from foveate.errors import FoveateError
from foveate.model.entering import refuse_layers
from foveate.model.towers import number, told
from foveate.model.views import BridgeSight
from foveate.model.weighing import completed
from foveate.tilings import Tiling, parse
from foveate.tokens import ImagePlan, Wiring, wire

# What transformers' Auto classes say of a saved model where foveate has not been imported. They look for the code of an unknown model in
# the "repository" in front of the dashes; this can never be the name of one, so nothing is fetched or run in its stead.
NEEDS = "the Python package foveate is needed: pip install foveate, then `import foveate` before loading (trust_remote_code does not help)."


Sizes = Sequence[tuple[int, int]]
"""(height, width) of images in pixels."""


class Planning:
    """What images become, for whoever has a `sight` and perhaps a tiling. `view_tokens`: as how many visual tokens each view is asked for;
    None: as many as the bridge makes."""

    bridge: Any
    tiling: Any
    view_tokens: Any

    def sight(self, side: int | None = None) -> BridgeSight:
        """What the tower sees at once in a view of `side` pixels, those of `image_size` unless given."""
        raise NotImplementedError

    @property
    def weighs(self) -> bool:
        """Whether images become weights of the language model, and no tokens (the bridge vlora)."""
        return bool(self.bridge["kind"] == VLoRA.kind)

    @property
    def tiled(self) -> Tiling | None:
        """The tiling, read."""
        return None if self.tiling is None else parse(self.tiling)

    def plan_image(self, height: int, width: int, budget: int | None = None) -> ImagePlan:
        """What an image of `height` x `width` pixels becomes in at most `budget` views. FoveateError if the bridge cannot take its grid."""
        tiling, sight = self.tiled, self.sight()
        if tiling is not None:
            return replace(tiling.plan(width, height, budget, sight), each=self.view_tokens or 0)
        refuse_budget(budget)
        grid = sight.grid(sight.side, sight.side)
        return ImagePlan.whole(sight.made(grid)[0], grid, self.view_tokens or 0)

    def share(self, sizes: Sizes, budget: int | None = None) -> list[int | None]:
        """How many views each image of one prompt may have, which share `budget` (the tiling's own unless given); None: any number."""
        tiling = self.tiled
        if tiling is not None:
            return tiling.share([(width, height) for height, width in sizes], budget, self.sight())
        refuse_budget(budget)
        return [None] * len(sizes)

    def plan_images(self, sizes: Sizes, budget: int | None = None) -> list[ImagePlan]:
        """What the images of one prompt become."""
        shares = self.share(sizes, budget)
        return [self.plan_image(*size) if most is None else self.plan_image(*size, most) for size, most in zip(sizes, shares, strict=True)]

    def counts_of(self, view_tokens: Any, images: int) -> list[int | None]:
        """As how many visual tokens each view of each image is asked for: what `view_tokens` says, one number or one for each image, or
        their own. FoveateError for numbers of other images."""
        if view_tokens is None or isinstance(view_tokens, int):
            return [self.view_tokens if view_tokens is None else read_view_tokens(view_tokens)] * images
        counts = [read_view_tokens(int(count)) for count in view_tokens]
        if len(counts) != images:
            raise FoveateError(f"view_tokens says of {len(counts)} images how many tokens their views have, but there are {images} images")
        return counts


def read_view_tokens(given: Any) -> int | None:
    """The number of visual tokens of a view. FoveateError for what is no such number."""
    if given is None or (isinstance(given, int) and not isinstance(given, bool) and given > 0):
        return given
    raise FoveateError(f"view_tokens is a number of visual tokens of each view, at least 1, not {given!r}")


def refuse_budget(budget: int | None) -> None:
    if budget is not None:
        raise FoveateError(f"a budget of {budget} views was given, but the model has no tiling: it sees every image whole, once")


def read_tiling(spelled: str | Tiling | None) -> Tiling | None:
    """The tiling of a configuration. FoveateError for what is none."""
    if spelled is None or isinstance(spelled, Tiling):
        return spelled
    if isinstance(spelled, str):
        return parse(spelled)
    raise FoveateError(f'a tiling is spelled as "internvl:tiles=6", not {spelled!r}')


class FoveateConfig(Planning, PreTrainedConfig):
    """What `FoveateForConditionalGeneration` is made of.

    - `vision_config`, `text_config`: the backbones' own configurations (any model type that transformers knows); of several vision towers a
      `TowersConfig`, which also says what is read of each.
    - `bridge`: {"kind": ..., constructor arguments}; widths, levels and grid that are left open are filled in from the backbones.
    - `vision_feature_layer`: hidden states of the tower that the bridge gets, shallow before deep; 0 is the embeddings, negative
      numbers count from the end. The default [-2] is LLaVA's.
    - `image_token_id`: the placeholder that visual tokens replace.
    - `image_size`: side in pixels of the (square) input image now; the tower's own size unless given. The tower's own stays in
      `vision_config.image_size`; where the two differ position embeddings are interpolated.
    - `tiling`: how an image becomes views (`foveate.tilings`), spelled as "internvl:tiles=6"; None: it is seen whole, once.
    - `view_tokens`: as how many visual tokens each view is asked for of a bridge that makes as many as it is asked for, unless a call says
      another number; None: all.
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
    tiling: Any = None
    view_tokens: Any = None
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
        told(self.vision_config, self.vision_feature_layer)
        if self.image_size is None:
            self.image_size = self.native_size
        tiling = read_tiling(self.tiling)
        self.tiling = None if tiling is None else str(tiling)
        width = number(self.vision_config, "hidden_size")
        attends = getattr(self.vision_config, "num_attention_heads", None) is not None  # towers of convolutions leave it to the bridge
        self.bridge = complete_config(
            completed(self.bridge or {"kind": "mlp"}, self.text_config),
            vision_width=width,
            width=width,
            **({"head_dim": width // number(self.vision_config, "num_attention_heads")} if attends else {}),
            text_width=self.text_config.get_text_config().hidden_size,
            levels=(levels := len(self.vision_feature_layer) * (1 if tiling is None else tiling.scales)),
            towers=getattr(self.vision_config, "shapes", [[levels, width]]),
            grid=self.grid[0],
        )
        self.view_tokens = read_view_tokens(self.view_tokens)
        self.check_tiling(tiling)
        if tiling is not None and tiling.shapes:
            sight = self.sight()
            sight.made((sight.merge, 2 * sight.merge))  # a bridge that is bound to one grid is told now
        self.auto_map = {"AutoConfig": f"{NEEDS}--foveate.FoveateConfig"}
        # The tying itself is the language model's own affair (it is nested whole); this is what libraries around it read.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    def check_tiling(self, tiling: Tiling | None) -> None:
        """FoveateError where a tiling lets tokens enter in front of decoder layers that are not there, has no tokens to lay out, or has a
        lens behind which the bridge cannot read."""
        if tiling is not None and self.weighs:
            raise FoveateError(
                f"the images of a {VLoRA.kind} bridge become weights, and no tokens that the tiling {tiling} could lay out: leave it out"
            )
        depth = getattr(self.text_config.get_text_config(), "num_hidden_layers", None)
        if tiling is not None and depth is not None:
            refuse_layers(tiling.layers, depth)
        if tiling is not None and tiling.lens is not None:
            tiling.plan(self.image_size, self.image_size, sight=self.sight())

    @property
    def scales(self) -> int:
        """At how many sizes the bridge reads the tower's maps."""
        tiling = self.tiled
        return 1 if tiling is None else tiling.scales

    @property
    def joins(self) -> int:
        """How many views of an image become one map in front of the bridge."""
        tiling = self.tiled
        return 1 if tiling is None else tiling.joins

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return number(self.vision_config, "patch_size")

    @property
    def native_size(self) -> int:
        """Side in pixels of the images that the tower's position embeddings were made for."""
        return number(self.vision_config, "image_size")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches of an input image."""
        return self.patch_grid(self.image_size, self.image_size)

    def sight(self, side: int | None = None) -> BridgeSight:
        return BridgeSight.of(self.bridge, side or self.image_size, self.patch_size, self.view_tokens)

    def plans_of(self, image_sizes: Any, side: int, view_tokens: Any = None) -> list[ImagePlan]:
        """What became of images of which `image_sizes` (images, 3) says height, width and at most how many views (0: any number), in
        views of `side` pixels of `view_tokens` (images,) tokens. FoveateError for a model without a tiling."""
        tiling, sight = self.tiled, self.sight(side)
        if tiling is None:
            raise FoveateError("image_sizes were given, but the model has no tiling; use the processor that belongs to it")
        given, counts = image_sizes.tolist(), self.counts_of(view_tokens, len(image_sizes))
        plans = zip(given, counts, strict=True)
        return [
            replace(tiling.plan(width, height, most or None, replace(sight, each=each)), each=each or 0)
            for (height, width, most), each in plans
        ]

    def wire(self, plan: ImagePlan) -> Wiring:
        """From which tokens and from where in the picture each slot of an image is, by its plan."""
        sight, grids = self.sight(plan.crops[0].pixels[0]), dict.fromkeys(crop.grid for crop in plan.crops if crop.grid is not None)
        return wire(plan, tuple((grid, sight.boxes(grid)) for grid in grids))

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches of an image of `height` x `width` pixels; the rest that fills no patch is not seen by a tower."""
        patch = self.patch_size
        if height < patch or width < patch:
            raise FoveateError(f"an image of {height} x {width} pixels is smaller than one patch of {patch} pixels")
        return height // patch, width // patch
