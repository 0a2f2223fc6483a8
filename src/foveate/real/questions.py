"""Questions about scenes of real pictures, documents and charts, short and plain, with answers of a few tokens.

Families of scenes: naming ("What is in the top right?"), relation ("What is below the lemon?"), presence (no less often than yes; what is
asked for in vain is of the group of something there), counting (0 to 4, each as often), locating (a cell of a 4 x 4 grid), boxes
(hundredths of the side, [left, top, right, bottom]), reading (a label). Of pages: documents, charts.

A place is named only where nothing else could be meant: `_CLEAR` px lie between a centre and the border that decides.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from foveate.real.charts import Chart
from foveate.real.pages import Facts
from foveate.real.scenes import SIZE, Scene, Thing
from foveate.real.stock import Stock, said
from foveate.real.things import akin

FAMILIES = ("naming", "relation", "presence", "counting", "locating", "boxes", "reading", "documents", "charts")
METRICS = {
    "naming": "exact",
    "relation": "exact",
    "presence": "exact",
    "counting": "exact",
    "locating": "exact",
    "boxes": "iou,format=hundredths",
    "reading": "anls",
    "documents": "anls",
    "charts": "relaxed",
}
"""How each family is scored by `foveate bench`."""
GRID = 4
LIST = ("List the things, place by place.", "List the things, cell by cell of a 4x4 grid.")
READ = "Read the text."

_CLEAR = 8
_FAR = 130  # px between a thing and what is said to be beside it, at most
_SPOTS = (("top left", "top", "top right"), ("left", "middle", "right"), ("bottom left", "bottom", "bottom right"))
_PLACES = {_SPOTS[y][x]: (x, y) for x, y in ((0, 0), (2, 0), (1, 1), (0, 2), (2, 2))}  # that are asked for: "the top" might be a whole side
_SIDES = {"above": (1, -1), "below": (1, 1), "left of": (0, -1), "right of": (0, 1)}  # axis of the step, and its direction
_QUOTA = ("counting", "reading", "presence", "naming", "relation", "locating", "naming", "boxes")


@dataclass(frozen=True)
class Question:
    """One question. `answers` are all that are right, the first one is taught; `names` of things it speaks of or asks for; `printed`: texts
    in the first answer, in order, that are read off the picture."""

    question: str
    answers: tuple[str, ...]
    family: str
    names: frozenset[str] = frozenset()
    printed: tuple[str, ...] = ()


def scene_questions(scene: Scene, stock: Stock, rng: random.Random, yes: bool) -> list[Question]:
    """About eight questions in random order: none speaks of a thing that another one names. `yes`: the answer of the one on presence."""
    asked: list[Question] = []
    for family in _QUOTA:
        spoken = frozenset().union(*(question.names for question in asked))
        found = _presence(scene, stock, yes) if family == "presence" else _SCENE[family](scene, stock, rng)
        free = [question for question in found if not question.names & spoken]
        if free:
            asked.append(rng.choice(free))
    rng.shuffle(asked)
    return asked


def page_questions(facts: Facts, rng: random.Random, count: int = 6) -> list[Question]:
    """Questions about a document; of a receipt always the total, the date and a quantity."""
    single = [question for question, _ in facts.asked]
    usable = [(question, answer) for question, answer in facts.asked if single.count(question) == 1]
    first = [(q, a) for q, a in usable if q in ("What is the total?", "What is the date?")]
    many = [(q, a) for q, a in usable if q.startswith("How many")]
    first += [rng.choice(many)] if many else []
    others = [item for item in usable if item not in first]
    chosen = first + rng.sample(others, min(len(others), count - len(first)))
    rng.shuffle(chosen)
    return [Question(question, (answer,), "documents", printed=(answer,)) for question, answer in chosen]


def chart_questions(chart: Chart, rng: random.Random, count: int = 4) -> list[Question]:
    """The highest or the lowest bar, and values of others."""
    extreme = rng.randrange(2)
    _, answer = chart.asked[extreme]
    values = [item for item in chart.asked[2:] if f" {answer}?" not in item[0]]
    chosen = [chart.asked[extreme], *rng.sample(values, min(len(values), count - 1))]
    rng.shuffle(chosen)
    return [Question(question, (answer,), "charts", printed=(answer,)) for question, answer in chosen]


def caption(scene: Scene, cells: bool) -> Question:
    """Which things lie where, from the top left, by their centres, in the ninths of the picture or in `cells` of the grid."""
    parts = GRID if cells else 3
    things: dict[tuple[int, int], list[str]] = {}
    for thing in scene.things:
        across, down = (int(middle * parts / SIZE) for middle in thing.centre)
        things.setdefault((down, across), []).append(thing.name)
    told = [
        f"{f'row {down + 1}, column {across + 1}' if cells else _SPOTS[down][across]}: {', '.join(found)}"
        for (down, across), found in sorted(things.items())
    ]
    return Question(LIST[cells], ("; ".join(told),), "")


def transcript(texts: Iterable[str]) -> Question:
    """All that is printed on a page, in order."""
    read = " ".join(texts)
    return Question(READ, (read,), "", printed=(read,))


# ---- families of scenes --------------------------------------------------------------------------------------------------------------


def _single(scene: Scene) -> list[Thing]:
    """Things of which there is one."""
    names = [thing.name for thing in scene.things]
    return [thing for thing in scene.things if names.count(thing.name) == 1]


def _naming(scene: Scene, stock: Stock, rng: random.Random) -> list[Question]:
    there = [(place, thing) for place in _PLACES if (thing := _in_third(scene, place)) is not None]
    return [Question(f"What is in the {place}?", said(thing.name).said, "naming", frozenset([thing.name])) for place, thing in there]


def _relation(scene: Scene, stock: Stock, rng: random.Random) -> list[Question]:
    found = []
    for reference in _single(scene):
        for side in _SIDES:
            thing = _beside(scene, reference, side)
            if thing is not None and thing.name != reference.name:
                names = frozenset([thing.name, reference.name])
                found.append(Question(f"What is {side} the {reference.name}?", said(thing.name).said, "relation", names))
    return found


def _in_third(scene: Scene, place: str) -> Thing | None:
    """The only thing with its centre in a ninth of the picture, the others being clearly out of it."""

    def inside(thing: Thing, slack: int) -> bool:
        return all(
            SIZE * third / 3 - (slack if third > 0 else SIZE) <= middle < SIZE * (third + 1) / 3 + (slack if third < 2 else SIZE)
            for third, middle in zip(_PLACES[place], thing.centre, strict=True)
        )

    near = [thing for thing in scene.things if inside(thing, _CLEAR)]
    return near[0] if len(near) == 1 and inside(near[0], -_CLEAR) else None


def _beside(scene: Scene, reference: Thing, side: str) -> Thing | None:
    """The nearest thing on a side, which lies well in the reference's row or column; None where another one comes near to that."""
    axis, sign = _SIDES[side]
    found = []
    for thing in scene.things:
        gap = thing.box[axis] - reference.box[axis + 2] if sign > 0 else reference.box[axis] - thing.box[axis + 2]
        across = 1 - axis
        common = min(thing.box[across + 2], reference.box[across + 2]) - max(thing.box[across], reference.box[across])
        narrow = min(box[across + 2] - box[across] for box in (thing.box, reference.box))
        if thing is not reference and gap > -_CLEAR and common > -_CLEAR:
            found.append((gap, common / narrow, thing))
    found.sort(key=lambda item: item[0])
    clear = found and found[0][1] >= 0.5 and 0 <= found[0][0] <= _FAR and (len(found) == 1 or found[1][0] - found[0][0] >= 3 * _CLEAR)
    return found[0][2] if clear else None


def _presence(scene: Scene, stock: Stock, yes: bool) -> list[Question]:
    there = sorted({thing.name for thing in scene.things} - {scene.counted})
    names = there if yes else absent(scene, stock)
    return [Question(_is_there(name), ("yes" if yes else "no",), "presence", frozenset([name])) for name in names]


def _is_there(name: str) -> str:
    grammar = said(name)
    return f"{'Are' if grammar.number == 'plural' else 'Is'} there {grammar.some}?"


def absent(scene: Scene, stock: Stock) -> list[str]:
    """Names of the groups of what is there that fit nothing that is there, nor what is counted."""
    there = {thing.name for thing in scene.things}
    alike = [name for group in sorted({said(name).group for name in there}) for name in stock.groups[group]]
    return [name for name in alike if not any(akin(name, other) for other in there | {scene.counted})]


def _counting(scene: Scene, stock: Stock, rng: random.Random) -> list[Question]:
    number = sum(thing.name == scene.counted for thing in scene.things)
    return [Question(f"How many {said(scene.counted).many} are there?", (str(number),), "counting", frozenset([scene.counted]))]


def _locating(scene: Scene, stock: Stock, rng: random.Random) -> list[Question]:
    found = []
    for thing in _single(scene):
        cells = [cell_of(middle) for middle in thing.centre]
        if None not in cells:
            answer = f"row {cells[1]}, column {cells[0]}"
            found.append(Question(f"In a 4x4 grid, where is the {thing.name}?", (answer,), "locating", frozenset([thing.name])))
    return found


def cell_of(middle: float) -> int | None:
    """The row or column of the grid, from 1; None within a few pixels of a line."""
    cell = int(middle / SIZE * GRID)
    low, high = middle - cell * SIZE / GRID, (cell + 1) * SIZE / GRID - middle
    close = (low < _CLEAR and cell > 0) or (high < _CLEAR and cell < GRID - 1)
    return None if close else cell + 1


def _boxes(scene: Scene, stock: Stock, rng: random.Random) -> list[Question]:
    return [
        Question(f"What is the box of the {thing.name}?", (box_text(thing.box),), "boxes", frozenset([thing.name]))
        for thing in _single(scene)
    ]


def box_text(box: Sequence[int]) -> str:
    """A box in hundredths of the side."""
    return "[" + ", ".join(str(round(edge * 100 / SIZE)) for edge in box) + "]"


def _reading(scene: Scene, stock: Stock, rng: random.Random) -> list[Question]:
    return reading(scene, alone=len(scene.labels) == 1)


def reading(scene: Scene, alone: bool) -> list[Question]:
    """What its labels say; `alone`: there is one, which needs no other name."""
    if alone:
        text = scene.labels[0].text
        return [Question("What does the label say?", (text,), "reading", printed=(text,))]
    names = [scene.things[label.under].name for label in scene.labels]
    return [
        Question(f"What does the label under the {name} say?", (label.text,), "reading", frozenset([name]), (label.text,))
        for name, label in zip(names, scene.labels, strict=True)
    ]


_SCENE: dict[str, Callable[[Scene, Stock, random.Random], list[Question]]] = {
    "naming": _naming,
    "relation": _relation,
    "counting": _counting,
    "locating": _locating,
    "boxes": _boxes,
    "reading": _reading,
}


def constant(questions: Iterable[Question], family: str) -> tuple[str, float, int]:
    """The one answer that is right most often in a family, its share, and how many questions there are. Boxes are right where they have
    half of what they and the answer cover in common."""
    answers = [question.answers[0].lower() for question in questions if question.family == family]
    if family == "boxes":
        right = {one: sum(_half_in_common(one, other) for other in answers) for one in dict.fromkeys(answers)}
    else:
        right = dict(Counter(answers))
    best = max(right, key=lambda answer: right[answer], default="")
    return best, right.get(best, 0) / max(1, len(answers)), len(answers)


def _half_in_common(one: str, other: str) -> bool:
    (a, b, c, d), (e, f, g, h) = ([int(edge) for edge in text[1:-1].split(",")] for text in (one, other))
    common = max(0, min(c, g) - max(a, e)) * max(0, min(d, h) - max(b, f))
    return 2 * common >= (c - a) * (d - b) + (g - e) * (h - f) - common
