"""Methods of a model whose calls are watched: their arguments and results are seen, and what they do stays theirs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from foveate.probes.hooks import uncompiled

_ABSENT: Any = object()


class Watched:
    """Stands in for a method of a module and tells `note` of every call; looks like the method to those who ask for its signature.

    What a caller has put on the instance under that name is what is called, and is there again afterwards."""

    def __init__(self, module: Any, name: str, note: Callable[..., Any]) -> None:
        self.module, self.name, self.note = module, name, note
        self._known: inspect.Signature | None = None
        self._own = vars(module).get(name, _ABSENT)
        self._has_own = self._own is not _ABSENT
        if not self._has_own:
            self._own = None
        setattr(module, name, self)

    @property
    def method(self) -> Callable[..., Any]:
        if self._has_own:
            own: Callable[..., Any] = self._own
            return own
        bound: Callable[..., Any] = getattr(type(self.module), self.name).__get__(self.module)
        return bound

    @property
    def __signature__(self) -> inspect.Signature:
        if self._known is None:  # a call is watched more than once a forward pass
            self._known = inspect.signature(self.method)
        return self._known

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name."""
        named = dict(self.__signature__.bind_partial(*args, **kwargs).arguments)
        more = named.pop("kwargs", {})
        return {**named, **more}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return uncompiled(self.note, self, args, kwargs)

    def remove(self) -> None:
        if vars(self.module).get(self.name) is not self:
            return  # somebody has put another there meanwhile, which is theirs
        delattr(self.module, self.name)
        if self._has_own:
            setattr(self.module, self.name, self._own)
