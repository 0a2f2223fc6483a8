"""DC²: a picture divided until its parts are as small as what the model sees, described from the leaves up, and answered with what the
parts have told (Wang et al., arXiv 2408.15556).

A part is divided in four unless half of a side would be below half of what the model sees at once (168 of 336 px), or at `depth`. Parts
that look alike, by the mean of what they are encoded to, are merged first: average linkage, at a cosine distance below `merge`; a cluster
is the mean of its pixels in the place of its first part. A leaf is described; any other part is described after its parts, with what they
have told. A thing that is told of a part is remembered where one of its parts told it too: in that part, or in this one where several
did. At the end the things that the question names (at most `top`) are looked at once more, and what is seen there goes before the
question about the picture.

Where we differ: the description is asked for as a list, in the place of a caption from which a second pass takes the things; whether the
question names a thing is told by the share of the thing's words that are in it (at least `match`), not by an embedding model; the odd
pixel of a part stays in it; of the places of a thing, those inside of another are left out by comparing them, which the released code
does by indices of another order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from foveate.inference.strategies.base import Strategy
from foveate.inference.strategies.boxes import Box, grid, height, inside, squared, width
from foveate.inference.strategies.session import Session

_PLACE = re.compile(r"<[^<>]*>")  # marks of a model's own in what it says, such as places


@dataclass(frozen=True)
class DC2(Strategy):
    """Descriptions from the smallest parts up; `merge` 0: parts that look alike are not merged."""

    name: ClassVar[str] = "dc2"
    paper: ClassVar[str] = "2408.15556"
    depth: int = 5
    merge: float = 0.1
    match: float = 0.3
    top: int = 2

    def check(self) -> None:
        self.least(0, "depth")
        self.least(1, "top")
        self.between(0, 2, "merge")
        self.between(0, 1, "match")

    def parts(self, box: Box, depth: int, side: int) -> list[Box]:
        """The quarters of a part; [] of a leaf."""
        halves = width(box) // 2, height(box) // 2
        return [] if depth >= self.depth or min(halves) < max(1, side / 2) else grid(box, 2, 2)

    def search(self, session: Session) -> str:
        memory: dict[str, list[Box]] = {}
        told: list[str] = []
        session.hints = told
        self.describe(session, session.picture, session.whole, 0, memory)
        for box in self.places(session.question, memory):
            told.append(session.say("about", [session.view(box)], session.words.about.format(question=session.question)))
            session.chosen = [*session.chosen, box]
        return "found" if told else "searched"

    def describe(self, session: Session, picture: Image.Image, box: Box, depth: int, memory: dict[str, list[Box]]) -> list[str]:
        """What is in a part, whose pixels are those of `picture`; `memory` keeps where each thing is."""
        below = [(part, self.describe(session, view, part, depth + 1, memory)) for part, view in self.divided(session, picture, box, depth)]
        session.visit(box, depth)
        told = "; ".join(", ".join(names) for _, names in below if names)
        text = session.words.combine.format(parts=told) if told else session.words.describe
        names = things(session.say("describe", [picture if depth == 0 else squared(picture)], text))
        session.seen[box].said = ", ".join(names)
        for name in names:
            where = [part for part, own in below if name in own]
            if where or not below:
                memory.setdefault(name, []).append(where[0] if len(where) == 1 else box)
        return names

    def divided(self, session: Session, picture: Image.Image, box: Box, depth: int) -> list[tuple[Box, Image.Image]]:
        """The parts of a part with their pixels, those that look alike merged."""
        boxes = self.parts(box, depth, session.side)
        views = [picture.crop((b[0] - box[0], b[1] - box[1], b[2] - box[0], b[3] - box[1])) for b in boxes]
        if not boxes or not self.merge:
            return list(zip(boxes, views, strict=True))
        groups = clusters(np.stack([session.feature(squared(view)) for view in views]), self.merge)
        return [(boxes[group[0]], mean([views[i] for i in group])) for group in groups]

    def places(self, question: str, memory: dict[str, list[Box]]) -> list[Box]:
        """Where the things are that a question names, the best first."""
        asked = words(question)
        shares = {name: len(words(name) & asked) / len(words(name)) for name in memory if words(name)}
        named = sorted((name for name, share in shares.items() if share >= self.match and share > 0), key=lambda name: -shares[name])
        found = []
        for name in named[: self.top]:
            boxes = list(dict.fromkeys(memory[name]))
            found += [box for box in boxes if not any(box != other and inside(box, other) for other in boxes)]
        return list(dict.fromkeys(found))

    def last(self, session: Session) -> tuple[Sequence[Image.Image], str]:
        if not session.hints:
            return [session.picture], session.question
        return [session.picture], session.words.hint.format(said=" ".join(session.hints), question=session.question)


def things(said: str) -> list[str]:
    """The entries of a list as a model writes it, each once, without articles."""
    parts = (part.strip(" .*-\"'").lower() for part in re.split(r"[,;\n]", _PLACE.sub("", said)))
    return list(dict.fromkeys(name for part in parts if (name := re.sub(r"^(a|an|the|and) ", "", part))))


def words(text: str) -> set[str]:
    """The words of a text, in lower case and without the s of a plural."""
    return {word.removesuffix("s") or word for word in re.findall(r"\w+", text.lower())}


def clusters(features: np.ndarray, apart: float) -> list[list[int]]:
    """Rows of (parts, width) joined while the mean cosine distance between two groups is below `apart`: average linkage. Groups and their
    members are in the order of the rows."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    distance = 1 - unit @ unit.T
    groups = [[i] for i in range(len(features))]
    while len(groups) > 1:
        pairs = [(distance[np.ix_(groups[i], groups[k])].mean(), i, k) for i in range(len(groups)) for k in range(i + 1, len(groups))]
        least, i, k = min(pairs)
        if least >= apart:
            break
        groups[i] = sorted(groups[i] + groups.pop(k))
    return groups


def mean(pictures: Sequence[Image.Image]) -> Image.Image:
    """The mean of pictures, pixel by pixel, in the size of the first."""
    if len(pictures) == 1:
        return pictures[0]
    size = pictures[0].size
    stack = np.stack([np.asarray(one if one.size == size else one.resize(size), np.float32) for one in pictures])
    return Image.fromarray(stack.mean(0).round().astype(np.uint8))
