"""What the models give back."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class StackedImageOutput(BaseModelOutputWithPooling):
    """Encoded images, and `deepstack_features`: of each stack, of each image the (visual tokens, text width) that are added to its visual
    tokens inside the language model. (The name is the library's, which repeats and slices them with the rest.)"""

    deepstack_features: list[list[Tensor]] | None = None


@dataclass
class WeightsImageOutput(BaseModelOutputWithPooling):
    """Encoded images that are no tokens: `image_weights` (images, layers, inputs of all targets, rank), see `foveate.bridges.vlora`."""

    image_weights: Tensor | None = None


@dataclass
class FoveateModelOutputWithPast(BaseModelOutputWithPast):
    """The decoder's output, and `image_hidden_states`: the visual tokens (their number in the batch, width) that went in."""

    image_hidden_states: Tensor | None = None


@dataclass
class FoveateCausalLMOutputWithPast(ModelOutput):
    """Logits (batch, positions, vocabulary) and, where labels were given, the language model's loss."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


def common_outputs(output: Any) -> dict[str, Any]:
    """What a decoder and a causal language model both give back."""
    return {name: getattr(output, name, None) for name in ("past_key_values", "hidden_states", "attentions")}
