"""VisPruner against a loop over its lists, the lists of its card, and what every selection must hold."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import ClsAttention, View
from foveate.reducers.fastervlm import FasterVLM
from foveate.reducers.vispruner import VisPruner, thinned
from foveate.tokens import TokenMap, budget
from tests.reducers.ragged import Ragged, batches, check_raster, check_rows, counted, crops, keeps, kept, make

quick = settings(max_examples=20)


def oracle(states: Tensor, score: Tensor, left: int, important: float, step: int) -> list[int]:
    """The card's rule, one cosine at a time."""
    x, s = states.double().numpy(), score.double().numpy()

    def cosine(i: int, j: int) -> float:
        return float(x[i] @ x[j]) / float(np.linalg.norm(x[i]) * np.linalg.norm(x[j]))

    if left >= len(x):
        return list(range(len(x)))
    ranked = sorted(range(len(x)), key=lambda i: (-s[i], i))
    first = int(important * left)
    rest = ranked[first:]
    while len(rest) > left - first:
        if left == first:
            rest = []
            break
        even, odd = rest[::2], rest[1::2]
        nearest = {i: max(cosine(i, j) for j in odd) for i in even}
        even.sort(key=lambda i: -nearest[i])
        rest = even[min(step, len(rest) - (left - first), len(even)) :] + odd
    return sorted(ranked[:first] + rest)


def view(batch: Ragged, scores: Tensor) -> View:
    return View.of(batch.tokens, layout=batch.layout, signals={ClsAttention(-2): scores})


def scored(batch: Ragged, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Scores of the batch and of its rows alone."""
    scores = torch.zeros(batch.layout.shape)
    rows = [torch.rand(1, end - start, generator=torch.Generator().manual_seed(seed + b)) for b, (start, end) in enumerate(batch.spans)]
    for b, (start, end) in enumerate(batch.spans):
        scores[b, start:end] = rows[b][0]
    return scores, rows


def one(reducer: VisPruner, states: Tensor, scores: Tensor) -> list[int]:
    signals: Any = {ClsAttention(reducer.layer): scores[None]}
    return kept(reducer.reduce(View.of(states[None], signals=signals)).map)


@quick
@given(batches(), keeps, st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([1, 2, 8]), st.integers(0, 99))
def test_each_image_of_a_ragged_batch(batch: Ragged, keep: Any, important: float, step: int, seed: int) -> None:
    reducer = VisPruner(keep, important=important, step=step)
    scores, rows = scored(batch, seed)
    token_map = reducer.reduce(view(batch, scores)).map
    for row, slots in batch.images():
        left = budget(keep, len(slots))
        picks = [slots[i] for i in oracle(batch.tokens[row, slots], scores[row, slots], left, important, step)]
        assert [i for i in kept(token_map, row) if i in slots] == picks
        assert counted(reducer, len(slots), len(slots)) == left
    check_raster(batch, token_map, [budget(keep, r * c) for r, c in batch.grids])
    check_rows(batch, token_map, [reducer.reduce(view(row, s)).map for row, s in zip(batch.rows, rows, strict=True)])


def test_the_best_attended_residual_of_the_card_is_lost_whatever_the_similarities() -> None:
    scores = torch.tensor([0.9, 0.8, 0.4, 0.3, 0.2, 0.1])
    for seed in range(5):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        assert one(VisPruner(4), x, scores) == [0, 1, 3, 5]  # of the list 2, 3, 4, 5 both even places leave


def test_with_nothing_but_important_ones_it_is_fastervlm() -> None:
    x, scores = torch.randn(9, 4), torch.rand(9)
    signals: Any = {ClsAttention(-2): scores[None]}
    assert one(VisPruner(4, important=1.0), x, scores) == kept(FasterVLM(4).reduce(View.of(x[None], signals=signals)).map)


def test_lists_that_the_authors_code_cannot_thin() -> None:
    """576 patches: T = 58 leaves an odd list, T = 8 takes more than half of it in the last round."""
    x, scores = torch.randn(576, 8), torch.rand(576)
    for left in (58, 8, 1):
        assert len(one(VisPruner(left), x, scores)) == left
    assert thinned(torch.rand(7, 7), 7, 8).tolist() == list(range(7))
    assert thinned(torch.rand(7, 7), 0, 8).tolist() == []
    assert thinned(torch.ones(5, 5), 1, 8).tolist() == [3]  # even places 0 2 4 leave, then the even one of 1 3


def test_tokens_are_counted_for_each_crop() -> None:
    batch = make([[1, (2, 4), 2]])
    split = crops(batch, torch.where(batch.layout.rank_in_image < 3, 0, 1))
    target = VisPruner(2).reduce(view(split, torch.rand(split.layout.shape))).map.target
    assert [int((target.visual & (target.place[..., 1] == c)).sum()) for c in (0, 1)] == [2, 2]


def reduced(batch: Ragged, **options: Any) -> TokenMap:
    return VisPruner(**options).reduce(view(batch, torch.rand(batch.layout.shape))).map


@pytest.mark.parametrize("keep", [1.0, 16, 64])
def test_keeping_everything_is_the_identity(keep: Any) -> None:
    assert reduced(make([[1, (4, 4), 2], [3]], left=True), keep=keep).is_identity
    assert reduced(make([[1, (1, 1), 2]]), keep=0.1).is_identity  # one token


@pytest.mark.parametrize("options", [{"keep": 0}, {"important": 1.5}, {"important": 1}, {"step": 0}, {"scope": "sample"}, {"layer": 0.5}])
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        VisPruner(**options)
