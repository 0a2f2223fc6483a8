"""What every reducer is: a frozen dataclass that says where it acts and turns a View into a decision."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Self

from PIL.Image import Image

from foveate.contract import BeforeProcessor, Decision, Site, ThroughLayer, View, Workload
from foveate.errors import FoveateError, nearest

SAVED_NAME = "foveate.json"


@dataclass(frozen=True)
class Reducer(ABC):
    """One method. Subclasses are frozen dataclasses whose fields are the method's options; `positions` is one of them:
    "keep" leaves each survivor its original position, "renumber" closes the gaps."""

    name: ClassVar[str]
    paper: ClassVar[str]
    version: ClassVar[int] = 1
    beyond: ClassVar[bool] = False  # whether a layer that the model does not have is none to act at, and no error
    amounts: ClassVar[tuple[str, ...]] = ("keep",)  # the options that say how many tokens stay, which `at` sets
    positions: str = field(default="keep", kw_only=True)

    def __post_init__(self) -> None:
        if self.positions not in ("keep", "renumber"):
            raise FoveateError(f'{self.name}: positions={self.positions!r} is not possible; choose "keep" or "renumber"')

    @abstractmethod
    def sites(self, layers: int) -> list[Site]:
        """Where it acts in a language model of `layers` decoder layers, and the signals that it needs there."""

    @abstractmethod
    def reduce(self, view: View, stage: int = 0) -> Decision:
        """The decision at one site; `stage` is its place in `sites`."""

    @abstractmethod
    def count(self, arriving: int, original: int, stage: int = 0) -> int:
        """Visual tokens of one image that leave the site, when `arriving` of its `original` tokens come to it."""

    def prepare(self, image: Image) -> Image:
        """What becomes of an image at `BeforeProcessor`."""
        return image

    def positions_at(self, stage: int) -> str:
        """What happens to positions at one of its sites, for a method that renumbers at some of them only."""
        return self.positions

    def at(self, keep: float) -> Self:
        """The same method, left with about `keep` (a share in (0, 1]) of the visual tokens. FoveateError where it has no such setting."""
        if not any(option.name == "keep" for option in dataclasses.fields(self)):
            raise FoveateError(f"{self.name} has no option keep, so it cannot be set to keep={keep:g}")
        changed: dict[str, Any] = {"keep": float(keep)}
        return dataclasses.replace(self, **changed)

    # ---- cost

    def visual_tokens(self, per_image: int, num_layers: int) -> list[int]:
        """Visual tokens of one image in each decoder layer."""
        return visual_tokens([self], per_image, num_layers)

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        """What its own matrix products at one site take for one prompt; what the signals of the vision tower take is not in it."""
        return 0

    # ---- spelling

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, "version": self.version, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Self:
        options = {k: v for k, v in options.items() if k not in ("method", "version")}
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in options:
            if key not in known:
                raise FoveateError(f"{cls.name} has no option {key!r}{nearest(key, known)}; its options are {', '.join(known) or 'none'}")
        missing = [f.name for f in known.values() if f.default is dataclasses.MISSING and f.name not in options]
        if missing:
            raise FoveateError(f"{cls.name} needs {', '.join(missing)}: write {cls.name}:{','.join(m + '=…' for m in missing)}")
        return cls(**options)

    def __str__(self) -> str:
        return self.spelled()

    def spelled(self, without: Sequence[str] = (), always: Sequence[str] = ()) -> str:
        """The canonical spelling, which `parse` reads back; some options may be left out of it, or stand in it at their default too."""
        options = []
        for option in dataclasses.fields(self):
            if option.name in without:
                continue
            value = getattr(self, option.name)
            default = option.default
            if option.name in always or default is dataclasses.MISSING or value != default or type(value) is not type(default):
                text = str(value).lower() if isinstance(value, bool) else str(value)
                options.append(f"{option.name}={text.replace('e+', 'e') if isinstance(value, float) else text}")  # "+" joins reducers
        return self.name + (":" + ",".join(options) if options else "")


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


def parse_with(text: str, methods: dict[str, type[Reducer]]) -> list[Reducer]:
    """Reads "name:option=value,option=value+name:…"; "" and "none" are no reducer at all."""
    if text.strip() in ("", "none"):
        return []
    found: list[Reducer] = []
    for part in text.split("+"):
        name, _, rest = part.strip().partition(":")
        if name not in methods:
            raise FoveateError(f"unknown reducer {name!r}{nearest(name, methods)}; known are {', '.join(sorted(methods))} and none")
        options: dict[str, Any] = {}
        for item in filter(None, rest.split(",")):
            key, equals, value = item.partition("=")
            if not equals or not value.strip():
                raise FoveateError(f"reducer {part.strip()!r}: cannot read {item!r}; write option=value")
            options[key.strip()] = _value(value.strip())
        try:
            found.append(methods[name].from_dict(options))
        except TypeError as error:
            raise FoveateError(f"reducer {part.strip()!r}: {error}") from error
    return found


Step = tuple[Site, Reducer, int]


def acting(reducers: Sequence[Reducer], num_layers: int) -> list[Step]:
    """(site, reducer, stage) in the order in which they act in the model."""
    sites = [(site, i, stage) for i, r in enumerate(reducers) for stage, site in enumerate(r.sites(num_layers))]
    sites = [at for at in sites if at[0].layer < num_layers and not isinstance(at[0], BeforeProcessor)]
    ordered = sorted(sites, key=lambda at: (at[0].layer, isinstance(at[0], ThroughLayer), *at[1:]))
    return [(site, reducers[i], stage) for site, i, stage in ordered]


def visual_tokens(reducers: Sequence[Reducer], per_image: int, num_layers: int) -> list[int]:
    """Visual tokens of one image in each decoder layer under several reducers, applied in order of their layers."""
    counts = [per_image] * num_layers
    for site, reducer, stage in acting(reducers, num_layers):
        left = reducer.count(counts[site.layer], per_image, stage)
        end = site.layer + 1 if isinstance(site, ThroughLayer) else num_layers
        counts[site.layer : end] = [left] * (end - site.layer)
    return counts


def save_reducers(reducers: Sequence[Reducer], folder: Path) -> None:
    """Writes `foveate.json` beside the weights; `attach(model)` without a second argument reads it."""
    (folder / SAVED_NAME).write_text(json.dumps({"reducers": [r.to_dict() for r in reducers]}, indent=2) + "\n")
