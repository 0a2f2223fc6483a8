"""Blocks that are made alike and called alike cost the same: of a tower's stack one is run on shapes, and counts for the others.

A dry run passes every operation through Python, which for a tower of two dozen blocks takes most of a second, of images of every other size
again. A block stands for another one where both have the same modules, shapes of weights and settings (its number in the stack aside),
and the call has tensors of the same shapes, and of those that have values the very same ones. A block whose attention is watched has a
configuration of its own (`foveate.probes.layer`), so it is run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from foveate.accounting.counter import Counter, parts_of

NUMBER = "layer_idx"  # by which a block says where in the stack it stands
PLAIN = (bool, int, float, str, type(None), torch.dtype)


@contextmanager
def one_for_all(model: nn.Module, counted: Counter) -> Iterator[None]:
    """Until the `with` block is left, blocks of the towers of `model`, a model on the meta device, stand for one another; `counted` counts
    each of them."""
    lists = [
        found
        for module, part in parts_of(model).items()
        if part == "tower"
        for found in module.modules()
        if isinstance(found, nn.ModuleList) and len(found) > 1
    ]
    changed = []
    try:
        for found in lists:
            known: dict[Hashable, _Known] = {}
            for block in found:
                if "forward" not in vars(block):  # whoever has put another one there wants it called
                    block.forward = _standing(block.forward, made(block), known, counted)
                    changed.append(block)
        yield
    finally:
        for block in changed:
            del block.forward


@dataclass(frozen=True, eq=False)
class _Known:
    """What a call gave and took. `given`: what the call is known by, kept alive."""

    given: list[Any]
    output: Any
    flops: dict[str, int]


def _standing(forward: Callable[..., Any], block: Hashable, known: dict[Hashable, _Known], counted: Counter) -> Callable[..., Any]:
    def standing(*args: Any, **kwargs: Any) -> Any:
        leaves, shape = tree_flatten((args, kwargs))
        key = block, str(shape), tuple(map(_told, leaves))
        if key not in known:
            before = dict(counted.flops)
            output = forward(*args, **kwargs)
            known[key] = _Known(leaves, output, {part: count - before[part] for part, count in counted.flops.items()})
            return output
        counted.flops.update(known[key].flops)  # a tally's update adds
        return tree_map_only(Tensor, lambda made: torch.empty_like(made) if made.is_meta else made, known[key].output)

    return standing


def made(block: nn.Module) -> Hashable:
    """What a block is, but for its number and the values of its weights."""
    return tuple((name, type(module), _settings(module), _weights(module)) for name, module in block.named_modules())


def _settings(module: nn.Module) -> Hashable:
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name not in (NUMBER, "forward")}
    return tuple((name, _told(value)) for name, value in sorted(own.items()))


def _weights(module: nn.Module) -> Hashable:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return tuple((name, _told(tensor)) for name, tensor in own)


def _told(value: Any) -> Hashable:
    """What tells a value apart from others: of a tensor without values its shape, of an object which one it is."""
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_told, value))
    if isinstance(value, Tensor) and value.is_meta:
        return value.dtype, tuple(value.shape), value.stride()
    return id(value)
