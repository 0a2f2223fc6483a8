"""In which order the shapes of a call are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from foveate.anatomy import Anatomy, Media, Patches, families
from tests.anatomy.calls import Core, call, cells, drawn, raster


class Told(Anatomy):
    def rasters(self, given: dict[str, Any]) -> list[tuple[int, int]] | None:
        return given.get("rasters")


def told(media: Media) -> Media:
    anatomy = Told(media.anatomy.core, media.anatomy.decoder, media.anatomy.layers)
    return Media(anatomy, media.modality, media.features, media.given, media.crops, media.overheard, media.extras)


def test_a_reader_of_ones_own_comes_first() -> None:
    grid = torch.tensor([[1, 2, 3]])
    given = told(call(6, rasters=[(3, 2)], image_grid_thw=grid))
    assert cells(given.anatomy.arrangement(given).parts[0]) == raster(3, 2)
    given = told(call(6, image_grid_thw=grid))  # it need not know every call
    assert cells(given.anatomy.arrangement(given).parts[0]) == raster(2, 3)


def test_the_most_certain_shape_is_asked_first() -> None:
    """All at once: grids, then positions, frames, sizes, and crops where nothing else is left."""
    grid = {"video_grid_thw": torch.tensor([[1, 2, 8]])}
    spots = {"video_position_ids": torch.tensor([[[c, r] for r in range(8) for c in range(2)]])}
    video = {"pixel_values_videos": torch.zeros(1, 4, 3, 8, 8)}
    size = {"image_sizes": [(1, 16)]}
    given: dict[str, Any] = grid | spots | video | size
    found = []
    for part in (grid, spots, video, size):
        media = call(16, modality="video", **given)
        laid = media.anatomy.arrangement(media).parts[0]
        found.append((laid.size.tolist(), int(laid.place[:, 1].max()) + 1))
        given = {name: value for name, value in given.items() if name not in part}
    media = call(16, modality="video", pixel_values=torch.zeros(1, 3, 8, 8))
    found.append((media.anatomy.arrangement(media).parts[0].size.tolist(), 0))
    assert found == [([2, 8], 0), ([8, 2], 0), ([2, 2], 4), ([1, 16], 0), ([4, 4], 0)]


def test_newlines_are_found_in_any_shape_and_what_is_said_goes_to_its_item() -> None:
    core = Core()
    core.image_newline = nn.Parameter(torch.tensor([5.0, 6.0]))
    media = call(3, 4, core=core, pixel_values=torch.zeros(2, 3, 8, 8))
    media.features[0][2] = torch.tensor([5.0, 6.0])
    arrangement = media.anatomy.arrangement(media)
    assert [drawn(laid) for laid in arrangement.parts] == ["ppn", "pppp"]
    (first, said), (second, other) = arrangement.items({"score": [torch.zeros(3), torch.ones(4)]})
    assert first is arrangement.parts[0]
    assert second is arrangement.parts[1]
    assert (len(said["score"]), len(other["score"])) == (3, 4)
    assert media.anatomy.patches(media) == Patches()


def test_only_methods_that_are_there_are_listened_to() -> None:
    core = Core()
    media = call(1, core=core)
    assert media.anatomy.overheard == {}
    vars(core)["apply_pooling"] = lambda features: features
    assert media.anatomy.overheard == {"apply_pooling": families.frames.pooled}
