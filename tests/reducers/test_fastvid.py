"""FastVID against its rule, and the numbers of the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from foveate.errors import FoveateError
from foveate.reducers import FastVID
from tests.reducers.moving import Clips, alone, batches, check, count, film
from tests.reducers.test_density import oracle as clusters


def test_the_counts_of_the_reference() -> None:
    """20 places, a half, one segment of 6 frames: 6 salient tokens in each, 12 context tokens in frames 1 and 5."""
    x = film((6, 4, 5), still=0.0)
    attention = torch.arange(120.0).view(6, 20)
    token_map = alone(FastVID(0.5, segments=1, tau=-1.0), x, attention)[1]
    kept = token_map.representative[0].tolist()
    assert [sum(i // 20 == f for i in kept) for f in range(6)] == [6, 18, 6, 6, 6, 18]
    assert [i % 20 for i in kept if i < 20] == list(range(14, 20))  # the salient ones
    assert count(FastVID(0.5), 6, 20) == 60


def test_the_merge_of_the_reference() -> None:
    """One token that joins another: .6 x + .4 y; of two, the target keeps .6 all the same, of none 1."""
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.1]]])
    _, token_map = alone(FastVID(1, context=1.0), x)
    assert token_map.representative.tolist() == [[0]]
    assert token_map.weight is not None
    assert token_map.weight[0, 0].tolist() == pytest.approx([0.6, 0.4])


def oracle(x: Tensor, attention: Tensor, number: int, d: float, p: int, beta: float) -> list[tuple[int, dict[int, float]]]:
    """One segment, by the card."""
    F, P, _ = x.shape
    C = int(d * number + 1e-9)
    salient: dict[int, list[int]] = {}
    for f in range(F):
        n = (number - C) // F + (f < (number - C) % F)
        salient[f] = sorted(range(P), key=lambda i: (-float(attention[f, i]), i))[:n]
    out = [(f * P + i, {f * P + i: 1.0}) for f in range(F) for i in salient[f]]
    anchors = [f for f in range(F - 1, -1, -1) if (F - 1 - f) % p == 0]
    rest = {f: [i for i in range(P) if i not in salient[f]] for f in range(F)}
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    for a, f in enumerate(anchors):
        n = C // len(anchors) + (a < C % len(anchors))
        if not n:
            continue
        centres = sorted(rest[f][i] for i in clusters(x[f][rest[f]].double().tolist(), n, min(4, len(rest[f])))[0])
        groups: dict[int, list[int]] = {centre: [] for centre in centres}
        for g in range(F):
            for i in rest[g]:
                if g == f and i in centres:
                    continue
                like = [round(float(unit[g, i] @ unit[f, c]), 6) for c in centres]
                groups[centres[like.index(max(like))]].append(g * P + i)
        for centre, own in groups.items():
            w = max(1 / (len(own) + 1), beta) if own else 1.0
            out.append((f * P + centre, {f * P + centre: w, **{s: (1 - w) / len(own) for s in own}}))
    return sorted(out, key=lambda one: one[0])


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 1, 5), (5, 2, 2), (6, 3, 3)])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_the_rule(shape: tuple[int, int, int], share: float) -> None:
    x = film(shape, seed=4, still=0.2)
    attention = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(1))
    number = max(1, round(share * x.shape[0] * x.shape[1]))
    _, token_map = alone(FastVID(number, segments=1, tau=-1.0), x, attention)
    wanted = oracle(x, attention, number, 0.4, 4, 0.6)
    assert token_map.representative[0].tolist() == [at for at, _ in wanted]
    assert len(wanted) == number
    for m, (_, weights) in enumerate(wanted):
        own = token_map.sources(0, m)
        assert own == sorted(weights)
        said = [1.0] if token_map.weight is None else [float(token_map.weight[0, m, token_map.member[0, m].tolist().index(s)]) for s in own]
        assert said == pytest.approx([weights[s] for s in own])


def test_identical_frames_and_more_frames_than_budget() -> None:
    assert len(alone(FastVID(0.25), torch.ones(9, 4, 3))[0]) == 9
    assert len(alone(FastVID(3), film((20, 1, 4)))[0]) == 3
    assert alone(FastVID(1.0), film((9, 1, 4)))[1].is_identity
    assert [count(FastVID(keep), 10, 7) for keep in (0.05, 0.25, 1.0, 30)] == [4, 18, 70, 30]


@pytest.mark.parametrize("option", ["context", "beta", "tau"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(FoveateError, match=f"{option}=2.0 is not possible"):
        FastVID(**{option: 2.0})  # type: ignore[arg-type]
    with pytest.raises(FoveateError, match="step=0"):
        FastVID(step=0)


@settings(max_examples=20)
@given(batches())
def test_rows_are_what_they_are_alone(batch: Clips) -> None:
    for reducer in (FastVID(0.3), FastVID(0.5, scope="sample", segments=2, step=2), FastVID(0.9, context=1.0)):
        check(reducer, batch)
