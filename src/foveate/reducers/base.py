"""What every reducer is: a frozen dataclass that says where it acts and turns a View into a decision."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

from PIL.Image import Image

from foveate.contract import Decision, ImageSize, Site, View, Workload
from foveate.errors import FoveateError, nearest
from foveate.reducers.spelling import Spelled, read_options

SAVED_NAME = "foveate.json"


@dataclass(frozen=True)
class Reducer(Spelled, ABC):
    """One method. Subclasses are frozen dataclasses whose fields are the method's options; `positions` is one of them:
    "keep" leaves each survivor its original position, "renumber" closes the gaps.

    What a class says of its method:

    name, paper   its spelling, and its arXiv number ("-": a baseline); version is raised when the same options decide otherwise
    experimental  whether its rule rests on an abstract or another's words alone, and may change when the source can be read
    beyond        whether it ignores layers that the model does not have, instead of refusing the model
    amounts       the options that say how many tokens stay, which `at` sets
    between       whether it places tokens where no other engine does: between integers, in several
                  places, or by other frequencies
    video         whether it compares the frames of a clip, so that it is of little use on pictures
    looks_at      of "text", "attention" and "keys" (of a decoder layer), "positions", "tower", "states", "pixels", what its choice follows

    What the common tests run, on images of 16 tokens in a model of four decoder layers and more:

    examples      spellings that reduce, one for each way in which the method works; the first acts on every family of models
    keeps_all     spellings that keep everything; the first does so on every family of models
    multiplies    spellings that multiply matrices in order to decide: a counter checks `score_flops` on them. (): the method never does
    """

    paper: ClassVar[str]
    version: ClassVar[int] = 1
    experimental: ClassVar[bool] = False
    beyond: ClassVar[bool] = False
    video: ClassVar[bool] = False
    amounts: ClassVar[tuple[str, ...]] = ("keep",)
    looks_at: ClassVar[frozenset[str]] = frozenset()
    examples: ClassVar[tuple[str, ...]] = ()
    keeps_all: ClassVar[tuple[str, ...]] = ()
    multiplies: ClassVar[tuple[str, ...]] = ()
    positions: str = field(default="keep", kw_only=True)

    def __post_init__(self) -> None:
        self.check()
        for option, value in self.canonical().items():
            object.__setattr__(self, option, value)

    def check(self) -> None:
        """Raises FoveateError where an option is not possible."""
        if self.positions not in ("keep", "renumber"):
            raise FoveateError(f'{self.name}: positions={self.positions!r} is not possible; choose "keep" or "renumber"')

    def canonical(self) -> dict[str, Any]:
        """The options that are written in another way than they were given, as they are written: one setting has one spelling."""
        return {}

    @property
    def between(self) -> bool:
        return False

    @abstractmethod
    def sites(self, layers: int) -> list[Site]:
        """Where it acts in a language model of `layers` decoder layers, and the signals that it needs there."""

    @abstractmethod
    def reduce(self, view: View, stage: int = 0) -> Decision:
        """The decision at one site; `stage` is its place in `sites`."""

    @abstractmethod
    def count(self, work: Workload, stage: int = 0) -> list[int]:
        """Visual tokens of each image of a prompt that leave the site (in the vision tower: of each crop). To the token where all of an
        image's tokens arrive and `exact` says so; of what an earlier method has left, how it lies in crops and frames is not known."""

    def exact(self, work: Workload) -> bool:
        """Whether sizes alone decide how many tokens leave; where not, `count` says how many leave at most."""
        return True

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

    def visual_tokens(self, image: int | ImageSize, num_layers: int) -> list[int]:
        """Visual tokens of one image in each decoder layer."""
        return visual_tokens([self], image, num_layers)

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        """What its own matrix products at one site take for one prompt; what the signals of the vision tower take is not in it."""
        return 0

    def unseen(self, sizes: Workload, stage: int = 0) -> int:
        """(query, key) pairs of one prompt, of all its slots with all, that need not be computed under what it decides at `Visibility`;
        where sizes alone do not say, those that are sure."""
        return 0

    # ---- spelling

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, "version": self.version, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Self:
        return cls.from_options({k: v for k, v in options.items() if k not in ("method", "version")})


def parse_with(text: str, methods: dict[str, type[Reducer]]) -> list[Reducer]:
    """Reads "name:option=value,option=value+name:…"; "" and "none" are no reducer at all."""
    if text.strip() in ("", "none"):
        return []
    found: list[Reducer] = []
    for part in text.split("+"):
        name = part.strip().partition(":")[0]
        if name == "preset":
            raise FoveateError(
                f"{part.strip()!r} is a setting that depends on the model: attach(model, {part.strip()!r}) takes it alone; elsewhere "
                "write out what `foveate presets MODEL` shows"
            )
        if name not in methods:
            raise FoveateError(f"unknown reducer {name!r}{nearest(name, methods)}; known are {', '.join(sorted(methods))} and none")
        _, options = read_options(part, "reducer")
        try:
            found.append(methods[name].from_dict(options))
        except TypeError as error:
            raise FoveateError(f"reducer {part.strip()!r}: {error}") from error
    return found


Step = tuple[Site, Reducer, int]


def acting(reducers: Sequence[Reducer], num_layers: int) -> list[Step]:
    """(site, reducer, stage) in the order in which they act in the model: the tower's by block, then by decoder layer."""
    sites = [(site, i, stage) for i, r in enumerate(reducers) for stage, site in enumerate(r.sites(num_layers))]
    sites = [at for at in sites if at[0].layer < num_layers and at[0].effect.place != "image"]

    def order(at: tuple[Site, int, int]) -> tuple[int, ...]:
        site, i, stage = at
        return (site.layer, not site.effect.lasts, site.effect.place != "tower", site.index, i, stage)

    return [(site, reducers[i], stage) for site, i, stage in sorted(sites, key=order)]


def passing(
    reducers: Sequence[Reducer],
    images: Sequence[ImageSize],
    counts: list[list[int]],
    known: Mapping[tuple[int, bool], Sequence[int]] = MappingProxyType({}),
) -> Iterator[Step]:
    """The steps in the order in which they act. `counts` are, by decoder layer, the tokens of each image of one prompt that go through it:
    after each step what it has left. `known`: by decoder layer, from it on (True) or in it alone (False), what all that acted there left
    of each image; without it, and between two that act there, what `count` says."""
    crops = [image.crops if len(image.crops) > 1 else image.frames for image in images]  # each is one sequence in the tower
    whole = tuple(ImageSize.whole(tokens) for parts in crops for tokens in parts)
    in_tower = [size.tokens for size in whole]
    steps = acting(reducers, len(counts))
    last = {(site.layer, site.effect.lasts): number for number, (site, _, _) in enumerate(steps)}
    for number, (site, reducer, stage) in enumerate(steps):
        yield site, reducer, stage
        place = site.layer, site.effect.lasts
        if site.effect.place == "tower":
            in_tower = reducer.count(Workload(whole, tuple(in_tower)), stage)
            each = iter(in_tower)
            left = [sum(next(each) for _ in parts) for parts in crops]
        else:
            left = reducer.count(Workload(tuple(images), tuple(counts[site.layer]), layers=len(counts)), stage)
        left = list(known.get(place, left)) if last[place] == number else left
        end = len(counts) if site.effect.lasts else site.layer + 1
        counts[site.layer : end] = [left] * (end - site.layer)


def tokens_by_layer(reducers: Sequence[Reducer], images: Sequence[ImageSize], num_layers: int) -> list[list[int]]:
    """By decoder layer, the visual tokens of each image of one prompt that go through it, under several reducers."""
    counts = [[image.tokens for image in images]] * num_layers
    for _ in passing(reducers, images, counts):
        pass
    return counts


def visual_tokens(reducers: Sequence[Reducer], image: int | ImageSize, num_layers: int) -> list[int]:
    """Visual tokens of one image (its size, or how many tokens in one crop) in each decoder layer under several reducers."""
    size = ImageSize.whole(image) if isinstance(image, int) else image
    return [left for (left,) in tokens_by_layer(reducers, [size], num_layers)]


def save_reducers(reducers: Sequence[Reducer], folder: Path) -> None:
    """Writes `foveate.json` beside the weights; `attach(model)` without a second argument reads it."""
    (folder / SAVED_NAME).write_text(json.dumps({"reducers": [r.to_dict() for r in reducers]}, indent=2) + "\n")
