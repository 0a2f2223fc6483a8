"""Reducers on plain tensors: which tokens stay, and what becomes of them, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.contract import Signal, View, Visible, content_keys
from foveate.errors import FoveateError
from foveate.reducers import Reducer, parse
from foveate.tokens import Kind, Layout, TokenMap

Grid = tuple[int, int]


@dataclass(frozen=True)
class Kept:
    """What a reducer leaves of L tokens a row. Legend: M the most that any row has left; rows with fewer end in empty places.

    indices    (B, M) int64: which token each survivor is, or whose place it takes where it was merged; -1 in empty places
    mask       (B, L) bool: the tokens that `indices` names
    states     (B, M, D) the survivors' states, those of merged tokens mixed, 0 in empty places; None where no tokens were given
    positions  (B, M) int64: the place in the sequence as the method's `positions` has it: the old one, or counted anew without gaps
    map        the same as a map of all slots, text too: which tokens went into which, and with what weights
    """

    indices: Tensor
    mask: Tensor
    states: Tensor | None
    positions: Tensor
    map: TokenMap


def reduce(
    reducer: Reducer | str,
    tokens: Tensor | None = None,
    *,
    grid: Grid | Sequence[Grid] | None = None,
    special: int = 0,
    text: Tensor | int = 0,
    signals: dict[Signal, Any] | None = None,
    layout: Layout | None = None,
    layers: int | None = None,
    step: int = 0,
    keys: Tensor | None = None,
) -> Kept:
    """The decision of one reducer about one image a row, at one of its sites.

    reducer   a method or its spelling, such as "divprune:keep=0.25"
    tokens    (B, L, D) states; without them a method may look at signals alone
    grid      (rows, columns) of the patches; several: of the crops (tiles) that follow each other
    special   how many of the L tokens, in front, are no patches: [CLS], then registers. They stay, and count in no budget
    text      (B, T, D) states of the question, which follows the image; or T, where no states of it are looked at
    signals   scores that the method asks for: (B, L) tensors, or `AttentionRows` over all L + T slots
    layout    in place of grid, special and text: what every one of the L tokens is, in any number of images, crops and samples
    layers    decoder layers of the model, for methods that count in them
    step      which of the method's sites, counted from 0
    keys      (images,) `foveate.contract.content_keys`, which random choices follow; None: those of the tokens

    Raises FoveateError where the sizes do not agree or the method lacks what it looks at.
    """
    if isinstance(reducer, str):
        named = parse(reducer)
        if len(named) != 1:
            raise FoveateError(f"{reducer!r} names {len(named)} reducers; reduce does one step of one: call it for each")
        reducer = named[0]
    signals = dict(signals or {})
    B, L = _shape(tokens, signals, grid, special, layout)
    T = 0 if layout is not None else text.shape[1] if isinstance(text, Tensor) else text
    if layout is None:
        layout = _layout(B, L, T, grid, special, device=_device(tokens, signals))
    for signal, value in signals.items():
        if isinstance(value, Tensor) and value.shape[:2] not in ((B, L), (B, L + T)):
            raise FoveateError(f"{signal} is of shape {tuple(value.shape)}; there are {B} rows of {L} tokens")
    states = tokens
    if tokens is not None and T:
        states = torch.cat([tokens, text if isinstance(text, Tensor) else tokens.new_zeros((B, T, tokens.shape[2]))], 1)
    if keys is None and tokens is not None:
        keys = content_keys([tokens[layout.image[:, :L] == i] for i in range(int(layout.image.max()) + 1)])
    blank = torch.zeros((B, L + T, 0), device=layout.kind.device) if states is None else states
    view = View.of(blank, layout=layout, image_keys=keys, signals=signals, layers=layers)
    if tokens is None or (T and not isinstance(text, Tensor)):
        view = replace(view, tokens=None)  # not zeros, which a method would take for states
    decision = reducer.reduce(view, step)
    if isinstance(decision, Visible) or reducer.between:
        raise FoveateError(
            f"{reducer.name} says which token sees which, or where tokens stand, which only a model can do: attach it to one"
        )
    token_map = decision.map
    positions = token_map.target.position
    if reducer.positions_at(step) == "renumber":
        at = token_map.representative.clamp(min=0)
        positions = positions - token_map.source.valid.cumsum(1).gather(1, at) + token_map.target.valid.cumsum(1)
    return _kept(token_map, positions, None if states is None else token_map.apply(states), L)


def _kept(token_map: TokenMap, positions: Tensor, states: Tensor | None, L: int) -> Kept:
    """Without the text, and with empty places at the end."""
    own = (token_map.representative >= 0) & (token_map.representative < L)
    order = torch.argsort((~own).to(torch.int8), dim=1, stable=True)[:, : int(own.sum(1).max())]
    there = own.gather(1, order)
    indices = torch.where(there, token_map.representative.gather(1, order), -1)
    mask = torch.zeros((own.shape[0], L + 1), dtype=torch.bool, device=own.device)
    mask = mask.scatter(1, torch.where(there, indices, L), True)[:, :L]
    if states is not None:
        states = states.gather(1, order[..., None].expand(-1, -1, states.shape[2])).masked_fill(~there[..., None], 0.0)
    return Kept(indices, mask, states, torch.where(there, positions.gather(1, order), 0), token_map)


def _layout(B: int, L: int, T: int, grid: Grid | Sequence[Grid] | None, special: int, device: Any) -> Layout:
    visual = torch.zeros((B, L + T), dtype=torch.bool, device=device)
    visual[:, special:L] = True
    layout = Layout.sequence(visual)
    kind, place = layout.kind.clone(), layout.place.clone()
    kind[:, :special] = int(Kind.REGISTER)
    kind[:, : min(special, 1)] = int(Kind.CLS)
    at = special
    for crop, (rows, columns) in enumerate(_grids(grid)):
        number = torch.arange(rows * columns, device=device)
        cells = torch.stack([torch.full_like(number, crop), torch.full_like(number, -1), number // columns, number % columns], -1)
        place[:, at : at + len(number), 1:] = cells
        at += len(number)
    return replace(layout, kind=kind, place=place)


def _grids(grid: Grid | Sequence[Grid] | None) -> list[Grid]:
    if grid is None:
        return []
    several: Any = [grid] if isinstance(grid[0], int) else grid
    return list(several)


def _shape(
    tokens: Tensor | None, signals: dict[Signal, Any], grid: Grid | Sequence[Grid] | None, special: int, layout: Layout | None
) -> tuple[int, int]:
    """(B, L)."""
    if tokens is not None and tokens.ndim != 3:
        raise FoveateError(f"tokens are of shape {tuple(tokens.shape)}; give (images, tokens, width)")
    given = [tokens] if tokens is not None else [value for value in signals.values() if isinstance(value, Tensor)]
    patches = sum(rows * columns for rows, columns in _grids(grid))
    if layout is not None:
        B, L = layout.shape
    elif given:
        B, L = given[0].shape[:2]
    else:
        raise FoveateError("how many tokens there are is not known: give tokens, a signal of shape (images, tokens), or a layout")
    if tokens is not None and tokens.shape[:2] != (B, L):
        raise FoveateError(f"tokens are of shape {tuple(tokens.shape)}, their layout of {(B, L)}")
    if grid is not None and patches + special != L:
        raise FoveateError(f"a grid of {grid} has {patches} patches; with {special} special tokens there are {L} tokens")
    if not 0 <= special < L:
        raise FoveateError(f"special={special} of {L} tokens leaves no patch to reduce")
    return B, L


def _device(tokens: Tensor | None, signals: dict[Signal, Any]) -> Any:
    return next(value.device for value in (tokens, *signals.values()) if isinstance(value, Tensor))
