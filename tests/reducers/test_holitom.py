"""HoliTom's first stage against its equations, and the example of the reference."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.errors import FoveateError
from foveate.reducers import HoliTom
from foveate.reducers.common import dealt
from foveate.reducers.holitom import windows
from tests.reducers.moving import Clips, alone, batches, check, count, film
from tests.reducers.test_density import oracle as clusters


def still(*rows: str) -> Tensor:
    return torch.tensor([[mark == "1" for mark in row] for row in rows])


def test_the_windows_of_the_reference() -> None:
    assert windows(still("110", "100", "111")) == [range(0, 2), range(2, 4)]
    assert windows(torch.zeros(0, 3, dtype=torch.bool)) == [range(0, 1)]
    assert windows(still("000", "000")) == [range(0, 1), range(1, 2), range(2, 3)]
    assert windows(still("11", "11", "11")) == [range(0, 4)]


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 999))
def test_no_cut_saves_more(frames: int, places: int, seed: int) -> None:
    z = torch.rand(frames - 1, places, generator=torch.Generator().manual_seed(seed)) < 0.7

    def saved(cut: list[range]) -> int:
        return sum((len(w) - 1) * int(z[w[0] : w[-1]].all(0).sum()) for w in cut if len(w) > 1)

    best = 0
    for ends in product([False, True], repeat=frames - 1):
        starts = [0, *(f + 1 for f, end in enumerate(ends) if end)]
        best = max(best, saved([range(a, b) for a, b in zip(starts, [*starts[1:], frames], strict=True)]))
    found = windows(z)
    assert [f for w in found for f in w] == list(range(frames))
    assert saved(found) == best


def test_the_counts_of_the_reference() -> None:
    """Its example has 7 tokens unshared of 6 in the budget; ours are never more than the budget."""
    x = torch.zeros(4, 3, 8)
    for f, p in product(range(4), range(3)):
        x[f, p, (f + p) % 8] = 1.0  # every token unlike the one before
    x[1, :2] = x[0, :2]
    x[2, 0] = x[1, 0]
    x[3] = x[2]
    assert len(alone(HoliTom(0.5), x)[0]) == 6


def oracle(x: Tensor, attention: Tensor, number: int, tau: float, beta: float) -> list[tuple[int, dict[int, float]]]:
    """(survivor, weights of its sources) by the card, group by group."""
    P = x.shape[1]
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    z = (1 - (1 - (unit[:-1] * unit[1:]).sum(-1)).round(decimals=6)) > tau
    groups: list[tuple[list[int], list[int]]] = []  # frames, places; one frame: as it is
    for w in windows(z):
        static = [p for p in range(P) if len(w) > 1 and all(bool(z[f, p]) for f in w[:-1])]
        if static:
            groups.append((list(w), static))
        for f in w:
            if len(rest := [p for p in range(P) if p not in static]):
                groups.append(([f], rest))
    sizes = [len(places) for _, places in groups]
    out: list[tuple[int, dict[int, float]]] = []
    for (frames, places), n in zip(groups, dealt(number, sizes, sizes), strict=True):
        if len(frames) == 1:
            chosen = sorted(places, key=lambda p: (-float(attention[frames[0], p]), p))[:n]
            out += [(frames[0] * P + p, {frames[0] * P + p: 1.0}) for p in chosen]
        elif n:
            means = x[frames][:, places].double().mean(0).tolist()
            centres, label = clusters(means, n, min(7, n)) if n < len(places) else (list(range(n)), list(range(n)))
            for j, centre in enumerate(centres):
                own = [i for i, cluster in enumerate(label) if cluster == j]
                weight = {i: (1.0 if len(own) == 1 else beta) if i == centre else (1 - beta) / (len(own) - 1) for i in own}
                out.append(
                    (frames[0] * P + places[centre], {f * P + places[i]: w / len(frames) for i, w in weight.items() for f in frames})
                )
    return sorted(out)


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 1, 5), (5, 2, 2), (6, 3, 3), (8, 2, 4)])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_equations(shape: tuple[int, int, int], share: float) -> None:
    x = film(shape, seed=9, still=0.75)
    total = x.shape[0] * x.shape[1]
    attention = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(1))
    number = max(1, round(share * total))
    _, token_map = alone(HoliTom(number), x, attention)
    wanted = oracle(x, attention, number, 0.8, 0.6)
    assert token_map.representative[0].tolist() == [at for at, _ in wanted]
    for m, (_, weights) in enumerate(wanted):
        own = token_map.sources(0, m)
        assert own == sorted(weights)
        at = token_map.member[0, m].tolist()
        said = [1.0] if token_map.weight is None else [float(token_map.weight[0, m, at.index(s)]) for s in own]
        assert said == pytest.approx([weights[s] for s in own])


def test_a_clip_that_stands_still_is_one_window() -> None:
    x = film((5, 1, 4), still=1.0)
    kept, token_map = alone(HoliTom(0.5), x)
    assert kept == [0, 1, 2, 3]  # ten are allowed, but there are four once what is equal is merged
    assert torch.allclose(token_map.apply(x.reshape(1, 20, -1))[0], x[0], atol=1e-6)
    assert alone(HoliTom(1.0), x)[1].is_identity


def test_counts_and_options() -> None:
    assert [count(HoliTom(keep), 10, 7) for keep in (0.05, 0.25, 1.0, 30)] == [4, 18, 70, 30]
    for option in ("tau", "beta"):
        with pytest.raises(FoveateError, match=f"{option}=2.0 is not possible"):
            HoliTom(**{option: 2.0})  # type: ignore[arg-type]


@settings(max_examples=20)
@given(batches())
def test_rows_are_what_they_are_alone(batch: Clips) -> None:
    for reducer in (HoliTom(0.3), HoliTom(0.5, scope="sample")):
        check(reducer, batch)
