"""Close-ups of scenes: the quarter of a picture round a label, shown as large as the whole picture is.

A tower sees things and print in them as it does in a picture of twice the side, and in a quarter of its tokens.
"""

from __future__ import annotations

import random
from dataclasses import replace

from foveate.real.questions import Question, caption, reading
from foveate.real.scenes import SIZE, Box, Scene, letters

PART = SIZE // 2


def closeup(rng: random.Random, scene: Scene, number: int) -> tuple[Scene, Box] | None:
    """What is seen round label `number` and the thing above it, as a scene of `SIZE` pixels, and which box of the picture that is. There
    are things whose centre is inside, and labels that are there whole, with their things. None where the two do not fit."""
    label = scene.labels[number]
    (a, b, c, d), (e, f, g, h) = label.box, scene.things[label.under].box
    spans = [(max(0, high - PART), min(low, SIZE - PART)) for low, high in ((min(a, e), max(c, g)), (min(b, f), max(d, h)))]
    if any(first > last for first, last in spans):
        return None
    left, top = (rng.randint(first, last) for first, last in spans)

    part = (left, top, left + PART, top + PART)
    inside = [i for i, thing in enumerate(scene.things) if left <= thing.centre[0] < left + PART and top <= thing.centre[1] < top + PART]
    things = [replace(thing, box=moved(thing.box, part), side=thing.side * SIZE // PART) for thing in (scene.things[i] for i in inside)]
    whole = [one for one in scene.labels if one.under in inside and within(one.box, part)]
    labels = [replace(one, under=inside.index(one.under), size=one.size * SIZE // PART, box=moved(one.box, part)) for one in whole]
    return replace(scene, things=tuple(things), labels=tuple(labels)), part


def moved(box: Box, part: Box) -> Box:
    """Where in a close-up of `part` a box of the picture is; what is outside is cut off."""
    edges = (edge - start for edge, start in zip(box, part[:2] * 2, strict=True))
    a, b, c, d = (min(max(edge, 0), PART) * SIZE // PART for edge in edges)
    return a, b, c, d


def spelled(close: Scene, scene: Scene, part: Box) -> list[tuple[str, Box]]:
    """Where in a close-up of `part` of a scene its things are, and each letter of the labels that are seen whole: a cell of a tower is
    narrower than a word, so that no token could say the word."""
    printed = [letter for label in scene.labels if within(label.box, part) for letter in letters(label)]
    return [*((thing.name, thing.box) for thing in close.things), *((letter, moved(box, part)) for letter, box in printed)]


def within(box: Box, other: Box) -> bool:
    return other[0] <= box[0] and other[1] <= box[1] and box[2] <= other[2] and box[3] <= other[3]


def told(close: Scene, alone: bool) -> list[Question]:
    """What its labels say, then what lies where in it. `alone`: no other label is to be seen."""
    return [*reading(close, alone), caption(close, cells=False)]
