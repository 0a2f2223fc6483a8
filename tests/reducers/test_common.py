"""The map that sends slots into slots against a loop, in ragged batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import FoveateError
from foveate.reducers.common import choose, groups, images, integers, into
from foveate.reducers.fastervlm import FasterVLM
from tests.reducers.ragged import Ragged, batches, edges, make

quick = settings(max_examples=30)


@quick
@given(batches(), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_every_token_goes_where_it_is_sent(batch: Ragged, weighted: bool, ordered: bool, seed: int) -> None:
    layout, generator = batch.layout, torch.Generator().manual_seed(seed)
    B, N = layout.shape
    home = torch.full((B, N), -1)
    for b, slots in images(layout):
        targets = slots[: 1 + seed % len(slots)]
        home[b, slots] = targets[torch.randint(len(targets), slots.shape, generator=generator)]
        home[b, targets] = targets
        home[b, slots[torch.rand(len(slots), generator=generator) < 0.2]] = -1
        lost = (home[b, slots] >= 0) & (home[b, home[b, slots].clamp(min=0)] < 0)
        home[b, slots[lost]] = -1
    weight = torch.rand(B, N, generator=generator).double() if weighted else None
    place = torch.randint(5, (B, N), generator=generator) if ordered else None
    token_map = into(layout, home, weight, place)
    slot = torch.arange(N).expand(B, N)
    everything_stays = torch.equal(home[layout.visual], slot[layout.visual])
    assert token_map.is_identity == everything_stays
    for b in range(B):
        stays = [n for n in range(N) if layout.valid[b, n] and (not layout.visual[b, n] or home[b, n] == n)]
        if place is not None and not everything_stays:
            stays.sort(key=lambda n: (int(place[b, n]), n))
        found = edges(token_map, b)
        assert [r for r, _ in found] == stays
        for n, members in found:
            assert [s for s, _ in members] == [s for s in range(N) if s == n or (layout.visual[b, s] and home[b, s] == n)]
            if token_map.weight is not None and weight is not None:
                assert [w for _, w in members] == [float(weight[b, s]) for s, _ in members]
        merged = any(len(members) > 1 for _, members in found)
        assert not (merged and weighted and token_map.weight is None)


def test_slots_may_count_over_the_batch() -> None:
    batch = make([[1, (2, 2), 1], [(2, 2), (1, 2)]], left=True)
    layout = batch.layout
    B, N = layout.shape
    flat, rows = torch.full((B * N,), -1), torch.full((B, N), -1)
    for slots in groups(layout, "image"):
        flat[slots] = slots[0]
        rows[slots[0] // N, slots % N] = slots[0] % N
    first, second = into(layout, flat), into(layout, rows)
    assert torch.equal(first.member, second.member)
    assert [len(m) for b in range(B) for _, m in edges(first, b)] == [1, 4, 1, 4, 2]


def test_messages_name_the_option_and_what_is_possible() -> None:
    reducer = FasterVLM()
    choose(reducer, scope=("crop", "image"))
    with pytest.raises(FoveateError, match=r'fastervlm: scope=.crop. is not possible; choose "row", "column" or false$'):
        choose(reducer, scope=("row", "column", False))
    integers(reducer, layer=None)
    with pytest.raises(FoveateError, match=r"fastervlm: layer=-2 is not possible, why; give an integer >= 0$"):
        integers(reducer, ", why", layer=0)
    with pytest.raises(FoveateError, match=r"fastervlm: keep=0.25 is not possible; give an integer, such as -2"):
        integers(reducer, keep=None)
