"""In front of vLLM's own class of a model: fewer rows for each image, and their positions where the model is asked for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING

from foveate.anatomy import Laid
from foveate.contract import content_keys
from foveate.errors import FoveateError
from foveate.integrations.vllm import positions as carried
from foveate.integrations.vllm.items import FIELD, Room, apart, lie, pixels_of
from foveate.integrations.vllm.setting import check_engine, engine_reducer
from foveate.integrations.vllm.tower import Tower, by_transformers, tower_of
from foveate.probes.encoding import Item
from foveate.reducers.exporting import in_grid, reduce_embeddings
from foveate.tokens import Layout

if TYPE_CHECKING:
    from typing import Any as _Base
else:
    _Base = object


class ReducingModel(_Base):
    """Comes in front of the class of a model. Without a reducer it does what that does."""

    supports_mrope = True  # where the configuration asks for positions: `foveate.integrations.vllm.setting.promotion`

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        reducer = engine_reducer(config)
        transformers = by_transformers(type(self))
        grid = (
            hasattr(MODEL_MAPPING.get(type(config), None), "get_rope_index")
            if transformers
            else hasattr(super(), "get_mrope_input_positions")
        )
        if reducer is not None:
            check_engine(reducer, vllm_config, grid, transformers)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._reducer, self._config = reducer, config
        self._grid = grid  # whether positions are places in a grid, which are never renumbered
        keeps = reducer is not None and (self._grid or reducer.positions_at(0) == "keep")
        self._told: bool = keeps and vllm_config.model_config.uses_mrope  # whether each row brings its position along
        self._offsets: Tensor | None = None
        self._tower: Tower | None = None if reducer is None else tower_of(self, config, reducer.sites(1)[0].needs)
        self._most = vllm_config.scheduler_config.max_num_batched_tokens

    def embed_multimodal(self, **kwargs: Any) -> Any:
        packed = kwargs.pop(FIELD, None)
        if self._tower is None:
            return super().embed_multimodal(**kwargs)
        if packed is None:  # videos, which stay whole
            found = super().embed_multimodal(**kwargs)
            return [self._placed(of, torch.zeros(len(of), dtype=torch.int64, device=of.device)) for of in found]
        rooms = [Room.of(each) for each in packed]
        if sum(room.tokens for room in rooms) <= self._most:
            return self._embedded(rooms, kwargs)
        # vLLM counts the tokens that will be left, so it hands out more images at once than it has room to encode.
        return [of for room, own in zip(rooms, apart(kwargs, len(rooms)), strict=True) for of in self._embedded([room], own)]

    def _embedded(self, rooms: Sequence[Room], given: dict[str, Any]) -> list[Tensor]:
        assert self._tower is not None
        self._tower.begin()
        found = list(super().embed_multimodal(**given))
        items = self._tower.items() or self._items(apart(given, len(found)), found, self._tower)
        return [self._reduced(*each) for each in zip(rooms, found, items, strict=True)]

    def _items(self, given: Sequence[Mapping[str, Any]], found: Sequence[Tensor], tower: Tower) -> list[Item]:
        """What is known of each image where the model is vLLM's own, from sizes alone."""
        layouts = [lie(self._config, own, len(of)) for own, of in zip(given, found, strict=True)]
        laid = [Laid(layout.kind[0].to(of.device), layout.place[0, :, 1:].to(of.device)) for layout, of in zip(layouts, found, strict=True)]
        keys = content_keys([of if (pixels := pixels_of(own)) is None else pixels for own, of in zip(given, found, strict=True)])
        return [Item(key, *at, said) for key, at, said in zip(keys, laid, tower.values(laid), strict=True)]

    def _reduced(self, room: Room, embeddings: Tensor, item: Item) -> Tensor:
        if not len(embeddings) == len(item) == room.tokens:
            raise FoveateError(f"the model has made {len(embeddings)} tokens of an image of which its processor counted {room.tokens}")
        layout, width = Layout.item(item.kind, item.place), self._config.get_text_config().hidden_size
        places = in_grid(layout) if self._grid else None
        reduced = reduce_embeddings(room.reducer, embeddings, layout, item.values, key=item.key, positions=places, width=width)
        if len(reduced.kept) != room.left:  # vLLM drops what is too much without a word
            raise FoveateError(f"{room.reducer} has left {len(reduced.kept)} tokens of an image, and there are places for {room.left}")
        return self._placed(reduced.embeddings, reduced.positions)

    def _placed(self, embeddings: Tensor, offsets: Tensor) -> Tensor:
        return carried.written(embeddings, offsets.expand(carried.ROWS, -1)) if self._told else embeddings

    def embed_input_ids(self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None) -> Tensor:
        self._offsets = None
        if self._told and multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            parts = [carried.read(of) for of in multimodal_embeddings]
            multimodal_embeddings = [rows for rows, _ in parts]
            self._offsets = torch.zeros((carried.ROWS, len(input_ids)), dtype=torch.int64, device=input_ids.device)
            self._offsets[:, is_multimodal.to(input_ids.device)] = torch.cat([offsets for _, offsets in parts], 1)
        embedded: Tensor = super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)
        return embedded

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        offsets, self._offsets = self._offsets, None
        if offsets is not None:
            positions = positions.clone()
            positions[:, : offsets.shape[1]] += offsets
        return super().forward(input_ids, positions, *args, **kwargs)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Of text where it would stand beside whole images, of each image's tokens that of its first: the rest they bring along."""
        if not self._told:
            if self._grid:
                return super().get_mrope_input_positions(input_tokens, mm_features)
            return torch.arange(len(input_tokens)).expand(carried.ROWS, -1), 0
        longer, moved, at = carried.whole(input_tokens, mm_features)
        found, delta = torch.arange(len(longer)).expand(carried.ROWS, -1), 0
        if self._grid:
            found, delta = super().get_mrope_input_positions(longer, moved)
            for feature in moved:
                self._check_grid(feature, found)
        return found[:, at], delta + len(longer) - len(input_tokens)

    def _check_grid(self, feature: Any, found: Tensor) -> None:
        """FoveateError where the model's own positions of a whole image are others than its tokens will bring along."""
        if FIELD not in feature.data:
            return
        place = feature.mm_position
        own = found[:, place.offset : place.offset + place.length]
        own = own if place.is_embed is None else own[:, place.is_embed]
        given = {name: value[None] for name, value in feature.data.get_data().items() if isinstance(value, Tensor)}
        if not torch.equal(own - own[:, :1], in_grid(lie(self._config, given, own.shape[1]))):
            raise FoveateError(f"{type(self).__name__} gives an image's tokens other positions than their rows and columns: not served")
