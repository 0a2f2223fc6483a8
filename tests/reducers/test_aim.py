"""AIM: merging with plain means, the walk over the attention map, and the schedule, against the numbers of the cards."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import Attention, AttentionRows, BeforeLM, FromLayer, Signal, View
from foveate.reducers import aim
from foveate.reducers.aim import AIM, walk
from foveate.tokens import Layout, TokenMap, budget
from tests.reducers.ragged import Ragged, batches, check_raster, check_rows, counted, edges, keeps, kept, make
from tests.reducers.test_tome import oracle as merging

quick = settings(max_examples=25)
CARD = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])


def merged(reducer: AIM, batch: Ragged) -> TokenMap:
    return reducer.reduce(batch.view()).map


def causal(valid: Tensor, heads: int = 2, seed: int = 0, past: int = 0) -> AttentionRows:
    """Queries and keys of a layer; the mask leaves padding out as a model's does."""
    B, N = valid.shape
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(B, heads, N, 4, generator=generator), torch.randn(B, 1, N + past, 4, generator=generator)
    seen = torch.ones(N, N + past, dtype=torch.bool).tril(past) & torch.nn.functional.pad(valid, (past, 0), value=True)[:, None]
    return AttentionRows(query, key, 0.5, seen[:, None])


def one_row(attention: AttentionRows, row: int, start: int, end: int) -> AttentionRows:
    assert attention.mask is not None
    mask = attention.mask[row : row + 1, :, start:end, start:end]
    return replace(attention, query=attention.query[row : row + 1, :, start:end], key=attention.key[row : row + 1, :, start:end], mask=mask)


def importance(attention: AttentionRows, row: int, there: list[int], temperature: float = 0.1, walks: int = 5) -> np.ndarray[Any, Any]:
    """The card's rule on one row, from the logits, head by head."""
    heads = []
    for h in range(attention.query.shape[1]):
        q, k = attention.query[row, h, there].double().numpy(), attention.key[row, 0, there].double().numpy()
        logits = np.where(np.tril(np.ones((len(there), len(there)))) > 0, q @ k.T * attention.scale / temperature, -np.inf)
        m = np.exp(logits - logits.max(1, keepdims=True))
        m /= m.sum(1, keepdims=True)
        x = np.full(len(there), 1 / len(there))
        for _ in range(walks):
            x = x @ m
        heads.append(x)
    return np.sqrt(np.mean(np.square(heads), axis=0))


# ---- merging


def test_196_tokens_are_98_and_49() -> None:
    x = torch.randn(1, 196, 4)
    halved = AIM(0.5).reduce(View.of(x)).map
    assert halved.target.shape[1] == 98
    assert AIM(0.25).reduce(View.of(x)).map.target.shape[1] == 49
    assert counted(AIM(0.25), 196, 196) == 49


def test_copies_of_one_token_stay_that_token() -> None:
    x = torch.randn(1, 1, 4).expand(1, 12, 4)
    torch.testing.assert_close(AIM(0.25).reduce(View.of(x)).map.apply(x), x[:, :3])


def test_missing_sizes_matter() -> None:
    """a and c (places 0 and 2) both choose b (place 1): (a + b + c) / 3 and d, which then count the same although they are 3 and 1."""
    x = torch.tensor([[[1.0, 0.1], [1.0, 0.0], [1.0, -0.1], [0.0, 1.0]]])
    a, b, c, d = x[0]
    once = AIM(0.5).reduce(View.of(x)).map
    assert [[m for m, _ in members] for _, members in edges(once, 0)] == [[0, 1, 2], [3]]
    torch.testing.assert_close(AIM(0.25).reduce(View.of(x)).map.apply(x)[0, 0], ((a + b + c) / 3 + d) / 2)
    torch.testing.assert_close(AIM(0.25, weighted=True).reduce(View.of(x)).map.apply(x)[0, 0], (a + b + c + d) / 4)


@quick
@given(batches(), keeps, st.booleans(), st.sampled_from(["raster", "matching"]))
def test_merging_each_image_of_a_ragged_batch(batch: Ragged, keep: Any, weighted: bool, order: str) -> None:
    reducer = AIM(keep, weighted=weighted, order=order)
    token_map = merged(reducer, batch)
    for row, slots in batch.images():
        expected = merging(batch.tokens[row, slots], budget(keep, len(slots)), weighted=weighted)
        if order == "raster":
            expected.sort(key=lambda t: t.keeper)
        found = [e for e in edges(token_map, row) if e[0] in slots]
        assert [e[0] for e in found] == [slots[t.keeper] for t in expected]
        for (_, members), token in zip(found, expected, strict=True):
            assert [m for m, _ in members] == [slots[s] for s in sorted(token.sources)]
            np.testing.assert_allclose([w for _, w in members], [token.sources[s] for s in sorted(token.sources)], rtol=1e-6)
        assert counted(reducer, len(slots), len(slots)) == len(expected)
    if order == "raster":
        check_raster(batch, token_map, [budget(keep, h * w) for h, w in batch.grids])
    check_rows(batch, token_map, [merged(reducer, row) for row in batch.rows])


def test_frames_are_merged_each_on_its_own() -> None:
    batch = make([[1, (2, 4), 1]])
    place = batch.layout.place.clone()
    place[..., 2] = torch.where(batch.layout.visual, batch.layout.rank_in_image // 4, -1)
    batch = replace(batch, layout=replace(batch.layout, place=place))
    for scope, groups in (("frame", [[1, 2, 3, 4], [5, 6, 7, 8]]), ("image", [list(range(1, 9))])):
        found = [members for slot, members in edges(merged(AIM(1, scope=scope), batch), 0) if 0 < slot < 9]
        assert [[m for m, _ in members] for members in found] == groups


@pytest.mark.parametrize("keep", [1.0, 16, 99])
def test_keeping_everything_is_the_identity(keep: Any) -> None:
    reducer = AIM(keep, steps=0)
    assert merged(reducer, make([[1, (4, 4), 2], [3]], left=True)).is_identity
    assert len(reducer.sites(32)) == 1


# ---- the walk


def test_the_walk_of_the_card() -> None:
    x = walk(AttentionRows.of(CARD[None, None]), torch.ones(1, 3, dtype=torch.bool), temperature=1.0)
    torch.testing.assert_close(x, torch.tensor([[[0.948, 0.042, 0.010]]]), rtol=0, atol=5e-4)


@pytest.mark.parametrize("elements", [1 << 26, 1, 90])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_the_walk_of_a_padded_batch_is_that_of_its_rows(elements: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of any size."""
    monkeypatch.setattr(aim, "ELEMENTS", elements)
    valid = torch.tensor([[True] * 7, [False] * 3 + [True] * 4, [True] * 5 + [False] * 2])
    attention = causal(valid)
    x = walk(attention, valid, walks=3, temperature=temperature)
    for row in range(3):
        there = valid[row].nonzero()[:, 0].tolist()
        np.testing.assert_allclose(
            x[row][:, there].square().mean(0).sqrt().numpy(), importance(attention, row, there, temperature, 3), rtol=1e-4, atol=1e-7
        )
    torch.testing.assert_close(x.sum(-1), torch.ones(3, 2))
    assert bool((x.transpose(1, 2)[~valid] == 0).all())


def test_padding_that_the_attention_does_not_mask_is_left_out() -> None:
    """Attention functions that pack the batch are called without a mask."""
    valid = torch.tensor([[False, False, True, True, True, True]])
    attention = causal(valid)
    torch.testing.assert_close(walk(replace(attention, mask=None), valid), walk(attention, valid))


def test_weight_on_cached_slots_never_comes_back() -> None:
    """The walk over the whole map, of which the chunk has only its own rows, ends the same way on the chunk."""
    valid = torch.ones(1, 4, dtype=torch.bool)
    attention = causal(valid, past=3)
    rows = attention.rows(torch.arange(4)[None])
    whole = torch.zeros(1, 2, 7, 7)
    whole[:, :, :3, :3] = torch.eye(3)
    whole[:, :, 3:] = rows
    expected = walk(AttentionRows.of(whole), torch.ones(1, 7, dtype=torch.bool), temperature=0.5)[..., 3:]
    torch.testing.assert_close(walk(attention, valid, temperature=0.5) * 4 / 7, expected)
    # The same in terms of slots, two of which are padding that stands for the first key.
    layout = Layout.sequence(torch.zeros(1, 6, dtype=torch.bool), valid_BN=torch.tensor([[True] * 4 + [False] * 2]))
    here = TokenMap.keep(layout, layout.valid)
    slots = replace(here, representative=torch.tensor([[0, 1, -1, 2, 3, -1]]))
    found = walk(attention.of_slots(slots, 3), torch.tensor([[True, True, False, True, True, False]]), temperature=0.5)
    torch.testing.assert_close(found[..., [0, 1, 3, 4]] * 4 / 7, expected)
    assert not found[..., [2, 5]].any()


# ---- pruning


def pruning(batch: Ragged, stage: int, attention: AttentionRows | None = None, steps: int = 8) -> tuple[AIM, View]:
    """In front of a pruning in a model of 28 layers; the first stands in front of layer 14."""
    reducer = AIM(1.0, steps=steps)
    signals: dict[Signal, Any] = {
        Attention(reducer.sites(28)[stage].layer - 1): causal(batch.layout.valid) if attention is None else attention
    }
    return reducer, View.of(batch.tokens, layout=batch.layout, signals=signals, layers=28)


@quick
@given(batches(), st.integers(1, 3), st.integers(0, 9))
def test_pruning_each_image_of_a_ragged_batch(batch: Ragged, stage: int, seed: int) -> None:
    attention = causal(batch.layout.valid, seed=seed)
    reducer, view = pruning(batch, stage, attention, steps=4)
    token_map = reducer.reduce(view, stage).map
    for row, slots in batch.images():
        there = batch.layout.valid[row].nonzero()[:, 0].tolist()
        score = dict(zip(there, importance(attention, row, there).tolist(), strict=True))
        found = [i for i in kept(token_map, row) if i in slots]
        left = budget(1 - stage / 4, len(slots))
        assert len(found) == left == counted(reducer, len(slots), len(slots), stage)
        dropped = [i for i in slots if i not in found]
        # Rounding may tell apart what the oracle calls equal, no more.
        assert all(score[d] <= score[k] * (1 + 1e-4) + 1e-9 for d in dropped for k in found)
    check_raster(batch, token_map, [budget(1 - stage / 4, h * w) for h, w in batch.grids])
    alone = []
    for b, (own, (start, end)) in enumerate(zip(batch.rows, batch.spans, strict=True)):
        alone.append(reducer.reduce(pruning(own, stage, one_row(attention, b, start, end), steps=4)[1], stage).map)
    check_rows(batch, token_map, alone)


def test_heads_may_be_permuted() -> None:
    batch = make([[1, (3, 4), 2]])
    attention = causal(batch.layout.valid, heads=3)
    turned = replace(attention, query=attention.query[:, [2, 0, 1]])
    first, second = (r.reduce(v, 4).map for r, v in (pruning(batch, 4, a) for a in (attention, turned)))
    assert torch.equal(first.representative, second.representative)


def test_importance_is_the_root_of_the_mean_square_over_heads() -> None:
    """Token 1 beats token 2 in the mean square over heads, not in the mean."""
    to = torch.zeros(1, 2, 4, 4)
    to[0, 0, :, :] = torch.tensor([0, 0.9, 0.1, 0])
    to[0, 1, :, :] = torch.tensor([0, 0, 0.85, 0.15])
    reducer = AIM(1.0, start=1, stop=4, steps=4, temperature=1.0)
    view = View.of(torch.randn(1, 4, 2), signals={Attention(2): AttentionRows.of(to)}, layers=5)
    assert kept(reducer.reduce(view, 3).map) == [1]
    assert to[0, :, 0].mean(0).argmax() == 2


def test_only_the_prompt_walks() -> None:
    """Other states behind the asking slot change nothing, where as a part of the prompt they would."""
    batch = make([[1, (3, 4), 9]])
    first, other = causal(batch.layout.valid, seed=1), causal(batch.layout.valid, seed=2)
    other = replace(first, query=torch.cat([first.query[:, :, :15], other.query[:, :, 15:] * 9], 2))
    found = []
    for asking in (14, 21):
        for attention in (first, other):
            reducer, view = pruning(batch, 6, attention)
            found.append(kept(reducer.reduce(view.asked_at(torch.tensor([asking])), 6).map))
    assert found[0] == found[1]
    assert found[2] != found[3]


def test_the_last_stage_drops_every_visual_token() -> None:
    batch = make([[1, (2, 2), 2], [4]])
    reducer, view = pruning(batch, 8)
    token_map = reducer.reduce(view, 8).map
    check_raster(batch, token_map, [0])
    assert counted(reducer, 4, 4, 8) == 0


def test_shares_are_of_the_tokens_after_merging() -> None:
    """32 and 8 tokens merge to 16 and 4; of these stage 2 of 4 leaves 8 and 2, whatever is left of them by then."""
    batch = make([[1, (4, 8), 1, (2, 4), 1]])
    first = batch.view()
    reducer = AIM(0.5, steps=4)
    once = reducer.reduce(first).map
    tokens, layout = once.apply(batch.tokens), once.target
    for stage, numbers in ((1, [12, 3]), (2, [8, 2]), (3, [4, 1]), (4, [0, 0])):
        signals: dict[Signal, Any] = {Attention(reducer.sites(28)[stage].layer - 1): causal(layout.valid)}
        view = View(layout, tokens, signals=signals, first=first, layers=28).asked_at(layout.valid.sum(1) - 1)
        token_map = reducer.reduce(view, stage).map
        tokens, layout = token_map.apply(tokens), token_map.target
        assert [int((layout.visual & (layout.image == i)).sum()) for i in (0, 1)] == numbers
        assert [counted(reducer, n, whole, stage) for n, whole in ((99, 32), (99, 8))] == numbers
    assert layout.valid.sum() == 3


def test_a_text_only_batch() -> None:
    layout = Layout.sequence(torch.zeros(2, 3, dtype=torch.bool))
    signals: dict[Signal, Any] = {Attention(13): causal(layout.valid)}
    view = View.of(torch.randn(2, 3, 4), layout=layout, signals=signals, layers=28)
    assert all(AIM().reduce(view, stage).map.is_identity for stage in (0, 1, 8))


# ---- the schedule


def test_the_schedule_of_the_card() -> None:
    sites = AIM().sites(28)
    assert sites[0] == BeforeLM()
    assert sites[1:] == [FromLayer(layer, (Attention(layer - 1),)) for layer in range(14, 22)]
    assert [AIM().share(stage) for stage in range(1, 9)] == [0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]
    counts = AIM(0.25).visual_tokens(196, 28)
    assert counts == [49] * 14 + [43, 37, 31, 25, 18, 12, 6] + [0] * 7


def test_the_schedule_of_vicuna() -> None:
    assert [site.layer for site in AIM(start=13, stop=20).sites(32)] == [0, *range(13, 21)]


@pytest.mark.parametrize("layers", [1, 2, 4, 12, 32, 80])
def test_the_schedule_at_any_depth(layers: int) -> None:
    at = [site.layer for site in AIM().sites(layers)][1:]
    assert len(at) == 8
    assert at == sorted(set(at))
    assert at[0] == max(1, round(layers / 2))
    if layers >= 32:
        assert at[-1] == layers * 3 // 4
    AIM().visual_tokens(64, layers)


def test_positions() -> None:
    assert [AIM().positions_at(stage) for stage in (0, 1, 8)] == ["renumber", "keep", "keep"]
    assert AIM(positions="keep").positions_at(0) == "keep"


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"keep": 1.5},
        {"steps": -1},
        {"steps": 1.0},
        {"walks": 0},
        {"start": 0},
        {"start": 1.5},
        {"stop": True},
        {"stop": 0.25},
        {"temperature": 0},
        {"temperature": "low"},
        {"weighted": 1},
        {"order": "x"},
        {"scope": "x"},
        {"positions": "x"},
    ],
)
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        AIM(**options)


def test_views_that_lack_something() -> None:
    layout = make([[(2, 2)]]).layout
    with pytest.raises(FoveateError, match="aim looks at the tokens' states"):
        AIM().reduce(View(layout))
    with pytest.raises(FoveateError, match=r"aim: at which layer .* give View.of\(layers=…\)"):
        AIM().reduce(View(layout), 1)
    with pytest.raises(FoveateError, match=r"Attention.layer=13. is not provided here"):
        AIM().reduce(View(layout, layers=28), 1)
