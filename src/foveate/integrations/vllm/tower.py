"""What the tower says of each token, heard while vLLM runs it: no attention is computed but the rows that a method asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.models.transformers.multimodal import MultiModalMixin

from foveate.anatomy import Laid, Patches, extras_of, read
from foveate.contract import AttentionRows, Noise, Signal
from foveate.errors import FoveateError
from foveate.probes.encoding import Encodings, Item
from foveate.probes.hooks import Hook
from foveate.probes.tower import TOWER_SIGNALS, carry, values_of

_TOWERS = ("vision_tower", "vision_model", "visual")


class Tower:
    """Of a model that vLLM has written itself: its own attention modules are watched, one for each block."""

    def __init__(self, model: nn.Module, config: Any, needs: Sequence[Signal]) -> None:
        self._signals = [signal for signal in needs if isinstance(signal, TOWER_SIGNALS)]
        self._calls: dict[int, list[AttentionRows]] = {}
        if not self._signals:
            return
        tower = next((part for part in (getattr(model, name, None) for name in _TOWERS) if isinstance(part, nn.Module)), None)
        blocks = [] if tower is None else [part for part in tower.modules() if isinstance(part, MMEncoderAttention)]
        depth = getattr(config.vision_config, "num_hidden_layers", 0)
        if tower is None or not blocks or not depth or hasattr(tower, "spatial_merge_size"):
            name = type(model).__name__
            raise FoveateError(
                f"{self._signals[0]} cannot be read in the tower of vLLM's own {name}: choose a method that needs no scores of it, such as "
                "divprune:keep=0.25, or start the server with --model-impl transformers"
            )
        self._extras = extras_of(tower)
        self._layers = {signal: signal.layer % depth for signal in self._signals}
        for signal, layer in self._layers.items():
            if layer >= len(blocks):
                raise FoveateError(f"{signal}: vLLM runs the first {len(blocks)} of the tower's {depth} blocks; choose one of these")
        for layer in set(self._layers.values()):
            blocks[layer].register_forward_pre_hook(Hook(self._note, layer))

    def begin(self) -> None:
        """The model is about to encode."""
        self._calls = {}

    def items(self) -> list[Item] | None:
        """The items that it has encoded, where their reading is transformers' own."""
        return None

    def values(self, laid: Sequence[Laid]) -> list[dict[Signal, Tensor]]:
        """What was said meanwhile of the tokens of each item."""
        said: list[dict[Signal, Tensor]] = [{} for _ in laid]
        for signal in self._signals:
            crops = [values for call in self._calls[self._layers[signal]] for values in values_of(signal, call, self._extras)]
            for own, values in zip(said, carry(crops, laid, Patches()), strict=True):
                own[signal] = values
        return said

    def _note(self, layer: int, module: Any, args: tuple[Tensor, ...]) -> None:
        heads = [x.unflatten(-1, (-1, module.head_size)) if x.ndim == 3 else x for x in args[:2]]
        query, key = (x.transpose(1, 2) for x in heads)
        ranks = get_tp_group()
        group = ranks.device_group if ranks.world_size > 1 else None
        self._calls.setdefault(layer, []).append(AttentionRows(query, key, module.scale, causal=False, group=group))


class ReadTower(Tower):
    """Of a model that vLLM runs by transformers' code: read as `attach` reads it."""

    def __init__(self, model: Any, needs: Sequence[Signal]) -> None:
        super().__init__(model, None, ())
        self._found: list[Item] = []
        Encodings(read(model.model), [*needs, Noise()], self._seen)

    def _seen(self, modality: str, items: list[Item], features: list[Tensor]) -> None:
        self._found += items

    def begin(self) -> None:
        self._found = []

    def items(self) -> list[Item] | None:
        return self._found


def tower_of(model: nn.Module, config: Any, needs: Sequence[Signal]) -> Tower:
    return ReadTower(model, needs) if by_transformers(type(model)) else Tower(model, config, needs)


def by_transformers(kind: type) -> bool:
    """Whether vLLM runs a model by transformers' code."""
    return issubclass(kind, MultiModalMixin)
