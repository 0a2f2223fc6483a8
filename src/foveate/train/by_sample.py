"""Attention of packed samples where no kernel takes them end to end: sample by sample, with no mask of pairs.

Flash attention's kernels are told where each sample begins. Other backends take a mask of pairs, T² of them for a row of T tokens, of which
most belong to two samples. Here the samples of the row are laid side by side, (samples, heads, longest, width), attended to causally, and
what is made of that is laid end to end again: linear maps, norms and the head see no padding, attention sees what it would without packing.
In the place of eager attention stand plain products too, which leave out most of what causality hides. To transformers and to the engine
this is a flash attention, as its name says: what they hand it are positions that begin anew with each sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.anatomy import Anatomy
from foveate.errors import FoveateError

BACKENDS = ("eager", "sdpa")
PREFIX = "foveate_flash_over_"  # before the name of the backend
BLOCK = 96  # queries that are taken together: none of them sees keys after the last


@contextmanager
def sample_by_sample(anatomy: Anatomy) -> Iterator[None]:
    """The decoder's attention goes sample by sample while it is given one packed row, until the `with` block is left."""
    config = anatomy.text_config
    backend = config._attn_implementation
    name = PREFIX + backend
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(attend, backend))
        AttentionMaskInterface.register(name, flash_attention_mask)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = backend


def attend(
    backend: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, heads, T, width) each, and the positions (1, T) -> (1, T, heads, width). FoveateError where samples cannot be told by these."""
    if attention_mask is not None or position_ids is None or position_ids.shape != (1, query.shape[2]) or key.shape[2] != query.shape[2]:
        raise FoveateError("attention goes sample by sample where one row of them comes with its positions, and no mask")
    if backend == "eager" and any(kwargs.get(name) is not None for name in ("softcap", "s_aux")):
        raise FoveateError("attention goes sample by sample where scores are not capped and there are no sinks")
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_tensor([query.shape[2]]))
    longest = int(lengths.max())
    places = (torch.arange(longest, device=lengths.device) < lengths[:, None]).flatten().nonzero()[:, 0]

    def laid(states: Tensor) -> Tensor:
        flat = states[0].transpose(0, 1)
        rows = flat.new_zeros(len(lengths) * longest, *flat.shape[1:]).index_copy(0, places, flat)
        return rows.unflatten(0, (len(lengths), longest)).transpose(1, 2)

    states = laid(query), laid(key), laid(value)
    if backend == "eager":
        made = causal(*states, query.shape[-1] ** -0.5 if scaling is None else scaling, dropout)
    else:  # padding comes after all that is real, and no real token sees what comes after it: no mask is wanted
        made, *_ = ALL_ATTENTION_FUNCTIONS[backend](module, *states, None, scaling=scaling, dropout=dropout, **kwargs)
    return made.flatten(0, 1).index_select(0, places)[None], None


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """(B, heads, N, width), and keys and values of as many heads or of a part -> (B, N, heads, width)."""
    groups, N = query.shape[1] // key.shape[1], query.shape[2]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    query, key = query * scaling, key.transpose(2, 3)
    hidden = torch.full((N, N), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device).triu(1)
    blocks = []
    for start in range(0, N, BLOCK):
        end = min(start + BLOCK, N)
        weights = (query[:, :, start:end] @ key[..., :end] + hidden[start:end, :end]).softmax(-1)
        blocks.append((F.dropout(weights, dropout) @ value[:, :, :end]).transpose(1, 2))
    return torch.cat(blocks, 1)
