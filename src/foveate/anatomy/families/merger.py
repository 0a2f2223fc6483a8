"""Merger: a method `inputs_merger` of the core writes the features into the sequence, and no method says into which slots.

Idefics 3. The slots are those of the image token, told by its id or, where there are no ids any more, by its embedding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

METHOD = "inputs_merger"


def placeholders(core: Any, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
    token = core.config.image_token_id
    if input_ids is not None:
        return input_ids.eq(token)
    embed = core.get_input_embeddings()
    slots: Tensor = (inputs_embeds == embed.weight[token].to(inputs_embeds.dtype)).all(-1)
    return slots
