"""FlashVID's first stage against its rule."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from foveate.errors import FoveateError
from foveate.reducers import FlashVID
from foveate.reducers.common import dealt
from foveate.reducers.flashvid import diverse
from tests.reducers.moving import Clips, alone, batches, check, count, film
from tests.reducers.test_density import oracle as clusters


def cosine(a: Tensor, b: Tensor) -> float:
    return round(float(a.double() @ b.double() / (a.double().norm() * b.double().norm())), 6)


def picks(x: Tensor, a: list[float], n: int) -> list[int]:
    P = len(x)
    d = [[(1 - cosine(x[i], x[j])) * a[j] for j in range(P)] for i in range(P)]
    chosen: list[int] = []
    while len(chosen) < n:
        rows = chosen or list(range(P))
        score = {j: min((d[i][j] for i in rows if i != j), default=0.0) for j in range(P) if j not in chosen}
        chosen.append(max(score, key=lambda j: (score[j], -j)))
    return sorted(chosen)


def oracle(x: Tensor, attention: Tensor, number: int, alpha: float, edge: float) -> list[tuple[int, dict[int, float]]]:
    """One segment, by the card."""
    F, P, _ = x.shape
    A = ceil(round(alpha * number, 6))
    chosen = [picks(x[f], attention[f].tolist(), n) for f, n in enumerate(dealt(A, [1.0] * F, [P] * F))]
    out = [(f * P + p, {f * P + p: 1.0}) for f in range(F) for p in chosen[f]]
    rest = [[p for p in range(P) if p not in chosen[f]] for f in range(F)]
    links = []
    for f in range(1, F):
        for p in rest[f] if rest[f - 1] else []:
            like = [cosine(x[f, p], x[f - 1, q]) for q in rest[f - 1]]
            links.append((max(like), f * P + p, (f - 1) * P + rest[f - 1][like.index(max(like))]))
    links = sorted(links, key=lambda link: (-link[0], link[1]))[: F * P - number]
    root = {f * P + p: f * P + p for f in range(F) for p in rest[f]}
    for _, child, parent in sorted((link for link in links if link[0] > edge), key=lambda link: link[1]):
        root[child] = root[parent]
    trees = {r: sorted(s for s in root if root[s] == r) for r in sorted(set(root.values()))}
    flat = x.double().flatten(0, 1)
    frames = [[r for r in trees if r // P == f] for f in range(F)]
    for roots, n in zip(frames, dealt(number - A, list(map(len, frames)), list(map(len, frames))), strict=True):
        if not n:
            continue
        means = [flat[trees[r]].mean(0).tolist() for r in roots]
        centres, label = clusters(means, n, min(7, n)) if n < len(roots) else (list(range(len(roots))), list(range(len(roots))))
        for j, centre in enumerate(centres):
            own = [roots[i] for i, cluster in enumerate(label) if cluster == j]
            out.append((roots[centre], {s: 1 / len(own) / len(trees[r]) for r in own for s in trees[r]}))
    return sorted(out, key=lambda one: one[0])


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 1, 5), (5, 2, 2), (6, 3, 3)])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_rule(shape: tuple[int, int, int], share: float) -> None:
    x = film(shape, seed=8, still=0.5)
    x = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    attention = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(1))
    number = max(1, round(share * x.shape[0] * x.shape[1]))
    _, token_map = alone(FlashVID(number, segments=1, tau=-1.0), x, attention)
    wanted = oracle(x, attention, number, 0.7, 0.8)
    assert token_map.representative[0].tolist() == [at for at, _ in wanted]
    assert len(wanted) == number
    for m, (_, weights) in enumerate(wanted):
        own, at = token_map.sources(0, m), token_map.member[0, m].tolist()
        assert own == sorted(weights)
        said = [1.0] if token_map.weight is None else [float(token_map.weight[0, m, at.index(s)]) for s in own]
        assert said == pytest.approx([weights[s] for s in own])


def test_a_chain_of_equal_tokens_becomes_that_token() -> None:
    """Where the authors' code makes one and a half of it."""
    x = torch.eye(4)[None].repeat(3, 1, 1)
    kept, token_map = alone(FlashVID(4, alpha=0.0, segments=1), x)
    assert kept == [0, 1, 2, 3]
    assert torch.allclose(token_map.apply(x.reshape(1, 12, 4))[0], x[0])


def test_selection_weighs_distances_with_attention() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert diverse(x, torch.tensor([1.0, 1.0, 1.0]), 2).tolist() == [0, 2]
    assert diverse(x, torch.tensor([1.0, 9.0, 1.0]), 2).tolist() == [1, 0]
    assert diverse(torch.ones(3, 2), torch.ones(3), 3).tolist() == [0, 1, 2]  # no token twice


def test_identical_frames_and_more_frames_than_budget() -> None:
    assert len(alone(FlashVID(0.25), torch.ones(9, 4, 3))[0]) == 9
    assert len(alone(FlashVID(3), film((20, 1, 4)))[0]) == 3
    assert alone(FlashVID(1.0), film((9, 1, 4)))[1].is_identity
    assert [count(FlashVID(keep), 10, 7) for keep in (0.05, 0.25, 1.0, 30)] == [4, 18, 70, 30]


@pytest.mark.parametrize("option", ["alpha", "edge", "tau"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(FoveateError, match=f"{option}=2.0 is not possible"):
        FlashVID(**{option: 2.0})  # type: ignore[arg-type]


@settings(max_examples=20)
@given(batches())
def test_rows_are_what_they_are_alone(batch: Clips) -> None:
    for reducer in (FlashVID(0.3), FlashVID(0.5, scope="sample", segments=2), FlashVID(0.9, alpha=0.2)):
        check(reducer, batch)
