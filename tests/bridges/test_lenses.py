"""Lenses against their equations: plain loops in float64 over tiles, pieces, patches and heads, from the weights alone."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bridges.bridge_oracle import Array, Weights, linear, weights_of

from foveate.bridges import LENSES, build_lens
from foveate.bridges.dual_perspective import from_blocks, from_strides, to_blocks, to_strides
from foveate.errors import FoveateError


def woken(config: dict[str, Any], levels: int, width: int) -> Any:
    """A lens of which no weight is what it begins as, so that each of them counts."""
    lens = build_lens(config, levels=levels, width=width).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.2)
    return lens


def norm(x: Array, w: Weights, name: str, eps: float = 1e-5) -> Array:
    centred = x - x.mean()
    found: Array = centred / math.sqrt((centred**2).mean() + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]
    return found


def attend(query: Array, keys: list[Array], values: list[Array], w: Weights, heads: int) -> Array:
    """One query's row of attention: softmax(q k / sqrt(width of a head)) v of each head, side by side, through the last map."""
    q = linear(query, w, "attention.to_q")
    k, v = [w["attention.to_k.weight"] @ x for x in keys], [linear(x, w, "attention.to_v") for x in values]
    size, found = len(query) // heads, np.zeros(len(query))
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        shares = [math.exp(q[part] @ one[part] / math.sqrt(size)) for one in k]
        found[part] = sum(share * one[part] for share, one in zip(shares, v, strict=True)) / sum(shares)
    return linear(found, w, "attention.proj")


# ---- SliME: queries of a tile ----------------------------------------------------------------------------------------------------------


def places(side: int, width: int) -> Array:
    """(side, side, width): the column's sines and cosines, then the row's, at frequencies from 1 down."""
    found, quarter = np.zeros((side, side, width)), width // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                slow = 10000 ** (i / quarter)
                for half, at in enumerate((column, row)):
                    found[row, column, 2 * half * quarter + i] = math.sin(at / slow)
                    found[row, column, (2 * half + 1) * quarter + i] = math.cos(at / slow)
    return found


def resized(x: Array, length: int) -> Array:
    """Bicubically along the first axis (a = -3/4, centres aligned, the ends repeated)."""
    found = np.zeros((length, *x.shape[1:]))
    for i in range(length):
        at = (i + 0.5) * len(x) / length - 0.5
        for near in range(math.floor(at) - 1, math.floor(at) + 3):
            d, a = abs(at - near), -0.75
            share = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            found[i] += share * x[min(max(near, 0), len(x) - 1)]
    return found


@pytest.mark.parametrize(
    ("side", "grid", "width", "heads"), [(2, (2, 2), 24, 3), (2, (3, 4), 24, 3), (3, (2, 5), 160, 5), (1, (2, 2), 8, 1)]
)
def test_queries_of_a_tile_by_the_equations(side: int, grid: tuple[int, int], width: int, heads: int) -> None:
    """Of two tiles and two levels; also where there are more queries than patches."""
    lens = woken({"kind": "tile_queries", "side": side}, 2, width)
    x = [torch.randn(2, grid[0] * grid[1], width, dtype=torch.float64, generator=torch.Generator().manual_seed(level)) for level in (1, 2)]
    place = places(side, width)
    beside = resized(resized(place, grid[0]).swapaxes(0, 1), grid[1]).swapaxes(0, 1).reshape(-1, width)
    found = lens(x, grid)
    for level, (made, given_) in enumerate(zip(found, x, strict=True)):
        w = weights_of(lens, f"readers.{level}.")
        assert made.shape == (2, side * side, width)
        for tile in range(2):
            patches = [norm(patch, w, "norm_patch", 1e-6) for patch in given_[tile].numpy()]
            keys = [patch + at for patch, at in zip(patches, beside, strict=True)]
            for n in range(side * side):
                query = norm(w["query"][n], w, "norm_query", 1e-6) + place[n // side, n % side]
                expected = norm(attend(query, keys, patches, w, heads), w, "norm", 1e-6)
                torch.testing.assert_close(made[tile, n], torch.from_numpy(expected), atol=2e-6, rtol=2e-6)


def test_the_published_queries() -> None:
    """144 of them, eight heads of 128 values; queries and their norms, the patches' and the last one's, four maps."""
    with torch.device("meta"):
        lens: Any = build_lens({"kind": "tile_queries", "side": 12}, levels=1, width=1024)
        (made,) = lens([torch.empty(6, 576, 1024)], (24, 24))
    assert made.shape == (6, 144, 1024)
    assert lens.readers[0].attention.heads == 8
    assert sum(p.numel() for p in lens.parameters()) == 144 * 1024 + 3 * 2048 + 4 * 1024**2 + 3 * 1024
    with pytest.raises(FoveateError, match="a multiple of 4, not 10"):
        build_lens({"kind": "tile_queries", "side": 2}, levels=1, width=10)
    with pytest.raises(FoveateError, match="side must be a whole number of at least 1"):
        build_lens({"kind": "tile_queries", "side": 0}, levels=1, width=8)


# ---- INF-LLaVA: two perspectives -------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 4), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_pieces_put_together_and_cut_again(n: int, rows: int, columns: int) -> None:
    """Blocks and strides of a map, place by place; and the two pairs of functions undo each other."""
    whole = torch.arange(2 * n * rows * n * columns, dtype=torch.float64).view(2, n * rows, n * columns, 1)
    blocks, strides = to_blocks(whole, n), to_strides(whole, n)
    for image in range(2):
        for i in range(n):
            for j in range(n):
                for r in range(rows):
                    for c in range(columns):
                        at = (image, i * n + j, r * columns + c, 0)
                        assert blocks[at] == whole[image, i * rows + r, j * columns + c, 0]
                        assert strides[at] == whole[image, r * n + i, c * n + j, 0]
    assert torch.equal(from_blocks(blocks, (rows, columns)), whole)
    assert torch.equal(from_strides(strides, (rows, columns)), whole)


def test_the_papers_four_by_four() -> None:
    """n = 2: the first block is rows and columns 0 and 1, the first stride rows and columns 0 and 2."""
    whole = torch.arange(16).view(1, 4, 4, 1)
    assert to_blocks(whole, 2)[0, 0, :, 0].tolist() == [0, 1, 4, 5]
    assert to_strides(whole, 2)[0, 0, :, 0].tolist() == [0, 2, 8, 10]


def enhanced(own: dict[tuple[int, int], Array], other: dict[tuple[int, int], Array], same: Any, w: Weights, heads: int) -> Any:
    """Each place of a map, having read those of the other map that are of the same piece."""
    found = {}
    for at, x in own.items():
        piece = [other[place] for place in sorted(other) if same(place) == same(at)]
        found[at] = norm(attend(x, piece, piece, w, heads) + x, w, "norm")
    return found


@pytest.mark.parametrize(("n", "grid", "width", "heads"), [(2, (2, 3), 12, 4), (3, (1, 2), 8, 8), (1, (2, 2), 16, 8)])
def test_two_perspectives_by_the_equations(n: int, grid: tuple[int, int], width: int, heads: int) -> None:
    """Two images and two levels. The paper's cuts: the global map reads in strides, the local one in blocks."""
    lens = woken({"kind": "dual_perspective"}, 2, width)
    (rows, columns), views = grid, 1 + 2 * n * n
    x = [torch.randn(2, views, rows * columns, width, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    found = lens(x, grid)
    for level, (made, given_) in enumerate(zip(found, x, strict=True)):
        w = weights_of(lens, f"enhancers.{level}.")
        assert made.shape == (2, rows * columns, width)
        for image in range(2):
            seen, local, whole = given_[image].numpy(), {}, {}
            for piece in range(n * n):
                i, j = divmod(piece, n)
                for patch in range(rows * columns):
                    r, c = divmod(patch, columns)
                    local[i * rows + r, j * columns + c] = seen[1 + piece, patch]
                    whole[r * n + i, c * n + j] = seen[1 + n * n + piece, patch]
            new_whole = enhanced(whole, local, lambda at: (at[0] % n, at[1] % n), w, heads)
            new_local = enhanced(local, whole, lambda at: (at[0] // rows, at[1] // columns), w, heads)
            for patch in range(rows * columns):
                r, c = divmod(patch, columns)
                total = np.zeros(width)
                for at in [(r * n + i, c * n + j) for i in range(n) for j in range(n)]:
                    halves = [linear(new_local[at], w, "down_local"), linear(new_whole[at], w, "down_global")]
                    total += norm(np.concatenate(halves) + new_local[at] + new_whole[at], w, "norm_fused")
                expected = seen[0, patch] + total / n**2
                torch.testing.assert_close(made[image, patch], torch.from_numpy(expected), atol=1e-9, rtol=1e-9)


def test_the_published_perspectives() -> None:
    """19 views become the patches of one; eight heads."""
    with torch.device("meta"):
        lens: Any = build_lens({"kind": "dual_perspective"}, levels=1, width=1024)
        (made,) = lens([torch.empty(2, 19, 576, 1024)], (24, 24))
    assert made.shape == (2, 576, 1024)
    assert lens.enhancers[0].attention.heads == 8
    assert sum(p.numel() for p in lens.parameters()) == 4 * 1024**2 + 3 * 1024 + 2 * (1024 * 512 + 512) + 2 * 2048


# ---- both ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LENSES)
def test_an_image_and_a_level_stand_for_themselves(kind: str) -> None:
    """No other image of the call, and no other level, has a say in what becomes of one; and every weight of a lens has."""
    lens = woken({"kind": kind, **({"side": 2} if kind == "tile_queries" else {})}, 2, 16)
    x = [torch.randn(3, *((9,) if kind == "dual_perspective" else ()), 6, 16, dtype=torch.float64) for _ in range(2)]
    together = lens(x, (2, 3))
    alone = [torch.cat([lens([y[i : i + 1] for y in x], (2, 3))[level] for i in range(3)]) for level in range(2)]
    other = lens([x[0], x[1] + 1.0], (2, 3))
    for level in range(2):
        torch.testing.assert_close(together[level], alone[level], atol=1e-12, rtol=0)
        assert torch.equal(other[level], together[level]) == (level == 0)
    sum((y**3).sum() for y in together).backward()
    assert all(parameter.grad is not None and bool(parameter.grad.abs().max() > 1e-9) for parameter in lens.parameters())
