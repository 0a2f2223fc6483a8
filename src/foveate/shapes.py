"""The library's own code run on shapes alone: what a tower and a bridge cost for given images, from a configuration and no weights.

A model is built on the meta device, where a tensor has a shape and no values. What depends on weights stays such a shape; what depends on
the images alone (grids, sizes, masks, empty tiles) is computed as ever, so that code that asks for its values goes its usual way: windows,
mergers and resamplers are counted as they run, with no formula for any of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForImageTextToText

from foveate.anatomy import read
from foveate.counting import Counter
from foveate.encoding import Encoded, Encodings, Item
from foveate.errors import FoveateError
from foveate.signals import Signal, TowerKeys
from foveate.sizes import ImageSize
from foveate.tokens import Kind
from foveate.towers import blocks, extras_of

_aten = torch.ops.aten
_models: dict[str, nn.Module] = {}
_counted: dict[tuple[str, str, str], Counted] = {}


@dataclass(frozen=True)
class Counted:
    """What a call that encodes images costs and makes.

    flops  by part: "tower", "bridge", "scores" (the signals that were asked for), "other"
    items  of each item its patches' tokens and how many others it has (newlines, [CLS])
    crops  (crops, tokens of each, not patches among them) as they come to the tower's first block, call by call; signals asked for only
    width  of the tower's keys, mean over heads, where they are asked for
    """

    flops: dict[str, int]
    items: list[tuple[ImageSize, int]]
    crops: list[tuple[int, int, int]]
    width: int


def skeleton(config: Any) -> nn.Module:
    """The vision-language model of `config` without weights, once per configuration. FoveateError where the library knows no such model."""
    key = config.to_json_string(use_diff=False)
    if key not in _models:
        try:
            with torch.device("meta"), torch.inference_mode(False):  # it will serve outside of it as well
                model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32)
        except (ValueError, KeyError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise FoveateError(f"cannot build a {config.model_type!r} model without weights to read its cost: {reason}") from error
        _models[key] = model.eval()
    return _models[key]


def encode(config: Any, call: Encoded, needs: Iterable[Signal] = ()) -> Counted:
    """Runs a call with `needs`, signals of the tower. FoveateError where the model's code wants values of what has only a shape."""
    with torch.inference_mode(False):
        return _encode(config, call, sorted(set(needs), key=repr))


def _encode(config: Any, call: Encoded, needs: Sequence[Signal]) -> Counted:
    given = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in call.given.items()}
    spelled = json.dumps([call.method, {name: _spelled(value) for name, value in given.items()}])
    key = config.to_json_string(use_diff=False), spelled, repr(needs)
    if key not in _counted:
        model = skeleton(config)
        anatomy = read(model)
        core: Any = anatomy.core
        given = {name: _usable(name, value) if isinstance(value, Tensor) else value for name, value in given.items()}
        seen: list[Item] = []
        encodings = Encodings(anatomy, needs, lambda modality, items, features: seen.extend(items))
        arriving = None
        try:
            if needs:
                arriving = _Arriving(anatomy.tower_of("video" if "video" in call.method else "image"))
            with torch.no_grad(), Counter(model) as counted, _Shapes():
                getattr(core, call.method)(**given)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FoveateError(f"cannot count {call.method} of a {config.model_type!r} model on shapes alone: {reason}") from error
        finally:
            encodings.remove()
            if arriving is not None:
                arriving.hook.remove()
        patches = [item.place[item.kind == Kind.PATCH] for item in seen]
        items = [(ImageSize.of(place), len(item) - len(place)) for item, place in zip(seen, patches, strict=True)]
        widths = [values.shape[1] for item in seen for signal, values in item.values.items() if isinstance(signal, TowerKeys)]
        crops = arriving.crops if arriving is not None else []
        _counted[key] = Counted(dict(counted.flops), items, crops, widths[0] if widths else 0)
    return _counted[key]


class _Arriving:
    """Notes what comes to a tower's first block."""

    def __init__(self, tower: nn.Module) -> None:
        self.crops: list[tuple[int, int, int]] = []
        self._prefix = extras_of(tower).number
        self.hook = blocks(tower)[0].register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))  # under whatever name
        if states.ndim == 3:
            self.crops.append((states.shape[0], states.shape[1], self._prefix))


def _usable(name: str, value: Tensor) -> Tensor:
    """A copy, since what was made in inference mode cannot be used outside; pixels as numbers again."""
    return value.float() if "pixel_values" in name and value.dtype == torch.bool else value.clone()


def _spelled(value: Any) -> Any:
    """Two calls that are spelled alike cost the same."""
    if not isinstance(value, Tensor):
        return repr(value)
    compact = value[(..., *[0 if step == 0 else slice(None) for step in value.stride()])]  # of a stand-in one value for each patch or tile
    digest = hashlib.sha256(compact.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    return [str(value.dtype), list(value.shape), digest]


class _Shapes(TorchDispatchMode):
    """Where a tensor without values takes part, the others lose theirs; where none does, everything is computed on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        without = any(leaf.is_meta for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta" if without else "cpu")
        if not without:
            return func(*args, **kwargs)
        if func._overloadpacket in (_aten.index, _aten.index_put, _aten.index_put_):  # how many a mask picks must be known
            args = (args[0], [part for index in args[1] for part in _numbers(index)], *args[2:])
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


def _numbers(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the numbers of the rows (and columns) that it picks."""
    if index is None or index.is_meta or index.dtype != torch.bool:
        return [index]
    return list(index.nonzero().unbind(1))
