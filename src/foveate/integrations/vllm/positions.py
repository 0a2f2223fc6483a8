"""Where the tokens that are left stand, carried behind their embeddings.

vLLM asks a model for the positions of a request once, before any image is encoded, so it cannot be told there which tokens will be left.
They are told the place of their image's first token, and each row of embeddings brings along how far from it the row stands: two digits
for each of the three numbers of a place, so that they come through bfloat16 as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.integrations.vllm.items import FIELD

ROWS, DIGITS = 3, 2
COLUMNS = ROWS * DIGITS
_BASE = 256  # bfloat16 holds the integers below


def written(embeddings_MD: Tensor, offsets_3M: Tensor) -> Tensor:
    """(M, D + COLUMNS)."""
    digits = torch.stack([offsets_3M // _BASE, offsets_3M % _BASE], -1)
    return torch.cat([embeddings_MD, digits.permute(1, 0, 2).reshape(-1, COLUMNS).to(embeddings_MD)], 1)


def read(embeddings_MD: Tensor) -> tuple[Tensor, Tensor]:
    """(embeddings (M, D), offsets (3, M) int64) of what `written` has made."""
    digits = embeddings_MD[:, -COLUMNS:].round().to(torch.int64).view(-1, ROWS, DIGITS)
    return embeddings_MD[:, :-COLUMNS], (digits[..., 0] * _BASE + digits[..., 1]).T


def whole(tokens: Sequence[int], features: Sequence[Any]) -> tuple[list[int], list[Any], Tensor]:
    """A prompt as it would be with all tokens of its images.

    tokens    of the prompt, as short as it is
    features  vLLM's, of its images (and videos, which are whole)

    Returns its tokens, its features there, and (N,) int64: at which of its tokens each of the shorter prompt's is told to stand, an
    image's all at its first.
    """
    longer: list[int] = []
    moved: list[Any] = []
    at: list[int] = []
    done = 0
    for feature in sorted(features, key=lambda feature: feature.mm_position.offset):
        place = feature.mm_position
        at += range(len(longer), len(longer) + place.offset - done)
        longer += tokens[done : place.offset]
        end = place.offset + place.length
        run, start, carried = list(tokens[place.offset : end]), len(longer), feature.data.get(FIELD)
        if carried is None:
            at += range(start, start + place.length)
        else:
            tokens_of, left = carried.data[:2].tolist()
            more = tokens_of - left
            embed = torch.ones(place.length, dtype=torch.bool) if place.is_embed is None else place.is_embed
            first, last = (int(embed.nonzero()[i, 0]) for i in (0, -1))
            at += [start + (first if first <= i <= last else i + (more if i > last else 0)) for i in range(place.length)]
            run[last + 1 : last + 1] = [run[last]] * more
            inner = torch.cat([embed[: last + 1], torch.ones(more, dtype=torch.bool), embed[last + 1 :]])
            place = replace(place, length=len(run), is_embed=None if place.is_embed is None else inner)
        longer += run
        moved.append(replace(feature, mm_position=replace(place, offset=start)))
        done = end
    at += range(len(longer), len(longer) + len(tokens) - done)
    longer += tokens[done:]
    return longer, moved, torch.tensor(at, dtype=torch.int64)
