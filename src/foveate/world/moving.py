"""Scenes that move: what is in a clip at each of its frames. Deterministic by seed; no files, no network.

Two to four things of the embedded world, each of another shape, and in most cases one piece of writing. Each of them has one story:

    stay     it is there from the first frame to the last
    appear   it is there from one frame on
    leave    it is there up to one frame
    turn     from one frame on it has another colour
    move     it crosses a good part of the picture, to the right, left, top or bottom
    pass     writing that is there for a quarter of the clip

Whatever happens begins and ends at a frame of an even number, and what happens to shapes not before the third and not in the last two, so
that every second frame shows all of it, in order, and the first and the last of them the beginning and the end. No two shapes appear, leave
or turn at once.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

from foveate.world.pictures import (
    COLOURS,
    RASTER,
    SHAPES,
    SIZES,
    Box,
    Rgb,
    Scene,
    Split,
    Thing,
    Wanted,
    extent,
    ground,
    ink_on,
    placed,
    shade,
    writing,
)

FRAMES = 16  # of a clip
LEAST = 12  # fewer frames have no room for what happens
RATE = 8  # frames a second
WAYS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
"""Where things move, as (rows, columns)."""


@dataclass(frozen=True)
class Actor:
    """A thing with its story.

    thing  as it is first
    start  the first frame of what happens to it: it is there, or gone, or of another colour, or has not moved yet
    end    the frame at which that is over: of what moves, it is where it stays; of what passes, it is gone. `start` of all others
    last   as it is at the end, whether it is there or not
    way    where it moves, one of WAYS
    """

    thing: Thing
    story: str
    start: int = 0
    end: int = 0
    last: Thing | None = None
    way: str = ""

    def at(self, frame: int) -> Thing | None:
        """The thing in a frame; None where it is not there."""
        last = self.last or self.thing
        if self.story in ("appear", "leave"):
            return self.thing if (frame >= self.start) == (self.story == "appear") else None
        if self.story == "pass":
            return self.thing if self.start <= frame < self.end else None
        if self.story == "turn":
            return last if frame >= self.start else self.thing
        if self.story != "move":
            return self.thing
        share = min(1.0, max(0.0, (frame - self.start) / (self.end - self.start)))
        down, right = (round(RASTER * share * (last.box[axis] - self.thing.box[axis])) / RASTER for axis in (0, 1))
        box = self.thing.box
        return replace(self.thing, box=(box[0] + down, box[1] + right, box[2] + down, box[3] + right))


@dataclass(frozen=True)
class MovingScene:
    """What a clip shows, over so many frames."""

    seed: int | str
    actors: tuple[Actor, ...]
    background: tuple[Rgb, Rgb]
    sideways: bool
    frames: int

    @property
    def shapes(self) -> list[Actor]:
        return [actor for actor in self.actors if actor.thing.kind == "shape"]

    def at(self, frame: int) -> Scene:
        """What one frame shows."""
        there = (actor.at(frame) for actor in self.actors)
        return Scene(self.seed, tuple(thing for thing in there if thing is not None), self.background, self.sideways)


def moving_scene(seed: int | str, split: Split = "train", frames: int = FRAMES) -> MovingScene:
    """The moving scene of a seed, of an even number of frames, at least LEAST. The same seed gives another one in the other split."""
    tries = (_drawn(random.Random(f"moving/{split}/{seed}/{attempt}"), seed, split, frames) for attempt in itertools.count())
    return next(found for found in tries if found is not None)


def _drawn(rng: random.Random, seed: int | str, split: Split, frames: int) -> MovingScene | None:
    """None where not everything finds a place."""
    dark, tints = ground(rng)
    ink, sideways = ink_on(rng, dark), rng.random() < 0.5
    wanted = writing(rng, split)
    stories = ["pass" if rng.random() < 0.7 else "stay" for _ in wanted]
    shapes = rng.sample(SHAPES, rng.choices((2, 3, 4), (3, 4, 2))[0])
    wanted += [{"kind": "shape", "name": name, "colour": rng.choice(list(COLOURS)), "size": rng.choice(SIZES)} for name in shapes]
    told = rng.sample(("appear", "leave", "turn", "move"), 2)
    told += [rng.choice(("stay", "stay", "appear", "leave", "turn")) for _ in shapes[2:]]
    stories += rng.sample(told, len(told))
    extents = [extent(rng, item) for item in wanted]
    ways = [rng.choice(list(WAYS)) if story == "move" else "" for story in stories]
    places = placed(rng, [_lane(rng, size, way) for size, way in zip(extents, ways, strict=True)])
    times = rng.sample(range(2, frames - 1, 2), sum(story in ("appear", "leave", "turn") for story in stories))
    actors = []
    for item, story, size, way, place in zip(wanted, stories, extents, ways, places, strict=True):
        if place is None:
            return None
        actors.append(_actor(rng, item, story, size, way, place, ink, times, frames))
    return MovingScene(seed, tuple(actors), tints, sideways, frames)


def _lane(rng: random.Random, size: tuple[int, int], way: str) -> tuple[int, int]:
    """(height, width) of all that a thing takes while it moves."""
    if not way:
        return size
    length = rng.randint(88, 116)
    return (length, size[1]) if WAYS[way][0] else (size[0], length)


def _actor(
    rng: random.Random, item: Wanted, story: str, size: tuple[int, int], way: str, place: Box, ink: Rgb, times: list[int], frames: int
) -> Actor:
    """`times`: of what happens at once, of which the last one is taken."""
    rgb = shade(rng, str(item["colour"])) if item["kind"] == "shape" else ink
    thing = Thing(box=place, rgb=rgb, **item)  # type: ignore[arg-type]
    if story == "pass":
        span = max(4, 2 * (frames // 8))
        start = rng.randrange(0, frames - span + 1, 2)
        return Actor(thing, story, start, start + span)
    if story == "move":
        start = rng.randrange(2, frames // 2, 2)
        first, last = (replace(thing, box=_end(place, size, way, end)) for end in (False, True))
        return Actor(first, story, start, start + 2 * (frames // 4) - 2, last, way)
    if story == "stay":
        return Actor(thing, story)
    start = times.pop()
    if story == "turn":
        colour = rng.choice([name for name in COLOURS if name != thing.colour])
        return Actor(thing, story, start, start, replace(thing, colour=colour, rgb=shade(rng, colour)))
    return Actor(thing, story, start, start)


def _end(lane: Box, size: tuple[int, int], way: str, last: bool) -> Box:
    """Where in its lane a thing is before and after it has moved."""
    height, width = (side / RASTER for side in size)
    top, left, bottom, right = lane
    if last == (sum(WAYS[way]) > 0):
        return bottom - height, right - width, bottom, right
    return top, left, top + height, left + width
