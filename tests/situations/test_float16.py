"""Half precision at its end, and images that are not numbers: as the bare model has it, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate import FoveateError
from foveate.reducers import METHODS, parse
from foveate.reducers.cdpruner import greedy_map
from foveate.reducers.divprune import spread
from foveate.reducers.sparsevlm import peaks
from foveate.reducers.tome import bipartite
from foveate.tokens import Layout, TokenMap, top
from tests.reducers.test_fastervlm import mosaic
from tests.reducers.test_hired import look
from tests.test_attach import REDUCERS
from tests.test_encoder_cuts import make as with_deep_tower
from tests.tiny import PATCHES, ROWS, Batch, llava

SUMS = [  # methods that add up tokens, where they have the choice
    "sparsevlm:keep=0.3,layers=1",
    "sparsevlm:keep=4,layers=1,order=append",
    "visionzip:dominant=2,contextual=1,merge=sum",
]
MEANS = [
    "sparsevlm:keep=0.3,layers=1,merge=mean",
    "visionzip:dominant=2,contextual=1",
    "tome:keep=0.1",
    "tome:keep=0.3,metric=keys",
    "aim:keep=0.2,steps=2",
    "aim:keep=0.2,steps=0,weighted=true",
    "vscan:keep=2,windows=1,local=-1,late=1,rest=1.0",
    "avgpool2d:stride=2",
    "vcc:layer=1,stride=8",
]
NAN, INF = float("nan"), float("inf")


def adds(spelling: str) -> bool:
    """Whether a method adds up tokens: SparseVLM unless it is told otherwise, others where they are told."""
    recycles = spelling.startswith("sparsevlm") and "merge=mean" not in spelling and "recycle=false" not in spelling
    return recycles or "merge=sum" in spelling


def loud(largest: float, dtype: torch.dtype = torch.float16) -> Any:
    """A LLaVA whose image features are all nearly `largest`."""
    model = llava(dtype=dtype)
    with torch.no_grad():
        last = model.model.multi_modal_projector.linear_2
        last.weight.mul_(0.01)
        last.bias.fill_(largest)
    return model


# ---- sums


@pytest.mark.parametrize("reducer", [*SUMS, *MEANS])
@torch.no_grad()
def test_as_the_bare_model_or_refused(reducer: str) -> None:
    batch = Batch([ROWS[0]], dtype=torch.float16)
    for largest in (1e2, 6.5e4):
        model = loud(largest)
        assert bool(model(**batch.inputs).logits.isfinite().all())
        with foveate.attach(model, reducer):
            if reducer in SUMS and largest > 1e4:
                with pytest.raises(FoveateError, match=r"add up to .*e\+0., and float16 ends at 65504: load the model in bfloat16"):
                    model(**batch.inputs)
            else:
                assert bool(model(**batch.inputs).logits.isfinite().all())


@pytest.mark.parametrize("reducer", SUMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_wider_types_hold_the_sums(reducer: str, dtype: torch.dtype) -> None:
    with foveate.attach(model := loud(6.5e4, dtype), reducer):
        assert bool(model(**Batch([ROWS[0]], dtype=dtype).inputs).logits.isfinite().all())


@pytest.mark.parametrize("reducer", REDUCERS)
@torch.no_grad()
def test_no_method_loses_a_finite_image(reducer: str) -> None:
    """Also in what it computes on the way: similarities, norms, keys."""
    model, batch = loud(4e4), Batch([ROWS[0], ROWS[1]], "left", torch.float16)
    with foveate.attach(model, reducer):
        if adds(reducer):
            with pytest.raises(FoveateError, match="float16 ends at 65504"):
                model(**batch.inputs)
        else:
            assert bool(model(**batch.inputs).logits[batch.inputs["attention_mask"].bool()].isfinite().all())


def test_a_mean_of_the_largest_numbers_is_the_largest_number() -> None:
    layout = Layout.sequence(torch.ones(1, 9, dtype=torch.bool))
    x = torch.full((1, 9, 2), 65504.0, dtype=torch.float16)
    for count in (3, 7, 9):
        member = torch.arange(count).view(1, 1, count)
        token_map = TokenMap.merge(layout, member, torch.full((1, 1, count), 1 / count), torch.zeros(1, 1, dtype=torch.int64))
        assert token_map.apply(x)[0, 0].tolist() == [65504.0, 65504.0]


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_what_is_infinite_already_is_no_new_fault(value: float) -> None:
    layout = Layout.sequence(torch.ones(1, 4, dtype=torch.bool))
    x = torch.ones(1, 4, 1, dtype=torch.float16)
    x[0, 2] = value
    token_map = TokenMap.merge(layout, torch.arange(4).view(1, 1, 4), None, torch.zeros(1, 1, dtype=torch.int64))
    assert token_map.apply(x).flatten().isnan().all() if value != value else token_map.apply(x).flatten().tolist() == [value]


# ---- images that are not numbers


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("reducer", REDUCERS)
@torch.no_grad()
def test_a_broken_image_breaks_its_own_row_as_without_a_reducer(reducer: str, value: float) -> None:
    """Its tokens are as many as any image's, its row says nothing, and the row beside it what it says alone."""
    model, batch = llava(), Batch([ROWS[0], ROWS[0]])
    with foveate.attach(model, reducer) as run:
        model(**batch.inputs)
        sound = run.last.visual_tokens
        alone = model(**batch.singles[1]).logits[0]
    batch.pixels[0, :, 8:16, 8:16] = value
    bare = model(**batch.inputs).logits
    assert bool(bare[0, -1].isnan().all())
    with foveate.attach(model, reducer) as run:
        found = model(**batch.inputs).logits
    assert bool(found[0, -1].isnan().all())
    assert run.last.visual_tokens == sound or "atpllava" in reducer  # which leaves as many as follow from what is seen
    torch.testing.assert_close(batch.own(found, 1), alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_in_the_tower_too() -> None:
    model, batch = with_deep_tower(), Batch([ROWS[0], ROWS[0]])
    batch.pixels[0, :, :8] = NAN
    with foveate.attach(model, "tome:keep=0.4,site=tower,blocks=3") as run:
        found = model(**batch.inputs).logits
        assert bool(found[0, -1].isnan().all())
        assert run.last.visual_tokens == [2 * 6] * 2
        torch.testing.assert_close(found[1], model(**batch.singles[1]).logits[0], rtol=1e-4, atol=1e-5)


def test_every_method_is_looked_at() -> None:
    assert {r.name for text in REDUCERS for r in parse(text)} == METHODS.keys() - {"downsample"}


@pytest.mark.parametrize("places", [[3], [0, 5], list(range(PATCHES))])
def test_one_broken_token_is_kept_first_and_nothing_is_picked_twice(places: list[int]) -> None:
    """Picking by the largest: a value that is not a number counts as the largest, once, and the others follow by the rule for ties."""
    torch.manual_seed(0)
    states = torch.randn(PATCHES, 4)
    states[places] = NAN
    score = torch.rand(1, PATCHES)
    score[0, places] = NAN
    kept = top(Layout.sequence(torch.ones(1, PATCHES, dtype=torch.bool)), score, 8)
    assert int(kept.sum()) == 8
    assert bool(kept[0, places[:8]].all())
    for found in (spread(states, 8), greedy_map(_kernel(states), 8)[0]):
        assert len(set(found.tolist())) == 8
        assert set(places[:8]) <= set(found.tolist())
    centres, owner = peaks(states, 3)
    assert len(set(centres.tolist())) == 3
    assert set(owner.tolist()) <= set(centres.tolist())
    matching = bipartite(states, 5, protect_first=1)
    assert sorted(matching.group.unique().tolist()) == list(range(PATCHES - 5))
    assert matching.keeper[0] == 0
    assert (matching.group == 0).sum() == 1


def _kernel(states: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(states, dim=-1)
    return (unit @ unit.T).fill_diagonal_(1.0)


@pytest.mark.parametrize(("share", "left"), [("sum", [4, 2, 2, 2, 2]), ("count", [4, 4, 4, 0, 0])])
@pytest.mark.parametrize("unspent", ["leave", "give"])
def test_hired_deals_to_tiles_where_the_base_image_is_broken(share: str, left: list[int], unspent: str) -> None:
    """Shares of nothing are alike; counts of the best follow the rule for ties."""
    patches = mosaic((2, 2), (2, 2), (2, 2))
    coarse = torch.rand(len(patches))
    coarse[:4] = NAN
    assert look(patches, coarse, torch.where(coarse.isnan(), NAN, 0.5), keep=12, share=share, unspent=unspent) == left
