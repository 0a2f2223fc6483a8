"""Questions about, and accounts of, the scenes that move.

| family | asks |
|---|---|
| event | what a shape does: stay, appear, leave, turn or move |
| order | whether something happens before something else |
| motion | where a shape moves: right, left, down or up |
| change | what color a shape has at first, or at the end |
| tally | how many objects there are at first, at the end or in all, how many appear or leave |
| presence | whether a shape of a color is there at first, or at the end; half of the negatives are there at another time |
| reading | what is written, which most of the time is there in passing |

Shapes go by their names, which are theirs alone in a scene. No question of a conversation answers another.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from foveate.world.moving import Actor, MovingScene
from foveate.world.pictures import COLOURS
from foveate.world.questions import Question, what

HAPPENINGS = ("event", "order", "motion", "change", "tally", "presence", "reading")
DESCRIBE_CLIP = "describe the video."
_SPARE = ("event", "change", "presence", "tally")  # asked a second time, where there is room
_TRIES = 6


@dataclass(frozen=True)
class Happening(Question):
    """A question; its ties are the facts that it asks, and `tells` those that it takes for known."""

    tells: frozenset[frozenset[str]] = field(default=frozenset(), repr=False)

    def spoils(self, other: Happening) -> bool:
        """Whether one of the two answers the other."""
        return bool(self.ties & (other.ties | other.tells) or self.tells & other.ties)


def account(scene: MovingScene) -> str:
    """All that happens in a scene: what is there from the beginning, then the others, each as its story begins."""
    told = []
    for actor in sorted(scene.actors, key=lambda actor: (actor.start, what(actor.thing))):
        verb = f"{actor.story}{'es' if actor.story == 'pass' else 's'}"
        more = f" {actor.way}" if actor.story == "move" else f" {actor.last.colour}" if actor.last is not None else ""
        told.append(f"{what(actor.thing)} {verb}{more}")
    return ", ".join(told)


def happenings(scene: MovingScene, count: int = 7) -> list[Happening]:
    """Up to `count` questions on a scene in random order, fewer where the scene does not carry them."""
    rng = random.Random(f"happenings/{scene.seed}")
    asked: list[Happening] = []
    for family in rng.sample(HAPPENINGS, len(HAPPENINGS)) + rng.sample(_SPARE, len(_SPARE)):
        yes = rng.random() < 0.5  # settled before trying: a "yes" that found no place must not turn into a "no"
        for _ in range(_TRIES if len(asked) < count else 0):
            found = _MAKERS[family](scene, rng, yes)
            if found and not any(found.question == other.question or found.spoils(other) for other in asked):
                asked.append(found)
                break
    rng.shuffle(asked)
    return asked


def _ties(*facts: tuple[Actor, str]) -> frozenset[frozenset[str]]:
    return frozenset(frozenset((actor.thing.name, fact)) for actor, fact in facts)


def _event(scene: MovingScene, rng: random.Random, yes: bool) -> Happening:
    actor = rng.choice(scene.shapes)
    return Happening(f"what does the {actor.thing.name} do?", actor.story, "event", _ties((actor, "story")))


def _order(scene: MovingScene, rng: random.Random, yes: bool) -> Happening | None:
    shapes = [actor for actor in scene.shapes if actor.story != "stay"]
    pairs = [(one, other) for one in shapes for other in shapes if one.end < other.start]
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    one, other = (first, second) if yes else (second, first)
    text = f"does the {one.thing.name} {one.story} before the {other.thing.name} {other.story}s?"
    asked, told = (_ties((one, fact), (other, fact)) for fact in ("time", "story"))
    return Happening(text, "yes" if yes else "no", "order", asked, told)


def _motion(scene: MovingScene, rng: random.Random, yes: bool) -> Happening | None:
    moving = [actor for actor in scene.shapes if actor.story == "move"]
    if not moving:
        return None
    actor = rng.choice(moving)
    return Happening(f"where does the {actor.thing.name} move?", actor.way, "motion", _ties((actor, "way")), _ties((actor, "story")))


def _change(scene: MovingScene, rng: random.Random, yes: bool) -> Happening | None:
    turning = [actor for actor in scene.shapes if actor.story == "turn"]
    actor = rng.choice(turning if turning and rng.random() < 0.7 else scene.shapes)
    when, frame = rng.choice(_times(scene))
    thing = actor.at(frame)
    if thing is None:
        return None
    return Happening(f"what color is the {thing.name} {when}?", str(thing.colour), "change", _ties((actor, "color")))


def _tally(scene: MovingScene, rng: random.Random, yes: bool) -> Happening:
    kind = rng.choice(("are there at first", "are there at the end", "are there in all", "appear", "leave"))
    counts: dict[str, Any] = {f"are there {when}": sum(a.at(frame) is not None for a in scene.shapes) for when, frame in _times(scene)}
    counts |= {"are there in all": len(scene.shapes)}
    counts |= {story: sum(actor.story == story for actor in scene.shapes) for story in ("appear", "leave")}
    return Happening(f"how many objects {kind}?", str(counts[kind]), "tally", frozenset({frozenset(("tally", kind))}))


def _presence(scene: MovingScene, rng: random.Random, yes: bool) -> Happening | None:
    actor, (when, frame) = rng.choice(scene.shapes), rng.choice(_times(scene))
    now = {str(thing.colour) for thing in [actor.at(frame)] if thing is not None}
    other = sorted({str(thing.colour) for thing in (actor.thing, actor.last) if thing is not None} - now)
    if yes and not now:
        return None
    never = [colour for colour in COLOURS if colour not in now]
    colour = rng.choice(sorted(now) if yes else other if other and rng.random() < 0.5 else never)
    text = f"is there a {colour} {actor.thing.name} {when}?"
    return Happening(text, "yes" if yes else "no", "presence", _ties((actor, "story"), (actor, "color")))


def _reading(scene: MovingScene, rng: random.Random, yes: bool) -> Happening | None:
    for actor in scene.actors:
        if (kind := actor.thing.kind) != "shape":
            return Happening(f"what {kind} is {'handwritten' if kind == 'digit' else 'printed'}?", actor.thing.name, "reading")
    return None


def _times(scene: MovingScene) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("at first", 0), ("at the end", scene.frames - 1)


_MAKERS: dict[str, Callable[[MovingScene, random.Random, bool], Happening | None]] = {
    "event": _event,
    "order": _order,
    "motion": _motion,
    "change": _change,
    "tally": _tally,
    "presence": _presence,
    "reading": _reading,
}
