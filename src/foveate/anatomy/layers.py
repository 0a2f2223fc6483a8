"""What a layer is, read off its code and its parameters."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn


def attends(layer: nn.Module) -> bool:
    """Whether a layer attends: a part of it calls the library's attention interface (or torch's attention), whose masks have four
    dimensions. What recurs or convolves along the sequence has a mask (batch, tokens) at most, whatever the configuration calls it."""
    kinds: set[Any] = {type(module) for module in layer.modules()}
    return any(map(_calls_interface, kinds))


def window_of(layer: nn.Module, config: Any, index: int) -> int | None:
    """How many tokens a decoder layer reaches back to, its own among them; None: to all. index: which layer of the language model it is."""
    named = [vars(module)["sliding_window"] for module in layer.modules() if "sliding_window" in vars(module)]
    if named:
        return next((int(window) for window in named if window), None)
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    return int(window) if window and (types is None or "sliding" in types[index]) else None


def grows(layer: nn.Module, config: Any, index: int) -> bool:
    """Whether what a decoder layer caches grows with the sequence: it attends, and to all of it, not within a window or a chunk."""
    types = getattr(config, "layer_types", None)
    return attends(layer) and window_of(layer, config, index) is None and not (types and "chunked" in types[index])


@functools.cache
def _calls_interface(kind: Any) -> bool:
    for base in kind.__mro__:  # a subclass may hand on to its base
        code = getattr(inspect.unwrap(vars(base).get("forward", kind)), "__code__", None)
        if code is not None and {"ALL_ATTENTION_FUNCTIONS", "scaled_dot_product_attention"} & set(code.co_names):
            return True
    return False


# What a layer adds last: its norm where that stands behind the branch, else the branch. Experts beside a shared one are two branches.
_BRANCHES = (("post_feedforward_layernorm",), ("post_mlp_layernorm",), ("mlp", "feed_forward", "shared_mlp", "block_sparse_moe"))


def feed_forward(layer: nn.Module) -> nn.Module | None:
    """The part of a decoder layer whose output is the feed-forward branch, as it is added to the states; None where it is not one known
    part."""
    for names in _BRANCHES:
        found = [part for name in names if isinstance(part := getattr(layer, name, None), nn.Module)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def tensor_parallel_group(layer: nn.Module) -> Any:
    """The ranks over which a layer's heads are shared out (a torch.distributed.ProcessGroup), None where this rank has all of them."""
    parameter: Any
    for parameter in layer.parameters():
        mesh = getattr(parameter, "device_mesh", None)  # of a DTensor
        if mesh is None or "tp" not in (mesh.mesh_dim_names or ()):
            continue
        dimension = mesh.mesh_dim_names.index("tp")
        if mesh.size(dimension) > 1 and parameter.placements[dimension].is_shard():
            return mesh.get_group(dimension)
    return None
