"""VTW: where it acts and what that costs, the choice of its layer, and what is left on a live model."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.contract import FromLayer, View
from foveate.errors import FoveateError
from foveate.reducers import VTW, parse, visual_tokens
from foveate.reducers.exporting import unexportable
from foveate.tokens import TokenMap
from tests.reducers.ragged import check_raster, check_rows, make
from tests.tiny import IMAGE, LAYERS, PATCHES, ROWS, Batch, llava


@pytest.mark.parametrize(
    ("layer", "layers", "first"),
    [
        (0.5, 32, 16),
        (0.5, 40, 20),
        (0.5, 5, 3),
        (0.25, 28, 7),
        (1 / 3, 10, 3),
        (16, 32, 16),
        (0, 4, 0),
        (1e-9, 4, 0),
        (1.0, 7, None),
        (4, 4, None),
    ],
)
def test_where_it_acts(layer: int | float, layers: int, first: int | None) -> None:
    reducer = VTW(layer)
    assert reducer.sites(layers) == ([] if first is None else [FromLayer(first)])
    whole = layers if first is None else first
    assert visual_tokens([reducer], 9, layers) == [9] * whole + [0] * (layers - whole)


def test_what_layer_16_of_32_costs() -> None:
    """612 tokens, of which 576 are visual."""
    visual = visual_tokens([VTW()], 576, 32)
    assert sum(visual) / 32 == 288
    assert sum(n + 36 for n in visual) / (32 * 612) == pytest.approx(0.529, abs=5e-4)


def test_every_visual_token_goes_and_no_other() -> None:
    batch = make([[2, (2, 3), 1, (1, 2), 2], [3], [1, (3, 3), 1]], left=True, pad=1)

    def cut(view: View) -> TokenMap:
        return VTW().reduce(view).map

    check_raster(batch, cut(batch.view()), [0, 0, 0])
    check_rows(batch, cut(batch.view()), [cut(row.view()) for row in batch.rows])


@torch.no_grad()
def test_from_layer_0_on_it_is_the_text_alone_with_a_gap_in_its_positions() -> None:
    model, batch = llava(), Batch([ROWS[0]])
    ids = torch.tensor([[token for token in ROWS[0] if token != IMAGE]])
    gap = torch.tensor([[at for at, token in enumerate(ROWS[0]) if token != IMAGE]])
    with foveate.attach(model, "vtw:layer=0") as run:
        found = model(**batch.inputs).logits[0, gap[0]]
        assert run.last.visual_tokens == [0] * LAYERS
    torch.testing.assert_close(found, model(input_ids=ids, position_ids=gap).logits[0], rtol=1e-4, atol=1e-5)
    with foveate.attach(model, "vtw:layer=0,positions=renumber"):
        found = model(**batch.inputs).logits[0, gap[0]]
    torch.testing.assert_close(found, model(input_ids=ids).logits[0], rtol=1e-4, atol=1e-5)


def test_a_share_of_the_tokens_is_a_share_of_the_layers() -> None:
    assert VTW(3).at(0.25) == VTW(0.25)
    assert sum(visual_tokens([VTW().at(0.75)], PATCHES, 8)) == 0.75 * 8 * PATCHES
    with pytest.raises(FoveateError, match=r"keep=0\.0 is not possible"):
        VTW().at(0)


def test_the_first_layer_within_eta() -> None:
    found = {5: 0.2, 6: 0.01, 7: 0.02, 8: 0.0}
    assert [VTW.within(found, eta).layer for eta in (0.3, 0.015, 0.005)] == [5, 6, 8]
    with pytest.raises(FoveateError, match=r"no layer is within eta=0\.001, the nearest differs by 0\.01"):
        VTW.within({5: 0.2, 6: 0.01}, 0.001)


@pytest.mark.parametrize("value", ["-1", "0.0", "1.5", "true", "half", "nan", "1" + "0" * 30])
def test_impossible_layers_are_named(value: str) -> None:
    with pytest.raises(FoveateError, match=r"vtw: layer=.* is not possible; give a share of the depth in \(0, 1\]"):
        parse(f"vtw:layer={value}")


def test_a_layer_that_is_not_there_is_refused_and_no_server_drops_a_picture() -> None:
    with pytest.raises(FoveateError, match="there is no decoder layer 5 to act at"):
        foveate.attach(llava(), "vtw:layer=5")
    assert unexportable(VTW()) == "acts in the LM"
    assert unexportable(VTW(0)) == "leaves no token of an image"
