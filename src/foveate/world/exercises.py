"""Talks of the language model about described scenes: questions as in conversations, and exercises.

A conversation asks ten questions and gives ten answers of a token or two; from a hundred thousand of them the small language model learnt
to copy, but not which size belongs to which shape. An exercise asks for all things at once (where each is, what is at each place, how each
pair lies, which statements are true), so that ten times as many tokens say whether a description was understood. What is drawn at random in
an answer, the order of the things and how they are called, is marked, and hardly counts in the loss.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from foveate.world.pictures import COLOURS, SHAPES, SIZES, Scene, Thing, scene
from foveate.world.questions import CLEAR, RULER, Question, ask, at, box_answer, ordered, plural, refer, what
from foveate.world.text import document

Piece = tuple[str, bool]
"""A stretch of text, and whether it follows from what stands before it."""

Answers = list[tuple[str, str]]
"""What is said at will, and what follows."""

Exercise = Callable[[Scene, random.Random], tuple[str, Answers]]
"""What is asked for about a scene, with the answers."""

# How often each family is tried in a conversation of `asked`: the harder, the more often.
_TRIED = {"relation": 4, "locating": 3, "attribute": 2, "count": 2, "presence": 1}
_KINDS = 5  # exercises in one talk about a scene
_CROSSED = 3  # and about crossed properties, where there is less to ask for


@dataclass(frozen=True)
class Talk:
    """Turns about a described scene: its things in the order of the description, and all text that comes after that."""

    things: tuple[Thing, ...]
    pieces: tuple[Piece, ...]

    def words(self) -> list[Piece]:
        """The whole document, described in words, from `<s>` on."""
        return [("<s><user>" + ", ".join(what(thing) + at(thing) for thing in self.things), False), *self.pieces]


def asked(seed: int | str) -> Talk:
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
    return _talk(ordered(item, rng if rng.random() < 0.5 else None), [(one.question, [("", one.answer)]) for one in found])


def exercise(seed: int | str) -> Talk:
    """Five exercises about a described scene of at least two things. Deterministic by seed."""
    rng = random.Random(f"exercise/{seed}")
    scenes = (scene(f"exercise/{seed}/{attempt}") for attempt in itertools.count())
    item = next(item for item in scenes if len(item.things) > 1)
    things = ordered(item, rng if rng.random() < 0.7 else None)
    return _talk(things, [kind(item, rng) for kind in _drawn(rng)])


def crossed(seed: int | str) -> Talk:
    """Three exercises about made-up scenes of two or three colours and shapes, in which about half of the pairs are there: what has the
    colour and what has the shape are seldom one thing. Deterministic by seed."""
    rng = random.Random(f"crossed/{seed}")
    colours, shapes = (rng.sample(list(all_), rng.choice((2, 2, 3))) for all_ in (COLOURS, SHAPES))
    pairs = list(itertools.product(colours, shapes))
    there = rng.sample(pairs, rng.randint(2, min(5, len(pairs) - 1)))
    things = []
    for (colour, shape), place in zip(there, rng.sample(range(RULER**2), len(there)), strict=True):
        row, column = (one / RULER for one in divmod(place, RULER))
        box = (row, column, row + 1 / RULER, column + 1 / RULER)
        things.append(Thing("shape", shape, box, COLOURS[colour], colour, rng.choice(SIZES)))
    size = {(str(thing.colour), thing.name): str(thing.size) for thing in things}
    place_of = {(str(thing.colour), thing.name): at(thing) for thing in things}
    exact = [(one, *pair) for pair in pairs for one in SIZES if pair in size or rng.random() < 0.3]
    counts = [(f"{colour} objects", sum(pair[0] == colour for pair in there)) for colour in colours]
    counts += [(plural(shape), sum(pair[1] == shape for pair in there)) for shape in shapes] + [("objects", len(there))]
    kinds: list[tuple[str, Answers]] = [
        ("find.", [(" ".join(pair), place_of.get(pair, " no")) for pair in pairs]),
        ("which are there?", [(" ".join(pair), " yes" if pair in size else " no") for pair in pairs]),
        ("exactly?", [(" ".join(one), " yes" if size.get(one[1:]) == one[0] else " no") for one in exact]),
        ("tell.", [(f"the {' '.join(pair)} is", f" {size[pair]} {' '.join(pair)}") for pair in there]),
        ("count.", [(given, f" {number}") for given, number in counts]),
    ]
    turns = [(order, rng.sample(answers, len(answers))) for order, answers in rng.sample(kinds, _CROSSED)]
    some = [(f"is there a {' '.join(pair)}?", [("", "yes" if pair in size else "no")]) for pair in rng.sample(pairs, 3)]
    return _talk(things, [*turns, *some] if rng.random() < 0.5 else turns)


def plain(seed: int | str, most: int = 5) -> list[Piece]:
    """`text.document` as pieces: its answers follow."""
    pieces: list[Piece] = []
    for number, part in enumerate(document(seed, most).split("<assistant>")):
        answer, end, rest = part.partition("</s>") if number else ("", "", part)
        pieces += [(answer + end, True)] * bool(number) + [(rest + "<assistant>", False)]
    return [*pieces[:-1], (pieces[-1][0].removesuffix("<assistant>"), False)]


def _talk(things: list[Thing], turns: list[tuple[str, Answers]]) -> Talk:
    pieces: list[Piece] = []
    for order, answers in turns:
        if answers:
            start = "<user>" if pieces else "\n"
            pieces += [(f"{start}{order}<assistant>", False), *_listed(answers)]
            pieces[-1] = (pieces[-1][0] + "</s>", True)
    return Talk(tuple(things), tuple(pieces))


def _drawn(rng: random.Random) -> list[Exercise]:
    """Different kinds of exercise, those that are learnt last more often than the others."""
    left = dict(EXERCISES)
    found: list[Exercise] = []
    while len(found) < _KINDS:
        found += rng.choices(list(left), list(left.values()))
        del left[found[-1]]
    return found


def _listed(answers: Answers) -> list[Piece]:
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


def _places(item: Scene, rng: random.Random) -> tuple[str, Answers]:
    return "point.", [(name, at(thing)) for thing, name in _named(item, rng)]


def _boxes(item: Scene, rng: random.Random) -> tuple[str, Answers]:
    return "boxes.", [(name, at(thing) + box_answer(thing.box)) for thing, name in _named(item, rng)]


def _contents(item: Scene, rng: random.Random) -> tuple[str, Answers]:
    things = rng.sample(item.things, len(item.things))
    return "what is here?", [(at(thing), what(thing)) for thing in things]


def _describe(item: Scene, rng: random.Random) -> tuple[str, Answers]:
    shapes = [(thing, name) for thing, name in _named(item, rng) if thing.kind == "shape"]
    return "tell.", [(f"{name} is", f" {thing.size} {thing.colour} {thing.name}") for thing, name in shapes]


def _compare(item: Scene, rng: random.Random) -> tuple[str, Answers]:
    pairs = list(itertools.permutations(_named(item, rng), 2))
    found = []
    for (one, name), (other, other_name) in rng.sample(pairs, min(4, len(pairs))):
        words = ""
        for axis, (before, after) in enumerate((("above", "below"), ("left", "right"))):
            apart = other.centre[axis] - one.centre[axis]
            words += " " + (before if apart >= CLEAR else after if apart <= -CLEAR else "level")
        found.append((f"{name} to {other_name} is", words))
    return "compare.", found


def _presence(item: Scene, rng: random.Random) -> tuple[str, Answers]:
    return "which are there?", _many("presence", "is there a ", "?", item, rng)


def _find(item: Scene, rng: random.Random) -> tuple[str, Answers]:
    """Where the thing of a colour and a shape is; most that are not there cross those that are."""
    there = [(str(thing.colour), thing.name) for thing in item.shapes]
    found = [(f"{thing.colour} {thing.name}", at(thing)) for thing in item.shapes if there.count((str(thing.colour), thing.name)) == 1]
    colours, shapes = {colour for colour, _ in there}, {shape for _, shape in there}
    cross = sorted(set(itertools.product(colours, shapes)) - set(there))
    near = sorted(pair for pair in itertools.product(COLOURS, SHAPES) if (pair[0] in colours) != (pair[1] in shapes))
    absent = rng.sample(cross, min(len(cross), 5))
    absent += rng.sample(near, max(0, min(2, len(found) - len(absent))))
    answers = found + [(" ".join(pair), " no") for pair in absent]
    return "find.", rng.sample(answers, len(answers))


def _exactly(item: Scene, rng: random.Random) -> tuple[str, Answers]:
    """Whether a thing of three properties is there; those that are not differ in one property from one that is."""
    there = sorted({(str(thing.size), str(thing.colour), thing.name) for thing in item.shapes})
    absent = []
    for size, colour, shape in there:
        other = SIZES[1 - SIZES.index(size)]
        absent += [(other, colour, shape), (size, rng.choice(list(COLOURS)), shape), (size, colour, rng.choice(SHAPES))]
    no = sorted(set(absent) - set(there))
    answers = [(" ".join(one), " yes") for one in there]
    answers += [(" ".join(one), " no") for one in rng.sample(no, min(len(no), len(there) + 2))]
    return "exactly?", rng.sample(answers, len(answers))


def _count(item: Scene, rng: random.Random) -> tuple[str, Answers]:
    return "count.", _many("count", "how many ", " are there?", item, rng)


def _true(item: Scene, rng: random.Random) -> tuple[str, Answers]:
    return "true or not?", _many("relation", "is ", "?", item, rng)


def _many(family: str, start: str, end: str, item: Scene, rng: random.Random) -> Answers:
    """Up to twelve different questions of a family without the words that they share, with their answers."""
    found = [one for _ in range(12) if (one := ask(family, item, rng)) is not None]
    return list(dict.fromkeys((one.question.removeprefix(start).removesuffix(end), f" {one.answer}") for one in found))


EXERCISES: dict[Exercise, int] = {
    _places: 1,
    _boxes: 1,
    _compare: 1,
    _contents: 1,
    _describe: 2,
    _find: 4,
    _exactly: 3,
    _presence: 3,
    _count: 4,
    _true: 2,
}
"""Each kind, what is asked for with its answers, and how often it is drawn."""
