"""Views of a layer's cache made of random numbers, and slow plain readings of what a policy says of one row and one head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.contract import AttentionRows, CacheView

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def view(
    lengths: Sequence[int], *, side: str = "left", images: range = range(3, 8), layer: int = 1, layers: int = 4, seed: int = 0
) -> CacheView:
    """Of prompts of these lengths, padded on one side; tokens number `images` of each are an image's. A row's numbers are the same
    whatever stands beside it."""
    B, N = len(lengths), max(lengths)
    query, key, value = (torch.zeros(B, heads, N, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    place = torch.full((B, 1, N), -1)
    for row, n in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + n)
        own = slice(N - n, N) if side == "left" else slice(0, n)
        place[row, 0, own] = torch.arange(n)
        for tensor, heads in ((query, HEADS), (key, KEY_HEADS), (value, KEY_HEADS)):
            tensor[row, :, own] = torch.randn(heads, n, WIDTH, generator=generator)
    valid = place[:, 0] >= 0
    slot = torch.arange(N)
    mask = (slot[:, None] >= slot)[None] & valid[:, None] | torch.eye(N, dtype=torch.bool)
    visual = torch.isin(place, torch.tensor(list(images)))
    rows = AttentionRows(query, key, WIDTH**-0.5, mask[:, None])
    return CacheView(layer, tuple(range(layers)), place, visual, valid.sum(1), key, value, rows, valid)


def of_attention(attention: Tensor, **others: object) -> CacheView:
    """Of a finished map (H, N, N) of one row."""
    N = attention.shape[-1]
    keys = torch.zeros(1, attention.shape[0], N, 1)
    place = torch.arange(N).view(1, 1, N)
    valid = torch.ones(1, N, dtype=torch.bool)
    return CacheView(
        0, (0,), place, torch.zeros(1, 1, N, dtype=torch.bool), torch.tensor([N]), keys, keys, AttentionRows.of(attention[None]), valid
    )


def attention(one: CacheView, row: int) -> Tensor:
    """(H, n, n) float64 causal attention among the tokens of a row, by the formula."""
    assert one.attention is not None
    own = one.place[row, 0] >= 0
    q, k = one.attention.query[row][:, own].double(), one.keys[row][:, own].double()
    n = q.shape[1]
    out = torch.zeros(HEADS, n, n, dtype=torch.float64)
    for head in range(HEADS):
        for i in range(n):
            logits = torch.stack([q[head, i] @ k[head // (HEADS // KEY_HEADS), j] / WIDTH**0.5 for j in range(i + 1)])
            out[head, i, : i + 1] = logits.softmax(0)
    return out


def kept(one: CacheView, stays: Tensor, row: int) -> list[list[int]]:
    """By head, the tokens of a row that stay, by their places."""
    places = one.place[row].expand(stays.shape[1], -1)
    return [sorted(places[head][stays[row, head]].tolist()) for head in range(stays.shape[1])]


def best(scores: list[float], number: int, *, ordered: bool = False) -> list[int]:
    """The places of the highest scores; of equal ones the first. In order of place, or of score."""
    found = sorted(range(len(scores)), key=lambda k: (-scores[k], k))[:number]
    return found if ordered else sorted(found)
