"""Hooks that compiled models call without looking into them, and that are copied and pickled with their model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_uncompiled: Callable[..., Any] | None = None
WHY = "Foveate's hooks decide by values and cannot be traced: compile the model without fullgraph=True while something is attached to it"


class Hook:
    """Calls a method, with some arguments in front. No closure, which could not be pickled."""

    def __init__(self, method: Callable[..., Any], *first: Any) -> None:
        self.method, self.first = method, first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return uncompiled(self.method, *self.first, *args, **kwargs)


def uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function's result; torch.compile neither traces into it nor into what it calls."""
    return (_uncompiled or _call)(function, *args, **kwargs)


def prepare() -> None:
    """To be called before the first hook of a model that may be compiled runs. Not at import: it takes a second."""
    global _uncompiled
    if _uncompiled is None:
        _uncompiled = torch.compiler.disable(_call, reason=WHY)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)
