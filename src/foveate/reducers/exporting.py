"""Reducing in engines other than transformers, such as servers: which methods they can run, how many tokens these leave, and the reduction.

An engine that serves makes room for an image before it encodes it, runs its language model on one sequence that no layer may shorten, and
gives one encoded image to many requests. So it can run a method that

- acts once, between the tower and the first decoder layer,
- leaves as many tokens as follow from sizes alone, to the token,
- looks neither at the question nor at the other images of a prompt,
- has no weights of its own, and gives each token one position, an integer.

All of it is read off what a method says of itself: its sites, what it looks at, the scope that it counts in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.contract import ImageSize, Signal, Workload, content_keys
from foveate.errors import FoveateError
from foveate.reducers import METHODS
from foveate.reducers.base import Reducer
from foveate.reducers.learned import Learned
from foveate.reducers.plain import reduce
from foveate.tokens import Layout

_DEEP = 1024  # decoder layers: more than any model has, so that no site of a method falls away
_IMAGE = ImageSize((576,), (576,), ((24, 24),))
_INSTEAD = {"attention": "tower", "keys": "states"}  # what a server has in the place of what only the language model's layers know


def unexportable(reducer: Reducer) -> str:
    """Why no other engine can run a reducer, in a few words; "" where one can."""
    sites = reducer.sites(_DEEP)
    for site in sites:
        if site.effect.place == "image":
            return "acts on the image, before the processor"
        if site.effect.place == "tower":
            return "acts in the tower"
        if site.layer or not site.effect.lasts:
            return "acts in the LM"
    if reducer.between:
        return "places tokens between integers, in several places, or by other frequencies"
    if len(sites) != 1:
        return "acts more than once"
    if isinstance(reducer, Learned):
        return "decides by weights of its own"
    if "text" in reducer.looks_at:
        return "looks at the question"
    if reducer.count(Workload((_IMAGE,), (_IMAGE.tokens,))) == [0]:
        return "leaves no token of an image"
    return "counts over all images of a prompt" if getattr(reducer, "scope", "image") == "sample" else ""


def nearest_exportable(reducer: Reducer) -> Reducer:
    """The reducer that comes nearest to one that is not exportable: the same method with one option changed, else, of those that
    rank by the same, or by what stands for it outside of the language model, the newest that asks for least. With the same `keep`, where it
    has one."""
    options = {option.name for option in dataclasses.fields(reducer)}
    for option, value in (("layer", 0), ("site", "lm"), ("scope", "image"), ("s", 1.0)):
        same = _changed(reducer, **{option: value}) if option in options else None
        if same is not None and not unexportable(same):
            return same
    looks = {_INSTEAD.get(what, what) for what in reducer.looks_at} & {"tower", "states"}
    looks = {"tower"} if "tower" in looks else looks
    alike = [m for m in METHODS.values() if m.looks_at == looks and m.amounts == ("keep",) and not m.experimental and not m.video]
    able = [m() for m in reversed(alike) if not unexportable(m())]
    found = min(able, key=lambda reducer: len(reducer.sites(_DEEP)[0].needs))  # the first of equals
    return _changed(found, keep=getattr(reducer, "keep", None)) or found


def _changed(reducer: Reducer, **options: Any) -> Reducer | None:
    """The same with other options, None where the method has no such setting."""
    try:
        return dataclasses.replace(reducer, **options)
    except FoveateError:
        return None


def exported(reducers: Sequence[Reducer], engine: str = "another engine") -> Reducer:
    """The one reducer that an engine is to run. FoveateError with the reason and the nearest one that it can where there are several, or
    it is not exportable."""
    if len(reducers) != 1:
        named = "+".join(map(str, reducers)) or "none"
        able = [reducer for reducer in reducers if not unexportable(reducer)]
        hint = f"; give {str(able[0])!r} alone" if able else "; name one, such as divprune:keep=0.25"
        raise FoveateError(f"{engine} runs one reducer, and {named!r} names {len(reducers)}{hint}")
    (reducer,) = reducers
    reason = unexportable(reducer)
    if reason:
        raise FoveateError(
            f"{engine} cannot run {str(reducer)!r}: it {reason}; the nearest that it can run is {nearest_exportable(reducer)}"
        )
    return reducer


def count_embeddings(reducer: Reducer, layout: Layout) -> int:
    """How many of an image's tokens (see `Layout.item`) a reducer leaves, newlines and [CLS] among them, which stay beside its budget.

    FoveateError where it is not exportable, and where the number follows from more than the layout.
    """
    exported([reducer])
    visual = layout.visual[0]
    size = ImageSize.of(layout.place[0, visual, 1:])
    if not size.tokens:
        return layout.shape[1]
    work = Workload((size,), (size.tokens,))
    if not reducer.exact(work):
        parts = (
            f"{len(size.crops)} crops" if len(size.crops) > 1 else "unknown rows and columns" if not size.grids else "rows of unlike length"
        )
        raise FoveateError(
            f"{str(reducer)!r}: how many of the {size.tokens} tokens of an image of {parts} stay does not follow from sizes alone; "
            + ('choose unspent="give"' if hasattr(reducer, "unspent") else "choose another method")
        )
    return sum(reducer.count(work)) + layout.shape[1] - size.tokens


def in_grid(layout: Layout) -> Tensor:
    """(3, L) int64, of a layout (1, L): how far each token stands from its image's first one: in time, down and to the right."""
    return layout.place[0, :, 2:].T.clamp(min=0)


class Reduced(NamedTuple):
    """What a reducer leaves of one image. Legend: L its tokens, M those that are left.

    embeddings  (M, D) the survivors; of merged tokens what they were mixed to
    kept        (M,) int64: which token each is, or whose place it takes
    positions   (M,) or (P, M): theirs, out of those of all tokens
    """

    embeddings: Tensor
    kept: Tensor
    positions: Tensor


def reduce_embeddings(
    reducer: Reducer,
    embeddings: Tensor,
    layout: Layout,
    signals: Mapping[Signal, Tensor] | None = None,
    *,
    key: Tensor | None = None,
    positions: Tensor | None = None,
    width: int | None = None,
) -> Reduced:
    """What `attach` does to one image between tower and language model, on plain tensors: what every other engine calls.

    embeddings  (L, D) of one image, as the bridge has made them
    layout      what they are, of shape (1, L): `Layout.item`
    signals     what the tower says of each token, (L,) or (L, h), where the reducer asks for it
    key         () int64, `foveate.contract.content_keys` of its pixels, which random choices follow; None: that of its embeddings
    positions   int64, (L,), or (P, L) places in a grid (m-RoPE), whose gaps are never closed; None: 0 to L - 1
    width       how many columns of the embeddings are their states; those behind (DeepStack) are cut with them; None: all

    Raises FoveateError where the reducer is not exportable, lacks a signal, or leaves another number than `count_embeddings` says.
    """
    left = count_embeddings(reducer, layout)
    states = embeddings if width is None else embeddings[:, :width]
    keys = content_keys([states]) if key is None else key[None]
    kept = reduce(reducer, states[None], layout=layout, signals={of: value[None] for of, value in (signals or {}).items()}, keys=keys)
    here = kept.indices[0]
    if len(here) != left:
        raise FoveateError(f"{str(reducer)!r} left {len(here)} of {layout.shape[1]} tokens where {left} were counted; this is a fault")
    assert kept.states is not None
    states = kept.states[0] if width is None else kept.map.apply(embeddings[None])[0]
    rows = torch.arange(layout.shape[1], device=here.device) if positions is None else positions
    if rows.ndim == 2:
        return Reduced(states, here, torch.stack([kept.map.positions(row[None], mean=kept.map.mean)[0] for row in rows]))
    moved = kept.map.positions(rows[None], mean=kept.map.mean)[0]
    if reducer.positions_at(0) == "renumber":
        moved = moved - here + torch.arange(left, device=here.device)
    return Reduced(states, here, moved)
