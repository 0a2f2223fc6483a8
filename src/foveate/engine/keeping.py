"""What a model makes of images, kept for the next time that it is asked for the same ones.

    with keeping(model, Kept(at_most=2 << 30)) as kept:
        ...                      # encodes under attachments, each picture once

A table of methods and budgets shows the same pictures under each of them, and only few methods look into the tower. Attachments of those
that do encode anew.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from transformers.utils import ModelOutput

from foveate.anatomy import read
from foveate.probes.encoding import KEPT

_UNREAD = ("hidden_states", "attentions")  # of a tower's outputs; what reads them has gone into the features by then


class Kept:
    """Results of whole calls that encode, in memory of the host, `at_most` bytes; what does not fit is encoded anew each time.

    `seconds`: what those calls took that need not be made again, each as long as when it was made.
    """

    def __init__(self, at_most: int) -> None:
        self.at_most, self.bytes, self.seconds = at_most, 0, 0.0
        self._found: dict[bytes, tuple[Any, float]] = {}

    def of(self, method: str, given: Mapping[str, Any], encode: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What `encode()` returns, or has returned to a call of `method` that was given the same: the model's outputs first (kept without
        the levels of its tower), and what was noted meanwhile."""
        key = name_of(method, given)
        if key in self._found:
            there, seconds = self._found[key]
            self.seconds += seconds
            return moved(there, next((leaf.device for leaf in tree_leaves(given) if isinstance(leaf, Tensor)), torch.device("cpu")))
        start = time.perf_counter()
        outputs, *noted = encode()
        if isinstance(outputs, ModelOutput):
            outputs = type(outputs)(**{name: value for name, value in outputs.items() if name not in _UNREAD})
        there = moved((outputs, *noted), torch.device("cpu"))  # which waits for a device
        seconds = time.perf_counter() - start
        size = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(there) if isinstance(leaf, Tensor))
        if self.bytes + size <= self.at_most:
            self.bytes += size
            self._found[key] = there, seconds
        return outputs, *noted


@contextmanager
def keeping(model: Any, kept: Kept) -> Iterator[Kept]:
    """A `with` block in which attachments to `model`, whose weights stay as they are, keep what is encoded."""
    core = read(model).core
    setattr(core, KEPT, kept)
    try:
        yield kept
    finally:
        delattr(core, KEPT)


def name_of(method: str, given: Mapping[str, Any]) -> bytes:
    """A hash of a call: all bytes of its tensors, their shapes and types, and how its other arguments are written."""
    leaves, shape = tree_flatten(dict(sorted(given.items())))
    found = hashlib.sha256(f"{method} {shape}".encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.digest()


def moved(value: Any, device: torch.device) -> Any:
    """The same with all of its tensors on `device`."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), value)
