"""Each cache policy against a slow plain reading of its rule, row by row and head by head, and the numbers that can be found by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foveate import FoveateError
from foveate.cache_policies import POLICIES, LookM, PrefixKV, PyramidKV, RandomEviction, SnapKV, ZipVL, parse
from foveate.cache_policies.lookm import merge, nearest
from foveate.cache_policies.pyramidkv import pyramid
from foveate.cache_policies.zipvl import important, normalised
from foveate.contract import CacheView
from foveate.errors import NotApplicable
from tests.cache_policies.views import HEADS, KEY_HEADS, WIDTH, attention, best, kept, of_attention, view

LENGTHS = [14, 10, 11]
both_sides = pytest.mark.parametrize("side", ["left", "right"])


def half_up(x: float) -> int:
    return max(1, floor(x + 0.5))


def by_key_head(weights: Tensor, g: int) -> Tensor:
    """(n, n) mean of the query heads of a key head."""
    return weights[g * (HEADS // KEY_HEADS) : (g + 1) * (HEADS // KEY_HEADS)].mean(0)


# ---- every policy ---------------------------------------------------------------------------------------------------------------------

EXAMPLES = [spelling for policy in POLICIES.values() for spelling in policy.examples]


def decided(spelling: str, one: CacheView) -> Tensor:
    policy = parse(spelling)
    assert policy is not None
    if isinstance(policy, PrefixKV):
        return policy.decide_together([one], [policy.score(one)])[0].stays
    return policy.decide(one).stays


@pytest.mark.parametrize("spelling", EXAMPLES)
def test_a_row_decides_the_same_in_any_batch(spelling: str) -> None:
    together = {side: view(LENGTHS, side=side) for side in ("left", "right")}
    for row, n in enumerate(LENGTHS):
        alone = view([n])
        expected = kept(alone, decided(spelling, alone), 0)
        assert 0 < sum(map(len, expected)) < len(expected) * n
        for one in together.values():
            assert kept(one, decided(spelling, one), row) == expected


@pytest.mark.parametrize("spelling", [s for policy in POLICIES.values() for s in policy.keeps_all])
def test_what_keeps_all_lets_no_token_go(spelling: str) -> None:
    one = view(LENGTHS)
    assert torch.equal(decided(spelling, one), one.there.expand_as(decided(spelling, one)))


@pytest.mark.parametrize("spelling", [*EXAMPLES, "snapkv:keep=0.3,window=7,kernel=3,every=64", "zipvl", "prefixkv"])
def test_a_spelling_is_read_back(spelling: str) -> None:
    policy = parse(spelling)
    assert policy is not None
    assert parse(str(policy)) == policy


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_says_what_the_common_tests_run(name: str) -> None:
    policy = POLICIES[name]
    assert policy.examples
    assert policy.keeps_all
    assert policy.paper
    kept_all = [parse(spelling) for spelling in policy.keeps_all]
    assert kept_all[0] is not None
    assert kept_all[0].keeps_everything
    assert not any(one.keeps_everything for one in map(parse, policy.examples) if one is not None)


@pytest.mark.parametrize(
    ("spelling", "what"),
    [
        ("snapkv:keep=0", "keep=0"),
        ("snapkv:keep=1.5", "keep=1.5"),
        ("random:keep=-1", "keep=-1"),
        ("snapkv:window=0", "window=0"),
        ("snapkv:kernel=4", "odd"),
        ("pyramidkv:beta=0", "beta=0"),
        ("lookm:merge=sum", "merge='sum'"),
        ("zipvl:tau=0.0", "tau=0.0"),
        ("zipvl:tau=1.5", "tau=1.5"),
        ("zipvl:keep=0.5", "no option 'keep'"),
        ("prefixkv:first=-1", "first=-1"),
        ("random:every=-1", "every=-1"),
        ("snapvk", "did you mean 'snapkv'"),
    ],
)
def test_what_is_not_possible_is_refused(spelling: str, what: str) -> None:
    with pytest.raises(FoveateError, match=what) as error:
        parse(spelling)
    assert not isinstance(error.value, NotApplicable)


@pytest.mark.parametrize("spelling", EXAMPLES)
def test_what_it_multiplies_is_what_it_says(spelling: str) -> None:
    one, policy = view([14]), parse(spelling)
    with FlopCounterMode(display=False) as counter:
        decided(spelling, one)
    assert policy is not None
    assert counter.get_total_flops() == policy.score_flops(14, HEADS * WIDTH, KEY_HEADS * WIDTH)


def test_a_policy_without_a_share_cannot_be_set_to_one() -> None:
    assert SnapKV().at(0.25) == SnapKV(keep=0.25)
    with pytest.raises(FoveateError, match="no option keep"):
        ZipVL().at(0.25)


# ---- random ---------------------------------------------------------------------------------------------------------------------------


def test_random_keeps_a_set_of_its_own_in_every_head_layer_and_seed() -> None:
    one, other = view([40]), view([40], layer=2)
    sets = [
        tuple(kept(v, RandomEviction(keep=0.5, seed=seed).decide(v).stays, 0)[g]) for v in (one, other) for seed in (0, 1) for g in (0, 1)
    ]
    assert len(set(sets)) == len(sets)
    assert {len(found) for found in sets} == {20}
    assert 5 < len(set(sets[0]) & set(range(20))) < 15  # neither end is preferred


# ---- snapkv ---------------------------------------------------------------------------------------------------------------------------


def snapkv_by_hand(one: CacheView, row: int, number: int, window: int, kernel: int) -> list[list[int]]:
    found = []
    for g in range(KEY_HEADS):
        weights = by_key_head(attention(one, row), g)
        n = len(weights)
        prefix = n - window
        seen = [sum(float(weights[q, k]) for q in range(n - window, n)) for k in range(prefix)]
        reach = kernel // 2
        pooled = [sum(seen[j] for j in range(k - reach, k + reach + 1) if 0 <= j < prefix) / kernel for k in range(prefix)]
        found.append(best(pooled, number - window) + list(range(prefix, n)))
    return found


@both_sides
@pytest.mark.parametrize(("window", "kernel"), [(3, 5), (4, 1), (1, 3)])
def test_snapkv_by_its_equations(side: str, window: int, kernel: int) -> None:
    one = view(LENGTHS, side=side)
    stays = SnapKV(keep=0.6, window=window, kernel=kernel).decide(one).stays
    for row, n in enumerate(LENGTHS):
        assert kept(one, stays, row) == snapkv_by_hand(one, row, half_up(0.6 * n), window, kernel)


def test_snapkv_with_a_budget_within_the_window_keeps_the_newest() -> None:
    one = view(LENGTHS)
    stays = SnapKV(keep=3, window=6).decide(one).stays
    assert [kept(one, stays, row) for row in range(3)] == [[[n - 3, n - 2, n - 1]] * 2 for n in LENGTHS]


# ---- pyramidkv ------------------------------------------------------------------------------------------------------------------------


def test_pyramidkvs_budgets_by_hand() -> None:
    # 100 tokens, window 10, mean 40: 30 beside the window; beta 3: from 2 * 30 - 10 = 50 down to 10 in five equal steps.
    assert pyramid(40, 100, 10, 5, 3) == [60, 50, 40, 30, 20]
    # Mean 80: 70 beside the window; beta 20 would ask for 136.5 of 90: from 90 down to 2 * 70 - 90 = 50.
    assert pyramid(80, 100, 10, 5, 20) == [100, 90, 80, 70, 60]
    assert pyramid(10, 100, 10, 5, 20) == [10] * 5
    assert pyramid(40, 100, 10, 1, 20) == [40]


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 12), st.integers(1, 30), st.floats(0.01, 1))
def test_pyramidkv_keeps_as_much_as_snapkv_and_never_more_above(tokens: int, window: int, layers: int, beta: int, share: float) -> None:
    mean = half_up(share * tokens)
    found = pyramid(mean, tokens, min(window, tokens), layers, beta)
    assert sum(found) == mean * layers
    assert max(found) <= tokens
    assert all(a >= b - 1 for a, b in itertools.pairwise(found))  # what rounding leaves over may stand anywhere


def test_pyramidkv_is_snapkv_at_each_layers_budget() -> None:
    for layer in range(4):
        one = view(LENGTHS, layer=layer)
        stays = PyramidKV(keep=0.6, window=3, beta=4).decide(one).stays
        for row, n in enumerate(LENGTHS):
            assert kept(one, stays, row) == snapkv_by_hand(one, row, pyramid(half_up(0.6 * n), n, 3, 4, 4)[layer], 3, 5)


# ---- prefixkv -------------------------------------------------------------------------------------------------------------------------


def sharper(one: CacheView, factor: float) -> CacheView:
    assert one.attention is not None
    return replace(one, attention=replace(one.attention, query=one.attention.query * factor))


def test_prefixkv_fills_all_layers_to_one_share_of_attention() -> None:
    lengths, sharpness = [24, 15], [0.0, 1.0, 4.0, 16.0]
    policy = PrefixKV(keep=0.5, first=2)
    views = [sharper(view(lengths, layer=layer, seed=layer), sharpness[layer]) for layer in range(4)]
    decisions, differ = policy.decide_together(views, [policy.score(one) for one in views]), False
    for row, n in enumerate(lengths):
        # One slot at a time, always to the layer whose prefix holds the least.
        orders, shares = [], []
        for one in views:
            seen = attention(one, row).mean(0).sum(0)
            scores: list[float] = (seen / seen.sum()).tolist()
            protected = sorted({0, 1, n - 1}, key=lambda k: -k)
            orders.append(protected + [k for k in best(scores, n, ordered=True) if k not in protected])
            shares.append(scores)
        taken = [3] * 4
        while sum(taken) < 4 * half_up(0.5 * n):
            held = [sum(shares[i][k] for k in orders[i][: taken[i]]) if taken[i] < n else 2.0 for i in range(4)]
            taken[held.index(min(held))] += 1
        assert [kept(one, d.stays, row)[0] for one, d in zip(views, decisions, strict=True)] == [
            sorted(order[:number]) for order, number in zip(orders, taken, strict=True)
        ]
        differ = differ or len(set(taken)) > 1
    assert differ


def test_prefixkv_by_hand() -> None:
    """Two layers of four tokens, the first and the last of them protected."""
    steep, flat = torch.tensor([[[0.7, 0.2, 0.1, 0.0]]]), torch.tensor([[[0.4, 0.3, 0.2, 0.1]]])
    one = of_attention(torch.eye(4)[None])
    policy = PrefixKV(keep=2, first=1)
    stays = [d.stays[0, 0].tolist() for d in policy.decide_together([one, one], [steep, flat])]
    assert stays == [[True, False, False, True], [True, False, False, True]]
    stays = [d.stays[0, 0].tolist() for d in PrefixKV(keep=3, first=1).decide_together([one, one], [steep, flat])]
    # What stands in front of each: of the one layer .7 and .9, of the other .5 and .8; so .5 and .7 are the next two.
    assert stays == [[True, True, False, True], [True, True, False, True]]
    steeper = torch.tensor([[[0.9, 0.05, 0.05, 0.0]]])
    stays = [d.stays[0, 0].tolist() for d in PrefixKV(keep=3, first=1).decide_together([one, one], [steeper, flat])]
    assert stays == [[True, False, False, True], [True, True, True, True]]  # .9 and .95 against .5 and .8


# ---- lookm ----------------------------------------------------------------------------------------------------------------------------


@both_sides
@pytest.mark.parametrize("window", [2, 4])
def test_lookm_by_its_equations(side: str, window: int) -> None:
    one = view(LENGTHS, side=side)
    stays = LookM(keep=0.6, window=window).decide(one).stays
    for row, n in enumerate(LENGTHS):
        for g, found in enumerate(kept(one, stays, row)):
            seen = by_key_head(attention(one, row), g).sum(0).tolist()
            prior = [seen[k] + (0.0 if 3 <= k < 8 else max(seen)) for k in range(n - window)]
            assert found == best(prior, half_up(0.6 * n) - window) + list(range(n - window, n))
            if half_up(0.6 * n) >= len({*range(n)} - {*range(3, min(8, n - window))}):  # room for all of the text, and for the window
                assert {*range(n)} - {*range(3, 8)} <= set(found)


@pytest.mark.parametrize("how", ["average", "pivot", "weighted"])
def test_lookm_merges_what_goes_into_its_nearest(how: str) -> None:
    one = view([12, 9])
    decision = LookM(keep=0.5, window=3, merge=how).decide(one)
    assert decision.keys is not None
    assert decision.values is not None
    for row in range(2):
        for g in range(KEY_HEADS):
            keys, stays, there = one.keys[row, g].double(), decision.stays[row, g], one.there[row, 0]
            cosine = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)
            homes = {
                e: max((k for k in range(12) if stays[k]), key=lambda k: float(cosine[e, k]))
                for e in range(12)
                if there[e] and not stays[e]
            }
            assert homes
            for name, merged in (("keys", decision.keys), ("values", decision.values)):
                own = getattr(one, name)[row, g].double()
                for k in range(12):
                    if not stays[k]:
                        continue
                    comes = [e for e in homes if homes[e] == k]
                    parts = {"average": [own[e] for e in comes], "pivot": [(own[e] + own[k]) / 2 for e in comes]}
                    parts["weighted"] = [cosine[e, k] * own[e] for e in comes]
                    expected = (own[k] + sum(parts[how])) / (len(comes) + 1)
                    torch.testing.assert_close(merged[row, g, k].double(), expected, atol=1e-6, rtol=1e-5)


def test_lookms_merging_by_hand() -> None:
    keys = torch.tensor([[[[2.0, 0.0], [0.0, 1.0], [4.0, 0.0], [0.0, 3.0]]]])
    stays = torch.tensor([[[True, True, False, False]]])
    home, likeness = nearest(keys, stays, ~stays)
    assert home.tolist() == [[[-1, -1, 0, 1]]]
    assert merge(keys, home, likeness, "average")[0, 0, :2].tolist() == [[3.0, 0.0], [0.0, 2.0]]
    assert merge(keys, home, likeness, "pivot")[0, 0, :2].tolist() == [[2.5, 0.0], [0.0, 1.5]]
    torch.testing.assert_close(merge(keys, home, likeness, "weighted")[0, 0, :2], torch.tensor([[3.0, 0.0], [0.0, 2.0]]))


# ---- zipvl ----------------------------------------------------------------------------------------------------------------------------


def test_zipvls_tau_vectors() -> None:
    scores = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    assert {tau: int(important(scores, tau)) for tau in (0.8, 0.975)} == {0.8: 3, 0.975: 5}
    assert int(important(scores, 0.7)) == 2
    assert int(important(scores, 0.71)) == 3
    assert int(important(scores, 1.0)) == 5
    assert important(torch.stack([scores, torch.tensor([1.0, 0, 0, 0, 0])]), 0.8).tolist() == [3, 1]


def test_zipvl_normalises_away_what_early_tokens_get_for_being_early() -> None:
    """Uniform causal attention over four tokens: accumulated 2.08, 1.08, .58, .25; by the queries that see each .52, .36, .29, .25."""
    uniform = torch.tril(torch.ones(4, 4)) / torch.arange(1, 5)[:, None]
    one = of_attention(uniform[None])
    accumulated = uniform.sum(0)[None, None]
    assert [round(x, 2) for x in accumulated.flatten().tolist()] == [2.08, 1.08, 0.58, 0.25]
    assert [round(x, 2) for x in normalised(one, accumulated).flatten().tolist()] == [0.52, 0.36, 0.29, 0.25]
    assert [round(x, 2) for x in normalised(one, uniform[-2:].sum(0)[None, None], 2).flatten().tolist()] == [0.29, 0.29, 0.29, 0.25]


@both_sides
@pytest.mark.parametrize("probes", [0, 4])
def test_zipvl_by_its_rule(side: str, probes: int) -> None:
    one = view(LENGTHS, side=side)
    stays = ZipVL(tau=0.7, probes=probes).decide(one).stays
    for row, n in enumerate(LENGTHS):
        rows = range(n - (probes or n), n)
        weights = attention(one, row).mean(0)
        accumulated = [sum(float(weights[q, k]) for q in rows) for k in range(n)]
        falling, number = sorted(accumulated, reverse=True), 1
        while sum(falling[:number]) < 0.7 * sum(accumulated):
            number += 1
        share = [accumulated[k] / sum(q >= k for q in rows) for k in range(n)]
        assert kept(one, stays, row)[0] == best(share, number)
