"""Exercises of the language model: documents most of whose answers are many small things that follow from the description alone.

A conversation asks ten questions and gives ten answers of a token or two; from a hundred thousand of them the small language model learnt
to copy, but not which size belongs to which shape. An exercise asks for all things at once (where each is, what is at each place, how each
pair lies, which statements are true), so that ten times as many tokens say whether a description was understood. What is drawn at random in
an answer, the order of the things and how they are called, is marked, and hardly counts in the loss.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from foveate.world.pictures import Scene, Thing, scene
from foveate.world.questions import CLEAR, Question, ask, box_answer, caption, cell, refer, what
from foveate.world.text import turn

Piece = tuple[str, bool]
"""A stretch of text, and whether it follows from what stands before it."""

# How often each family is tried in a conversation of `asked`: the harder, the more often.
_TRIED = {"relation": 4, "locating": 3, "attribute": 2, "count": 2, "presence": 1}
_KINDS = 5  # exercises in one document


def asked(seed: int | str) -> str:
    """A conversation about a described scene, hard families more often than in `questions.conversation`."""
    rng = random.Random(f"asked/{seed}")
    item = scene(f"asked/{seed}")
    found: list[Question] = []
    for family in (family for family, times in _TRIED.items() for _ in range(times)):
        for _ in range(4):
            question = ask(family, item, rng)
            if question and all(question.question != other.question for other in found):
                found.append(question)
                break
    rng.shuffle(found)
    text = caption(item, True, rng if rng.random() < 0.5 else None)
    return "<s>" + "".join(turn(f"{text}\n{one.question}" if i == 0 else one.question, one.answer) for i, one in enumerate(found))


def exercise(seed: int | str) -> list[Piece]:
    """Five exercises about a described scene of at least two things, from `<s>` on. Deterministic by seed."""
    rng = random.Random(f"exercise/{seed}")
    scenes = (scene(f"exercise/{seed}/{attempt}") for attempt in itertools.count())
    item = next(item for item in scenes if len(item.things) > 1)
    text = caption(item, True, rng if rng.random() < 0.7 else None) + "\n"
    pieces: list[Piece] = [("<s>", False)]
    for kind in rng.sample([_places, _boxes, _compare, _compare, _contents, _describe, _presence, _count, _true, _true], _KINDS):
        order, answers = kind(item, rng)
        if answers:
            pieces += [(f"<user>{text}{order}<assistant>", False), *_listed(answers), ("</s>", False)]
            text = ""
    return pieces


def _listed(answers: list[tuple[str, str]]) -> list[Piece]:
    """A comma between answers of (what is said at will, what follows from it)."""
    pieces: list[Piece] = []
    for number, (given, follows) in enumerate(answers):
        pieces += [((", " if number else "") + given, False), (follows, True)]
    return pieces


def _named(item: Scene, rng: random.Random) -> list[tuple[Thing, str]]:
    """Things that can be told from all others, in random order, each with a name that only it has."""
    found = []
    for thing in item.things:
        names = [f"the {thing.kind}"] if thing.kind != "shape" else []
        if thing.kind == "shape":
            told = refer(item, thing, ("size", "color", "shape"), rng)
            names += [] if told is None else [told[0]]
            names += [f"the {thing.colour} one"] if sum(other.colour == thing.colour for other in item.shapes) == 1 else []
            names += [f"the {thing.name}"] if sum(other.name == thing.name for other in item.shapes) == 1 else []
        if names:
            found.append((thing, rng.choice(names)))
    rng.shuffle(found)
    return found


def _at(thing: Thing) -> str:
    return "".join(f"<loc{cell(middle)}>" for middle in thing.centre)


def _places(item: Scene, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    return "point.", [(name, _at(thing)) for thing, name in _named(item, rng)]


def _boxes(item: Scene, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    return "boxes.", [(name, _at(thing) + box_answer(thing.box)) for thing, name in _named(item, rng)]


def _contents(item: Scene, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    things = rng.sample(item.things, len(item.things))
    return "what is here?", [(_at(thing), what(thing)) for thing in things]


def _describe(item: Scene, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    shapes = [(thing, name) for thing, name in _named(item, rng) if thing.kind == "shape"]
    return "tell.", [(f"{name} is", f" {thing.size} {thing.colour} {thing.name}") for thing, name in shapes]


def _compare(item: Scene, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    pairs = list(itertools.permutations(_named(item, rng), 2))
    found = []
    for (one, name), (other, other_name) in rng.sample(pairs, min(4, len(pairs))):
        words = ""
        for axis, (before, after) in enumerate((("above", "below"), ("left", "right"))):
            apart = other.centre[axis] - one.centre[axis]
            words += " " + (before if apart >= CLEAR else after if apart <= -CLEAR else "level")
        found.append((f"{name} to {other_name} is", words))
    return "compare.", found


def _presence(item: Scene, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    return "which are there?", _many("presence", "is there a ", "?", item, rng)


def _count(item: Scene, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    return "count.", _many("count", "how many ", " are there?", item, rng)


def _true(item: Scene, rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    return "true or not?", _many("relation", "is ", "?", item, rng)


def _many(family: str, start: str, end: str, item: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Up to six different questions of a family without the words that they share, with their answers."""
    found = [one for _ in range(6) if (one := ask(family, item, rng)) is not None]
    return list(dict.fromkeys((one.question.removeprefix(start).removesuffix(end), f" {one.answer}") for one in found))


EXERCISES: tuple[Callable[[Scene, random.Random], tuple[str, list[tuple[str, str]]]], ...] = (
    _places,
    _boxes,
    _compare,
    _contents,
    _describe,
    _presence,
    _count,
    _true,
)
"""Each kind: what is asked for, and a list of (what is said at will, what follows)."""
