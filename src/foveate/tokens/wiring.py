"""Which tokens of its crops each slot of an image is made of, where in the picture they come from, and where the learned marks stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foveate.tokens.image import MARKS, Block, Box, Crop, ImagePlan, Mark, Pair, Tag
from foveate.tokens.layout import Kind

Ints = NDArray[Any]  # of int64
Floats = NDArray[Any]
Boxes = tuple[tuple[Pair, tuple[Box, ...]], ...]
"""Of grids (rows, columns) of patches, from which of them (first row and column, the ones after the last) each token is made."""


@dataclass(frozen=True, eq=False)
class Wiring:
    """The L slots of an image.

    source  (L, E) int64: the tokens that it is made of, counted over the image's crops; -1 in slots of marks
    weight  (L, E) float32 of each of them; they add up to 1
    mark    (L,) int64: 0 for visual tokens, else 1 more than the place of its name in MARKS
    place   (L, 4) int64: crop (`ImagePlan.labels`), frame (-1), row and column, -1 for marks and where there is no raster. Rows and
            columns of tiles count over the whole map that they are laid into.
    box     (L, 4) int64: (left, top, right, bottom) of what it shows, in pixels of the image, the smallest that hold it whole; empty
            where it shows nothing but filling, -1 for marks
    """

    source: Tensor
    weight: Tensor
    mark: Tensor
    place: Tensor
    box: Tensor

    @property
    def kind(self) -> Tensor:
        """(L,) int64, a `Kind`; all marks are newlines."""
        return torch.where(self.mark == 0, int(Kind.PATCH), int(Kind.NEWLINE))

    def apply(self, tokens: Tensor, marks: Tensor | None = None) -> Tensor:
        """(L, D) from the tokens of the crops, (all of them, D), and `marks` (len(MARKS), D); zeros stand for marks that are not given."""
        empty = tokens.new_zeros(1, tokens.shape[1])
        table = torch.cat([tokens, tokens.new_zeros(len(MARKS), tokens.shape[1]) if marks is None else marks.to(tokens), empty])
        device = tokens.device
        source = torch.where(self.mark[:, None] > 0, len(tokens) + self.mark[:, None] - 1, self.source).to(device)
        if source.shape[1] == 1:
            return table[source[:, 0]]
        return (table[source] * self.weight.to(device, tokens.dtype)[..., None]).sum(1)


def raster(boxes: Sequence[Box]) -> Pair | None:
    """(rows, columns) of boxes (first row and column, the ones after the last), None where they are not one raster, row after row."""
    rows, columns = (sorted({box[axis] for box in boxes}) for axis in (0, 1))
    corners = [(row, column) for row in rows for column in columns]
    return (len(rows), len(columns)) if [box[:2] for box in boxes] == corners else None


@lru_cache(maxsize=512)
def wire(plan: ImagePlan, boxes: Boxes = ()) -> Wiring:
    """The wiring of a plan that knows its image's size. `boxes`: of which patches the bridge makes each token, for each grid of its crops;
    the tokens of a crop whose grid is not among them share it out in equal cells."""
    assert plan.size is not None
    with torch.inference_mode(False):  # it will be remembered, for training too
        return _wired(plan, plan.size, boxes)


@lru_cache(maxsize=512)
def stacks(plan: ImagePlan) -> Tensor:
    """(S, L) int64: of each stack of a plan's mosaic the tokens, counted over the image's crops, that belong to the L visual tokens of its
    first crop. Stack (i, j) of a x b crops, i before j, is every a-th row and b-th column of their map from (i, j) on (DeepStack, arXiv
    2406.04334), so that a token gets in all stacks together what the crops show where it stands itself. (0, L) without a mosaic."""
    if plan.mosaic is None:
        return torch.zeros(0, plan.visual, dtype=torch.int64)
    starts = np.cumsum([0] + [crop.tokens for crop in plan.crops])
    cells, (rows, columns) = _map(plan, plan.mosaic, starts), (plan.mosaic.rows, plan.mosaic.columns)
    with torch.inference_mode(False):
        return torch.from_numpy(np.stack([cells[i::rows, j::columns].ravel() for i in range(rows) for j in range(columns)]))


def _wired(plan: ImagePlan, size: Pair, boxes: Boxes) -> Wiring:
    of, starts = dict(boxes), np.cumsum([0] + [crop.tokens for crop in plan.crops])
    rows: list[tuple[Ints, Floats, Ints, Ints]] = []
    for part in plan.parts or tuple(Block(i) for i in range(len(plan.crops))):
        if isinstance(part, Mark):
            rows.append(_marks(1, MARKS.index(part.name) + 1))
        elif not isinstance(part, Tag):
            rows.append(_block(plan, part, starts))
    most = max(source.shape[1] for source, *_ in rows)
    source = np.concatenate([np.pad(s, ((0, 0), (0, most - s.shape[1])), mode="edge") for s, *_ in rows])
    weight = np.concatenate([np.pad(w, ((0, 0), (0, most - w.shape[1]))) for _, w, *_ in rows])
    mark, place = (np.concatenate([row[i] for row in rows]) for i in (2, 3))
    shown = np.concatenate([token_boxes(crop, size, None if crop.grid is None else of.get(crop.grid)) for crop in plan.crops])
    box = _union(shown, source, weight)
    box[mark > 0] = -1
    source[mark > 0] = -1
    tensors = (torch.from_numpy(part) for part in (source, weight.astype(np.float32), mark, place, box))
    return Wiring(*tensors)


def token_boxes(crop: Crop, size: Pair, boxes: Sequence[Box] | None = None) -> Ints:
    """(tokens, 4) int64: (left, top, right, bottom) of each token of a crop, in pixels of an image of `size`, rounded outwards."""
    if crop.canvas is None:
        wide, high = size
        window = round(crop.box[0] * wide), round(crop.box[1] * high), round(crop.box[2] * wide), round(crop.box[3] * high)
        picture, at = size, (0, 0)
    else:
        window, picture, at = crop.window, crop.canvas.picture, crop.canvas.at
    if crop.every > 1:  # a token of every few pixels shows what lies between them as well
        window = (0, 0, *crop.canvas.size) if crop.canvas is not None else window
    if boxes is not None and crop.grid is not None:
        of, cells = np.array(boxes, np.int64)[: crop.tokens], crop.grid
    elif crop.cells is not None:
        cells = crop.cells
        down, across = np.divmod(np.arange(crop.tokens, dtype=np.int64), cells[1])
        of = np.stack([down, across, down + 1, across + 1], 1)
    else:
        cells, of = (1, 1), np.tile(np.array([[0, 0, 1, 1]], np.int64), (crop.tokens, 1))
    found = np.empty((crop.tokens, 4), np.int64)
    for axis, (start, end) in enumerate(((1, 3), (0, 2))):  # across, then down
        count, length = cells[1 - axis], size[axis]
        low, high = window[axis], window[axis + 2]
        divisor = count * picture[axis]
        from_, to = (((low - at[axis]) * count + of[:, edge] * (high - low)) * length for edge in (start, end))
        found[:, axis], found[:, axis + 2] = np.clip(from_ // divisor, 0, length), np.clip(-(-to // divisor), 0, length)
    return found


def _marks(count: int, number: int) -> tuple[Ints, Floats, Ints, Ints]:
    return np.zeros((count, 1), np.int64), np.ones((count, 1)), np.full(count, number), np.full((count, 4), -1)


def _block(plan: ImagePlan, block: Block, starts: Ints) -> tuple[Ints, Floats, Ints, Ints]:
    """Sources, weights, marks and places of one block."""
    crop, label = plan.crops[block.first], plan.labels
    if crop.cells is None:
        count = crop.tokens
        alone = np.full((count, 4), -1)
        alone[:, 0] = label[block.first]
        return starts[block.first] + np.arange(count)[:, None], np.ones((count, 1)), np.zeros(count, np.int64), alone
    (r, c), cells = crop.cells, _map(plan, block, starts)
    top, left, bottom, right = block.window or (0, 0, *cells.shape)
    kept = cells[top:bottom, left:right]
    rows, columns = block.shape or kept.shape
    down, across = _between(kept.shape[0], rows), _between(kept.shape[1], columns)
    pairs = [(row, column) for row in down for column in across]
    source: Ints = np.stack([kept[np.ix_(row[0], column[0])] for row, column in pairs], -1)
    weight: Floats = np.stack([row[1][:, None] * column[1] for row, column in pairs], -1)
    at = [
        start + (2 * np.arange(count) + 1) * length // (2 * count)
        for start, count, length in ((top, rows, kept.shape[0]), (left, columns, kept.shape[1]))
    ]
    row, column = (axis.ravel() for axis in np.meshgrid(*at, indexing="ij"))
    own = np.array(label)[block.first + row // r * block.columns + column // c]
    above, before = _tiles_before(crop)
    place: Ints = np.stack([own, np.full_like(row, -1), row + above * r, column + before * c], 1).reshape(rows, columns, 4)
    mark: Ints = np.zeros((rows, columns), np.int64)
    if block.newline:
        wide = ((0, 0), (0, 1))
        source, weight = np.pad(source, (*wide, (0, 0))), np.pad(weight, (*wide, (0, 0)), constant_values=1 / source.shape[-1])
        mark, place = np.pad(mark, wide, constant_values=1), np.pad(place, (*wide, (0, 0)), constant_values=-1)
    flat, each = mark.size, source.shape[-1]
    return source.reshape(flat, each), weight.reshape(flat, each), mark.ravel(), place.reshape(flat, 4)


def _map(plan: ImagePlan, block: Block, starts: Ints) -> Ints:
    """The tokens of a block's crops as they lie side by side: one map of cells, (block.rows * rows, block.columns * columns)."""
    cells = plan.crops[block.first].cells
    assert cells is not None
    (r, c), number = cells, block.rows * block.columns
    found: Ints = starts[block.first] + np.arange(number * r * c).reshape(block.rows, block.columns, r, c).transpose(0, 2, 1, 3)
    return found.reshape(block.rows * r, block.columns * c)


def _tiles_before(crop: Crop) -> Pair:
    """(rows, columns) of tiles that lie above and to the left of a crop on its canvas."""
    wide, high = crop.pixels
    return (0, 0) if crop.canvas is None or crop.every > 1 else (crop.window[1] // high, crop.window[0] // wide)


def _between(length: int, wanted: int) -> list[tuple[Ints, Floats]]:
    """Where each of `wanted` cells comes from in a row of `length`, bilinearly and with centres aligned: places and weights; one of each
    where nothing is scaled."""
    if length == wanted:
        return [(np.arange(length), np.ones(length))]
    at = np.maximum((np.arange(wanted) + 0.5) * length / wanted - 0.5, 0.0)
    low = np.floor(at).astype(np.int64)
    share = at - low
    return [(low, 1.0 - share), (np.minimum(low + 1, length - 1), share)]


def _union(shown: Ints, source: Ints, weight: Floats) -> Ints:
    """(L, 4): the box around those of all sources that count."""
    each = shown[source]
    counts = (weight > 0)[..., None]
    large = np.iinfo(np.int64).max
    low = np.where(counts, each[..., :2], large).min(1)
    high = np.where(counts, each[..., 2:], -1).max(1)
    return np.concatenate([low, high], 1)
