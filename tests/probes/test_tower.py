"""From one value a patch of the tower to one value a token."""

from typing import Any

import pytest
import torch
from torch import Tensor

from foveate import FoveateError
from foveate.anatomy import Patches, places
from foveate.probes.tower import carry
from foveate.tokens import Kind


def test_patches_become_tokens() -> None:
    """A raster of 4 x 4 patches, two crops of it, and what the model may make of them."""
    x = torch.arange(16.0)
    blocks = [2.5, 4.5, 10.5, 12.5]

    def carried(length: int, crops: list[Tensor], grouped: int = 0, **options: Any) -> list[list[float]]:
        return [v.tolist() for v in carry(crops, [places(length, crops=len(crops), **options)], Patches(grouped=grouped))]

    assert carried(16, [x]) == [x.tolist()]
    assert carried(4, [x], grouped=4) == [[1.5, 5.5, 9.5, 13.5]]
    assert carry([x], [places(2, frames=1)], Patches(grouped=4))[0].tolist() == [5.5, 9.5]  # two frames of two tokens become one
    assert carried(4, [x]) == [blocks]  # means of 2 x 2
    assert carried(8, [x, x + 16]) == [[*blocks, *(b + 16 for b in blocks)]]
    assert carried(9, [x]) == [[2.5, 3.5, 4.5, 6.5, 7.5, 8.5, 10.5, 11.5, 12.5]]  # 3 x 3 of 4 x 4: windows that overlap
    assert carried(17, [x], before=[Kind.CLS]) == [[0.0, *x.tolist()]]
    assert carried(17, [x], newline=True) == [[*x.tolist(), 0.0]]
    with pytest.raises(FoveateError, match="16 patches of the tower became 6 tokens"):
        carried(6, [x])
    with pytest.raises(FoveateError, match="16 patches of the tower became 6 tokens"):
        carried(6, [x], grouped=4)
    order = torch.tensor([2, 0, 3, 1])  # the tower's first group is the raster's third
    assert carry([x], [places(4)], Patches(grouped=4, order=order))[0].tolist() == [5.5, 13.5, 1.5, 9.5]
    boxes = [(0, 0, 4, 4), (0, 2, 1, 4)]
    assert carry([x], [places(2)], Patches(boxes=(boxes, (4, 4))))[0].tolist() == [7.5, 2.5]
    halves = [(0, 0, 4, 2), (0, 2, 4, 4)]
    of_each = Patches(boxes=(boxes, (4, 4)), each=((boxes, (4, 4)), (halves, (4, 4))))
    assert [one.tolist() for one in carry([x, x], [places(2), places(2)], of_each)] == [[7.5, 2.5], [6.5, 8.5]]


def test_patches_that_stand_in_order_of_windows_or_are_named_by_their_tokens() -> None:
    order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])  # two windows of 2 x 2 in a raster of 2 x 4: where each patch is taken from
    raster = torch.arange(8.0)
    (whole,) = carry([raster[order]], [places(8, shape=(2, 4))], Patches(order=order))
    assert whole.tolist() == raster.tolist()
    (blocks,) = carry([raster[order]], [places(2, shape=(1, 2))], Patches(order=order))
    assert blocks.tolist() == [2.5, 4.5]
    of = torch.tensor([[0, 1, 4, 5], [3, -1, -1, 7], [8, -1, -1, -1]])  # of two crops: the last token is the second one's
    crops = [torch.stack([raster, -raster], 1), torch.full((1, 2), 9.0)]
    one, two = carry(crops, [places(2), places(1)], Patches(pooled=of))
    assert (one.tolist(), two.tolist()) == ([[2.5, -2.5], [5.0, -5.0]], [[9.0, 9.0]])
