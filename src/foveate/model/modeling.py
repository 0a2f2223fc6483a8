"""A vision-language model from a vision tower, a bridge and a causal language model of transformers.

The language model may be any that takes embeddings and keeps its past in `past_key_values`, whatever its positions are (rotary, learned,
ALiBi). Reducers and recipes ask more of it: see `foveate.anatomy.read`.

Layout: `model.vision_tower`, `model.bridge` and `model.causal_lm`. The last is the complete causal language model, head included, because
families differ in what they do between the last hidden state and the logits (Gemma caps them, Cohere and Granite scale them, Phi adds a
bias) and in their losses: a text-only forward pass is the LM's own, to the last bit. `model.language_model`, like `get_decoder()`, is the
decoder inside it. (A submodule named language_model that holds a `model` would fall under a renaming rule of transformers' loader.)

The public interface is that of transformers' LLaVA classes.
"""

import inspect
from collections.abc import Collection, Sequence
from typing import Any, Literal, Self

from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from foveate.bridges import Bridge, build_bridge, build_lens
from foveate.errors import FoveateError
from foveate.model.configuration import FoveateConfig, read_tiling, read_view_tokens
from foveate.model.entering import Entering, watch
from foveate.model.grown import annealed, check_attention, check_language_model, lineage, place, refuse_few, refuse_growth, refuse_tiling
from foveate.model.merging import Merging
from foveate.model.outputs import FoveateCausalLMOutputWithPast, FoveateModelOutputWithPast, common_outputs
from foveate.model.towers import interpolates
from foveate.model.views import ImageMarks
from foveate.model.weighing import Weighing


class FoveatePreTrainedModel(PreTrainedModel):
    config_class = FoveateConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class FoveateModel(Merging, FoveatePreTrainedModel):
    """Tower, bridge and language model; `forward` ends at the decoder's last hidden state. Parts that are not given are made, untrained."""

    def __init__(
        self,
        config: FoveateConfig,
        vision_tower: PreTrainedModel | None = None,
        bridge: Bridge | None = None,
        causal_lm: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.vision_tower = vision_tower if vision_tower is not None else AutoModel.from_config(config.vision_config)
        self.bridge = bridge if bridge is not None else build_bridge(config.bridge)
        self.causal_lm = causal_lm if causal_lm is not None else AutoModelForCausalLM.from_config(config.text_config)
        self.image_marks: ImageMarks | None = None
        self.lens: nn.Module | None = None
        self._lens: dict[str, Any] | None = None
        self.entering, self._doors = Entering(), list[Any]()
        self.weighing = Weighing(self.bridge) if config.weighs else None
        self._check_parts()
        for part in (self.vision_tower, self.bridge, self.causal_lm):
            keep_initialisation(part)
        self.learn_marks()
        self.learn_lens()
        self.open_doors()
        self.post_init()

    def _check_parts(self) -> None:
        layers, scales = self.config.vision_feature_layer, self.config.scales
        if self.bridge.levels != len(layers) * scales:
            kind, levels = self.bridge.kind, self.bridge.levels
            more = f", at each of the {scales} sizes of {self.config.tiling}" if scales > 1 else ""
            raise FoveateError(f"the {kind} bridge takes {levels} feature levels but vision_feature_layer is {layers}{more}")
        accepted = inspect.signature(self.vision_tower.forward).parameters
        self._interpolates = interpolates(self.vision_tower)
        needed = [
            p.name for p in accepted.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "pixel_values"
        ]
        if needed:
            name = type(self.vision_tower).__name__
            raise FoveateError(f"{name} cannot be a vision tower here: besides pixel_values it needs {', '.join(needed)}")
        taken = inspect.signature(self.causal_lm.forward).parameters
        missing = [name for name in ("inputs_embeds", "past_key_values") if name not in taken]
        if missing:  # generation would forget the prompt without a word
            name, lost = type(self.causal_lm).__name__, " and no ".join(missing)
            raise FoveateError(
                f"{name} cannot be the language model here: its forward pass takes no {lost}, so that images or earlier tokens would be "
                "lost on it (recurrent models keep their past in other ways); take another"
            )

    def learn_marks(self) -> None:
        """Make the learned vectors of the tiling, those that are not there yet; those that it has not go."""
        names, had = (() if self.config.tiled is None else self.config.tiled.marks), dict(self.marks)
        if set(names) == set(had):
            return
        like = next(self.bridge.parameters())
        self.image_marks = ImageMarks(names, self.bridge.text_width).to(like.device, like.dtype) if names else None
        if self.image_marks is not None:
            self.image_marks.load_state_dict({name: vector for name, vector in had.items() if name in names}, strict=False)
            keep_initialisation(self.image_marks)

    def learn_lens(self) -> None:
        """Make the lens of the tiling unless it is there already; one that it has not goes."""
        wanted = None if self.config.tiled is None else self.config.tiled.lens
        if wanted == self._lens:
            return
        like, self.lens, self._lens = next(self.bridge.parameters()), None, wanted
        if wanted is not None:
            self.lens = build_lens(wanted, levels=self.bridge.levels, width=self.bridge.vision_width).to(like.device, like.dtype)
            keep_initialisation(self.lens)

    def open_doors(self) -> None:
        """Set the hooks by which tokens enter inside the language model, those of the tiling, or the weights that images become."""
        doors = watch(self.entering, self.causal_lm, () if self.config.tiled is None else self.config.tiled.layers)
        if self.weighing is not None:
            doors += self.weighing.open(self.causal_lm, self.bridge.text_width)
        for hook in self._doors:
            hook.remove()
        self._doors = doors

    def close_doors(self) -> None:
        """Nothing of a pass is left, after an exception too."""
        self.entering.end()
        if self.weighing is not None:
            self.weighing.end()

    @property
    def marks(self) -> dict[str, nn.Parameter]:
        """The learned vectors between visual tokens, by their names in foveate.tokens.MARKS."""
        return {} if self.image_marks is None else dict(self.image_marks.named_parameters())

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches of an input image of `config.image_size`."""
        return self.config.grid

    @property
    def language_model(self) -> nn.Module:
        """The decoder: what turns embeddings into last hidden states, with its `layers`."""
        return self.causal_lm.get_decoder()

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def get_input_embeddings(self) -> nn.Module:
        return self.causal_lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.causal_lm.set_input_embeddings(value)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_crops: Tensor | None = None,
        tower_features: Tensor | None = None,
        image_sizes: Tensor | None = None,
        view_tokens: Tensor | None = None,
        prompt_images: Tensor | None = None,
        run: Literal["images", "decoder", "logits"] = "decoder",
        **kwargs: Any,
    ) -> FoveateModelOutputWithPast | FoveateCausalLMOutputWithPast:
        """Prompts `input_ids` (batch, positions) with placeholders, `pixel_values` (crops of the images of all prompts, channels, height,
        width), `image_crops` (images,): how many crops each image has, one unless given; with a tiling `image_sizes` (images, 3) in its
        stead, see `get_image_features`; `view_tokens` (images,): as how many tokens each image's crops are asked for; where
        images become weights `prompt_images` (batch,): how many of them each prompt has, one unless given. `tower_features` (crops, levels,
        patches, width) may stand for pixels: what `encode_crops` makes.

        `run` says how far: to "logits" of the causal language model (and loss, for `labels`), through the "decoder" alone, or to "images",
        which runs no language model: `hidden_states` then has one level, what would have gone in.
        """
        text = inputs_embeds
        inputs_embeds, visual = self.merge(
            *(input_ids, pixel_values, inputs_embeds, past_key_values, mm_encoder_outputs),
            *(image_crops, tower_features, image_sizes, view_tokens, prompt_images),
        )
        if run == "images":
            self.close_doors()
            return FoveateCausalLMOutputWithPast(hidden_states=(inputs_embeds,), image_hidden_states=visual)
        kept, given = None, {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        if self.config.grown is not None:
            slots = None if visual is None else self._placeholders(input_ids, inputs_embeds if text is None else text)
            given, kept = place(self.config, inputs_embeds, slots, given, merged=text is not None)
        kwargs |= given | {"return_dict": True}
        called = self.causal_lm if run == "logits" else self.language_model
        try:
            output = called(inputs_embeds=inputs_embeds, **kwargs)
            if self.weighing is not None:
                self.weighing.keep(output.past_key_values)
        finally:
            self.close_doors()
        if kept is not None:
            kept.remember(output.past_key_values)
        if run == "logits":
            ends = {"loss": output.loss, "logits": output.logits}
            return FoveateCausalLMOutputWithPast(**ends, **common_outputs(output), image_hidden_states=visual)
        return FoveateModelOutputWithPast(output.last_hidden_state, **common_outputs(output), image_hidden_states=visual)


class FoveateForConditionalGeneration(FoveatePreTrainedModel, GenerationMixin):
    """A vision-language model with its language-model head. `from_backbones` makes one, `from_pretrained` loads one."""

    def __init__(
        self,
        config: FoveateConfig,
        vision_tower: PreTrainedModel | None = None,
        bridge: Bridge | None = None,
        causal_lm: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.model = FoveateModel(config, vision_tower, bridge, causal_lm)
        self.post_init()

    @classmethod
    def from_backbones(cls, vision: Any, text: Any, bridge: Any, **options: Any) -> tuple[Self, Any]:
        """(model, processor) from a vision tower, a causal LM and a bridge; see `foveate.model.assembly.from_backbones`."""
        from foveate.model.assembly import from_backbones  # it needs this class

        return from_backbones(vision, text, bridge, model_class=cls, **options)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches of an input image of `config.image_size`."""
        return self.config.grid

    @property
    def lm_head(self) -> nn.Module:
        return self.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.causal_lm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.causal_lm.set_output_embeddings(new_embeddings)

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_crops: Tensor | None = None,
        tower_features: Tensor | None = None,
        image_sizes: Tensor | None = None,
        view_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """See `FoveateModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_crops, tower_features, image_sizes, view_tokens, **kwargs)

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """See `FoveateModel.get_placeholder_mask`."""
        return self.model.get_placeholder_mask(input_ids, inputs_embeds, image_features)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_crops: Tensor | None = None,
        image_sizes: Tensor | None = None,
        view_tokens: Tensor | None = None,
        prompt_images: Tensor | None = None,
        **kwargs: Any,
    ) -> FoveateCausalLMOutputWithPast:
        """See `FoveateModel.forward`, whose `tower_features` and `run` are taken too; `labels` and `logits_to_keep` are the language
        model's."""
        return self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            image_crops=image_crops,
            image_sizes=image_sizes,
            view_tokens=view_tokens,
            prompt_images=prompt_images,
            labels=labels,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **{"run": "logits", **kwargs},
        )

    def scale_bridge(
        self, scales: Sequence[Sequence[int]], image_size: int, sources: Sequence[int] | None = None, keep: Collection[str] = ()
    ) -> None:
        """Grow the bridge, weights inflated, to `scales` [(window, queries per window), ...] at `image_size` pixels.

        `keep`: of "positions", "keys" and "order" what grown tokens keep of the token they are copies of (`foveate.model.grown`); without,
        they are counted as any others, as the paper has it. The parameters of the bridge are new objects: make optimisers afterwards. The
        processor is told with `processor.set_bridge(model.config.bridge, model.config.image_size)`.
        """
        old = self.model.bridge
        rows, _ = self.config.patch_grid(image_size, image_size)
        new = old.scaled(scales=scales, grid=rows, sources=sources)
        new.within((rows, rows), self.config.view_tokens)
        if keep:
            refuse_few(self.config)
            refuse_tiling(self.config)
            check_language_model(self)
            check_attention(self.config.get_text_config()._attn_implementation)
        grown = lineage(self.config, sources, keep)
        like = next(old.parameters())
        new.to(like.device, like.dtype).train(old.training).requires_grad_(any(p.requires_grad for p in old.parameters()))
        keep_initialisation(new)
        self.model.bridge = new
        self.config.bridge, self.config.image_size, self.config.grown = new.config(), image_size, grown

    def anneal_growth(self, left: float) -> None:
        """Leave `left`, from 1 to 0, of what the last growth has kept; at 0 grown tokens are counted as any others."""
        self.config.grown = annealed(self.config.grown, left)

    def set_tiling(self, tiling: Any) -> None:
        """Cut images by another tiling from now on (None: see them whole); what it puts between tokens, and its lens, is learned anew
        where it is new.

        The processor is told with `processor.set_tiling(model.config.tiling)`. FoveateError where the bridge reads another number of maps.
        """
        wanted = read_tiling(tiling)
        if (1 if wanted is None else wanted.scales) != self.config.scales:
            levels = self.model.bridge.levels
            raise FoveateError(f"the bridge reads {levels} maps, and {tiling} would change their number: make a model with it instead")
        if wanted is not None:
            refuse_growth(self.config, "a tiling")
            self.config.check_tiling(wanted)
        self.config.tiling = None if wanted is None else str(wanted)
        self.model.learn_marks()
        self.model.learn_lens()
        self.model.open_doors()

    def set_image_size(self, pixels: int) -> None:
        """Take images of `pixels` x `pixels` from now on. FoveateError if the bridge is bound to its grid."""
        self.model.bridge.within(self.config.patch_grid(pixels, pixels), self.config.view_tokens)
        self.config.image_size = pixels

    def set_view_tokens(self, count: int | None) -> None:
        """Make `count` visual tokens of each view from now on, unless a call says another number; None: all that the bridge can make.

        The processor is told with `processor.set_view_tokens(count)`. FoveateError for a number that the bridge does not make."""
        refuse_growth(self.config, "another number of view_tokens")
        self.model.bridge.within(self.config.grid, read_view_tokens(count))
        self.config.view_tokens = count


def keep_initialisation(module: nn.Module) -> None:
    """Tell transformers, which initialises what it thinks is new, that these modules have their values (unless they have none yet)."""
    if any(p.is_meta for p in module.parameters()):
        return
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]
