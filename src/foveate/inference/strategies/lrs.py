"""The descent of LRS-VQA through a pyramid: coarse tiles first, then the finer ones that the model looks at (Luo et al., ICCV 2025, arXiv
2503.07588; the number is from memory).

The levels are those of the `lrs` tiling: halved sizes, from three tiles along the longer side to the image's own. The model sees the
whole picture and the tiles of the coarsest level as images of one prompt; the `keep` of their tokens that the last token of the prompt
attends to most lie in tiles of the next level, which take the place of the coarse ones, and so on for `levels` levels or to the finest.
Tiles that nobody looks at are never encoded. The question is answered by the whole picture and the last tiles.

Where we differ: the scores are the model's own attention in decoder layer `layer` (two thirds of the way unless given), not those of a
module that was trained to foretell it; they are read on all tokens, also where a reducer is attached. A token's tile is found by the
place of its middle in the picture. Tiles are images of their own, without newlines; those at the edge are what is left, amid grey. The
last tiles are left whole: attach a reducer to cut their tokens. The released code descends once, the paper to the end, as here. With
fewer `nodes` than tiles, those with the highest token come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from foveate.errors import FoveateError
from foveate.inference.strategies.base import Strategy
from foveate.inference.strategies.boxes import Box, height, width
from foveate.inference.strategies.eyes import Map
from foveate.inference.strategies.session import Session
from foveate.tilings import LRS as Pyramid
from foveate.tokens import budget


@dataclass(frozen=True)
class LRS(Strategy):
    """Coarse to fine by attention; `levels`: how often it descends at most, 0: to the finest level."""

    name: ClassVar[str] = "lrs"
    paper: ClassVar[str] = "2503.07588"
    keep: float = 0.25
    levels: int = 0
    layer: int | None = None

    def check(self) -> None:
        self.least(0, "levels")
        if type(self.keep) not in (int, float) or not 0 < self.keep <= 1:
            raise FoveateError(f"lrs: keep={self.keep!r} is not possible; give a share of the tokens in (0, 1]")
        if self.layer is not None:
            self.least(0, "layer")

    def search(self, session: Session) -> str:
        last = session.eyes.layers - 2  # attention is read in front of the layer after it
        layer = min(2 * session.eyes.layers // 3, last) if self.layer is None else self.layer
        if not 0 <= layer <= last:
            raise FoveateError(f"lrs: layer={layer} is not possible; the attention of layers 0 to {last} of this model can be read")
        session.visit(session.whole, 0)
        levels = self.pyramid(*session.picture.size, session.side)
        tiles = levels[0] if len(levels[0]) > 1 else []
        for level, finer in enumerate([*levels[1:], []] if tiles else []):
            shown: list[Box] = []
            for tile in tiles:
                session.visit(tile, level + 1)
                shown.append(tile)
                session.chosen = sorted(shown, key=lambda box: (box[1], box[0]))
            if finer:
                tiles = self.looked_at(session, finer, layer)
        return "found" if tiles else "searched"

    def pyramid(self, wide: int, high: int, side: int) -> list[list[Box]]:
        """The tiles of each level that is gone through, coarse to fine."""
        grids = Pyramid().levels(wide, high, side)
        found = []
        for rows, columns in grids[: self.levels + 1] if self.levels else grids:
            step = max(wide / columns, high / rows)
            xs, ys = ([min(round(k * step), end) for k in range(n + 1)] for n, end in ((columns, wide), (rows, high)))
            cells = [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(rows) for c in range(columns)]
            found.append([box for box in cells if width(box) and height(box)])
        return found

    def looked_at(self, session: Session, finer: Sequence[Box], layer: int) -> list[Box]:
        """The tiles of the next level in which the best tokens lie, that of the best token first."""
        shown = session.chosen
        views = self.last(session)[0]
        maps = session.attended(views, session.question, layer)
        if len(maps) != len(views):
            raise FoveateError(
                f"lrs: of {len(views)} views this model makes {len(maps)} pictures of its own, so where it looks cannot be told; zoomeye "
                "does not ask for that"
            )
        maps = maps[1:]  # without the whole picture's
        tokens = [token for box, scores in zip(shown, maps, strict=True) for token in placed(box, scores)]
        for box, scores in zip(shown, maps, strict=True):
            session.seen[box].value = float(scores.max())
        tokens.sort(key=lambda token: -token[0])  # of equals those that come first stay first
        best = tokens[: budget(float(self.keep), len(tokens))]
        found = [tile for _, x, y in best for tile in finer if tile[0] <= x < tile[2] and tile[1] <= y < tile[3]]
        return list(dict.fromkeys(found))

    def last(self, session: Session) -> tuple[Sequence[Image.Image], str]:
        return [session.picture, *(session.view(box) for box in session.chosen)], session.question


def placed(box: Box, scores: Map) -> list[tuple[float, float, float]]:
    """(score, x, y) of each token of a view, with its middle in pixels of the picture; without those of the grey beside a part that is no
    square."""
    rows, columns = scores.shape
    side = max(width(box), height(box))
    left, top = box[0] - (side - width(box)) // 2, box[1] - (side - height(box)) // 2
    found = []
    for r in range(rows):
        for c in range(columns):
            x, y = left + (c + 0.5) * side / columns, top + (r + 0.5) * side / rows
            if box[0] <= x < box[2] and box[1] <= y < box[3]:
                found.append((float(scores[r, c]), x, y))
    return found
