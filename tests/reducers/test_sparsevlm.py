"""SparseVLM against plain oracles for raters, scores and clusters, the card's numbers, and what must hold of recycled tokens."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import Attention, AttentionRows, FromLayer, Signal, View
from foveate.reducers.base import parse_with
from foveate.reducers.sparsevlm import LISTS, SparseVLM, peaks, raters, relevance
from foveate.tokens import Layout, TokenMap, budget, top
from tests.reducers.ragged import counted
from tests.reducers.test_fastv import alone, grades, images, keeps, ranked, survivors, view
from tests.test_tokens import layouts

quick = settings(max_examples=40)


def one(**options: object) -> SparseVLM:
    """A single cut, in front of layer 2."""
    return SparseVLM(**{"layers": 2, **options})  # type: ignore[arg-type]


def clusters_oracle(x: np.ndarray, clusters: int) -> list[list[int]]:
    """Density peaks in loops: the members of each, centre first, the highest peak first. A token is its own nearest neighbour."""
    T = len(x)
    d = [[math.sqrt(sum((x[i] - x[j]) ** 2) / x.shape[1]) for j in range(T)] for i in range(T)]
    density = []
    for i in range(T):
        near = sorted(d[i])[:clusters]
        density.append(math.exp(-sum(v * v for v in near) / len(near)))
    apart = []
    for i in range(T):
        above = [d[i][j] for j in range(T) if (density[j], -j) > (density[i], -i)]
        apart.append(min(above) if above else max(map(max, d)))
    centres = sorted(range(T), key=lambda i: (-density[i] * apart[i], i))[:clusters]
    members = {c: [c] for c in centres}
    for i in range(T):
        if i not in centres:
            members[min(centres, key=lambda c: (d[i][c], c))].append(i)
    return list(members.values())


def oracle(layout: Layout, weights: Tensor, tokens: Tensor, reducer: SparseVLM, b: int) -> dict[int, list[int]]:
    """Representative -> sources of one row whose view is also the first, in loops."""
    x, a = tokens[b].double().numpy(), weights[b].double().mean(0).numpy()
    valid = [s for s in range(layout.shape[1]) if bool(layout.valid[b, s])]
    text = [s for s in valid if not bool(layout.visual[b, s])]
    out = {s: [s] for s in text}
    for slots in images(layout, b):
        behind = [t for t in text if t > slots[-1]]
        share = dict.fromkeys(behind, 0.0)
        for v in slots:
            e = {t: math.exp(x[v] @ x[t]) for t in behind}
            for t in behind:
                share[t] += e[t] / sum(e.values()) / len(slots)
        rows = [t for t in behind if share[t] >= 1 / len(behind) - 1e-9] or [valid[-1]]
        score = np.zeros(layout.shape[1])
        for s in slots:
            score[s] = sum(a[q, s] for q in rows) / len(rows)
        kept = ranked(score, slots, budget(reducer._entries[0], len(slots)))
        out |= {s: [s] for s in kept}
        dropped = [s for s in slots if s not in kept]
        if reducer.recycle and dropped:
            best = sorted(ranked(score, dropped, int(0.3 * len(dropped) + 1e-9) + 1))
            for cluster in clusters_oracle(x[best], int(len(best) / 10) + 1):
                out[best[cluster[0]]] = sorted(best[i] for i in cluster)
    return dict(sorted(out.items()))


def targets(m: TokenMap, b: int = 0) -> dict[int, list[int]]:
    return {r: m.sources(b, t) for t, r in enumerate(m.representative[b].tolist()) if r >= 0 and bool(m.target.valid[b, t])}


@quick
@given(layouts(), keeps, st.booleans(), st.integers(0, 10**6))
def test_the_rule_is_the_cards_in_ragged_batches(layout: Layout, keep: float | int, recycle: bool, seed: int) -> None:
    torch.manual_seed(seed)
    B, N = layout.shape
    weights, tokens = torch.rand(B, 2, N, N), torch.randn(B, N, 4)
    reducer = one(keep=keep, recycle=recycle)
    m = reducer.reduce(view(layout, weights, tokens=tokens)).map
    for b in range(B):
        assert targets(m, b) == oracle(layout, weights, tokens, reducer, b)
        assert list(targets(m, b)) == sorted(targets(m, b))
        row, slots = alone(layout, b)
        single = reducer.reduce(view(row, weights[b][None, :, slots][..., slots], tokens=tokens[b, slots][None])).map
        assert {int(slots[r]): [int(slots[s]) for s in sources] for r, sources in targets(single).items()} == targets(m, b)
        lives = m.target.valid[b].nonzero()[:, 0]
        torch.testing.assert_close(single.apply(tokens[b, slots][None])[0], m.apply(tokens)[b, lives], rtol=0, atol=1e-5)
    assert m.target.lengths() == [counted(reducer, n, n) for n in layout.lengths()]
    if not recycle:
        assert m.target.lengths() == [budget(keep, n) for n in layout.lengths()]


def test_several_clusters_of_two_large_images() -> None:
    layout = Layout.sequence((torch.arange(180)[None] % 90 < 80), [80, 80])
    weights, tokens = torch.rand(1, 2, 180, 180), torch.randn(1, 180, 6)
    reducer = one(keep=20)
    m = reducer.reduce(view(layout, weights, tokens=tokens)).map
    assert targets(m) == oracle(layout, weights, tokens, reducer, 0)
    assert m.target.lengths() == [22, 22]  # 60 dropped, 19 of them in 2 clusters
    assert m.target.size.sum() == 2 * (20 + 19)


@quick
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 10**6))
def test_clusters_are_density_peaks(tokens: int, clusters: int, seed: int) -> None:
    torch.manual_seed(seed)
    clusters = min(clusters, tokens)
    x = torch.randn(tokens, 3)
    centres, found = (indices.tolist() for indices in peaks(x, clusters))
    expected = clusters_oracle(x.double().numpy(), clusters)
    assert centres == [members[0] for members in expected]
    assert [sorted(members) for members in expected] == [[i for i in range(tokens) if found[i] == c] for c in centres]
    assert all(found[c] == c for c in found)


def test_two_clouds_are_two_clusters_and_equal_tokens_go_by_order() -> None:
    x = torch.tensor([[0.0], [0.1], [-0.1], [9.0], [9.1], [8.9]])
    assert peaks(x, 2)[1].tolist() == [0, 0, 0, 3, 3, 3]
    assert peaks(torch.ones(5, 2), 2)[1].tolist() == [0, 1, 0, 0, 0]


def test_raters_of_the_hand_example() -> None:
    visual, text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    assert [round(r, 3) for r in relevance(visual, text).tolist()] == [0.555, 0.136, 0.309]
    assert raters(visual, text).tolist() == [True, False, False]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50])
def test_equal_text_tokens_all_rate(n: int) -> None:
    for _ in range(20):
        assert bool(raters(torch.randn(9, 4), torch.randn(1, 4).expand(n, 4)).all())


def test_only_raters_score_and_only_those_behind_the_image() -> None:
    """One slot of text in front (it would be the best rater), four patches, and two behind, of which the second rates."""
    layout = Layout.sequence(torch.tensor([[0, 1, 1, 1, 1, 0, 0]]).bool())
    tokens = torch.tensor([[9.0, 1.0, 1.0, 1.0, 1.0, 0.0, 2.0]])[..., None]
    weights = torch.zeros(1, 1, 7, 7)
    weights[0, 0, 0, 2], weights[0, 0, 5, 3], weights[0, 0, 6, 4] = 9.0, 9.0, 0.5
    assert survivors(one(keep=1, recycle=False).reduce(view(layout, weights, tokens=tokens)).map) == [0, 4, 5, 6]


def test_an_image_that_no_text_follows_is_rated_by_the_last_slot() -> None:
    layout = Layout.sequence(torch.tensor([[0, 1, 1, 1, 1]]).bool())
    weights = torch.zeros(1, 1, 5, 5)
    weights[0, 0, 0, 1], weights[0, 0, 4, 3] = 9.0, 0.5
    assert survivors(one(keep=1, recycle=False).reduce(view(layout, weights)).map) == [0, 3]


def test_raters_are_chosen_on_the_first_view_and_found_again_behind_a_cut() -> None:
    layout = Layout.sequence(torch.tensor([[0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]).bool(), [4, 3, 6])
    first = view(layout, torch.zeros(2, 1, 12, 12), tokens=torch.randn(2, 12, 4))
    assert first.tokens is not None
    cut = TokenMap.keep(layout, top(layout, torch.rand(2, 12), 2))
    here = cut.target
    B, M = here.shape
    weights = torch.rand(B, 2, M, M)
    later = replace(view(here, weights, tokens=torch.randn(B, M, 4)), first=first)
    got = one(keep=1, recycle=False).reduce(later).map
    for b in range(B):
        text = [s for s in range(12) if bool(layout.valid[b, s]) and not bool(layout.visual[b, s])]
        now = [s for s in range(M) if bool(here.valid[b, s]) and not bool(here.visual[b, s])]
        kept = list(now)
        for old, slots in zip(images(layout, b), images(here, b), strict=True):
            behind = [t for t in text if t > old[-1]]
            chosen = raters(first.tokens[b, old], first.tokens[b, behind]).tolist()
            rows = [now[text.index(t)] for t, rates in zip(behind, chosen, strict=True) if rates]
            kept += ranked(weights[b].mean(0)[rows].mean(0).numpy(), slots, 1)
        assert survivors(got, b) == sorted(kept)


def test_lengths_of_192() -> None:
    counts = SparseVLM().visual_tokens(576, 32)
    assert counts == [576] * 3 + [309] * 4 + [204] * 9 + [113] * 16
    assert sum(counts) / 32 == 206.5
    nominal = SparseVLM(recycle=False).visual_tokens(576, 32)
    assert nominal == [576] * 3 + [300] * 4 + [200] * 9 + [110] * 16
    assert [site.layer for site in SparseVLM().sites(32)] == [3, 7, 16]
    assert SparseVLM().sites(32)[0] == FromLayer(3, (Attention(2),))
    assert SparseVLM().positions == "renumber"
    assert SparseVLM().visual_tokens(16, 4) == [16] * 4  # smaller than the lists: nothing is dropped


@pytest.mark.parametrize(("name", "budgets"), LISTS.items())
def test_the_codes_lists_by_name(name: str, budgets: tuple[int, ...]) -> None:
    counts = SparseVLM(name, recycle=False).visual_tokens(576, 32)
    assert (counts[3], counts[7], counts[16]) == budgets
    assert SparseVLM(name) != SparseVLM(budgets)
    assert SparseVLM(budgets, recycle=False).visual_tokens(576, 32) == counts


def test_counts_of_recycled_tokens_have_no_float_traps() -> None:
    for n in range(1, 3000):
        candidates = math.floor(n * 3 / 10 + 1e-9) + 1
        assert counted(one(keep=1), n + 1, n + 1) == 1 + candidates // 10 + 1
        assert counted(one(keep=1), n + 1, n + 1) <= n + 1


def test_sum_or_mean_and_raster_or_appended() -> None:
    """Slots 0 to 6 are one image; 6, 5 and 4 stay, and of the others 3 and 2 are one cluster, in slot 2 (all are equal, so the first)."""
    layout = Layout.sequence(torch.arange(9)[None] < 7)
    weights = torch.zeros(1, 1, 9, 9)
    weights[..., :7] = torch.arange(7) / 7
    tokens = torch.ones(1, 9, 2)
    tokens[0, 4:] = torch.arange(5)[:, None] + 5.0

    def run(**options: object) -> TokenMap:
        return one(keep=3, **options).reduce(view(layout, weights, tokens=tokens)).map

    assert targets(run()) == {2: [2, 3], 4: [4], 5: [5], 6: [6], 7: [7], 8: [8]}
    assert run().apply(tokens)[0, :, 0].tolist() == [2, 5, 6, 7, 8, 9]
    assert run(merge="mean").apply(tokens)[0, :, 0].tolist() == [1, 5, 6, 7, 8, 9]
    assert run(order="append").apply(tokens)[0, :, 0].tolist() == [5, 6, 7, 2, 8, 9]
    assert run(order="append", merge="mean").representative.tolist() == [[4, 5, 6, 2, 7, 8]]
    assert run(recycle=False).apply(tokens)[0, :, 0].tolist() == [5, 6, 7, 8, 9]
    assert run(order="append").target.size.tolist() == [[1, 1, 1, 2, 0, 0]]


@quick
@given(layouts(), st.integers(1, 4), st.integers(0, 10**6))
def test_appended_tokens_stand_behind_their_own_image_and_mean_leaves_equal_tokens_alone(layout: Layout, keep: int, seed: int) -> None:
    torch.manual_seed(seed)
    B, N = layout.shape
    # Two colours only, one an image's and one the text's: clusters of one image must not meet another's.
    tokens = torch.where(layout.visual, layout.image + 1.0, -1.0)[..., None].expand(B, N, 2)
    given = view(layout, torch.rand(B, 1, N, N), tokens=tokens)
    raster, appended = (one(keep=keep, merge="mean", order=order).reduce(given).map for order in ("raster", "append"))
    for b in range(B):
        assert targets(raster, b) == dict(sorted(targets(appended, b).items()))
    for m in (raster, appended):
        expected = torch.where(m.target.visual, m.target.image + 1.0, -1.0)[..., None].expand(-1, -1, 2)
        torch.testing.assert_close(m.apply(tokens)[m.target.valid], expected[m.target.valid], rtol=0, atol=1e-5)
        assert [[s for s in survivors(m, b) if not bool(layout.visual[b, s])] for b in range(B)] == [
            (layout.valid[b] & ~layout.visual[b]).nonzero()[:, 0].tolist() for b in range(B)
        ]
        for b in range(B):  # images stay in one piece and in order
            seen = [int(i) for i in m.target.image[b][m.target.visual[b]]]
            assert seen == sorted(seen)
    assert raster.target.lengths() == appended.target.lengths() == [counted(one(keep=keep), n, n) for n in layout.lengths()]


@quick
@given(layouts(), st.integers(1, 6), st.integers(0, 10**6))
def test_order_of_heads_scale_and_the_random_state_change_nothing(layout: Layout, keep: int, seed: int) -> None:
    torch.manual_seed(seed)
    B, N = layout.shape
    weights, tokens = grades(B, 4, N, N), torch.randn(B, N, 3)
    whole = one(keep=keep).reduce(view(layout, weights, tokens=tokens)).map
    for other in (weights, weights[:, [2, 0, 3, 1]], 0.25 * weights):
        torch.manual_seed(seed + 1)
        m = one(keep=keep).reduce(view(layout, other, tokens=tokens)).map
        assert torch.equal(m.member, whole.member)
        assert torch.equal(m.representative, whole.representative)


@quick
@given(layouts(), st.sampled_from([1.0, 9, 576, "v1-192"]), st.booleans())
def test_keeping_everything_is_the_identity(layout: Layout, keep: float | int | str, recycle: bool) -> None:
    B, N = layout.shape
    reducer = SparseVLM(keep, (2, 3, 4), recycle)
    weights: dict[Signal, Any] = {Attention(k): AttentionRows.of(torch.rand(B, 1, N, N)) for k in (1, 2, 3)}
    for stage in range(3):
        assert reducer.reduce(View.of(torch.randn(B, N, 3), layout=layout, signals=weights), stage).map.is_identity


def test_each_stage_reads_its_own_layer_and_budget() -> None:
    layout = Layout.sequence(torch.arange(10)[None] < 8)
    weights = torch.zeros(2, 1, 1, 10, 10)
    weights[0, ..., 1], weights[1, ..., 6] = 1.0, 1.0
    given = View.of(
        torch.zeros(1, 10, 1),
        layout=layout,
        signals={Attention(1): AttentionRows.of(weights[0]), Attention(4): AttentionRows.of(weights[1])},
    )
    reducer = SparseVLM((2, 1), (2, 5), recycle=False)
    assert survivors(reducer.reduce(given, 0).map) == [0, 1, 8, 9]
    assert survivors(reducer.reduce(given, 1).map) == [6, 8, 9]


def test_of_original_counts_what_was_there_before_another_cut() -> None:
    assert SparseVLM((0.5, 0.25), (2, 3), recycle=False).visual_tokens(40, 4) == [40, 40, 20, 10]
    assert SparseVLM((0.5, 0.25), (2, 3), recycle=False, of="arriving").visual_tokens(40, 4) == [40, 40, 20, 5]
    layout = Layout.sequence(torch.arange(22)[None] < 20)
    first = view(layout, torch.rand(1, 1, 22, 22), tokens=torch.randn(1, 22, 3))
    cut = TokenMap.keep(layout, top(layout, torch.rand(1, 22), 12))
    later = replace(view(cut.target, torch.rand(1, 1, 14, 14), tokens=torch.randn(1, 14, 3)), first=first)
    for of, kept in (("original", 10), ("arriving", 6)):
        reducer = one(keep=0.5, of=of)
        assert reducer.reduce(later).map.target.lengths() == [counted(reducer, 12, 20)] == [kept + 1]


@pytest.mark.parametrize(
    "reducer",
    [
        SparseVLM(),
        SparseVLM((300, 200, 110)),
        SparseVLM((0.5, 0.25), (1, 2), False, "mean", "append"),
        SparseVLM("v2-64", recycle=False, positions="keep"),
        one(keep=5),
    ],
)
def test_the_spelling_is_read_back(reducer: SparseVLM) -> None:
    assert parse_with(str(reducer), {"sparsevlm": SparseVLM}) == [reducer]
    assert SparseVLM.from_dict(reducer.to_dict()) == reducer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "v1-100"}, "keep='v1-100' is no list of the code's; choose one of v1-192, "),
        ({"keep": (300, 200)}, "has 2 entries, layers=3-7-16 has 3"),
        ({"keep": (300, 200, 0)}, "keep=0 is not possible"),
        ({"keep": "many"}, "keep='many' is not possible"),
        ({"layers": (0, 3, 4)}, "ascending integers >= 1"),
        ({"layers": (3, 3, 4)}, "ascending integers >= 1"),
        ({"layers": (3, 4, 5.5)}, "ascending integers >= 1"),
        ({"layers": "deep"}, "layers='deep' is not possible"),
        ({"recycle": 1}, "recycle=1 is not possible; choose true or false"),
        ({"merge": "max"}, 'merge=\'max\' is not possible; choose "sum" or "mean"'),
        ({"order": "score"}, 'order=\'score\' is not possible; choose "raster" or "append"'),
        ({"of": "all"}, "of='all' is not possible"),
    ],
)
def test_impossible_options_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        SparseVLM(**options)  # type: ignore[arg-type]


def test_what_a_view_lacks_is_an_error() -> None:
    layout = Layout.sequence(torch.arange(8)[None] < 6)
    whole = view(layout, torch.rand(1, 1, 8, 8), tokens=torch.randn(1, 8, 2))
    with pytest.raises(FoveateError, match="where the question ends is not known"):
        one(keep=2).reduce(replace(whole, questions=None))
    with pytest.raises(FoveateError, match="recycling needs the tokens' states"):
        one(keep=2).reduce(replace(whole, tokens=None, first=whole))
    assert one(keep=2, recycle=False).reduce(replace(whole, tokens=None, first=whole)).map.target.lengths() == [2]
    with pytest.raises(FoveateError, match="2 text slots in front of the first layer, 1 here"):
        one(keep=2).reduce(replace(whole.asked_at(torch.tensor([6])), first=whole))
