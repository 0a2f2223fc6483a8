"""How what has options is written and read: "name:option=value,option=value", in recipes, on the command line and in `foveate.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Self, TypeVar

from foveate.errors import FoveateError, nearest


class Spelled:
    """Base of frozen dataclasses that are written so: the fields are the options, `name` is what stands in front of them."""

    name: ClassVar[str]

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """One with these options. FoveateError for an option that it does not have, and for one that it needs."""
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in options:
            if key not in known:
                raise FoveateError(f"{cls.name} has no option {key!r}{nearest(key, known)}; its options are {', '.join(known) or 'none'}")
        missing = [f.name for f in known.values() if f.default is dataclasses.MISSING and f.name not in options]
        if missing:
            raise FoveateError(f"{cls.name} needs {', '.join(missing)}: write {cls.name}:{','.join(m + '=…' for m in missing)}")
        return cls(**options)

    def least(self, bound: int, *options: str) -> None:
        """FoveateError unless the options are whole numbers of at least `bound`."""
        for option in options:
            value = getattr(self, option)
            if type(value) is not int or value < bound:
                raise FoveateError(f"{self.name}: {option}={value!r} is not possible; give a whole number of at least {bound}")

    def __str__(self) -> str:
        return self.spelled()

    def spelled(self, without: Sequence[str] = (), always: Sequence[str] = ()) -> str:
        """The canonical spelling, which is read back; some options may be left out of it, or stand in it at their default too."""
        options = []
        for option in dataclasses.fields(self):  # type: ignore[arg-type]
            if option.name in without:
                continue
            value = getattr(self, option.name)
            default = option.default
            if option.name in always or default is dataclasses.MISSING or value != default or type(value) is not type(default):
                text = str(value).lower() if isinstance(value, bool) else str(value)
                options.append(f"{option.name}={text.replace('e+', 'e') if isinstance(value, float) else text}")  # "+" joins reducers
        return self.name + (":" + ",".join(options) if options else "")


Kind = TypeVar("Kind", bound=Spelled)


def read_options(text: str, what: str) -> tuple[str, dict[str, Any]]:
    """(name, options) of one spelling. `what` it is, for the FoveateError where it cannot be read."""
    name, _, rest = text.strip().partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not value.strip():
            raise FoveateError(f"{what} {text.strip()!r}: cannot read {item!r}; write option=value")
        options[key.strip()] = _value(value.strip())
    return name, options


def listed(names: Mapping[str, Any], base: type[Any]) -> dict[str, Any]:
    """The kinds of `base` among a module's names that can be spelled, by their spelling, in order."""
    kinds: list[Any] = [kind for kind in names.values() if isinstance(kind, type) and issubclass(kind, base) and "name" in vars(kind)]
    return {kind.name: kind for kind in kinds}


def read(text: str, what: str, kinds: Mapping[str, type[Kind]]) -> Kind:
    """One of `kinds` from its spelling. FoveateError for an unknown name or option; `what` it is."""
    name, options = read_options(text, what)
    if name not in kinds:
        raise FoveateError(f"unknown {what} {name!r}{nearest(name, kinds)}; known are {', '.join(kinds)}")
    return kinds[name].from_options(options)


def _value(text: str) -> int | float | str | bool:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if "/" in text:
        try:
            return float(Fraction(text))
        except (ValueError, ZeroDivisionError):
            pass
    return text
