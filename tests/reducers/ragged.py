"""Ragged batches and what every map must hold, for the tests of methods in front of the language model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from foveate.contract import Decision, ImageSize, View, Visible, Workload
from foveate.reducers import Reducer
from foveate.tokens import Layout, TokenMap


def mapped(decision: Decision) -> TokenMap:
    """The map of a decision about tokens."""
    assert not isinstance(decision, Visible)
    return decision.map


@dataclass
class Ragged:
    """A padded batch, and the same rows one by one. `grids` are those of all images, `spans` where each row begins and ends."""

    layout: Layout
    tokens: Tensor
    grids: list[tuple[int, int]]
    rows: list[Ragged]
    spans: list[tuple[int, int]]

    def view(self) -> View:
        return View.of(self.tokens, layout=self.layout)

    def images(self) -> list[tuple[int, list[int]]]:
        """(row, slots) of each image."""
        found = []
        for image in range(len(self.grids)):
            at = (self.layout.visual & (self.layout.image == image)).nonzero()
            found.append((int(at[0, 0]), at[:, 1].tolist()))
        return found


def make(rows: list[list[int | tuple[int, int]]], *, left: bool = False, width: int = 6, seed: int = 0, pad: int = 0) -> Ragged:
    """Rows of text (a number of slots) and images (their grid), padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    singles, slots = [], []
    for row in rows:
        kinds = [k for part in row for k in ([0] * part if isinstance(part, int) else [1] * (part[0] * part[1]))]
        grids = [part for part in row if not isinstance(part, int)]
        layout = Layout.sequence(torch.tensor([kinds]) == 1, [r * c for r, c in grids], grids=grids)
        states = torch.randn(1, len(kinds), width, generator=generator)
        singles.append(Ragged(layout, states, grids, [], [(0, len(kinds))]))
        slots.append(kinds)
    N = max(map(len, slots)) + pad
    spans = [((N - len(k), N) if left else (0, len(k))) for k in slots]
    kinds_BN = torch.full((len(rows), N), 2)
    tokens = torch.full((len(rows), N, width), 7.0)
    for b, (single, (start, end)) in enumerate(zip(singles, spans, strict=True)):
        kinds_BN[b, start:end] = torch.tensor(slots[b])
        tokens[b, start:end] = single.tokens[0]
    grids = [g for single in singles for g in single.grids]
    layout = Layout.sequence(kinds_BN == 1, [r * c for r, c in grids], valid_BN=kinds_BN != 2, grids=grids)
    return Ragged(layout, tokens, grids, singles, spans)


@st.composite
def batches(draw: st.DrawFn, least: int = 1) -> Ragged:
    """Several images in a row, of several sizes, rows of text alone, padding on either side."""
    side = st.integers(least, 4)
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row: list[int | tuple[int, int]] = [draw(st.integers(1, 2))]
        for _ in range(draw(st.integers(0, 2))):
            row += [(draw(side), draw(side)), draw(st.integers(1, 2))]
        rows.append(row)
    return make(rows, left=draw(st.booleans()), seed=draw(st.integers(0, 999)), pad=draw(st.integers(0, 1)))


keeps = st.one_of(st.integers(1, 20), st.floats(0.01, 1.0).map(lambda share: round(share, 3)))


def counted(reducer: Reducer, arriving: int, original: int, stage: int = 0) -> int:
    """Of one image of one crop, what leaves when `arriving` of its `original` tokens come to the site."""
    (left,) = reducer.count(Workload((ImageSize.whole(original),), (arriving,)), stage)
    return left


def crops(batch: Ragged, crop_BN: Tensor) -> Ragged:
    """The batch, its visual slots belonging to these crops."""
    place = batch.layout.place.clone()
    place[..., 1] = torch.where(batch.layout.visual, crop_BN, -1)
    return replace(batch, layout=replace(batch.layout, place=place))


def kept(token_map: TokenMap, row: int = 0) -> list[int]:
    """The representatives of a row's targets, in the order of the targets."""
    return [int(i) for i in token_map.representative[row] if i >= 0]


def edges(token_map: TokenMap, row: int, start: int = 0) -> list[tuple[int, list[tuple[int, float]]]]:
    """(representative, [(source, weight)]) of each valid target of a row, slots counted from `start`."""
    found = []
    for t in range(token_map.target.shape[1]):
        if token_map.target.valid[row, t]:
            there = [e for e in range(token_map.member.shape[2]) if token_map.member[row, t, e] >= 0]
            weights = [1.0 if token_map.weight is None else float(token_map.weight[row, t, e]) for e in there]
            members = sorted((int(token_map.member[row, t, e]) - start, w) for e, w in zip(there, weights, strict=True))
            found.append((int(token_map.representative[row, t]) - start, members))
    return found


def check_raster(batch: Ragged, token_map: TokenMap, expected: list[int]) -> None:
    """Every image has its number of tokens left, in raster order, and text is all there, copied to the bit."""
    layout, target = batch.layout, token_map.target
    assert [int((target.visual & (target.image == image)).sum()) for image in range(len(batch.grids))] == expected
    applied = token_map.apply(batch.tokens)
    for b in range(layout.shape[0]):
        stays = [r for r, _ in edges(token_map, b)]
        assert stays == sorted(set(stays))
        text = [i for i in range(layout.shape[1]) if layout.valid[b, i] and not layout.visual[b, i]]
        assert [i for i in stays if not layout.visual[b, i]] == text
        written = target.valid[b] & ~target.visual[b]
        assert torch.equal(applied[b, written], batch.tokens[b, text])


def check_rows(batch: Ragged, token_map: TokenMap, alone: list[TokenMap]) -> None:
    """The map of the batch is that of its rows one by one, and so is what it makes of the states: copies to the bit."""
    applied = token_map.apply(batch.tokens)
    for b, (single, row, (start, _)) in enumerate(zip(alone, batch.rows, batch.spans, strict=True)):
        assert edges(token_map, b, start) == edges(single, 0)
        # Sums over more members round otherwise, be it that the rest is padding.
        tolerance = 0.0 if token_map.member.shape[-1] == 1 else 1e-6
        own = single.apply(row.tokens)[0, single.target.valid[0]]
        torch.testing.assert_close(applied[b, token_map.target.valid[b]], own, rtol=tolerance, atol=tolerance)
