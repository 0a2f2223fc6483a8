"""V2Drop against a loop, the numbers of its card and of the published schedules, and the states that a live model hands it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate
from foveate import FoveateError
from foveate.contract import States, View
from foveate.reducers.v2drop import V2Drop
from foveate.tokens import budget
from tests.reducers.ragged import Ragged, batches, check_raster, check_rows, counted, keeps, kept, make
from tests.tiny import ROWS, Batch, llava

quick = settings(max_examples=20)


def view(batch: Ragged, before: torch.Tensor) -> View:
    return View.of(batch.tokens, layout=batch.layout, signals={States(2): before})


@quick
@given(batches(), keeps, st.integers(0, 99))
def test_each_image_of_a_ragged_batch(batch: Ragged, keep: Any, seed: int) -> None:
    reducer = V2Drop(keep, layers=3)
    before = batch.tokens + torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(seed))
    token_map = reducer.reduce(view(batch, before)).map
    change = (batch.tokens - before).double().numpy()
    for row, slots in batch.images():
        left = budget(keep, len(slots))
        best = sorted(slots, key=lambda n: (-sum(c * c for c in change[row, n].tolist()), n))[:left]
        assert [i for i in kept(token_map, row) if i in slots] == sorted(best)
        assert counted(reducer, len(slots), len(slots)) == left
    check_raster(batch, token_map, [budget(keep, r * c) for r, c in batch.grids])
    alone = [view(row, before[b : b + 1, start:end]) for b, (row, (start, end)) in enumerate(zip(batch.rows, batch.spans, strict=True))]
    check_rows(batch, token_map, [reducer.reduce(single).map for single in alone])


def test_numbers_of_the_card() -> None:
    change = torch.tensor([0.5, 2, 1, 1.5])[None, :, None]
    x = torch.randn(1, 4, 1)
    assert kept(V2Drop(0.5, layers=3).reduce(View.of(x, signals={States(2): x - change})).map) == [1, 3]
    assert kept(V2Drop(0.5, layers=3).reduce(View.of(x, signals={States(2): x.clone()})).map) == [0, 1]  # nothing has changed
    assert V2Drop(1.0, layers=3).reduce(View.of(x, signals={States(2): x - change})).map.is_identity


def test_published_schedules() -> None:
    llava_15 = V2Drop().visual_tokens(576, 32)
    assert llava_15 == [576] * 3 + [288] * 14 + [144] * 5 + [1] * 10
    assert sum(llava_15) / 32 == pytest.approx(202.8, abs=0.05)
    qwen2_vl = V2Drop("0.25-0.05-1", "3-16-22").visual_tokens(10_000, 28)
    assert sum(qwen2_vl) / 28 / 10_000 == pytest.approx(0.226, abs=0.0005)
    assert V2Drop().positions == "keep"


def test_it_is_shown_the_states_that_went_into_the_layer_before() -> None:
    """Those of the tokens that are left of an earlier cut, in a padded batch."""
    model, batch = llava(), Batch(ROWS, "left")
    entered: list[torch.Tensor] = []
    with torch.no_grad(), foveate.attach(model, "v2drop:keep=8,layers=1+v2drop:keep=4,layers=3") as run:
        layers = model.model.language_model.layers
        hooks = [layers[2].register_forward_pre_hook(lambda _, args: entered.append(args[0]))]
        hooks.append(layers[2].register_forward_hook(lambda _, args, output: entered.append(output)))
        model(**batch.inputs)
        for hook in hooks:
            hook.remove()
    assert run.last.visual_tokens == [48, 24, 24, 12]
    before, after = entered
    change, cut = (after - before).norm(dim=-1), run.last.maps[3]
    for row, image in [(0, 0), (1, 1), (1, 2)]:
        slots = (cut.source.image[row] == image).nonzero()[:, 0]
        best = slots[change[row, slots].argsort(descending=True)[:4]]
        assert [i for i in cut.representative[row].tolist() if i in slots.tolist()] == sorted(best.tolist())


@pytest.mark.parametrize(
    "options",
    [{"keep": 0}, {"keep": "0.5-0"}, {"layers": 0}, {"layers": "3-3"}, {"layers": "3-2"}, {"keep": "0.5-0.5"}, {"layers": 1.5}],
)
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        V2Drop(**options)


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(FoveateError, match="there is no decoder layer 17"), foveate.attach(llava(), "v2drop"):
        pass


def test_states_of_a_view_that_has_none() -> None:
    batch = make([[1, (2, 2), 1]])
    with pytest.raises(FoveateError, match=r"States\(layer=2\) is not provided here"):
        V2Drop(2, layers=3).reduce(batch.view())
