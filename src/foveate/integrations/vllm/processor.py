"""In front of vLLM's own processor of a model: as many places for an image as will be left of it.

vLLM makes room for an image before any encoder runs, so the number follows from sizes alone: `count_embeddings`, as the tokens themselves.
It goes with the image to the model, which holds itself to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig

from foveate.errors import FoveateError
from foveate.integrations.vllm.items import FIELD, Room, lie
from foveate.integrations.vllm.setting import BUDGET, OPTION, RequestError, engine_reducer, others, request_reducer
from foveate.reducers import Reducer
from foveate.reducers.exporting import count_embeddings

if TYPE_CHECKING:
    from typing import Any as _Base
else:
    _Base = object

_CARRIED = MultiModalFieldConfig.batched("image", keep_on_cpu=True)


class ReducingProcessor(_Base):
    """Comes in front of the class of a model's processor."""

    @cached_property
    def _reducer(self) -> Reducer | None:
        config = self.info.ctx.model_config
        ours = [name for name in config.get_multimodal_config().mm_processor_kwargs or {} if name in (OPTION, BUDGET)]
        if ours:
            raise FoveateError(f'mm_processor_kwargs: {ours[0]} is a request\'s; a server is told by hf_overrides={{"{OPTION}": …}}')
        return engine_reducer(config.hf_config)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """By what processor, encoder and prefix caches know an image: the method and its budget among it."""
        options = inputs.hf_processor_mm_kwargs
        found = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=others(options)))
        reducer = request_reducer(self._reducer, options)
        if reducer is None:
            return found
        return {**found, "image": [_key(name, reducer) for name in found.get("image", [])]} if "image" in found else found

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        return super()._apply_hf_processor_main(mm_items, others(hf_kwargs))

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        return super()._get_mm_fields_config(hf_inputs, others(hf_processor_mm_kwargs))

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any) -> Any:
        found = super()._get_mm_prompt_updates(mm_items, others(hf_processor_mm_kwargs), out_mm_kwargs)
        reducer = request_reducer(self._reducer, hf_processor_mm_kwargs)
        if reducer is None or "image" not in found:
            return found
        images = []
        for updates, item in zip(found["image"], out_mm_kwargs.get("image", []), strict=True):
            given = {name: value[None] for name, value in item.get_data().items() if isinstance(value, Tensor)}
            (update,) = updates
            shorter, room = _cut(update, reducer, self.info.get_hf_config(), given)
            (item[FIELD],) = _CARRIED.build_elems(FIELD, room.packed()[None])
            images.append([shorter])
        return {**found, "image": images}


def _key(name: str, reducer: Reducer) -> str:
    return hashlib.sha256(f"{name} {reducer} {reducer.version}".encode()).hexdigest()


def _cut(update: Any, reducer: Reducer, config: Any, given: Mapping[str, Tensor]) -> tuple[Any, Room]:
    """An update of the prompt with fewer places for one image."""
    full, is_embed = list(update.content.full), update.content.is_embed
    there = torch.ones(len(full), dtype=torch.bool) if is_embed is None else is_embed(full)
    at = there.nonzero()[:, 0].tolist()
    left = count_embeddings(reducer, lie(config, given, len(at)))
    if left < len(at) and at[-1] - at[0] + 1 != len(at):
        raise RequestError(
            f"{reducer}: text stands among the {len(at)} tokens of an image, so that room for {left} of them cannot be made; "
            "serve this model without a reducer"
        )
    if left < len(at):
        full = full[: at[0] + left] + full[at[-1] + 1 :]
    return update.with_content(replace(update.content, full=full)), Room(len(at), left, reducer)
