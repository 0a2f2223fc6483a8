"""ZoomEye: a picture as a tree of ever smaller parts, searched by how sure the model is (Shen et al., arXiv 2411.16044).

A part whose longer side is below what the model sees at once is a leaf; any other has four rows where it is at least twice as high as
wide, four columns where it is at least twice as wide as high, else 2 x 2 parts. Parts are visited in the order of

    w * existence + (1 - w) * latent,    w = (1 - b) * (depth / D)² + b,    D: the depth of the tree,

the confidence that what is sought is there, and that a closer look would show it. At each visit the model is asked whether it could
answer now; the search ends where that is at least `high`. After 3 D visits, and then after every two, `high` is lowered by the next of
`steps`, and the best visited part is taken if it reaches it; below `low` the search is given up, and the picture as it is answers.
Something that the question says of all of its kind ("all …") is collected instead: every part down to `gather_depth` of which the model
is as sure as of the best of its parts, and at least `gather`.

Settings of the paper's code: LLaVA view=local, high=0.6, low=0, steps 0.1/0.1/0.2; InternVL2.5 view=both, high=0.2, low=-0.2; Qwen2.5-VL
view=both, high=0.95, low=0, steps 0.05/0.1/0.2.

Where we differ: the prompts are our own, and all ways to write yes and no count, not one token each; where all parts have been visited
the best is taken if it reaches `low`; a cue that is answered by the whole picture leaves the whole picture in the last view; no
in-context examples go with the request for cues. In a local view a part that is no square has grey beside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from foveate.errors import FoveateError
from foveate.inference.strategies.base import Strategy
from foveate.inference.strategies.boxes import Box, beside, grid, grown, height, joined, marked, squared, union, width
from foveate.inference.strategies.session import Session

_PRONOUNS = {"it", "they", "them", "he", "she", "him", "her", "this", "that", "these", "those", "one", "none", "you", "i"}
_FAR, _NEAR, _AROUND = 1000, 50, 1.2  # px, px, times: of the last view


@dataclass(frozen=True)
class ZoomEye(Strategy):
    """Best-first search of a tree of parts, by confidence in yes.

    view   "local": the model is shown parts alone; "both": the whole picture with a red box, and the part
    depth  of the tree at most
    """

    name: ClassVar[str] = "zoomeye"
    paper: ClassVar[str] = "2411.16044"
    view: str = "local"
    high: float = 0.6
    low: float = 0.0
    steps: str = "0.1/0.1/0.2"
    depth: int = 5
    gather: float = 0.6
    gather_depth: int = 2

    def check(self) -> None:
        if self.view not in ("local", "both"):
            raise FoveateError(f'zoomeye: view={self.view!r} is not possible; choose "local" or "both"')
        self.between(-1, 1, "high", "low", "gather")
        self.least(0, "depth", "gather_depth")
        self.lowered()

    def lowered(self) -> list[float]:
        """By how much `high` is lowered, each time."""
        try:
            found = [float(step) for step in str(self.steps).split("/")]
        except ValueError:
            found = []
        if not found or min(found) <= 0:
            raise FoveateError(f'zoomeye: steps={self.steps!r} is not possible; write numbers above 0, such as "0.1/0.1/0.2"')
        return found

    # ---- the tree

    def parts(self, box: Box, depth: int, side: int) -> list[Box]:
        """The parts of a part; [] of a leaf."""
        wide, high = width(box), height(box)
        if depth >= self.depth or max(wide, high) < side:
            return []
        return grid(box, 4, 1) if high >= 2 * wide else grid(box, 1, 4) if wide >= 2 * high else grid(box, 2, 2)

    def deepest(self, box: Box, side: int, depth: int = 0) -> int:
        """The depth of the tree below a part."""
        return max((self.deepest(part, side, depth + 1) for part in self.parts(box, depth, side)), default=depth)

    def weight(self, depth: int, deepest: int) -> float:
        """How much existence counts against what a closer look might show."""
        least = 0.2 if self.view == "local" else 0.6
        return (1 - least) * (depth / deepest) ** 2 + least

    # ---- the search

    def search(self, session: Session) -> str:
        session.visit(session.whole, 0)
        cues = self.cues(session)
        found: list[Box] = []
        ended = "found"
        for cue in cues:
            session.chosen = found
            if cue.startswith("all "):
                own, why = self.collect(session, session.whole, 0, cue)[0], "searched"
            else:
                asked = session.question if len(cues) == 1 else session.words.part.format(cue=cue)
                own, why = self.best_first(session, cue, asked, found)
            found = [*found, *own]
            ended = why if why != "found" else ended
        session.chosen = list(dict.fromkeys(found))
        return ended

    def cues(self, session: Session) -> list[str]:
        """What has to be seen; the question itself where nothing is named."""
        if not session.words.cues:
            return [session.question]
        said = session.say("cues", [session.picture], session.words.cues.format(question=session.question))
        named = [part.strip(" .\"'*-").removeprefix("the ").strip() for part in re.split(r"[,;\n]", said.lower())]
        return list(dict.fromkeys(name for name in named if name and name not in _PRONOUNS)) or [session.question]

    def views(self, session: Session, box: Box) -> list[Image.Image]:
        if box == session.whole or self.view == "local":
            return [session.view(box)]
        return [marked(session.picture, [box]), session.picture.crop(box)]

    def existence(self, session: Session, box: Box, cue: str) -> float:
        return session.confidence("exists", self.views(session, box), session.words.exists.format(cue=cue))

    def best_first(self, session: Session, cue: str, asked: str, before: Sequence[Box]) -> tuple[list[Box], str]:
        """The part by which `asked` can be answered, if any, and why the search for it was over."""
        deepest = self.deepest(session.whole, session.side)
        steps, threshold, limit = self.lowered(), self.high, 3 * deepest
        queue: list[tuple[float, Box, int]] = [(0.0, session.whole, 0)]
        visited: list[tuple[float, Box]] = []
        while queue:
            _, box, depth = queue.pop(0)
            sure = session.confidence("answerable", self.views(session, box), session.words.answerable.format(question=asked))
            session.seen[box].value = sure
            visited.append((sure, box))
            best, where = max(visited, key=lambda one: one[0])  # of equals the first
            session.chosen = [*before, where] if best >= self.low else list(before)
            if sure >= threshold:
                return [box], "found"
            if len(visited) >= limit:
                threshold = round(threshold - (steps.pop(0) if len(steps) > 1 else steps[0]), 9)
                limit += 2
                if threshold < self.low:
                    return [], "given up"
                if best >= threshold:
                    return [where], "found"
            for part in self.parts(box, depth, session.side):
                session.visit(part, depth + 1)
                there = hidden = self.existence(session, part, cue)
                if session.words.latent:
                    hidden = session.confidence("latent", self.views(session, part), session.words.latent.format(cue=cue))
                weight = self.weight(depth + 1, deepest)
                queue.append((weight * there + (1 - weight) * hidden, part, depth + 1))
            queue.sort(key=lambda one: -one[0])  # of equals those that came first stay first
        return ([where], "found") if best >= self.low else ([], "searched")

    def collect(self, session: Session, box: Box, depth: int, cue: str) -> tuple[list[Box], float]:
        """The parts that hold some of what is sought, its own parts first, and how sure the model is that there is some in it at all."""
        found, best = [], -1.0
        for part in self.parts(box, depth, session.side) if depth < self.gather_depth else []:
            below, sure = self.collect(session, part, depth + 1, cue)
            found += below
            best = max(best, sure)
        seen = session.visit(box, depth)
        seen.value = self.existence(session, box, cue)
        if seen.value >= max(best, self.gather):
            found.append(box)
            session.chosen = [*session.chosen, box]
        return found, seen.value

    def last(self, session: Session) -> tuple[Sequence[Image.Image], str]:
        boxes, all_of_it = session.chosen, session.whole
        if not boxes or all_of_it in boxes:
            return [session.picture], session.question
        if self.view == "both":
            around = [grown(box, round(_AROUND * width(box)), round(_AROUND * height(box)), all_of_it) for box in boxes]
            return [marked(session.picture, boxes), *(session.picture.crop(box) for box in joined(around, _NEAR))], session.question
        boxes = [grown(box, session.side, session.side, all_of_it) for box in boxes]
        one = union(boxes)
        if len(boxes) > 1 and max(width(one), height(one)) > _FAR:
            return [squared(beside([session.picture.crop(box) for box in boxes]))], session.question
        return [session.view(one)], session.question
