"""Each file of `foveate.anatomy.families`, and the reading of configurations, on inputs by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.anatomy import Extras, Laid, columns_of, features_of, places
from foveate.anatomy.config import channels_of, experts_of, heads_of, placeholders_of, sides_of, vision_of
from foveate.anatomy.families import (
    asked,
    boxes,
    compression,
    crops,
    deepstack,
    frames,
    grids,
    marks,
    merger,
    mosaic,
    newlines,
    pooling,
    positions,
    queries,
    shared_keys,
    sizes,
    two_towers,
    windows,
)
from foveate.errors import NotApplicable, Reason
from foveate.tokens import Kind
from tests.anatomy.calls import Core, call, cells, drawn, raster

# ---- rasters


def test_a_raster_has_the_proportions_of_the_picture() -> None:
    assert cells(places(24, shape=(8, 12))) == raster(4, 6)
    assert cells(places(16)) == raster(4, 4)
    assert cells(places(7)) == [[-1, -1]] * 7  # no raster at all
    assert cells(places(16, raster=False)) == [[-1, -1]] * 16
    assert places(0).place.shape == (0, 4)


def test_frames_come_one_after_the_other_and_a_newline_last() -> None:
    laid = places(9, frames=2, newline=True)
    assert drawn(laid) == "ppppppppn"
    assert laid.place[:, 1].tolist() == [0] * 4 + [1] * 4 + [-1]
    assert cells(laid) == [*raster(2, 2), *raster(2, 2), [-1, -1]]
    assert laid.size.tolist() == [2, 2]


def test_crops_have_their_own_tokens_in_front() -> None:
    laid = places(10, crops=2, before=[Kind.CLS])
    assert drawn(laid) == "cppppcpppp"
    assert laid.place[:, 0].tolist() == [0] * 5 + [1] * 5
    assert cells(laid) == [[-1, -1], *raster(2, 2)] * 2


def test_columns_of_a_towers_patches() -> None:
    tower = nn.Module()
    tower.config = SimpleNamespace(patch_size=4)  # type: ignore[assignment]
    assert columns_of(tower, 6, torch.zeros(1, 3, 8, 12)) == 3
    assert columns_of(tower, 7, torch.zeros(1, 3, 8, 12)) == 0
    assert columns_of(tower, 9, None) == 3  # without pixels a square
    assert columns_of(tower, 6, None) == 0
    tower.config = SimpleNamespace(patch_size=[4, 4])  # type: ignore[assignment]
    assert columns_of(tower, 16, torch.zeros(1, 3, 8, 32)) == 4


# ---- grids


def test_a_grid_of_two_rows_and_three_columns() -> None:
    assert grids.laid(call(6)) is None
    assert grids.laid(call(6, 6, image_grid_thw=torch.tensor([[1, 2, 3]]))) is None  # not one for each
    (laid,) = grids.laid(call(6, core=Core({"spatial_merge_size": 1}), image_grid_thw=torch.tensor([[1, 2, 3]]))) or []
    assert (drawn(laid), cells(laid)) == ("p" * 6, raster(2, 3))
    assert laid.place[:, :2].unique().tolist() == [-1]


def test_blocks_of_a_grid_become_tokens() -> None:
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    wide, small = grids.laid(call(6, 1, core=Core({"spatial_merge_size": 2}), video_grid_thw=grid)) or []
    assert (cells(wide), cells(small)) == (raster(2, 3), [[0, 0]])
    (by_length,) = grids.laid(call(6, image_grid_thw=grid[:1])) or []  # the configuration does not say how large the blocks are
    assert cells(by_length) == raster(2, 3)
    own, small = grids.laid(call(24, 1, image_grid_thw=grid, image_merge_sizes=torch.tensor([1, 2]))) or []
    assert (cells(own), cells(small)) == (raster(4, 6), [[0, 0]])
    (unknown,) = grids.laid(call(7, core=Core({"spatial_merge_size": 2}), image_grid_thw=grid[:1])) or []
    assert (drawn(unknown), cells(unknown)) == ("p" * 7, [[-1, -1]] * 7)


@pytest.mark.parametrize(("length", "frames"), [(24, 4), (12, 2), (6, 1)])
def test_frames_of_a_grid_may_be_merged(length: int, frames: int) -> None:
    (laid,) = grids.laid(call(length, core=Core({"spatial_merge_size": 2}), video_grid_thw=torch.tensor([[4, 4, 6]]))) or []
    assert cells(laid) == raster(2, 3) * frames
    assert laid.place[:, 1].tolist() == [frame if frames > 1 else -1 for frame in range(frames) for _ in range(6)]
    (odd,) = grids.laid(call(18, core=Core({"spatial_merge_size": 2}), video_grid_thw=torch.tensor([[4, 4, 6]]))) or []
    assert odd.place.unique().tolist() == [-1]  # four frames do not become three


def grouping(core: nn.Module, **tower: Any) -> nn.Module:
    core.visual = nn.Module()
    vars(core.visual).update(tower)
    return core


def test_patches_stand_side_by_side_where_the_tower_groups_them() -> None:
    grid = torch.tensor([[2, 2, 4], [1, 4, 4]])
    assert grids.patches(call(6)) is None
    core = grouping(Core({"spatial_merge_size": 2}), spatial_merge_size=2)
    how = grids.patches(call(4, 4, core=core, image_grid_thw=grid))
    assert how is not None
    assert (how.segments, how.grouped, how.order, how.boxes) == (3, 4, None, None)
    how = grids.patches(call(4, 4, core=grouping(Core({"spatial_merge_size": 2})), image_grid_thw=grid))  # a plain raster of patches
    assert how is not None
    assert (how.segments, how.grouped) == (3, 0)
    sides = torch.tensor([2, 2])
    how = grids.patches(call(4, 4, core=grouping(Core()), image_grid_thw=grid, image_merge_sizes=sides))
    assert how is not None
    assert how.grouped == 4
    with pytest.raises(NotApplicable, match="encode them apart") as refused:
        grids.patches(call(16, 4, core=grouping(Core()), image_grid_thw=grid, image_merge_sizes=torch.tensor([1, 2])))
    assert refused.value.reason == Reason.UNKNOWN_PATCHES


def test_items_are_told_apart_by_their_pixels() -> None:
    grid, pixels = torch.tensor([[1, 2, 2], [1, 1, 2]]), torch.arange(12.0).view(6, 2)
    given = call(4, 2, image_grid_thw=grid, pixel_values=pixels)
    assert [p.tolist() for p in given.anatomy.contents(given)] == [pixels[:4].tolist(), pixels[4:].tolist()]
    tiles = torch.ones(2, 3, 1, 2, 2)
    tiles[1, 1:] = 0  # tiles that fill up the batch
    given = call(4, 4, pixel_values=tiles)
    assert [len(p) for p in given.anatomy.contents(given)] == [3, 1]
    plain = call(4, 4, pixel_values=tiles[:, 0])
    assert torch.equal(torch.stack(plain.anatomy.contents(plain)), tiles[:, 0])
    for unlike in (call(4, 4), call(4, 4, pixel_values=tiles[:1, 0])):
        assert unlike.anatomy.contents(unlike) is unlike.features


# ---- marks, windows, boxes


def test_marks_around_a_picture() -> None:
    tower = nn.Module()
    assert marks.marks(tower) == (False, False, False)
    tower.image_begin, tower.image_newline = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    assert marks.marks(tower) == (True, True, False)
    laid = marks.marked((2, 3), True, True, True)
    assert drawn(laid) == "npppnpppnn"
    assert [cell for cell in cells(laid) if cell[0] >= 0] == raster(2, 3)
    core = Core({"spatial_merge_size": 1})
    core.visual = tower
    (laid,) = grids.laid(call(9, core=core, image_grid_thw=torch.tensor([[1, 2, 3]]))) or []
    assert drawn(laid) == "npppnpppn"


def test_windows_of_two_by_two() -> None:
    tower = SimpleNamespace(spatial_merge_size=1, window_size=8, patch_size=4)
    grid = torch.tensor([[1, 4, 4]])
    assert windows.order(tower, grid) is None
    tower.fullatt_block_indexes = [1]
    order = windows.order(tower, grid)
    assert order is not None
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    named = SimpleNamespace(spatial_merge_size=1, window_size=8, patch_size=4, config=SimpleNamespace(layer_types=["window_attention"]))
    again = windows.order(named, grid)  # the kinds of its blocks say so
    assert again is not None
    assert torch.equal(again, order)
    named.config.layer_types = ["full_attention"]
    assert windows.order(named, grid) is None
    assert call(16).anatomy.window_order(None) is None


def test_boxes_of_a_bridge() -> None:
    core = Core()
    assert boxes.boxes(core, torch.zeros(1, 3, 8, 8)) is None
    assert boxes.laid(call(4, core=core, pixel_values=torch.zeros(1, 3, 8, 8))) is None
    quarters = [(0, 0, 2, 2), (0, 2, 2, 4), (2, 0, 4, 2), (2, 2, 4, 4)]
    core.bridge = nn.Module()
    vars(core.bridge)["boxes"] = lambda grid: quarters
    core.config.patch_grid = lambda height, width: (height // 2, width // 2)
    given = call(4, 4, core=core, pixel_values=torch.zeros(2, 3, 8, 8))
    assert given.boxes == (quarters, (4, 4))
    assert [cells(laid) for laid in boxes.laid(given) or []] == [raster(2, 2)] * 2
    assert given.anatomy.patches(given).boxes == given.boxes
    assert cells(boxes.over_boxes([(0, 0, 4, 4), (0, 0, 2, 2)], torch.device("cpu"))) == [[-1, -1]] * 2  # two scales are no raster


# ---- positions, frames, sizes, crops


def spots(rows: int, columns: int, most: int) -> Tensor:
    """(most, 2) column and row of each patch, filled up with -1."""
    there = torch.tensor([[c, r] for r in range(rows) for c in range(columns)])
    return torch.cat([there, torch.full((most - len(there), 2), -1)])


def test_positions_of_patches() -> None:
    core = Core({"pooling_kernel_size": 2})
    given = torch.stack([spots(4, 6, 30), spots(4, 4, 30)])
    assert positions.laid(call(6, 4, core=core, video_position_ids=given)) is None  # of the other modality
    wide, square = positions.laid(call(6, 4, core=core, image_position_ids=given)) or []
    assert (cells(wide), cells(square)) == (raster(2, 3), raster(2, 2))
    (unknown,) = positions.laid(call(5, core=core, image_position_ids=given[:1])) or []
    assert cells(unknown) == [[-1, -1]] * 5
    (plain,) = positions.laid(call(24, image_position_ids=given[:1])) or []  # nothing is pooled
    assert cells(plain) == raster(4, 6)


def test_positions_of_videos() -> None:
    core, given = Core({"pooling_kernel_size": 2}), torch.stack([spots(4, 4, 16)] * 2 + [spots(2, 4, 16)])
    told: dict[str, Any] = {"video_position_ids": given, "num_frames_per_video": torch.tensor([2, 1])}
    two, one = positions.laid(call(8, 2, core=core, modality="video", **told)) or []
    assert cells(two) == raster(2, 2) * 2
    assert two.place[:, 1].tolist() == [0] * 4 + [1] * 4
    assert cells(one) == raster(1, 2)
    assert one.place[:, 1].tolist() == [-1, -1]


def video(*lengths: int, of: tuple[int, ...] = (1, 2, 3, 4, 4), **options: Any) -> list[Laid]:
    return frames.laid(call(*lengths, modality="video", pixel_values_videos=torch.zeros(of), **options)) or []


def test_frames_of_a_video() -> None:
    assert frames.laid(call(8, pixel_values=torch.zeros(1, 2, 3, 4, 4))) is None  # tiles of an image
    assert not video(8, of=(2, 3, 4, 4))
    (laid,) = video(8)
    assert (drawn(laid), cells(laid)) == ("p" * 8, raster(2, 2) * 2)
    assert laid.place[:, 1].tolist() == [0] * 4 + [1] * 4
    (ended,) = video(9)
    assert drawn(ended) == "ppppppppn"
    assert cells(ended)[:8] == raster(2, 2) * 2
    (wide,) = video(12, of=(1, 2, 3, 4, 6))
    assert cells(wide) == raster(2, 3) * 2


def test_frames_that_are_pooled_or_are_items() -> None:
    (odd,) = video(10)  # five tokens a frame of equal sides: no raster
    assert cells(odd) == [[-1, -1]] * 10
    (unlike,) = video(11, overheard={"apply_pooling": 4})
    assert unlike.place.unique().tolist() == [-1]
    assert [laid.place[:, 1].unique().tolist() for laid in video(4, 4, 4, 4, of=(2, 2, 3, 4, 4))] == [[0], [1], [0], [1]]
    assert [laid.place[:, 1].unique().tolist() for laid in video(4, 4, of=(2, 1, 3, 4, 4))] == [[-1], [-1]]  # videos of one frame
    assert frames.pooled({}, torch.zeros(3, 7, 2)) == 7
    marked = video(10, crops=[(2, 5)], extras=Extras(True, 1))
    assert drawn(marked[0]) == "cppppcpppp"


def test_sizes_in_patches_and_in_pixels() -> None:
    assert sizes.laid(call(6)) is None
    assert sizes.laid(call(6, image_sizes=[(4, 6), (4, 6)])) is None
    shapes = torch.tensor([[4, 6], [6, 4]])
    wide, tall = sizes.laid(call(6, 6, core=Core(downsample_factor=2), spatial_shapes=shapes)) or []
    assert (cells(wide), cells(tall)) == (raster(2, 3), raster(3, 2))
    core = Core({"patch_size": 4}, spatial_merge_size=2)
    (laid,) = sizes.laid(call(6, core=core, image_sizes=[(16, 24)])) or []
    assert cells(laid) == raster(2, 3)
    (cut,) = sizes.laid(call(3, core=core, image_sizes=[(15, 24)])) or []  # pixels that fill no block are not seen
    (halved,) = sizes.laid(call(3, core=Core(downsample_factor=2), spatial_shapes=[(3, 6)])) or []
    assert cells(cut) == cells(halved) == raster(1, 3)
    (scaled,) = sizes.laid(call(24, core=core, image_sizes=[(16, 24)])) or []  # the proportions are left
    assert cells(scaled) == raster(4, 6)
    (unknown,) = sizes.laid(call(7, core=core, image_sizes=[(16, 24)])) or []
    assert cells(unknown) == [[-1, -1]] * 7


@pytest.mark.parametrize("name", ["target_sizes", "target_sizes_videos"])
def test_sizes_of_slices_whose_patches_are_merged_twice(name: str) -> None:
    def given(*rows: list[int]) -> dict[str, Any]:
        return {name: torch.tensor(rows)}

    wide, small = sizes.laid(call(6, 1, **given([8, 12], [4, 4]))) or []
    assert (cells(wide), cells(small)) == (raster(2, 3), [[0, 0]])
    (whole,) = sizes.laid(call(24, **given([4, 6]))) or []
    assert cells(whole) == raster(4, 6)
    (unknown,) = sizes.laid(call(7, **given([8, 12]))) or []
    assert cells(unknown) == [[-1, -1]] * 7


def test_pooled_tokens_of_a_picture_and_of_a_video() -> None:
    of = torch.tensor([[0, 1], [2, -1], [-1, -1], [4, 5]])
    assert pooling.laid(call(4, image_grids=torch.tensor([[2, 2, 0, 0]]))) is None
    assert pooling.patches(call(4)) is None
    two, one = pooling.laid(call(10, 1, image_token_pooling=of, image_grids=torch.tensor([[2, 2, 2, 3], [1, 1, 0, 0]]))) or []
    assert cells(two) == [*raster(2, 2), *raster(2, 3)]
    assert two.place[:, 0].tolist() == [0] * 4 + [1] * 6  # the whole, then the mosaic of its crops
    assert cells(one) == [[0, 0]]
    (film,) = pooling.laid(call(12, modality="video", video_token_pooling=of, video_grids=torch.tensor([[2, 2, 3]]))) or []
    assert (cells(film), film.place[:, 1].tolist()) == (raster(2, 3) * 2, [0] * 6 + [1] * 6)
    how = pooling.patches(call(3, image_token_pooling=of))
    assert how is not None
    assert how.pooled is not None
    assert how.pooled.tolist() == [[0, 1], [2, -1], [4, 5]]  # a row of nothing is no token


def test_crops_as_the_tower_saw_them() -> None:
    pixels = torch.zeros(3, 3, 8, 8)
    one, two = crops.laid(call(4, 8, crops=[(3, 16)], pixel_values=pixels))
    assert (cells(one), cells(two)) == (raster(2, 2), raster(2, 2) * 2)
    assert one.place[:, 0].tolist() == [-1] * 4
    assert two.place[:, 0].tolist() == [0] * 4 + [1] * 4
    (wide,) = crops.laid(call(6, pixel_values=torch.zeros(1, 3, 8, 12)))  # the tower does not say
    assert cells(wide) == raster(2, 3)
    (flat,) = crops.laid(call(4, crops=[(1, 16)]))  # no pixels, no raster
    assert cells(flat) == [[-1, -1]] * 4


@pytest.mark.parametrize(("tokens", "expected"), [(6, "crpppp"), (5, "rpppp"), (4, "pppp")])
def test_tokens_of_the_towers_own(tokens: int, expected: str) -> None:
    """A [CLS] and a register before four patches, of which the bridge has dropped none, one or both."""
    given = call(tokens, crops=[(1, 6)], extras=Extras(True, 2), pixel_values=torch.zeros(1, 3, 8, 8))
    (laid,) = crops.laid(given)
    assert drawn(laid) == expected
    assert cells(laid)[-4:] == raster(2, 2)
    behind = call(tokens, crops=[(1, 6)], extras=Extras(True, 2, True))
    assert crops.before(behind, tokens) == crops.before(call(tokens, crops=[(1, 6), (1, 9)], extras=Extras(True, 2)), tokens) == ()


def test_queries_have_no_place() -> None:
    core = Core()
    assert not queries.resampled(core)
    core.multi_modal_projector = nn.Linear(2, 2)
    assert not queries.resampled(core)
    core.multi_modal_projector.register_parameter("query", nn.Parameter(torch.zeros(4, 2)))
    assert queries.resampled(core)
    (laid,) = crops.laid(call(4, core=core, crops=[(1, 16)], extras=Extras(True, 1), pixel_values=torch.zeros(1, 3, 8, 8)))
    assert (drawn(laid), cells(laid)) == ("pppp", [[-1, -1]] * 4)
    core = Core()
    core.connector = nn.Sequential(nn.Linear(2, 2))  # whatever lies in it
    assert not queries.resampled(core)
    core.connector[0].register_parameter("latents", nn.Parameter(torch.zeros(4, 2)))
    assert queries.resampled(core)


# ---- mosaics and newlines


class Packs(Core):
    """Lays the tiles of 2 x 2 tokens side by side, a newline after every row, behind the whole picture."""

    def pack_image_features(self, image_features: list[Tensor], image_sizes: Any, image_newline: Tensor | None) -> list[Tensor]:
        found = []
        for tiles in image_features:
            rows = torch.cat([tile.view(2, 2, -1) for tile in tiles[1:]], 1) if len(tiles) > 1 else tiles.new_zeros(0, 0, tiles.shape[-1])
            if image_newline is not None:
                rows = torch.cat([rows, image_newline.to(rows).expand(len(rows), 1, -1)], 1)
            found.append(torch.cat([tiles[0], rows.flatten(0, 1)]))
        return found


def packing(*counts: int, newline: bool = True) -> dict[str, Any]:
    return {
        "image_features": [torch.zeros(count, 4, 2) for count in counts],
        "image_sizes": torch.tensor([[8, 16]] * len(counts)),
        "image_newline": torch.zeros(2) if newline else None,
    }


def test_a_mosaic_of_two_tiles() -> None:
    core = Packs({"image_size": 8}, image_grid_pinpoints=[[8, 16], [16, 8]])
    given = call(14, 4, core=core, overheard={"pack_image_features": packing(3, 1)})
    found = mosaic.arranged(given)
    assert found is not None
    assert [cells(part) for part in found.parts] == [raster(2, 2)] * 4
    said = {"score": [torch.arange(4.0) + 10 * part for part in range(4)], "keys": [torch.ones(4, 3) * part for part in range(4)]}
    (laid, scored), (alone, scored_alone) = found.items(said)
    assert drawn(laid) == "pppp" + "ppppn" * 2
    assert cells(laid) == [*raster(2, 2), *[[0, c] for c in range(4)], [-1, -1], *[[1, c] for c in range(4)], [-1, -1]]
    assert laid.place[:, 0].tolist() == [0] * 4 + [1, 1, 2, 2, -1] * 2
    assert laid.place[:, 1].unique().tolist() == [-1]
    assert scored["score"].tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 0, 12, 13, 22, 23, 0]
    assert scored["keys"].shape == (14, 3)
    assert scored["keys"][:, 0].tolist() == [0] * 4 + [1, 1, 2, 2, 0] * 2
    assert (drawn(alone), cells(alone)) == ("pppp", raster(2, 2))
    assert scored_alone["score"].tolist() == [30, 31, 32, 33]


def test_a_mosaic_without_newlines_and_one_of_a_way_of_its_own() -> None:
    given = {"pack_image_features": packing(3, newline=False)}
    core = Packs({"image_size": 8}, image_grid_pinpoints=[[8, 16]])
    found = mosaic.arranged(call(12, core=core, overheard=given))
    assert found is not None
    ((laid, _),) = found.items({})
    assert drawn(laid) == "p" * 12
    assert laid.place[:, 0].tolist() == [0] * 4 + [1, 1, 2, 2] * 2
    found = mosaic.arranged(call(12, core=Packs(), overheard=given))  # how many tiles stand side by side is not known
    assert found is not None
    ((laid, _),) = found.items({})
    assert cells(laid) == [*raster(2, 2), *[[0, 0], [0, 1]] * 2, *[[1, 0], [1, 1]] * 2]
    assert mosaic.arranged(call(12, core=core)) is None
    assert mosaic.arranged(call(12, core=core, modality="video", overheard=given)) is None
    assert mosaic.packed({"image_sizes": 1}, None) == {"image_sizes": 1}


class Shrinks(Core):
    """Lays four tiles of 2 x 2 tokens out as two rows of two, and scales these to 3 x 3 tokens."""

    def pack_image_features(self, image_features: list[Tensor], image_sizes: Any, image_newline: Tensor | None) -> list[Tensor]:
        (tiles,) = image_features
        rows = [torch.cat([tile.view(2, 2, -1) for tile in tiles[at : at + 2]], 1) for at in (1, 3)]
        scaled = nn.functional.interpolate(torch.cat(rows).permute(2, 0, 1)[None], (3, 3), mode="bilinear")[0]
        return [torch.cat([tiles[0], scaled.flatten(1).T])]


def test_a_mosaic_that_is_scaled_down() -> None:
    """A token between two tiles is of the tile that its row and column are in, not of one that lies between their numbers."""
    core = Shrinks({"image_size": 8}, image_grid_pinpoints=[[16, 16]])
    sizes_given = {**packing(5, newline=False), "image_sizes": torch.tensor([[16, 16]])}
    found = mosaic.arranged(call(13, core=core, overheard={"pack_image_features": sizes_given}))
    assert found is not None
    ((laid, _),) = found.items({})
    assert cells(laid) == [*raster(2, 2), *[[r, c] for r in (0, 2, 3) for c in (0, 2, 3)]]
    assert laid.place[:, 0].tolist() == [0] * 4 + [1, 2, 2, 3, 4, 4, 3, 4, 4]


def test_newlines_told_by_their_features() -> None:
    core, laid = Core(), places(4)
    features = torch.tensor([[1.0, 0.0], [5.0, 6.0], [2.0, 0.0], [5.0, 6.0]])
    assert newlines.told_apart(core, laid, features) is laid
    core.image_newline = nn.Parameter(torch.tensor([5.0, 6.0]))
    found = newlines.told_apart(core, laid, features)
    assert (drawn(found), cells(found)) == ("pnpn", [[-1, -1]] * 4)
    expected = marks.marked((2, 1), False, True, False)
    assert newlines.told_apart(core, expected, features) is expected
    assert newlines.told_apart(core, laid, features.to("meta")) is laid


# ---- the language model's side


def test_features_that_enter_between_layers() -> None:
    assert deepstack.injected({"inputs_embeds": 1}) is None
    slots, first, second = torch.tensor([[True, False]]), torch.zeros(1, 2), torch.ones(1, 2)
    kwargs, mask, layers = deepstack.injected({"visual_pos_masks": slots, "deepstack_visual_embeds": [first, second], "x": 3}) or (
        {},
        slots,
        {},
    )
    assert kwargs == {"visual_pos_masks": None, "deepstack_visual_embeds": None, "x": 3}
    assert mask is slots
    assert layers[1] is first
    assert layers[2] is second
    assert len(layers) == 2
    wide = slots[..., None].expand(1, 2, 4)
    kwargs, mask, layers = deepstack.injected({"vision_mask": wide, "deepstack_features": {0: first, 3: second}}) or ({}, slots, {})
    assert kwargs == {"vision_mask": None, "deepstack_features": None}
    assert torch.equal(mask, slots)
    assert layers[0] is first
    assert layers[3] is second
    assert len(layers) == 2


def test_features_of_what_encoding_returns() -> None:
    made = [torch.zeros(4, 2), torch.ones(3, 2)]
    assert features_of(made) == features_of(tuple(made)) == features_of(SimpleNamespace(pooler_output=made)) == made
    levels = SimpleNamespace(pooler_output=None, deepstack_features=[(3, made), (0, made[:1])])
    assert features_of(levels) == made
    assert features_of(SimpleNamespace(pooler_output=None, last_hidden_state=made)) == made


def test_slots_without_a_method_that_says_so() -> None:
    embed = nn.Embedding(5, 2)
    core = SimpleNamespace(config=SimpleNamespace(image_token_id=3), get_input_embeddings=lambda: embed)
    ids = torch.tensor([[1, 3, 3, 0]])
    by_id, by_embedding = merger.placeholders(core, ids, ids), merger.placeholders(core, None, embed(ids))
    assert by_id.tolist() == by_embedding.tolist() == [[False, True, True, False]]


def test_slots_that_are_asked_for_by_their_placeholder() -> None:
    core = Core(image_token_id=3, video_token_id=4)
    core.get_placeholder_mask = None  # type: ignore[assignment]
    anatomy, ids = call(2, core=core).anatomy, torch.tensor([[1, 3, 4, 4]])
    for token, modality in ((3, "image"), (4, "video")):
        assert asked.modality(core.config, {"token_id": token}, ("image", "video")) == modality
        slots, given = anatomy.slots((ids == token)[..., None].expand(1, 4, 2), {"token_id": token}, ["features", "token_id"])
        assert given
        assert {name: at.tolist() for name, at in slots.items()} == {modality: (ids == token).tolist()}
    assert asked.modality(core.config, {"token_id": 9}, ("image", "video")) is None
    assert asked.modality(core.config, {}, ("image", "video")) is None


def test_features_that_never_enter() -> None:
    kept = torch.tensor([True, False])
    assert compression.kept({}) == {"video": None}
    assert compression.kept({"video_compression_mask": kept})["video"] is kept


def test_a_tower_for_each_modality() -> None:
    core = nn.Module()
    core.image_tower = nn.Linear(1, 1)
    assert two_towers.tower_of(core, "video") is None
    assert two_towers.tower_of(core, "image") is core.image_tower
    given = call(4, core=core).anatomy
    assert given.tower_of("video") is given.tower is core.image_tower
    core.video_tower = nn.Linear(1, 1)
    assert given.tower_of("video") is core.video_tower


def test_images_that_become_weights() -> None:
    core = Core()
    assert not call(4, core=core).anatomy.weighs
    core.weighing = nn.Identity()
    assert call(4, core=core).anatomy.weighs


def test_shared_keys_are_refused() -> None:
    for config in (SimpleNamespace(), SimpleNamespace(num_kv_shared_layers=0)):
        shared_keys.refuse("Model", config)
    with pytest.raises(NotApplicable, match="Model: its last layers read the keys of earlier ones") as refused:
        shared_keys.refuse("Model", SimpleNamespace(num_kv_shared_layers=2))
    assert refused.value.reason == Reason.SHARED_KEYS


# ---- configurations


def test_what_configurations_call_by_several_names() -> None:
    vision = SimpleNamespace(patch_size=14, image_size=[28, 42])
    config = SimpleNamespace(vision_config=vision, image_token_id=7, moe_k=2, num_attention_heads=4)
    assert vision_of(config) is vision
    assert vision_of(vision) is None
    assert (sides_of(vision, "patch_size"), sides_of(vision, "image_size"), sides_of(None, "image_size")) == ((14, 14), (28, 42), None)
    assert (channels_of(vision), channels_of(SimpleNamespace(num_channels=1))) == (3, 1)
    assert placeholders_of(config, "image") == [7, 7]
    assert placeholders_of(config, "video") == [7]
    assert placeholders_of(SimpleNamespace(image_token_id=7, video_token_id=8), "video") == [8, 7]
    assert (experts_of(config), experts_of(vision)) == (2, None)
    assert (heads_of(config), heads_of(vision), heads_of(SimpleNamespace(num_attention_heads=4, kv_lora_rank=8))) == (4, None, None)
