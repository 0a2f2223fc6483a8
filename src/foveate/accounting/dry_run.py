"""The library's own code run on shapes alone: what a tower and a bridge cost for given images, from a configuration and no weights.

A model is built on the meta device, where a tensor has a shape and no values. What depends on weights stays such a shape; what depends on
the images alone (grids, sizes, masks, empty tiles) is computed as ever, so that code that asks for its values goes its usual way: windows,
mergers and resamplers are counted as they run, with no formula for any of them.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from threading import RLock
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForImageTextToText

from foveate.accounting.alike import one_for_all
from foveate.accounting.counter import Counter
from foveate.anatomy import Anatomy, blocks, read
from foveate.contract import ImageSize, Signal, TowerKeys
from foveate.errors import FoveateError
from foveate.probes.encoding import Encoded, Encodings, Item
from foveate.probes.tower import probe_of
from foveate.tokens import Kind

_aten = torch.ops.aten
_one_at_a_time = RLock()  # dry runs of several threads: they would see one another's, for a skeleton is shared and watched by hooks


@dataclass(frozen=True)
class Told:
    """Something under the text that tells it apart from others, by which what was found out about it is remembered."""

    text: str
    thing: Any = field(compare=False)

    @classmethod
    def by(cls, config: Any) -> Told:
        known = _settled.get().get(id(config))
        return known if known is not None else cls(config.to_json_string(use_diff=False), config)


_settled: ContextVar[Mapping[int, Told]] = ContextVar("settled", default=MappingProxyType({}))


@contextmanager
def settled(*told: Told) -> Iterator[None]:
    """Until the `with` block is left, these configurations are as they were told, and are not written out again."""
    token = _settled.set({id(one.thing): one for one in told})
    try:
        yield
    finally:
        _settled.reset(token)


@dataclass(frozen=True)
class Arrived:
    """What came to the blocks of a tower in one call.

    units   of each crop; beside them it has `beside` tokens of the tower's own, of which the first may be a [CLS] token (`cls`)
    patches  of a unit; `packed`: whether crops are one row, each as long as it is, rather than rows as long as the longest
    pairs   by block, of all pairs of a crop's slots the share that attend to each other: less than 1 where it attends within windows
    heads   of the attention, each with `width` values
    """

    units: tuple[int, ...]
    patches: int
    packed: bool
    beside: int
    cls: bool
    pairs: tuple[Fraction, ...]
    heads: int
    width: int


@dataclass(frozen=True)
class Counted:
    """What a call that encodes images costs and makes.

    flops  by part: "tower", "bridge", "scores" (the signals that were asked for), "other"
    items  of each item its patches' tokens and how many others it has (newlines, [CLS])
    calls  what came to the tower's blocks, call by call; only where `encode` was asked for it
    width  of the tower's keys, mean over heads, where they are asked for
    """

    flops: dict[str, int]
    items: list[tuple[ImageSize, int]]
    calls: list[Arrived]
    width: int


def skeleton(config: Any) -> nn.Module:
    """The vision-language model of `config` without weights. FoveateError where the library knows no such model."""
    return _skeleton(Told.by(config))


@lru_cache(maxsize=8)
def _skeleton(told: Told) -> nn.Module:
    config = told.thing
    try:
        with torch.device("meta"), torch.inference_mode(False):  # it will serve outside of it as well
            model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32)
    except (ValueError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise FoveateError(f"cannot build a {config.model_type!r} model without weights to read its cost: {reason}") from error
    found: nn.Module = model.eval()
    return found


def encode(config: Any, call: Encoded, needs: Iterable[Signal] = (), *, blocks: bool = False) -> Counted:
    """Runs a call with `needs`, signals of the tower; `blocks` notes what comes to its blocks. FoveateError where the model's code wants
    values of what has only a shape."""
    call = Encoded(call.method, {name: value.cpu() if isinstance(value, Tensor) else value for name, value in call.given.items()})
    return _encode(
        Told.by(config),
        Told(json.dumps([call.method, {name: _spelled(v) for name, v in call.given.items()}]), call),
        frozenset(needs),
        blocks,
    )


@lru_cache(maxsize=1024)
def _encode(told: Told, called: Told, needs: frozenset[Signal], inside: bool) -> Counted:
    call: Encoded = called.thing
    with _one_at_a_time, torch.inference_mode(False):
        model = _skeleton(told)
        anatomy = read(model)
        seen: list[Item] = []
        encodings = Encodings(anatomy, sorted(needs, key=repr), lambda modality, items, features: seen.extend(items))
        arriving = None
        try:
            if inside:
                arriving = _Arriving(anatomy, anatomy.tower_of(anatomy.encodings.get(call.method, "image")))
            with torch.no_grad(), Counter(model) as counted, one_for_all(model, counted):
                _run(model, call)
        finally:
            encodings.remove()
            if arriving is not None:
                arriving.remove()
    patches = [item.place[item.kind == Kind.PATCH] for item in seen]
    items = [(ImageSize.of(place), len(item) - len(place)) for item, place in zip(seen, patches, strict=True)]
    widths = [values.shape[1] for item in seen for signal, values in item.values.items() if isinstance(signal, TowerKeys)]
    return Counted(dict(counted.flops), items, arriving.calls if arriving is not None else [], widths[0] if widths else 0)


def trained_tower(config: Any, call: Encoded) -> int:
    """Parameters of the tower that get a gradient where `call` encodes images: not a pooling head, nor blocks above the last level."""
    model = skeleton(config)
    tower = read(model).tower_of("image")
    with _one_at_a_time, torch.inference_mode(False), torch.enable_grad():
        made = tree_leaves(_run(model, call).pooler_output)
        parameters = list(tower.parameters())
        gradients = torch.autograd.grad([features.sum() for features in made], parameters, allow_unused=True)
    return sum(p.numel() for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None)


def _run(model: nn.Module, call: Encoded) -> Any:
    """FoveateError where the model does not take the call, or asks for values."""
    core: Any = read(model).core
    given = {name: _usable(name, value) if isinstance(value, Tensor) else value for name, value in call.given.items()}
    try:
        with _Shapes():
            return getattr(core, call.method)(**given)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FoveateError(f"cannot count {call.method} of a {core.config.model_type!r} model on shapes alone: {reason}") from error


class _Arriving:
    """Notes what comes to a tower's blocks."""

    def __init__(self, anatomy: Anatomy, tower: nn.Module) -> None:
        self.calls: list[Arrived] = []
        self._anatomy, self._tower, self._layers = anatomy, tower, blocks(tower)
        self._names = list(inspect.signature(tower.forward).parameters)
        self._given: dict[str, Any] = {}
        self._seen: list[tuple[Any, Any]] = []
        self._probe = probe_of(self._layers[0])
        self._hooks = [
            tower.register_forward_pre_hook(self._begin, with_kwargs=True),
            tower.register_forward_hook(self._end),
            *(layer.register_forward_pre_hook(self._note, with_kwargs=True) for layer in self._layers),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._probe.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given, self._seen = {**dict(zip(self._names, args, strict=False)), **kwargs}, []

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))  # under whatever name
        self._seen.append((states.shape[:-1], kwargs.get("cu_seqlens")))
        if len(self._seen) == 1:
            self._probe.arm()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        crops = self._anatomy.crops(self._tower, self._given, self._seen[0][0])
        slots = [crops.extras.number + patches for patches in crops.patches]
        parts = [slots if table is None else table.diff().tolist() for _, table in self._seen]
        whole, query = sum(n * n for n in slots), self._probe.calls[0].query
        pairs = tuple(Fraction(sum(n * n for n in lengths), whole) for lengths in parts)
        self.calls.append(
            Arrived(
                tuple(crops.lengths),
                crops.side**2,
                crops.packed,
                crops.extras.number,
                crops.extras.cls,
                pairs,
                query.shape[1],
                query.shape[3],
            )
        )


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
