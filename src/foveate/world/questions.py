"""Captions of, and questions about, the scenes of the embedded world.

Six families mirror the field's benchmarks: presence (POPE-like: as many yes as no, half of the negatives differ from a thing in the
picture in one property), count, attribute, relation, reading, locating. "Objects" are the coloured shapes; writing is named "the number",
"the word", "the digit". Places are cells of a ruler of 16 along each side: `<loc4><loc5>` is row 4, column 5.
"""

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from foveate.world.pictures import COLOURS, SHAPES, Box, Scene, Thing

FAMILIES = ("presence", "count", "attribute", "relation", "reading", "locating")
RULER = 16
BoxCells = tuple[int, int, int, int]
DESCRIBE = "describe the image."
_BOX = re.compile(r"\s*".join([r"<loc(0|[1-9]\d*)>"] * 4))
_QUOTA = ("presence", "presence", "count", "count", "attribute", "attribute", "relation", "relation", "reading", "locating")
_SPARE = ("attribute", "relation", "count", "locating", "attribute", "count")  # asked where the quota could not be filled
_COUNT_WEIGHTS = (2, 2, 4, 8, 10, 12)
CLEAR = 0.15  # two centres this far apart (of the side) are clearly left/right or above/below of each other


@dataclass(frozen=True)
class Question:
    """One question with its answer. `ties` are the pairs of properties it says to belong together; two questions of one conversation
    share none, so that none answers the other."""

    question: str
    answer: str
    family: str
    ties: frozenset[frozenset[str]] = field(default=frozenset(), repr=False)


def caption(scene: Scene, places: bool = True, rng: random.Random | None = None) -> str:
    """Everything in a scene, by rows from the top; with `rng`, in a random order. `places` adds the cell of each centre."""
    return ", ".join(what(thing) + (at(thing) if places else "") for thing in ordered(scene, rng))


def ordered(scene: Scene, rng: random.Random | None = None) -> list[Thing]:
    """The things of a scene as a caption has them: by the rows of the ruler from the top, or with `rng` in a random order."""
    things = sorted(scene.things, key=lambda thing: (*map(cell, thing.centre), what(thing)))
    if rng is not None:
        rng.shuffle(things)
    return things


def at(thing: Thing) -> str:
    """The cell of a thing's centre."""
    return "".join(f"<loc{cell(middle)}>" for middle in thing.centre)


def what(thing: Thing) -> str:
    """What a caption calls a thing."""
    return {"number": "the number ", "word": "the word ", "digit": "a handwritten "}.get(
        thing.kind, f"a {thing.size} {thing.colour} "
    ) + thing.name


def conversation(scene: Scene, count: int = 10) -> list[Question]:
    """About ten questions on a scene in random order: fewer where the scene does not carry them."""
    rng = random.Random(f"questions/{scene.seed}")
    asked: list[Question] = []
    for family in _QUOTA + _SPARE:
        # Whether the answer is to be yes is settled before trying: a "yes" that found no free pair must not turn into a "no".
        yes = rng.random() < 0.5
        if family == "presence" and asked and len({(thing.colour, thing.name) for thing in scene.shapes}) == 1:
            continue
        for _ in range(6 if len(asked) < count else 0):
            found = ask(family, scene, rng, yes)
            if found and all(found.question != other.question and not found.ties & other.ties for other in asked):
                asked.append(found)
                break
    rng.shuffle(asked)
    return asked


def ask(family: str, scene: Scene, rng: random.Random, yes: bool | None = None) -> Question | None:
    """A question of a family; None where this draw does not carry one. `yes`: the answer of one on presence, drawn unless given."""
    if family == "presence":
        return _presence(scene, rng, rng.random() < 0.5 if yes is None else yes)
    return _MAKERS[family](scene, rng)


def box_cells(text: str) -> BoxCells | None:
    """The half-open box (row0, column0, row1, column1) in cells of the ruler, or None if `text` is not one well-formed box.

    The text names the first and the last cell, so `<loc3><loc3><loc3><loc3>` is the single cell (3, 3, 4, 4). A cell beyond the ruler or
    an end before its start is malformed.
    """
    match = _BOX.fullmatch(text.strip())
    if match is None:
        return None
    row0, column0, row1, column1 = (int(cell) for cell in match.groups())
    if max(row0, column0, row1, column1) >= RULER or row1 < row0 or column1 < column0:
        return None
    return row0, column0, row1 + 1, column1 + 1


def parse_box(answer: str) -> Box | None:
    """The same box in unit coordinates (top, left, bottom, right)."""
    cells = box_cells(answer)
    if cells is None:
        return None
    top, left, bottom, right = cells
    return top / RULER, left / RULER, bottom / RULER, right / RULER


def cell(position: float) -> int:
    """The cell of the ruler that a unit coordinate falls into."""
    return min(RULER - 1, int(position * RULER))


def box_answer(box: Box) -> str:
    """The first and the last cell of a box in unit coordinates, as answers name them; one cell at least, however small the box."""
    top, left, bottom, right = (int(edge * RULER + 0.5) for edge in box)
    top, left = min(top, RULER - 1), min(left, RULER - 1)
    return f"<loc{top}><loc{left}><loc{max(top, bottom - 1)}><loc{max(left, right - 1)}>"


def _pairs(*properties: str) -> frozenset[frozenset[str]]:
    return frozenset(frozenset(pair) for pair in itertools.combinations(properties, 2))


def _properties(thing: Thing) -> dict[str, str]:
    return {"size": str(thing.size), "color": str(thing.colour), "shape": thing.name}


def refer(scene: Scene, thing: Thing, allowed: tuple[str, ...], rng: random.Random) -> tuple[str, list[str]] | None:
    """A phrase that fits only this shape, made of the `allowed` properties, and the properties it names."""
    mine = _properties(thing)
    sets = [chosen for n in range(1, len(allowed) + 1) for chosen in itertools.combinations(allowed, n)]
    unique = [chosen for chosen in sets if sum(all(_properties(o)[p] == mine[p] for p in chosen) for o in scene.shapes) == 1]
    unique = [chosen for chosen in unique if len(chosen) < 3 or len(unique) == 1]  # three properties only where fewer do not do
    if not unique:
        return None
    chosen = rng.choice(unique)
    words = [mine[p] for p in ("size", "color") if p in chosen] + [mine["shape"] if "shape" in chosen else "object"]
    return "the " + " ".join(words), [mine[p] for p in chosen]


def _presence(scene: Scene, rng: random.Random, yes: bool) -> Question:
    there = {(str(thing.colour), thing.name) for thing in scene.shapes}
    if yes:
        colour, shape = rng.choice(sorted(there))
        return Question(f"is there a {colour} {shape}?", "yes", "presence", _pairs(colour, shape))
    absent = [pair for pair in itertools.product(COLOURS, SHAPES) if pair not in there]
    if rng.random() < 0.5:
        colour, shape = rng.choice(sorted(there))
        absent = [pair for pair in absent if (pair[0] == colour) != (pair[1] == shape)]
    colour, shape = rng.choice(absent)
    return Question(f"is there a {colour} {shape}?", "no", "presence", _pairs(colour, shape))


def _count(scene: Scene, rng: random.Random) -> Question | None:
    if rng.random() < 0.3:
        return Question("how many objects are there?", str(len(scene.shapes)), "count")
    counts = {f"{colour} objects": sum(thing.colour == colour for thing in scene.shapes) for colour in COLOURS}
    counts |= {plural(shape): sum(thing.name == shape for thing in scene.shapes) for shape in SHAPES}
    # By answer first: asked at random, nearly all would be 0 or 1.
    answers = sorted(set(counts.values()))
    answer = rng.choices(answers, [_COUNT_WEIGHTS[n] for n in answers])[0]
    what = rng.choice([what for what, n in counts.items() if n == answer])
    return Question(f"how many {what} are there?", str(answer), "count")


def plural(shape: str) -> str:
    """What several of a shape are called."""
    return f"{shape}{'es' if shape == 'cross' else 's'}"


def _attribute(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.shapes)
    about = rng.choice(("color", "shape", "size"))
    allowed = {"color": ("size", "shape"), "shape": ("size", "color"), "size": ("color", "shape")}[about]
    reference = refer(scene, thing, allowed, rng)
    if reference is None:
        return None
    phrase, named = reference
    answer = _properties(thing)[about]
    return Question(f"what {about} is {phrase}?", answer, "attribute", _pairs(answer, *named))


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    shapes = scene.shapes
    names = [(thing, f"the {thing.kind}") for thing in scene.things if thing.kind != "shape"]
    names += [(thing, f"the {thing.colour} one") for thing in shapes if sum(o.colour == thing.colour for o in shapes) == 1]
    names += [(thing, f"the {thing.name}") for thing in shapes if sum(o.name == thing.name for o in shapes) == 1]
    options = []
    for (one, one_name), (other, other_name) in itertools.permutations(names, 2):
        for axis, (before, after) in enumerate((("above", "below"), ("left of", "right of"))):
            if one is not other and other.centre[axis] - one.centre[axis] >= CLEAR:
                options += [(one_name, before, after, other_name), (other_name, after, before, one_name)]
    if not options:
        return None
    first, true, false, second = rng.choice(options)
    yes = rng.random() < 0.5
    return Question(f"is {first} {true if yes else false} {second}?", "yes" if yes else "no", "relation")


def _reading(scene: Scene, rng: random.Random) -> Question | None:
    for thing in scene.things:
        if thing.kind != "shape":
            return Question(f"what {thing.kind} is {'handwritten' if thing.kind == 'digit' else 'printed'}?", thing.name, "reading")
    return None


def _locating(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    if thing.kind != "shape":
        return Question(f"where is the {thing.kind}?", box_answer(thing.box), "locating")
    reference = refer(scene, thing, ("size", "color", "shape"), rng)
    if reference is None:
        return None
    return Question(f"where is {reference[0]}?", box_answer(thing.box), "locating", _pairs(*reference[1]))


_MAKERS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "count": _count,
    "attribute": _attribute,
    "relation": _relation,
    "reading": _reading,
    "locating": _locating,
}
