"""The way of a model's images from pixels to visual tokens: tower, bridge, and the order of the prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from foveate.bridges import ElasticBridge
from foveate.errors import FoveateError
from foveate.model.outputs import StackedImageOutput, WeightsImageOutput
from foveate.model.towers import patch_states, run
from foveate.model.views import ImageMarks, arrange, check_views, each_shape, joined, of_images, stacked
from foveate.tokens import Crop


class Seeing:
    """The part of a `FoveateModel` that sees."""

    config: Any
    vision_tower: Any
    bridge: Any
    image_marks: ImageMarks | None
    lens: Any
    grid: Any
    _interpolates: bool

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        return getattr(self.config.vision_config, "num_channels", 3), self.config.image_size, self.config.image_size

    @can_return_tuple  # type: ignore[untyped-decorator]
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_crops: Tensor | None = None,
        tower_features: Tensor | None = None,
        image_sizes: Tensor | None = None,
        view_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Crops (n, channels, height, width), normalised, -> `pooler_output`: of each image a tensor (visual tokens, text width).

        `image_crops` (images,) says how many of the crops each image has, one unless given; with a tiling `image_sizes` (images, 3) says
        of what height and width each was and at most how many views it had, and marks stand between its tokens. `view_tokens` (images,)
        says as how many tokens each image's crops are asked for, the configuration's number unless given. `tower_features`: what
        `encode_crops` has made of them; the tower is not run then, and of the pixels only the shape matters. `hidden_states` holds the
        tower's states at `vision_feature_layer` (None elsewhere). FoveateError where the tower cannot take the size or does not give one
        state per patch.

        Where tokens enter inside the language model (the tiling deepstack), `deepstack_features` holds them beside, see
        `StackedImageOutput`. Where images become weights (the bridge vlora), `image_weights` holds these, and there are no tokens.
        """
        output: Any = BaseModelOutput()
        said = next((given for given in (image_sizes, image_crops, pixel_values) if given is not None), pixel_values)
        each = self.config.counts_of(view_tokens, len(said))

        def tokens_of(pixels: Tensor, crops: Sequence[Crop] = ()) -> Any:
            nonlocal output
            grid = self.config.patch_grid(*pixels.shape[-2:])
            if tower_features is None:
                output = self._run_tower(pixels.to(self.vision_tower.dtype), **kwargs)
                features = [patch_states(output.hidden_states, layer, grid) for layer in self.config.vision_feature_layer]
            else:
                features = self._given(tower_features, grid)
            parameter = next(self.bridge.parameters(), None)
            if parameter is not None:
                features = [x.to(parameter.device, parameter.dtype) for x in features]
            return self._tokens(features, grid, each, crops)

        inside: dict[str, Any] = {}
        if image_sizes is None:
            tokens = tokens_of(pixel_values)
            if self.config.weighs:
                inside = {"image_weights": one_crop(tokens, image_crops)}
                images = [tokens.new_zeros(0, self.bridge.text_width)] * len(tokens)
            elif image_crops is None:
                images = [own[:count] for own, count in zip(tokens, each, strict=True)]
            else:
                found = zip(by_image(tokens, image_crops), each, strict=True)
                images = self.pack_image_features([own[:, :count] for own, count in found])
        else:
            plans = self.config.plans_of(image_sizes, pixel_values.shape[-1], view_tokens)
            check_views(plans, len(pixel_values))
            if self.config.joins > 1:
                own = [tokens[:count] for tokens, count in zip(tokens_of(pixel_values), each, strict=True)]
            else:
                views, counts = each_shape(plans, pixel_values, tokens_of), [len(plan.crops) for plan in plans]
                rows = [views[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]
                own = [torch.cat([view[:count] for view in row]) for row, count in zip(rows, each, strict=True)]
            images = arrange(own, plans, self.image_marks)
            if layers := self.config.tiled.layers:
                inside = {"deepstack_features": stacked(own, plans, len(layers))}
        kind = WeightsImageOutput if self.config.weighs else StackedImageOutput if inside else BaseModelOutputWithPooling
        return kind(
            last_hidden_state=output.last_hidden_state,
            pooler_output=images,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **inside,
        )

    def _tokens(self, features: list[Tensor], grid: tuple[int, int], each: Sequence[int | None], crops: Sequence[Crop]) -> Any:
        """What the bridge makes of views (n, patches, width) of each level, by way of the tiling's lens: (n, tokens, width), or n times
        (tokens, width) where those that go through the lens by themselves have other numbers than the rest. Where views are joined, of each
        image."""
        if self.config.joins > 1:
            apart = of_images(features, self.config.joins)
            return bridged(
                self.bridge, joined(apart, grid, self.config.scales) if self.lens is None else self.lens(apart, grid), grid, each
            )
        through = [number for number, crop in enumerate(crops) if crop.lens]
        if not through:
            return bridged(self.bridge, features, grid, each)
        rest = [number for number, crop in enumerate(crops) if not crop.lens]
        made, to = self.lens([x[through] for x in features], grid), crops[through[0]].grid or grid
        found = dict(zip(through, bridged(self.bridge, made, to, each), strict=True))
        if rest:
            found |= dict(zip(rest, bridged(self.bridge, [x[rest] for x in features], grid, each), strict=True))
        return [found[number] for number in range(len(crops))]

    def _given(self, tower_features: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """`tower_features` level by level. FoveateError where they are not of views of this grid."""
        levels, (rows, columns) = len(self.config.vision_feature_layer), grid
        if tower_features.shape[1:3] != (levels, rows * columns):
            raise FoveateError(
                f"tower_features of shape {tuple(tower_features.shape)} were given, but an image of {rows * self.config.patch_size} x "
                f"{columns * self.config.patch_size} pixels has {levels} levels of {rows} x {columns} patches"
            )
        return list(tower_features.unbind(1))

    def encode_crops(self, pixel_values: Tensor) -> Tensor:
        """Crops (n, channels, height, width), normalised, -> the features (n, levels, patches, width) that the bridge gets of them."""
        grid = self.config.patch_grid(*pixel_values.shape[-2:])
        output = self._run_tower(pixel_values.to(self.vision_tower.dtype))
        return torch.stack([patch_states(output.hidden_states, layer, grid) for layer in self.config.vision_feature_layer], 1)

    def pack_image_features(self, image_features: Sequence[Tensor]) -> list[Tensor]:
        """(crops, tokens, width) of each image -> its (visual tokens, width), crop after crop. Also called with places for features, to
        find out where each token comes from."""
        return [crops.flatten(0, 1) for crops in image_features]

    def _run_tower(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        return run(self.vision_tower, pixel_values, self.config.vision_feature_layer, self._interpolates, **kwargs)

    def unused_tower_parameters(self) -> list[str]:
        """Names (inside the tower) of trainable parameters that no feature level depends on: blocks above the deepest, poolers, norms.

        They never get a gradient, and DistributedDataParallel waits for one from every parameter: freeze these when the tower is trained.
        """
        named = [(name, p) for name, p in self.vision_tower.named_parameters() if p.requires_grad]
        pixels = torch.zeros(1, *self._image_shape, device=self.vision_tower.device)
        with torch.enable_grad():
            output = self._run_tower(pixels.to(self.vision_tower.dtype))
            total = sum(patch_states(output.hidden_states, layer, self.grid).float().sum() for layer in self.config.vision_feature_layer)
            if not isinstance(total, Tensor) or not total.requires_grad:
                return []
            gradients = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
        return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]


def bridged(bridge: Any, features: list[Tensor], grid: tuple[int, int], each: Sequence[int | None]) -> Tensor:
    """(crops, tokens, width): as many tokens as the most that an image asks for of its crops, None for all; fewer are the first of them."""
    most = max(bridge.within(grid, count) for count in set(each))
    made: Tensor = bridge(features, grid, most) if isinstance(bridge, ElasticBridge) else bridge(features, grid)
    return made


def one_crop(weights: Tensor, image_crops: Tensor | None) -> Tensor:
    """What images have become. FoveateError where one has another number of crops than one."""
    if image_crops is not None and image_crops.ne(1).any():
        raise FoveateError(f"image_crops {image_crops.tolist()}: an image that becomes weights is seen whole, in one crop")
    return weights


def by_image(tokens: Tensor, image_crops: Tensor) -> list[Tensor]:
    """Of each image the tokens of its crops."""
    counts = image_crops.tolist()
    if sum(counts) != len(tokens):
        raise FoveateError(f"image_crops counts {sum(counts)} crops, but pixel_values holds {len(tokens)}")
    return list(tokens.split(counts))
