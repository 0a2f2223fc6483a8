"""What several methods share: options that are read alike, what a view is asked for, and the map that sends slots into slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from math import floor, isfinite

import torch
from torch import Tensor

from foveate.contract import AttentionRows, BeforeLM, FromLayer, Question, Signal, Site, View
from foveate.errors import FoveateError
from foveate.reducers.base import Reducer
from foveate.reducers.spelling import Spelled
from foveate.tokens import Layout, TokenMap, budget

OF = ("original", "arriving")
_TOO_MUCH = 1 << 63  # for a tensor of integers

# ---- options


def choose(reducer: Spelled, **possible: Sequence[object]) -> None:
    """Raises FoveateError where an option is none of its possible values."""
    for option, values in possible.items():
        given = getattr(reducer, option)
        if not any(given == value and type(given) is type(value) for value in values):
            words = [str(v).lower() if isinstance(v, bool) else f'"{v}"' for v in values]
            raise FoveateError(f"{reducer.name}: {option}={given!r} is not possible; choose {', '.join(words[:-1])} or {words[-1]}")


def integers(reducer: Spelled, why: str = "", /, **least: int | None) -> None:
    """Raises FoveateError where an option is no integer of 64 bits or less than its least; None: a block of the tower, which may be
    negative."""
    for option, low in least.items():
        given = getattr(reducer, option)
        if type(given) is not int or (low is not None and given < low) or abs(given) >= _TOO_MUCH:
            wanted = "an integer, such as -2 for the last block but one" if low is None else f"an integer >= {low}"
            raise FoveateError(f"{reducer.name}: {option}={given!r} is not possible{why}; give {wanted}")


def shares(reducer: Spelled, *options: str) -> None:
    """Raises FoveateError where an option is no float from 0 to 1."""
    _within(reducer, 0.0, "share", options)


def cosines(reducer: Spelled, *options: str) -> None:
    """Raises FoveateError where an option is no float from -1 to 1."""
    _within(reducer, -1.0, "cosine", options)


def _within(reducer: Spelled, low: float, what: str, options: Sequence[str]) -> None:
    for option in options:
        given = getattr(reducer, option)
        if type(given) is not float or not low <= given <= 1.0:
            raise FoveateError(f"{reducer.name}: {option}={given!r} is not possible; give a {what} from {low} to 1.0, as in {option}=0.5")


def above_zero(reducer: Spelled, *options: str) -> None:
    """Raises FoveateError where an option is no finite float above 0."""
    for option in options:
        given = getattr(reducer, option)
        if type(given) is not float or not 0.0 < given < float("inf"):
            raise FoveateError(f"{reducer.name}: {option}={given!r} is not possible; give a number > 0, such as {option}=0.5")


def cutting_layers(name: str, value: object) -> list[int]:
    """The entries of an option `layers`, those in front of which a method cuts. Raises FoveateError unless they ascend from 1 on."""
    layers = [int(k) if type(k) is int else 0 for k in numbers(name, "layers", value)]
    if layers[0] < 1 or any(a >= b for a, b in pairwise(layers)):
        raise FoveateError(f"{name}: layers={value!r} is not possible; give ascending integers >= 1, as in layers=3-7-16")
    return layers


def check_entries(name: str, keep: object, entries: Sequence[int | float], layers: Sequence[int]) -> None:
    """Raises FoveateError unless `entries`, those of the option `keep`, are budgets: one, or one for each layer."""
    for entry in entries:
        budget(entry, 1)
    if len(entries) not in (1, len(layers)):
        raise FoveateError(
            f"{name}: keep={keep!r} has {len(entries)} entries, layers={spelled(layers)} has {len(layers)}; give one entry for each layer"
        )


def numbers(name: str, option: str, value: object) -> list[int | float]:
    """One number, several, or "1-2-3": the entries. Raises FoveateError for anything else."""
    parts = value.split("-") if isinstance(value, str) else list(value) if isinstance(value, (tuple, list)) else [value]
    found: list[int | float] = []
    for part in parts:
        try:
            entry = part if not isinstance(part, str) else float(part) if "." in part else int(part)
        except ValueError:
            entry = None
        if isinstance(entry, bool) or not isinstance(entry, (int, float)):
            raise FoveateError(
                f"{name}: {option}={value!r} is not possible; give a number, or several as in {option}=0.5-0.25 or 300-200-110"
            )
        found.append(entry)
    if not found:
        raise FoveateError(f"{name}: {option}={value!r} is empty; give a number, or several as in {option}=0.5-0.25")
    return found


def spelled(entries: Sequence[int | float]) -> int | float | str:
    """What `numbers` reads back, without commas: a number, or numbers joined by "-"."""
    return entries[0] if len(entries) == 1 else "-".join(format(Decimal(str(e)), "f") for e in entries)


def nearest_stride(name: str, keep: float, power: int) -> int:
    """The stride that leaves one of `stride ** power` tokens, nearest to one of 1 / `keep`. FoveateError where that would leave all."""
    stride = round(keep ** (-1 / power))
    if stride == 1 and keep < 1:
        raise FoveateError(f"{name} keeps at most 1/{2**power} of the tokens where it does anything, so it cannot be set to keep={keep:g}")
    return stride


def meant(share: float) -> Fraction:
    """The fraction that was meant: int(576 * (1 / 3)) must not depend on the float beside 1/3."""
    return Fraction(str(share)).limit_denominator(1_000_000)


def dealt(total: int, weights: Sequence[float], most: Sequence[int], least: int = 0) -> list[int]:
    """`total` tokens shared out by weights, to the token: each gets the whole part of its quota and those with the largest rest one more,
    of equal ones the first. None gets more than its `most`; each gets `least`, or its most, where the total is enough for that.

    Who would pass a bound is set at it, and the others share what is left. Of weights that are not positive numbers all count the same."""
    total = min(total, sum(most))
    floors = [min(least, cap) for cap in most]
    if sum(floors) > total:
        floors = [0] * len(most)
    even = not all(isfinite(weight) and weight >= 0 for weight in weights)
    weight = [Fraction(1) if even else Fraction(value) for value in weights]
    quota: dict[int, Fraction] = {}
    free = list(range(len(most)))
    while free:
        rest, scale = total - sum(quota.values(), Fraction(0)), sum((weight[i] for i in free), Fraction(0))
        wanted = {i: rest * weight[i] / scale if scale else rest / len(free) for i in free}
        bounded = {i: min(max(wanted[i], Fraction(floors[i])), Fraction(most[i])) for i in free}
        excess = sum(bounded.values()) - sum(wanted.values())
        # Of two kinds of violations the one that weighs more is settled first: the other may then vanish.
        fixed = [i for i in free if (bounded[i] > wanted[i] if excess > 0 else bounded[i] < wanted[i])] if excess else free
        quota.update({i: bounded[i] for i in fixed})
        free = [i for i in free if i not in quota]
    given = [floor(quota[i]) for i in range(len(most))]
    order = sorted(range(len(most)), key=lambda i: (given[i] - quota[i], i))
    for i in order[: total - sum(given)]:
        given[i] += 1
    return given


def in_front_of(layer: int, *needs: Signal) -> Site:
    """The site in front of decoder layer index `layer`; 0 is before the language model."""
    return FromLayer(layer, needs) if layer else BeforeLM(needs)


# ---- what a view is asked for


def states(name: str, view: View) -> Tensor:
    """(B, N, D) the tokens' states. Raises FoveateError where the view has none."""
    if view.tokens is None:
        raise FoveateError(f"{name} looks at the tokens' states and the view has none: make it with View.of(tokens, …)")
    return view.tokens


def questions(name: str, view: View) -> tuple[Question, ...]:
    """What is asked about the images. Raises FoveateError where the view does not say."""
    if view.questions is None:
        why = view.unknown or "the view does not say; make it by View.of, or give View(questions=…)"
        raise FoveateError(f"{name} ranks by what is asked about an image, and where the question ends is not known: {why}")
    return view.questions


def asked(name: str, view: View, score: Callable[[Question], Tensor]) -> Tensor:
    """(B, N) the score that each visual slot has by the question about it; `score` gives (B, N) of one question."""
    several = questions(name, view)
    if len(several) == 1:
        return score(several[0])
    found = torch.zeros(view.layout.shape, device=view.layout.kind.device)
    for question in several:
        found = torch.where(question.about, score(question), found)
    return found


def attention_before(reducer: Reducer, view: View, stage: int) -> AttentionRows:
    """The one signal that a stage needs, where the depth of the model decides which layer's it is."""
    if view.layers is None:
        raise FoveateError(
            f"{reducer.name}: at which layer a stage stands depends on the model's depth, which the view does not tell; "
            "give View.of(layers=…)"
        )
    rows: AttentionRows = view.signal(*reducer.sites(view.layers)[stage].needs)
    return rows


def leaving(view: View, left: Callable[[int, int], int], scope: str = "image") -> Tensor:
    """(B, N) int64, at each visual slot: what `left(arriving, original)` says of its group of the scope (0 for all other slots)."""
    layout, first = view.layout, (view.first or view).layout
    if scope == "image":  # counted over the batch already
        owner, before = layout.image[layout.visual], first.image[first.visual]
    else:
        owners = torch.cat([one.owners(scope)[one.visual] for one in (layout, first)])
        sizes = [int(one.visual.sum()) for one in (layout, first)]
        owner, before = torch.unique(owners, return_inverse=True)[1].split(sizes)
    original = before.bincount()
    arriving = owner.bincount(minlength=len(original))
    pairs = zip(arriving.tolist(), original.tolist(), strict=True)
    number = torch.zeros_like(layout.image)
    number[layout.visual] = torch.tensor([left(a, o) if a else 0 for a, o in pairs], dtype=torch.int64, device=number.device)[owner]
    return number


# ---- slots


def groups(layout: Layout, scope: str) -> list[Tensor]:
    """The slots of each group of visual tokens, ascending, counted over the whole batch (slot n of row b is b * N + n)."""
    owner = layout.groups(scope).flatten()
    order = owner.argsort(stable=True)[int((owner < 0).sum()) :]
    return list(order.split(torch.unique_consecutive(owner[order], return_counts=True)[1].tolist())) if order.numel() else []


def images(layout: Layout) -> list[tuple[int, Tensor]]:
    """(row, its slots (n,), ascending) of each image of the batch."""
    there = torch.where(layout.visual, layout.image, -1)
    return [(b, (there[b] == i).nonzero()[:, 0]) for b in range(layout.shape[0]) for i in there[b].unique().tolist() if i >= 0]


def picked(layout: Layout, keep: float | int, scope: str, pick: Callable[[Tensor, int], Tensor]) -> TokenMap:
    """Keeps `keep` of each group of the scope, in raster order: those of its slots (n,) that `pick(slots, left)` names by their places
    (left,) among them. A group of which all stay is not asked about."""
    kept = torch.zeros(layout.kind.numel(), dtype=torch.bool, device=layout.kind.device)
    for slots in groups(layout, scope):
        left = budget(keep, slots.numel())
        kept[slots if left == slots.numel() else slots[pick(slots, left)]] = True
    return TokenMap.keep(layout, kept.view(layout.shape))


def into(layout: Layout, home: Tensor, weight: Tensor | None = None, place: Tensor | None = None) -> TokenMap:
    """The map in which each visual token goes into the slot that `home` (int64) names: its own if it stays, -1: nowhere.

    weight  float64, of each token in its target; None: 1 everywhere
    place   int64: where not all stay, targets stand in its ascending order, equal ones in that of their slots; None: in that of their slots

    One value a slot, (B, N) or flat. Slots count in their row or, as those of `groups`, over the batch.
    """
    B, N = layout.shape
    slot = torch.arange(N, device=home.device).expand(B, N)
    home = torch.where(layout.visual, torch.where(home >= 0, home % max(N, 1), -1).view(B, N), slot)
    stays = home == slot
    if bool(stays.all()) or (place is None and bool((stays | (home < 0)).all())):
        return TokenMap.keep(layout, stays)
    stays = stays & layout.valid
    counts = stays.sum(1)
    M = int(counts.max()) if B else 0
    key = torch.where(stays, slot if place is None else place.view(B, N), torch.iinfo(torch.int64).max)
    target = torch.arange(M, device=home.device).expand(B, M)
    representative = key.argsort(dim=1, stable=True)[:, :M].masked_fill(target >= counts[:, None], -1)

    # Sources side by side by their targets; M is the target of what goes nowhere, as does all whose home is N.
    at = torch.where(representative >= 0, representative, N)
    target = torch.full((B, N + 1), M, device=at.device).scatter(1, at, target)
    target[:, N] = M
    target, source = target.gather(1, torch.where(home >= 0, home, N)).sort(dim=1, stable=True)
    rank = torch.arange(N, device=at.device) - torch.searchsorted(target, target)
    E = int(torch.where(target < M, rank, 0).max()) + 1 if N else 1
    cell = torch.where(target < M, target * E + rank.clamp(max=E - 1), M * E)
    member = torch.full((B, M * E + 1), -1, device=at.device).scatter(1, cell, source)[:, :-1].view(B, M, E)
    if weight is not None:
        weight = weight.view(B, N).gather(1, member.clamp(min=0).view(B, -1)).view(B, M, E)
    return TokenMap.merge(layout, member, weight, representative)
