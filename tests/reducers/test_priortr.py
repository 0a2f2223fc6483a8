"""PriorTR against loops over rows of a map, the numbers of its card, and prompts that have no null token."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import Attention, AttentionRows, View
from foveate.reducers.fastv import FastV
from foveate.reducers.priortr import PriorTR
from foveate.tokens import Kind, Layout, budget
from tests.reducers.ragged import Ragged, batches, check_raster, counted, keeps, kept

quick = settings(max_examples=20)


def oracle(layout: Layout, weights: Tensor, row: int, image: list[int], reducer: PriorTR, left: int) -> list[int]:
    """P log(P / Q) of one image, by loops over heads and rows."""
    a = weights[row].double().numpy().mean(0)
    text = [s for s in range(layout.shape[1]) if bool(layout.valid[row, s]) and int(layout.kind[row, s]) == Kind.TEXT]
    last = max(s for s in range(layout.shape[1]) if bool(layout.valid[row, s]))
    behind = [s for s in text if s > image[-1]] or [last]
    P = a[last, image] if reducer.rows == "last" else np.mean([a[r, image] for r in behind], axis=0)
    Q = a[behind[min(reducer.null, len(behind) - 1)], image]
    P, Q = P / P.sum(), Q / Q.sum()
    S = P * np.log(P / Q)
    return sorted(sorted(image, key=lambda n: (-S[image.index(n)], n))[:left])


def view(layout: Layout, tokens: Tensor, weights: Tensor) -> View:
    return View.of(tokens, layout=layout, signals={Attention(2): AttentionRows.of(weights)})


@quick
@given(batches(), keeps, st.sampled_from(["last", "all"]), st.integers(0, 2), st.integers(0, 99))
def test_each_image_of_a_ragged_batch(batch: Ragged, keep: Any, rows: str, null: int, seed: int) -> None:
    reducer = PriorTR(keep, rows=rows, null=null)
    B, N = batch.layout.shape
    weights = torch.rand(B, 2, N, N, generator=torch.Generator().manual_seed(seed)) + 0.01
    token_map = reducer.reduce(view(batch.layout, batch.tokens, weights)).map
    for row, slots in batch.images():
        left = budget(keep, len(slots))
        assert [i for i in kept(token_map, row) if i in slots] == oracle(batch.layout, weights, row, slots, reducer, left)
        assert counted(reducer, len(slots), len(slots)) == left
    check_raster(batch, token_map, [budget(keep, r * c) for r, c in batch.grids])
    for b, (own, (start, end)) in enumerate(zip(batch.rows, batch.spans, strict=True)):
        single = reducer.reduce(view(own.layout, own.tokens, weights[b : b + 1, :, start:end, start:end])).map
        assert [start + i for i in kept(single)] == [i for i in kept(token_map, b) if start <= i < end]


def prompt(P: list[float], Q: list[float], more: int = 0) -> View:
    """Three patches, a null token, more text, a last token."""
    N = 5 + more
    weights = torch.full((1, 1, N, N), 0.1)
    weights[0, 0, 3, :3], weights[0, 0, N - 1, :3] = torch.tensor(Q), torch.tensor(P)
    layout = Layout.sequence(torch.arange(N)[None] < 3)
    return view(layout, torch.zeros(1, N, 2), weights)


def test_numbers_of_the_card() -> None:
    at = prompt([0.5, 0.3, 0.2], [0.6, 0.2, 0.2])
    score = PriorTR().score(at)[0, :3]
    torch.testing.assert_close(score, torch.tensor([-0.0912, 0.1216, 0.0]), rtol=0, atol=5e-5)
    assert kept(PriorTR(1).reduce(at).map) == [1, 3, 4]
    assert kept(PriorTR(2).reduce(at).map) == [1, 2, 3, 4]
    assert kept(FastV(1, layer=3).reduce(at).map) == [0, 3, 4]


def test_what_all_of_the_image_gets_does_not_count() -> None:
    """P and Q are shares of what the image gets, however much that is."""
    scores = [PriorTR().score(prompt([p * 0.01 for p in (0.5, 0.3, 0.2)], [0.6, 0.2, 0.2], more))[0, :3] for more in (0, 4)]
    torch.testing.assert_close(scores[0], torch.tensor([-0.0912, 0.1216, 0.0]), rtol=0, atol=5e-5)
    torch.testing.assert_close(scores[0], scores[1])


def test_where_nothing_follows_the_image_the_lowest_stay() -> None:
    layout = Layout.sequence(torch.tensor([[False, True, True, True, True]]))
    at = view(layout, torch.zeros(1, 5, 2), torch.rand(1, 2, 5, 5))
    assert kept(PriorTR(2).reduce(at).map) == [0, 1, 2]
    equal = prompt([0.2, 0.3, 0.5], [0.2, 0.3, 0.5])
    assert PriorTR().score(equal)[0, :3].tolist() == [0, 0, 0]
    assert kept(PriorTR(2).reduce(equal).map) == [0, 1, 3, 4]


def test_an_images_own_newline_is_no_null_token() -> None:
    at = prompt([0.5, 0.3, 0.2], [0.6, 0.2, 0.2], more=1)
    at.layout.kind[0, 3] = int(Kind.NEWLINE)
    assert bool((PriorTR().score(at)[0, :3] != PriorTR().score(prompt([0.5, 0.3, 0.2], [0.6, 0.2, 0.2], more=1))[0, :3]).any())


@pytest.mark.parametrize("keep", [1.0, 3, 64])
def test_keeping_everything_is_the_identity(keep: Any) -> None:
    assert PriorTR(keep).reduce(prompt([0.5, 0.3, 0.2], [0.6, 0.2, 0.2])).map.is_identity


def test_tokens_by_layer() -> None:
    assert PriorTR().positions == "keep"
    assert PriorTR(192).visual_tokens(576, 32) == [576] * 3 + [192] * 29


@pytest.mark.parametrize("options", [{"keep": 0}, {"layer": 0}, {"rows": "question"}, {"null": -1}, {"of": "image"}])
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        PriorTR(**options)
