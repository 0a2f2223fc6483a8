"""How text and images come together in a model: visual tokens take the places that the prompt keeps for them, or enter by other doors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.errors import FoveateError
from foveate.model.entering import Entering
from foveate.model.grown import refuse_growth
from foveate.model.seeing import Seeing
from foveate.model.weighing import Weighing, by_prompt


class Merging(Seeing):
    """The part of a `FoveateModel` that puts images into the prompt, or beside it."""

    training: bool
    entering: Entering
    weighing: Weighing | None
    get_input_embeddings: Any

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """Where visual tokens go: (batch, positions, 1), True at image tokens. FoveateError if their number is not that of the features."""
        mask = self._placeholders(input_ids, inputs_embeds)
        if not torch.compiler.is_compiling():
            placeholders, tokens = int(mask.sum()), image_features.numel() // image_features.shape[-1]
            if placeholders != tokens:
                raise FoveateError(
                    f"the prompts hold {placeholders} image placeholders but the images give {tokens} visual tokens; "
                    "processor and model must agree on image size and bridge; the model needs all that the processor says, view_tokens too"
                )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    def _placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """(batch, positions) bool."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        found: Tensor = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        return found

    def merge(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_crops: Tensor | None = None,
        tower_features: Tensor | None = None,
        image_sizes: Tensor | None = None,
        view_tokens: Tensor | None = None,
        prompt_images: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Text and images -> embeddings (batch, positions, width) with the visual tokens in place, and the visual tokens themselves. What
        of the images enters inside the language model is left in `entering`, and what weights they have become in `weighing`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise FoveateError("give exactly one of input_ids and inputs_embeds")
        encoded = mm_encoder_outputs.get("image") if mm_encoder_outputs else None
        if sum(given is not None for given in (pixel_values, tower_features, encoded)) > 1:
            raise FoveateError("give images once: as pixel_values, as tower_features, or encoded in mm_encoder_outputs")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        before = encoded is not None
        if tower_features is not None:  # pixels that have the shape, and take no memory
            pixel_values = tower_features.new_ones(()).expand(len(tower_features), *self._image_shape)
        if pixel_values is not None:
            if view_tokens is not None:
                refuse_growth(self.config, "another number of view_tokens")
            encoded = self.get_image_features(pixel_values, image_crops, tower_features, image_sizes, view_tokens, return_dict=True)
        if self.weighing is not None:
            self._weigh(self.weighing, encoded, prompt_images, len(inputs_embeds), past_key_values, before)
        if encoded is not None:
            visual = torch.cat(list(encoded.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, visual)
            self._let_in(mask[..., 0], encoded)
            return inputs_embeds.masked_scatter(mask, visual), visual

        # While decoding, an image token can only be one that the model itself has made.
        if input_ids is not None and (past_key_values is None or past_key_values.get_seq_length() == 0):
            self.get_placeholder_mask(input_ids, inputs_embeds, inputs_embeds.new_zeros(0, inputs_embeds.shape[-1]))
        always, together = self.config.always_run_vision, several_processes()
        if (always or together) if self.training else (always and together and past_key_values is None):
            inputs_embeds = inputs_embeds + self._blank_image().to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds, None

    def _let_in(self, slots: Tensor, encoded: BaseModelOutputWithPooling) -> None:
        """Leave to the decoder layers what enters in front of them."""
        layers = () if self.config.tiled is None else self.config.tiled.layers
        stacks = getattr(encoded, "deepstack_features", None) or ()
        if len(stacks) != len(layers):
            raise FoveateError(
                f"the encoded images have {len(stacks)} deepstack_features, and with {self.config.tiling} {len(layers)} enter the language "
                "model: hand in image_sizes with the pixels, or all that get_image_features gives"
            )
        self.entering.begin(slots, {layer: torch.cat(list(of)) for layer, of in zip(layers, stacks, strict=True)})

    def _weigh(self, weighing: Weighing, encoded: Any, prompt_images: Tensor | None, rows: int, cache: Any, before: bool) -> None:
        """Leave to the decoder's maps the weights of the images that come now, or of those that a cache's prompts had. `before`: whether
        they were encoded beforehand, perhaps for prompts that have been repeated since."""
        weighing.end()
        past = 0 if cache is None else int(cache.get_seq_length())
        if encoded is not None:
            weights = getattr(encoded, "image_weights", None)
            if weights is None:
                raise FoveateError("the encoded images have no image_weights: hand in all that get_image_features gives, or the pixels")
            if past:
                raise FoveateError(
                    f"the weights that an image becomes act on all of its prompt, of which {past} tokens are cached already: without a new "
                    "image the cache's own go on; with one begin anew, without the cache"
                )
            weighing.begin(by_prompt(weights, prompt_images, rows, before), self.bridge.outputs)
        elif past:
            weighing.recall(cache, rows, self.bridge.outputs)
        elif prompt_images is not None and bool(prompt_images.any()):
            raise FoveateError(
                f"prompt_images says {prompt_images.tolist()}, but no image came: hand in the pixels too (a prompt that is generated from "
                "in chunks, prefill_chunk_size, comes without)"
            )

    def _blank_image(self) -> Tensor:
        """Zero, but by way of tower and bridge: sharded training hangs when one process skips a module that the others wait in."""
        given: dict[str, Tensor] = {}
        views, shape = 1, self._image_shape
        if self.config.tiling is not None:
            plan = self.config.plan_image(*shape[1:])
            given, views = {"image_sizes": torch.tensor([plan.given])}, len(plan.crops)
        pixels = torch.zeros(views, *shape, device=self.vision_tower.device)
        made = self.get_image_features(pixels, **given, return_dict=True)
        parts = [made.pooler_output[0]] if self.weighing is None else [made.image_weights, self.bridge.outputs]
        return torch.stack([(part * 0.0).sum() for part in parts]).sum()  # times zero first, lest the sum overflow


def several_processes() -> bool:
    """Whether this process trains together with others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
