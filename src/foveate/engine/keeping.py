"""What a model makes of images, kept for the next time that it is asked for the same ones.

    with keeping(model, Kept(at_most=2 << 30)) as kept:
        ...                      # encodes under attachments, each picture once

A table of methods and budgets shows the same pictures under each of them, and only few methods look into the tower. Attachments of those
that do encode anew.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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

    def of(self, method: str, given: Mapping[str, Any], encode: Callable[[], Any]) -> Any:
        """What `encode()` returns, or has returned to a call of `method` that was given the same."""
        key = name_of(method, given)
        if key in self._found:
            there, seconds = self._found[key]
            self.seconds += seconds
            return moved(there, device_of(given))
        start = time.perf_counter()
        made = encode()
        there = moved(made, torch.device("cpu"))  # which waits for a device
        seconds = time.perf_counter() - start
        size = size_of(there)
        if self.bytes + size <= self.at_most:
            self.bytes += size
            self._found[key] = there, seconds
        return made


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
    found = hashlib.sha256(method.encode())
    for name, value in sorted(given.items()):
        parts = value if isinstance(value, list | tuple) else [value]
        for part in parts:
            if isinstance(part, Tensor):
                found.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
                found.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                found.update(f"{name} {part!r}".encode())
    return found.digest()


def device_of(given: Mapping[str, Any]) -> torch.device:
    return next((value.device for value in given.values() if isinstance(value, Tensor)), torch.device("cpu"))


def moved(value: Any, device: torch.device) -> Any:
    """The same with all of its tensors on `device`, without the levels of a tower that nobody will read."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, Mapping):
        parts = {name: moved(part, device) for name, part in value.items() if name not in _UNREAD}
        return parts if type(value) is dict else type(value)(**parts)
    if isinstance(value, list | tuple):
        return type(value)(moved(part, device) for part in value)
    return copy.copy(value)


def size_of(value: Any) -> int:
    """Bytes of the tensors in it."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(size_of, value.values()))
    return sum(map(size_of, value)) if isinstance(value, list | tuple) else 0
