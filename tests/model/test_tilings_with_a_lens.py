"""Tilings with a lens in the assembled model: what the bridge reads, where each token lies, what is learned and what goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.situations.test_tiled_models import COS, MLP, POOL, drawn, inputs, samples
from tests.train.tiny_training import save_backbones

import foveate
from foveate.accounting.stack import parameters
from foveate.data.conversations import Conversation
from foveate.errors import FoveateError
from foveate.inference import load_model, retiled
from foveate.model.assembly import from_backbones
from foveate.tokens import Kind, wire

SLIME, INF = "slime:tiles=2,queries=2", "inf_llava:sides=2"
RESAMPLER: dict[str, Any] = {"kind": "resampler", "queries": 3, "width": 16, "head_dim": 8}
MQT: dict[str, Any] = {"kind": "mqt", "queries": 4, "width": 16, "head_dim": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("lenses")
    save_backbones(found)
    return found


def assembled(folder: Path, tiling: str | None, bridge: dict[str, Any] = MLP, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return from_backbones(folder / "tower", folder / "lm", bridge, tiling=tiling, **options)


def wide() -> list[Conversation]:
    """A picture twice as wide as high, which is two tiles without a border."""
    return [Conversation(0, "s", [("user", "<image>What?"), ("assistant", "This.")], [drawn(0, 80, 40)])]


def features(model: Any, batch: Any) -> torch.Tensor:
    """Of one image; from its pixels, and from what the tower has made of them before, as training reads it from a cache."""
    with torch.no_grad():
        (found,) = model.get_image_features(batch["pixel_values"], image_sizes=batch["image_sizes"]).pooler_output
        kept = model.model.encode_crops(batch["pixel_values"])
        empty = kept.new_ones(()).expand(batch["pixel_values"].shape)
        (again,) = model.get_image_features(empty, image_sizes=batch["image_sizes"], tower_features=kept).pooler_output
    assert torch.equal(again, found)
    return found


# ---- SliME -----------------------------------------------------------------------------------------------------------------------------


def test_the_bridge_reads_patches_of_the_whole_and_queries_of_tiles(folder: Path) -> None:
    """The overview's 16 tokens, the separator, and the tiles' 2 x 2 as they lie in the picture, row after row of both."""
    model, processor = assembled(folder, SLIME)
    batch, core = inputs(processor, wide()), model.model
    assert batch["pixel_values"].shape[0] == 3
    with torch.no_grad():
        seen = core.encode_crops(batch["pixel_values"])[:, 0]
        whole = core.bridge([seen[:1]], (4, 4))[0]
        (queries,) = core.lens([seen[1:]], (4, 4))
        tiles = core.bridge([queries], (2, 2))
    expected = [*whole, core.image_marks.separator.detach()]
    for row in range(2):
        for tile in range(2):
            expected += [tiles[tile, 2 * row + column] for column in range(2)]
    torch.testing.assert_close(features(model, batch), torch.stack(expected))


def test_boxes_of_tiles_are_those_of_their_queries_cells(folder: Path) -> None:
    """80 x 40 pixels: each tile shows 40 x 40, each of its tokens 20 x 20. With pooling in the bridge a token is all of a tile."""
    model, processor = assembled(folder, SLIME)
    plan = processor.plan_image(40, 80)
    wired = model.config.wire(plan)
    of = wired.box[wired.mark == 0]
    assert of[:2].tolist() == [[0, 0, 20, 10], [20, 0, 40, 10]]  # 4 x 4 of the overview
    assert of[16:].tolist() == [[x, y, x + 20, y + 20] for y in (0, 20) for x in (0, 20, 40, 60)]
    assert wired.place[17:].tolist() == [[1 + column // 2, -1, row, column] for row in range(2) for column in range(4)]
    assert wired.box[16].tolist() == [-1] * 4
    model, processor = assembled(folder, SLIME, POOL)
    wired = model.config.wire(processor.plan_image(40, 80))
    assert wired.box[-2:].tolist() == [[0, 0, 40, 40], [40, 0, 80, 40]]
    assert len(wired.box) == 4 + 1 + 2


@pytest.mark.parametrize("queries", [2, 3, 4])
def test_what_the_tower_says_of_a_tile_is_what_it_says_of_the_cells_patches(folder: Path, queries: int) -> None:
    """Scores of a tile's tokens are means over the patches of their cells; also of cells that share patches, and of one patch each."""
    model, processor = assembled(folder, f"slime:tiles=2,queries={queries}")
    batch = inputs(processor, wide())
    with torch.no_grad():
        with foveate.attach(model, "fastervlm:keep=0.5,scope=image") as run:
            model(**batch)
        kept = next(iter(run.last.maps.values())).target
        tower = model.model.vision_tower
        tower.set_attn_implementation("eager")
        seen = tower(batch["pixel_values"], output_attentions=True).attentions[-2].mean(1)[:, 0, 1:].view(3, 4, 4)
        tower.set_attn_implementation("sdpa")
    scores = [seen[0].flatten()]
    for tile in seen[1:]:
        spans = [(cell * 4 // queries, -(-(cell + 1) * 4 // queries)) for cell in range(queries)]
        scores.append(torch.stack([tile[top:bottom, left:right].mean() for top, bottom in spans for left, right in spans]))
    wired = wire(processor.plan_image(40, 80))
    own = torch.where(wired.kind == Kind.PATCH, torch.cat(scores)[wired.source[:, 0].clamp(min=0)], -1.0)
    best = own.topk(int(kept.visual.sum())).indices.sort().values
    assert torch.equal(kept.place[kept.visual][:, 1:], wired.place[best])


def test_a_tile_of_as_many_queries_as_patches_goes_through_the_lens_too(folder: Path) -> None:
    model, processor = assembled(folder, "slime:tiles=2,queries=4")
    batch = inputs(processor, wide())
    before = features(model, batch)
    with torch.no_grad():
        model.model.lens.readers[0].query += 1.0 + torch.arange(32.0) % 3
    after = features(model, batch)
    assert len(before) == 16 + 1 + 2 * 16
    assert torch.equal(before[:17], after[:17])
    assert bool((before[17:] != after[17:]).any(1).all())


@pytest.mark.parametrize(("bridge", "each"), [(RESAMPLER, None), (MQT, None), (MQT, 3)])
def test_a_bridge_of_queries_reads_the_queries_of_tiles(folder: Path, bridge: dict[str, Any], each: int | None) -> None:
    """Its tokens are no raster and follow one another, view by view; a smaller number is one of each view."""
    model, processor = assembled(folder, SLIME, bridge)
    made = each or bridge["queries"]
    more: dict[str, Any] = {} if each is None else {"view_tokens": each}
    batch = inputs(processor, wide(), **more)
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 3 * made + 1
    core = model.model
    with torch.no_grad():
        model(**batch)
        given = {name: batch[name] for name in ("image_sizes", "view_tokens") if name in batch}
        (found,) = model.get_image_features(batch["pixel_values"], **given).pooler_output
        seen = core.encode_crops(batch["pixel_values"])[:, 0]
        tiles = core.bridge(core.lens([seen[1:]], (4, 4)), (2, 2))
    torch.testing.assert_close(found[made + 1 :], tiles[:, :made].flatten(0, 1))


# ---- INF-LLaVA -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bridge", [MLP, COS])
def test_the_bridge_reads_what_two_perspectives_make_of_an_image(folder: Path, bridge: dict[str, Any]) -> None:
    model, processor = assembled(folder, INF, bridge)
    features(model, inputs(processor, samples()[:1]))
    batch, core = inputs(processor, samples()[1:2]), model.model
    with torch.no_grad():
        seen = core.encode_crops(batch["pixel_values"])[:, 0].view(2, 9, 16, -1)
        expected = core.bridge(core.lens([seen], (4, 4)), (4, 4))
        found = model.get_image_features(batch["pixel_values"], image_sizes=batch["image_sizes"]).pooler_output
        torch.testing.assert_close(torch.stack(list(found)), expected)
        plain = core.bridge([seen[:, 0]], (4, 4))
    assert not torch.allclose(expected, plain, atol=1e-3)
    with pytest.raises(FoveateError, match="1 views were given, but an image has 9 of them; hand in image_sizes"):
        model.get_image_features(batch["pixel_values"][:1])


# ---- both ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiling", [SLIME, INF])
def test_a_step_teaches_every_weight_of_a_lens(folder: Path, tiling: str) -> None:
    """With images, and without any, where the gradients are zeros rather than none."""
    model, processor = assembled(folder, tiling, vision_feature_layer=[1, -1])
    batch = inputs(processor, samples()[:2])
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    lens = dict(model.model.lens.named_parameters())
    assert {name.split(".")[1] for name in lens} == {"0", "1"}  # a lens of each level
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in lens.values())
    model.zero_grad(set_to_none=True)
    model.config.always_run_vision = True
    text = inputs(processor, samples()[2:3])
    model(**text, labels=text["input_ids"]).loss.backward()
    assert all(parameter.grad is not None and not bool(parameter.grad.any()) for parameter in lens.values())


def test_a_lens_comes_stays_and_goes_with_the_tiling(folder: Path) -> None:
    model, processor = assembled(folder, None)
    core, found = model.model, []
    for tiling in (SLIME, "slime:tiles=4,queries=2", "slime:queries=3", INF, "inf_llava:sides=1", "internvl:tiles=2", None):
        model.set_tiling(tiling)
        processor.set_tiling(model.config.tiling)
        found.append(core.lens)
        with torch.no_grad():
            model(**inputs(processor, samples()[:2]))
        assert any(name.startswith("model.lens.") for name in model.state_dict()) == (core.lens is not None)
    slime, more, other, inf, fewer, *none = found
    assert slime is more
    assert inf is fewer  # its weights do not depend on how many views a side there are
    assert len({slime, other, inf}) == 3
    assert none == [None, None]


def test_a_lens_has_the_dtype_of_the_bridge_and_is_counted_with_it(folder: Path) -> None:
    with_lens, plain = assembled(folder, INF, dtype="bfloat16")[0], assembled(folder, None)[0]
    assert {parameter.dtype for parameter in with_lens.model.lens.parameters()} == {torch.bfloat16}
    counts = [parameters(model.config)["bridge"] for model in (with_lens, plain)]
    assert counts[0] - counts[1] == sum(parameter.numel() for parameter in with_lens.model.lens.parameters())


def test_what_was_not_learned_is_refused(folder: Path, tmp_path: Path) -> None:
    model, processor = assembled(folder, INF)
    retiled(model, processor, "inf_llava:sides=3")  # the same lens
    plain, bare = assembled(folder, "xcomposer:tiles=2")  # which has a separator
    for tiling, lens in ((INF, "dual_perspective"), (SLIME, "tile_queries")):
        with pytest.raises(FoveateError, match=rf"has a lens \({lens}\) between tower and bridge, which this model has not learned"):
            retiled(plain, bare, tiling)
    with pytest.raises(FoveateError, match="cannot read them"):
        assembled(folder, None, COS)[0].set_tiling(SLIME)
    # a model saved without the weights of its lens is not filled up with new ones
    plain.config.tiling = INF
    plain.save_pretrained(tmp_path)
    with pytest.raises(FoveateError, match="lens"):
        load_model(tmp_path)


def test_a_cut_in_the_tower_cannot_be_carried_through_a_lens(folder: Path) -> None:
    for tiling in (SLIME, INF):
        model, processor = assembled(folder, tiling)
        batch = inputs(processor, wide())
        with (
            torch.no_grad(),
            foveate.attach(model, "fastervlm:keep=0.5,layer=0,site=tower"),
            pytest.raises(FoveateError, match="cannot be carried to the language model"),
        ):
            model(**batch)
