"""CDPruner against determinants, the matrix of its card, and what every selection must hold."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from foveate import FoveateError
from foveate.contract import View
from foveate.reducers.cdpruner import CDPruner, Relevance, greedy_map, min_max
from foveate.tokens import TokenMap, budget
from tests.reducers.ragged import Ragged, batches, check_raster, check_rows, counted, crops, keeps, kept, make

quick = settings(max_examples=25)
RELEVANCE = torch.tensor([1, 0.95, 0.6, 0.5])
SIMILARITY = torch.tensor([[1, 0.9, 0.1, 0], [0.9, 1, 0.1, 0], [0.1, 0.1, 1, 0.5], [0, 0, 0.5, 1]])
WIDTH = 18  # more than the largest image: no set of tokens is degenerate


def oracle(states: Tensor, relevance: Tensor, picks: int) -> list[int]:
    """Greedy by whole determinants: each pick makes that of the chosen kernel largest."""
    x, r = states.double().numpy(), relevance.double().numpy()
    r = (r - r.min() + 1e-6) / (r.max() - r.min()) if r.max() > r.min() else np.ones_like(r)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    similarity = x @ x.T
    np.fill_diagonal(similarity, 1)
    kernel = r[:, None] * similarity * r
    chosen: list[int] = []
    for _ in range(picks):
        others = [i for i in range(len(x)) if i not in chosen]
        volumes = [np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1] for i in others]
        chosen.append(others[int(np.argmax(volumes))])
    return chosen


def asked(batch: Ragged, row: int) -> Tensor:
    """Cosine of every state of a row with its text's mean."""
    text = batch.layout.valid[row] & ~batch.layout.visual[row]
    x = batch.tokens[row].double()
    question = x[text].mean(0)
    return x @ question / (x.norm(dim=-1) * question.norm())


def reduced(reducer: CDPruner, batch: Ragged) -> TokenMap:
    return reducer.reduce(batch.view()).map


def wide(batch: Ragged) -> Ragged:
    """The same slots with states of more dimensions than an image has tokens."""

    def states(tokens: Tensor, seed: int) -> Tensor:
        return torch.randn(*tokens.shape[:2], WIDTH, generator=torch.Generator().manual_seed(seed))

    rows = [replace(row, tokens=states(row.tokens, seed)) for seed, row in enumerate(batch.rows)]
    tokens = torch.full((*batch.tokens.shape[:2], WIDTH), 7.0)
    for b, (row, (start, end)) in enumerate(zip(rows, batch.spans, strict=True)):
        tokens[b, start:end] = row.tokens[0]
    return replace(batch, tokens=tokens, rows=rows)


def test_the_matrix_of_the_card() -> None:
    kernel = RELEVANCE[:, None] * SIMILARITY * RELEVANCE
    picks, gains = greedy_map(kernel, 3)
    assert picks.tolist() == [0, 2, 3]
    torch.testing.assert_close(gains, torch.tensor([1, 0.3564, 0.1869]), rtol=0, atol=5e-5)
    for size in (1, 2, 3):
        best = max(itertools.combinations(range(4), size), key=lambda c: float(torch.linalg.det(kernel.double()[list(c)][:, list(c)])))
        assert set(best) == set(picks[:size].tolist())


def test_nothing_alike_is_pure_relevance() -> None:
    r = torch.tensor([0.3, 0.9, 0.1, 0.7, 0.7])
    assert greedy_map(torch.diag(r**2), 5)[0].tolist() == [1, 3, 4, 0, 2]


def test_constant_relevance_is_pure_diversity() -> None:
    assert min_max(torch.full((3,), 0.4)).tolist() == [1, 1, 1]
    x = torch.randn(1, 6, WIDTH)
    view = View.of(x, signals={Relevance(): torch.full((1, 6), -2.0)})
    assert kept(CDPruner(3).reduce(view).map) == sorted(oracle(x[0], torch.ones(6), 3))
    for _ in range(8):  # all first gains tie, whatever rounding says of a unit vector's length
        assert kept(CDPruner(1).reduce(View.of(torch.randn(1, 12, WIDTH))).map) == [0]


def test_relevance_alone_decides_between_orthogonal_tokens_at_any_scale() -> None:
    relevance = torch.tensor([[0.1, 0.5, 0.2, 0.4, 0.3]])
    for signal in (relevance, 9 * relevance - 4):
        assert kept(CDPruner(2).reduce(View.of(torch.eye(5)[None], signals={Relevance(): signal})).map) == [1, 3]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_more_picks_than_the_kernel_has_rank(rank: int) -> None:
    """What is left of a gain is rounding then: a duplicate adds nothing, is never picked twice, and the lower index goes first."""
    x = torch.nn.functional.normalize(torch.randn(rank, 5), dim=-1).repeat(3, 1)
    picks, gains = greedy_map(x @ x.T, 3 * rank)
    assert sorted(picks.tolist()) == list(range(3 * rank))
    assert {i % rank for i in picks[:rank].tolist()} == set(range(rank))
    assert gains[rank:].tolist() == [0.0] * (2 * rank)
    assert picks[rank:].tolist() == sorted(picks[rank:].tolist())
    assert bool((gains[:rank] > 0).all())


@quick
@given(batches(), keeps)
def test_each_image_of_a_ragged_batch(narrow: Ragged, keep: Any) -> None:
    batch, reducer = wide(narrow), CDPruner(keep)
    token_map = reduced(reducer, batch)
    for row, slots in batch.images():
        left = budget(keep, len(slots))
        picks = [slots[i] for i in oracle(batch.tokens[row, slots], asked(batch, row)[slots], left)]
        assert [i for i in kept(token_map, row) if i in slots] == sorted(picks)
        assert counted(reducer, len(slots), len(slots)) == left
    check_raster(batch, token_map, [budget(keep, r * c) for r, c in batch.grids])
    check_rows(batch, token_map, [reduced(reducer, row) for row in batch.rows])


def test_relevance_is_normalised_in_each_image_alone() -> None:
    """Theirs takes the batch's extremes: an image far from the question would come out all alike."""
    batch = wide(make([[1, (3, 3), 1, (3, 3), 1]]))
    relevance = torch.rand(1, 21)
    shifted = relevance + torch.where(batch.layout.image == 1, 50.0, 0.0)
    maps = [CDPruner(4).reduce(View.of(batch.tokens, layout=batch.layout, signals={Relevance(): r})).map for r in (relevance, shifted)]
    (_, _), (_, slots) = batch.images()
    expected = sorted(slots[i] for i in oracle(batch.tokens[0, slots], relevance[0, slots], 4))
    assert [i for i in kept(maps[1]) if i in slots] == expected
    assert kept(maps[0]) == kept(maps[1])


def test_the_question_decides_and_the_answer_is_not_looked_at() -> None:
    x = torch.eye(6)
    tokens = torch.cat([x, x[2:3], x[5:6]])[None]  # six patches, the question asks for patch 2, the answer names patch 5
    both = View.of(tokens, text=2)
    assert kept(CDPruner(2).reduce(both).map) == [2, 5, 6, 7]
    prompt = replace(both.asked_at(torch.tensor([6])), signals={})
    assert kept(CDPruner(1).reduce(prompt).map) == [2, 6, 7]
    torch.testing.assert_close(Relevance().compute(prompt)[0, :6], x[2])


def test_prompts_without_text() -> None:
    x = torch.randn(1, 6, WIDTH)
    assert kept(CDPruner(3).reduce(View.of(x)).map) == sorted(oracle(x[0], torch.ones(6), 3))


def test_tokens_are_counted_for_each_crop() -> None:
    batch = wide(make([[1, (2, 4), 2], [2, (3, 3)]]))
    split = crops(batch, torch.where(batch.layout.rank_in_image < 3, 0, 1))
    target = reduced(CDPruner(2), split).target
    assert torch.stack([(target.visual & (target.place[..., 1] == c)).sum(1) for c in (0, 1)]).tolist() == [[2, 2], [2, 2]]
    assert reduced(CDPruner(2, scope="image"), split).target.visual.sum(1).tolist() == [2, 2]


@pytest.mark.parametrize("keep", [1.0, 16, 64])
def test_keeping_everything_is_the_identity(keep: Any) -> None:
    assert reduced(CDPruner(keep), make([[1, (4, 4), 2], [3]], left=True)).is_identity


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 1.5}, {"scope": "tile"}, {"positions": "gap"}])
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        CDPruner(**options)


def test_views_that_lack_something() -> None:
    batch = make([[1, (2, 2)]])
    with pytest.raises(FoveateError, match="cdpruner looks at the tokens' states"):
        CDPruner(2).reduce(View(batch.layout))
    with pytest.raises(FoveateError, match="where the question ends is not known"):
        CDPruner(2).reduce(View(batch.layout, batch.tokens))
    with pytest.raises(FoveateError, match=r"hand in signals=\{Relevance"):
        Relevance().compute(View(batch.layout))
