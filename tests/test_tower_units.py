"""Cuts in towers whose tokens are blocks of patches: packed pictures, windows, rotary positions, levels, pixel shuffle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import foveate
from foveate.anatomy import Crops, Extras, Units, read
from foveate.anatomy.families import shuffles
from foveate.anatomy.units import in_rows
from foveate.contract import Cut, InEncoder, Site, View, Workload
from foveate.engine.standing import Standing, check_beside
from foveate.errors import NotApplicable, Reason
from foveate.reducers import FasterVLM, Reducer, ToMe
from foveate.reducers.common import into
from foveate.tokens import TokenMap
from tests.conformance.family import alone
from tests.test_encoder_cuts import Fewer

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
SIDE = 2  # patches of a unit a side, in all towers here


@dataclass(frozen=True)
class Some(Reducer):
    """Drops about a quarter of a picture's tokens, by their places."""

    name: ClassVar[str] = "some"
    paper: ClassVar[str] = "-"
    block: int = 2

    def sites(self, layers: int) -> list[Site]:
        return [InEncoder(self.block)]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        row, column = view.layout.place[..., 3:].unbind(-1)
        return Cut(TokenMap.keep(view.layout, stays(row, column)))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return list(work.arriving)


def stays(row: Any, column: Any) -> Any:
    return (row * 5 + column * 3) % 4 != 0


@dataclass(frozen=True)
class Pairs(Some):
    """Merges every token with its neighbour in the tower's order."""

    name: ClassVar[str] = "pairs"

    def reduce(self, view: View, stage: int = 0) -> Cut:
        slot = torch.arange(view.layout.shape[1]).expand(view.layout.shape)
        return Cut(into(view.layout, slot // 2 * 2, torch.full(slot.shape, 0.5, dtype=torch.float64)))


def pictures(*grids: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Packed patches of 4 x 4 pixels in pairs of frames, and the grids (pictures, 3)."""
    count = sum(h * w for h, w in grids)
    pixels = torch.randn(count, 96, generator=torch.Generator().manual_seed(seed))
    return pixels, torch.tensor([[1, h, w] for h, w in grids])


@contextmanager
def given_to(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments of a module's calls."""
    found: list[Any] = []
    hook = module.register_forward_pre_hook(lambda module, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    yield found
    hook.remove()


# ---- where patches stand


def test_units_of_blocks_of_packed_rasters_and_of_windows() -> None:
    """Two frames of 2 x 3 blocks of 2 x 2 patches."""
    plain = Units.of(Crops([(2, 3)] * 2, SIDE, packed=True), torch.device("cpu"))
    assert plain.slot[0, 0].tolist() == plain.patch[0, 0].tolist() == [0, 1, 6, 7]
    assert plain.slot[1, 4].tolist() == [24 + 14, 24 + 15, 24 + 20, 24 + 21]
    assert plain.layout.place[1, 4].tolist() == [1, -1, -1, 1, 1]
    order = torch.tensor([0, 1, 3, 4, 2, 5, 6, 7, 9, 10, 8, 11])  # windows of 2 x 2 blocks
    windowed = Units.of(Crops([(2, 3)] * 2, SIDE, packed=True, grouped=True, order=order), torch.device("cpu"))
    assert windowed.slot[0, 2].tolist() == [8, 9, 10, 11]
    assert windowed.patch[0, 2].tolist() == [12, 13, 14, 15]
    assert windowed.layout.place[0, 2, 3:].tolist() == [1, 0]
    assert windowed.patch[1, 4].tolist() == [4 * 8 + i for i in range(4)]


def test_units_behind_the_towers_own_tokens_and_of_crops_of_different_lengths() -> None:
    shuffled = Units.of(Crops([(1, 2)] * 2, SIDE, Extras(True, 2)), torch.device("cpu"))
    assert shuffled.slot[1].tolist() == [[10, -1, -1, -1], [11, -1, -1, -1], [12, 13, 16, 17], [14, 15, 18, 19]]
    assert shuffled.patch[1, 2:].tolist() == [[8, 9, 12, 13], [10, 11, 14, 15]]
    assert shuffled.layout.kind[0].tolist() == [3, 4, 1, 1]
    ragged = Units.of(Crops([(1, 3), (1, 1)], 1, packed=True), torch.device("cpu"))
    assert ragged.layout.valid.tolist() == [[True] * 3, [True, False, False]]
    assert ragged.slot[..., 0].tolist() == [[0, 1, 2], [3, -1, -1]]


@settings(max_examples=30, deadline=None)
@given(st.booleans(), st.integers(0, 10**6))
def test_what_is_cut_keeps_the_towers_order(packed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    crops = Crops([(2, 3), (2, 2)] if packed else [(2, 2)] * 2, SIDE, Extras() if packed else Extras(True, 1), packed)
    units = Units.of(crops, torch.device("cpu"))
    slots = sum(crops.patches) if packed else 17
    first = Standing(units.slot, slots, packed)
    states = torch.randn((slots, 3) if packed else (2, slots, 3), generator=generator)
    assert torch.equal(first.states(first.tokens(first.rows(states)), states), states)
    kept = torch.rand(units.layout.shape, generator=generator) > 0.4
    kept[:, 1] = True
    token_map = TokenMap.keep(units.layout, kept)
    after = first.cut(token_map)
    cut = after.states(token_map.apply(first.tokens(first.rows(states))), states)
    for row, (own, all_of) in enumerate(zip(cut[None] if packed else cut, states[None] if packed else states, strict=True)):
        there = (
            units.slot[kept | ~units.layout.visual & units.layout.valid] if packed else units.slot[row][(kept | ~units.layout.visual)[row]]
        )
        wanted = sorted(int(slot) - (0 if packed else row * slots) for slot in there.flatten() if slot >= 0)
        assert torch.equal(own[: len(wanted)], all_of[wanted])
        assert not own[len(wanted) :].any()
        if packed:
            table = torch.tensor([0, 8, 24, 40], dtype=torch.int32)
            counts = [sum(a <= slot < b for slot in wanted) for a, b in ((0, 8), (8, 24), (24, 40))]
            assert after.beside(table).diff().tolist() == [count for count in counts if count]
            assert torch.equal(after.beside((states, states[None]))[1][0], all_of[wanted])
    mask = torch.randn(1, 1, slots, slots, generator=generator)
    there_n = after.slot[0][after.slot[0] >= 0]
    assert torch.equal(after.beside(mask)[0, 0, : len(there_n), : len(there_n)], mask[0, 0][there_n][:, there_n])


def test_what_cannot_be_cut_is_told() -> None:
    check_beside("cu_seqlens", torch.tensor([0, 4, 12]), 2, 12, True)
    check_beside("position_embeddings", (torch.zeros(12, 8), torch.zeros(1, 12, 8)), 2, 12, True)
    check_beside("attention_mask", torch.zeros(2, 1, 12, 12), 2, 12, False)
    for value, packed in ((torch.zeros(12, 8), False), (torch.zeros(5, 8), True), (torch.tensor([0, 4, 11]), True)):
        with pytest.raises(NotApplicable, match="it cannot be cut") as error:
            check_beside("extra", value, 2, 12, packed)
        assert error.value.reason == Reason.TOWER_INPUTS
    tower = alone("internvl").model.vision_tower
    with pytest.raises(NotApplicable, match="no raster of blocks of 2 x 2") as error:
        in_rows(tower, 2, torch.zeros(1, 3, 20, 20), (1, 26))
    assert error.value.reason == Reason.NO_RASTER


@pytest.mark.parametrize(
    ("name", "side"),
    [("internvl", 2), ("smolvlm", 2), ("gemma3", 2), ("aya_vision", 2), ("ovis2", 2), ("llava", 1), ("llava_onevision", 1)],
)
def test_the_side_of_a_block_is_in_the_configuration(name: str, side: int) -> None:
    assert shuffles.side(read(alone(name)).core) == side


# ---- in towers


@torch.no_grad()
def test_windows_and_rotary_positions_are_cut_with_the_patches() -> None:
    """Block by block and window by window, on nothing but what is left."""
    model = alone("qwen2_5_vl")
    tower, (pixels, grids) = model.model.visual, pictures((8, 12), (6, 4))
    order = read(model).window_order(grids)
    assert order is not None
    blocks = []
    for block in tower.blocks:
        with given_to(block) as calls:
            model.model.get_image_features(pixels, grids)
        blocks.append(calls[0])
    (x,), _ = blocks[2]
    cells = [(r, c) for h, w in ((4, 6), (3, 2)) for r in range(h) for c in range(w)]
    left = torch.tensor([4 * at + i for at, unit in enumerate(order.tolist()) if stays(*cells[unit]) for i in range(4)])
    assert 60 < len(left) < 110
    x, part = x.clone(), torch.zeros(len(x), dtype=torch.bool)
    part[left] = True
    for block, (_, beside) in list(zip(tower.blocks, blocks, strict=True))[2:]:
        cos, sin = beside["position_embeddings"]
        for start, end in pairwise(beside["cu_seqlens"].tolist()):
            here = (part[start:end].nonzero()[:, 0] + start).tolist()
            if here:
                x[here] = block(x[here], cu_seqlens=torch.tensor([0, len(here)]), position_embeddings=(cos[here], sin[here]))
    with given_to(tower.merger) as calls, foveate.attach(model, Some(2)):
        model.model.get_image_features(pixels, grids)
    ((found,), _), *_ = calls
    assert found.shape == x.shape
    torch.testing.assert_close(found[left], x[left], **CLOSE)


@torch.no_grad()
def test_levels_go_to_their_mergers_whole() -> None:
    """DeepStack takes the states of blocks 0, 1 and 2; the cut is in front of block 2, and merges two tokens each: of what was taken in
    front of it nothing is merged any more."""
    model = alone("qwen3_vl")
    pixels, grids = pictures((4, 8))
    bare = model.model.get_image_features(pixels, grids).deepstack_features
    with foveate.attach(model, Pairs(2)):
        output = model.model.get_image_features(pixels, grids)
    first, second, third = (level[0] for level in output.deepstack_features)
    assert torch.equal(first, bare[0][0])
    assert torch.equal(second, bare[1][0])
    for found in (output.pooler_output[0], third):
        assert found.shape[0] == 8
        assert torch.equal(found[0::2], found[1::2])
        assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["internvl", "qwen2_vl"])
@torch.no_grad()
def test_equal_tokens_that_are_merged_and_count_by_their_size_change_nothing(name: str, attn: str) -> None:
    """Without positions a picture of pairs of equal tokens, half of which become one token each, is the same picture where those count
    twice. The blocks of these towers take no mask: their attention is given one, picture by picture."""
    model = alone(name, attn)
    generator = torch.Generator().manual_seed(1)
    if name == "internvl":
        table = model.model.vision_tower.embeddings.position_embeddings
        values = torch.randn(2, 3, 4, 8, 2, 1, 8, generator=generator)  # 2 pictures of 4 rows of 2 pairs of blocks of 8 x 8 pixels
        given: tuple[Any, ...] = (values.expand(-1, -1, -1, -1, -1, 2, -1).reshape(2, 3, 32, 32),)
    else:
        table = model.model.visual.rotary_pos_emb.inv_freq
        pairs = torch.randn(6 + 4, 1, 4, 96, generator=generator).expand(-1, 2, -1, -1)
        given = (pairs.reshape(-1, 96), torch.tensor([[1, 4, 12], [1, 4, 8]]))
    before = table.clone()
    table.zero_()
    try:
        bare = model.model.get_image_features(*given, return_dict=True).pooler_output
        found = {}
        for proportional in (True, False):
            with foveate.attach(model, ToMe(0.75, site="tower", blocks=1, proportional=proportional)):
                found[proportional] = model.model.get_image_features(*given, return_dict=True).pooler_output
    finally:
        table.copy_(before)
    for own, by_size, plain in zip(bare, found[True], found[False], strict=True):
        torch.testing.assert_close(by_size, own, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(plain, own, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reducers", [[ToMe(0.4, site="tower", blocks=3)], [Fewer(1, 0.9, ragged=True), ToMe(0.5, site="tower", blocks=3)]])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_pictures_of_several_sizes_in_one_call_are_each_alone(name: str, reducers: list[Reducer]) -> None:
    model, sizes = alone(name), [(8, 12), (6, 4), (8, 12)]
    pixels, grids = pictures(*sizes)
    with foveate.attach(model, reducers):
        together = model.model.get_image_features(pixels, grids).pooler_output
        start = 0
        for i, (h, w) in enumerate(sizes):
            own = model.model.get_image_features(pixels[start : start + h * w], grids[i : i + 1]).pooler_output[0]
            torch.testing.assert_close(together[i], own, **CLOSE)
            start += h * w


@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl"])
@torch.no_grad()
def test_a_ranking_in_the_tower_is_that_of_its_block(name: str) -> None:
    """With [CLS] or without: the same tokens stay as where the same scores are used in front of the language model."""
    model = alone(name)
    token = model.config.image_token_id
    inputs: dict[str, Tensor] = {"input_ids": torch.tensor([[5, *[token] * (16 if name == "internvl" else 24), 6, 7]])}
    if name == "internvl":
        inputs["pixel_values"] = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    else:
        inputs["pixel_values"], inputs["image_grid_thw"] = pictures((8, 12))
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).int()
    kept = []
    for site in ("lm", "tower"):
        with foveate.attach(model, FasterVLM(0.4, 1, site=site)) as run:
            model(**inputs)
        kept.append(run.last.maps[0].representative.tolist())
    assert kept[0] == kept[1]
    assert run.last.tower[0].maps.keys() == {2}
