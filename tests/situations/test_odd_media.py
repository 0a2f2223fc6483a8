"""One frame, one token, one row, one column, one tile: what the layout says of each token is where its feature came from.

The oracle knows nothing of layouts. With the attention of the tower taken out each token depends on its own pixels alone, so the gradient
of a token's embedding says which pixels made it; what depends on none is no patch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, Dinov2WithRegistersConfig, LlamaConfig, SiglipVisionConfig

import foveate
from foveate.anatomy import attends, blocks, extras_of, read
from foveate.contract import AttentionRows, ClsAttention
from foveate.errors import NotApplicable
from foveate.probes.tower import values_of
from foveate.tokens import Kind
from tests.conformance.family import alone

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "initializer_range": 0.2,
}
IMAGE, VIDEO = 90, 91


@dataclass
class Token:
    """kind and place as the layout has them, and `source`: indices of the pixels (of all axes but the channels) that it depends on."""

    kind: int
    place: list[int]
    source: Tensor


def looked_at(model: Any, inputs: dict[str, Any]) -> list[Token]:
    """The visual tokens of a prompt."""
    name = next(name for name in inputs if name.startswith("pixel_values"))
    pixels = inputs[name].clone().requires_grad_()
    anatomy = read(model)
    towers = {anatomy.tower_of(modality) for modality in ("image", "video")}
    alone = [m for tower in towers for m in tower.modules() if attends(m) and not any(attends(child) for child in m.children())]
    seen: list[Tensor] = []
    hooks = [m.register_forward_hook(_nothing) for m in alone]
    hooks.append(anatomy.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0])))
    try:
        with foveate.attach(model, None, record="last") as run:
            model(**{**inputs, name: pixels}, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    layout = run.last.layouts[0]
    slots = (layout.image[0] >= 0).nonzero()[:, 0].tolist()
    assert len(slots) == int(torch.isin(inputs["input_ids"], _placeholders(model)).sum())
    direction = torch.randn(seen[0].shape[-1], generator=torch.Generator().manual_seed(0))
    found = []
    for slot in slots:
        (gradient,) = torch.autograd.grad(seen[0][0, slot] @ direction, pixels, retain_graph=True)
        strength = gradient.abs().amax(-1) if pixels.ndim < 4 else gradient.abs().amax(-3)
        found.append(Token(int(layout.kind[0, slot]), layout.place[0, slot].tolist(), strength.nonzero()))
    return found


def _placeholders(model: Any) -> Tensor:
    return torch.tensor([_placeholder(model, modality) for modality in ("image", "video")])


def _placeholder(model: Any, modality: str) -> int:
    names = (f"{modality}_token_id", f"{modality}_token_index")
    return next((n for n in (getattr(model.config, name, None) for name in names) if isinstance(n, int)), -1)


def _nothing(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return torch.zeros_like(output[0]), *output[1:]
    return torch.zeros_like(output)


def check(tokens: list[Token], kinds: str, where: Callable[[Tensor], tuple[int, int, int]] | None = None) -> None:
    """kinds: a letter a token, p(atch), n(ewline), c([CLS]), r(egister). where: from a token's pixels to part (tile or frame), row and
    column; without it parts are the first of the pixels' axes, and rows and columns are counted within a part."""
    letters = {Kind.PATCH: "p", Kind.NEWLINE: "n", Kind.CLS: "c", Kind.REGISTER: "r"}
    assert "".join(letters[Kind(token.kind)] for token in tokens) == kinds
    patches = [token for token in tokens if token.kind == Kind.PATCH]
    assert all(len(token.source) == 0 for token in tokens if token.kind != Kind.PATCH)
    assert all(len(token.source) for token in patches)
    if where is not None:
        expected = [where(token.source) for token in patches]
    else:
        centres = [(tuple(t.source[0, :-2].tolist()), *t.source[:, -2:].double().mean(0).round(decimals=3).tolist()) for t in patches]
        order = {axis: {part: sorted({c[axis] for c in centres if c[0] == part}) for part, *_ in centres} for axis in (1, 2)}
        parts = sorted({c[0] for c in centres})
        expected = [(parts.index(c[0]), order[1][c[0]].index(c[1]), order[2][c[0]].index(c[2])) for c in centres]
    assert [(max(0, *t.place[1:3]), *t.place[3:]) for t in patches] == expected


# ---- models whose inputs are made by hand


def tower(side: int, patch: int, kind: str = "clip") -> Any:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": side, "patch_size": patch}
    if kind == "registers":
        return Dinov2WithRegistersConfig(**shape, mlp_ratio=2, num_register_tokens=2)
    return (CLIPVisionConfig if kind == "clip" else SiglipVisionConfig)(**shape, intermediate_size=64)


def built(family: str, vision: Any, **own: Any) -> Any:
    torch.manual_seed(0)
    text = transformers.Qwen2Config(**TEXT) if family == "LlavaOnevision" else LlamaConfig(**TEXT)
    tokens = {"image_token_index": IMAGE, "video_token_index": VIDEO} if family != "Llava" else {"image_token_index": IMAGE}
    config = getattr(transformers, f"{family}Config")(vision_config=vision, text_config=text, **tokens, **own)
    config.image_token_id, config.video_token_id = IMAGE, VIDEO
    return getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()


def prompted(model: Any, **given: Any) -> dict[str, Any]:
    """Inputs with as many placeholders as the model makes features."""
    modality = "video" if "pixel_values_videos" in given else "image"
    with torch.no_grad():
        made = getattr(read(model).core, f"get_{modality}_features")(**given)
    features = made.pooler_output if made.pooler_output is not None else made.last_hidden_state
    ids = torch.tensor([[5, *[_placeholder(model, modality)] * sum(len(f) for f in features), 6]])
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        given["mm_token_type_ids"] = (ids == ids[0, 1]) * (2 if modality == "video" else 1)
    return {"input_ids": ids, **given}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("frames", "patches"), [(1, 4), (3, 4), (1, 1), (2, 1), (5, 1), (1, 3)])
def test_a_onevision_video_ends_in_its_newline(frames: int, patches: int) -> None:
    model = built("LlavaOnevision", tower(8 * patches, 8, "siglip"), vision_feature_select_strategy="full", image_grid_pinpoints=[[32, 32]])
    each = ((patches + 1) // 2) ** 2
    tokens = looked_at(model, prompted(model, pixel_values_videos=noise(1, frames, 3, 8 * patches, 8 * patches)))
    check(tokens, "p" * each * frames + "n")


@pytest.mark.parametrize(("frames", "patches"), [(1, 2), (2, 2), (1, 4), (5, 2), (3, 6)])
def test_a_next_video_has_no_newline(frames: int, patches: int) -> None:
    model = built("LlavaNextVideo", tower(8 * patches, 8), image_grid_pinpoints=[[32, 32]])
    tokens = looked_at(model, prompted(model, pixel_values_videos=noise(1, frames, 3, 8 * patches, 8 * patches)))
    check(tokens, "p" * (patches // 2) ** 2 * frames)


@pytest.mark.parametrize(("frames", "patches"), [(1, 1), (1, 2), (3, 2), (2, 4)])
def test_every_frame_of_video_llava_has_its_cls(frames: int, patches: int) -> None:
    model = built("VideoLlava", tower(8 * patches, 8))
    tokens = looked_at(model, prompted(model, pixel_values_videos=noise(1, frames, 3, 8 * patches, 8 * patches)))
    check(tokens, ("c" + "p" * patches**2) * frames)


@pytest.mark.parametrize(
    ("kind", "strategy", "side", "kinds"),
    [
        ("clip", "default", 8, "p"),
        ("clip", "full", 8, "cp"),  # two tokens: one and a [CLS]
        ("siglip", "full", 8, "p"),
        ("clip", "full", 16, "cpppp"),
        ("siglip", "full", 16, "pppp"),
        ("clip", "full", 32, "c" + 16 * "p"),
        ("registers", "default", 16, "rrpppp"),
        ("registers", "full", 16, "crrpppp"),
    ],
)
def test_cls_and_registers_are_told_from_patches(kind: str, strategy: str, side: int, kinds: str) -> None:
    model = built("Llava", tower(side, 8, kind), vision_feature_select_strategy=strategy, vision_feature_layer=-1)
    check(looked_at(model, prompted(model, pixel_values=noise(1, 3, side, side))), kinds)


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (1, 16), (2, 8), (8, 2), (1, 1), (1, 2)])
def test_a_strip_is_no_square(shape: tuple[int, int]) -> None:
    """Pixtral's tower makes a token of every patch at any shape."""
    vision = transformers.PixtralVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=4
    )
    model = built("Llava", vision, vision_feature_select_strategy="full", vision_feature_layer=-1)
    height, width = shape[0] * 4, shape[1] * 4
    tokens = looked_at(model, prompted(model, pixel_values=noise(1, 3, height, width), image_sizes=torch.tensor([[height, width]])))
    check(tokens, "p" * shape[0] * shape[1])


# Of 4 tiles in a row (3 in a column) padding may take the outer ones whole.
GRIDS = [[32, 32], [32, 64], [64, 32], [32, 96], [128, 32], [64, 64]]


@pytest.mark.parametrize("family", ["LlavaNext", "LlavaOnevision"])
@pytest.mark.parametrize(
    ("grids", "size", "whole", "mosaic"),
    [
        (GRIDS, (30, 60), (32, 64), (4, 8)),  # two tiles in a row
        (GRIDS, (60, 30), (64, 32), (8, 4)),
        (GRIDS, (120, 30), (128, 32), (16, 4)),
        (GRIDS, (8, 96), (32, 96), (2, 12)),  # unpadded to a row or two
        ([[64, 96]], (10, 100), (64, 96), (2, 12)),
        ([[32, 128]], (32, 16), (32, 128), (4, 2)),  # the outer tiles are nothing but padding
        ([[128, 32]], (16, 32), (128, 32), (2, 4)),
        ([[64, 64]], (4, 64), (64, 64), (0, 8)),  # unpadded to nothing
    ],
)
def test_mosaics_of_tiles(
    family: str, grids: list[list[int]], size: tuple[int, int], whole: tuple[int, int], mosaic: tuple[int, int]
) -> None:
    clip = family != "LlavaOnevision"
    model = built(
        family,
        tower(32, 8, "clip" if clip else "siglip"),
        image_grid_pinpoints=grids,
        vision_feature_select_strategy="default" if clip else "full",
    )
    columns = whole[1] // 32
    tiles = whole[0] // 32 * columns
    tokens = looked_at(model, prompted(model, pixel_values=noise(1, tiles + 1, 3, 32, 32), image_sizes=torch.tensor([size])))

    def where(source: Tensor) -> tuple[int, int, int]:
        tile, y, x = source[0, -3:].tolist()
        assert source[:, -3].eq(tile).all()
        if tile == 0:
            return 0, y // 8, x // 8
        return tile, ((tile - 1) // columns * 32 + y) // 8, ((tile - 1) % columns * 32 + x) // 8

    rows, wide = mosaic
    check(tokens, "p" * 16 + ("p" * wide + "n") * rows, where)


@pytest.mark.parametrize("family", ["LlavaNext", "LlavaOnevision"])
@pytest.mark.parametrize("patches", [1, 2, 4])
def test_tiles_of_few_tokens_and_one_crop_alone(family: str, patches: int) -> None:
    """Of several pictures each is one crop in LLaVA-OneVision; a tile may be one token, or as many as there are tiles."""
    side, clip = 8 * patches, family == "LlavaNext"
    options = {"image_grid_pinpoints": [[side, 2 * side]], "vision_feature_select_strategy": "default" if clip else "full"}
    model = built(family, tower(side, 8, "clip" if clip else "siglip"), **options)
    each = patches**2
    pair = prompted(model, pixel_values=noise(1, 3, 3, side, side), image_sizes=torch.tensor([[side, 2 * side]]))
    check(looked_at(model, pair), "p" * each + ("p" * 2 * patches + "n") * patches, lambda source: _in_row(source, side))
    if not clip:
        alone = {"pixel_values": noise(2, 1, 3, side, side), "image_sizes": torch.tensor([[side, side]] * 2)}
        tokens = looked_at(model, prompted(model, **alone, batch_num_images=torch.tensor([2])))
        for token in tokens[each + 1 :]:
            assert token.place[0] == 1
        half = [Token(t.kind, t.place, t.source[:, 1:]) for t in tokens[: each + 1]]
        check(half, "p" * each + "n")


def _in_row(source: Tensor, side: int) -> tuple[int, int, int]:
    tile, y, x = source[0, -3:].tolist()
    return (0, y // 8, x // 8) if tile == 0 else (tile, y // 8, ((tile - 1) * side + x) // 8)


class OwnWay(transformers.LlavaModel):
    """Puts its newlines in where Foveate does not look."""

    every = 4

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        made = super().get_image_features(*args, **kwargs)
        newline = self.image_newline[None]
        made.pooler_output = [torch.cat([x for row in f.split(self.every) for x in (row, newline)]) for f in made.pooler_output]
        return made


@pytest.mark.parametrize("every", [1, 2, 4, 16])
def test_newlines_of_a_model_that_puts_them_in_by_itself(every: int) -> None:
    model = built("Llava", tower(32, 8))
    model.model.image_newline = nn.Parameter(torch.randn(32))
    model.model.__class__ = type("OwnWay", (OwnWay,), {"every": every})
    tokens = looked_at(model, prompted(model, pixel_values=noise(1, 3, 32, 32)))
    assert [token.place[3:] for token in tokens] == [[-1, -1]] * len(tokens)
    check([t for t in tokens if t.kind != Kind.PATCH], "n" * (16 // every))
    assert "".join("p" if len(t.source) else "n" for t in tokens) == "".join("p" if t.kind == Kind.PATCH else "n" for t in tokens)


# ---- the tiny models of the conformance table


def grouped(grid: tuple[int, int, int], side: int) -> Callable[[Tensor], tuple[int, int, int]]:
    """Where the patches are that a processor puts side by side in groups of side x side."""
    _, h, w = grid

    def where(source: Tensor) -> tuple[int, int, int]:
        (group,) = (source[:, 0] // side**2).unique().tolist()
        frame, place = divmod(group, h * w // side**2)
        return frame, place // (w // side), place % (w // side)

    return where


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "video_llama_3"])
@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 2, 18), (1, 8, 2), (2, 2, 2), (3, 4, 2)])
def test_grids_of_one_token_one_row_one_column(name: str, grid: tuple[int, int, int]) -> None:
    model, images = alone(name), grid[0] == 1 or name == "glm4v"
    if name in ("qwen3_vl", "glm4v"):
        grid = (1, *grid[1:])  # text stands between their frames: a frame is an item
    given: dict[str, Any] = {
        "pixel_values" if images else "pixel_values_videos": noise(math.prod(grid), 48 if name == "video_llama_3" else 96)
    }
    given["image_grid_thw" if images else "video_grid_thw"] = torch.tensor([grid])
    for side in (1, 2) if name == "video_llama_3" else (2,):
        if name == "video_llama_3":
            given["image_merge_sizes" if images else "video_merge_sizes"] = torch.tensor([side])
        check(looked_at(model, prompted(model, **given)), "p" * (math.prod(grid) // side**2), grouped(grid, side))


@pytest.mark.parametrize(("h", "w"), [(2, 2), (2, 8), (8, 2), (4, 6)])
def test_hunyuan_marks_rows_and_picture(h: int, w: int) -> None:
    model = alone("hunyuan_vl")
    inputs = prompted(model, pixel_values=noise(h * w, 48), image_grid_thw=torch.tensor([[1, h, w]]))

    def where(source: Tensor) -> tuple[int, int, int]:
        ((row, column),) = torch.stack([source[:, 0] // w // 2, source[:, 0] % w // 2], 1).unique(dim=0).tolist()
        return 0, row, column

    check(looked_at(model, inputs), "n" + ("p" * (w // 2) + "n") * (h // 2) + "n", where)


@pytest.mark.parametrize(("h", "w"), [(2, 2), (2, 32), (32, 2), (8, 12)])
def test_gemma_4_at_any_shape(h: int, w: int) -> None:
    model, patches = alone("gemma4"), 4 * 70
    positions = torch.full((1, patches, 2), -1)
    positions[0, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(1)
    pixels = torch.cat([noise(1, h * w, 48), torch.zeros(1, patches - h * w, 48)], 1)
    inputs = prompted(model, pixel_values=pixels, image_position_ids=positions)

    def where(source: Tensor) -> tuple[int, int, int]:
        ((column, row),) = (positions[0, source[:, 1]] // 2).unique(dim=0).tolist()
        return 0, row, column

    check(looked_at(model, inputs), "p" * (h * w // 4), where)


@pytest.mark.parametrize(("height", "width"), [(8, 64), (64, 8), (16, 24), (15, 16)])
def test_breaks_of_mistral_3_are_text(height: int, width: int) -> None:
    """What is over behind whole tokens (15 pixels are one of 8) is cut off, and must not turn a row of two into a column."""
    model = alone("mistral3")
    given = {"pixel_values": noise(1, 3, height, width), "image_sizes": torch.tensor([[height, width]])}
    check(looked_at(model, prompted(model, **given)), "p" * (height // 8 * (width // 8)))


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_tiles_of_idefics(name: str, tiles: int) -> None:
    model = alone(name)
    inputs = prompted(model, pixel_values=noise(1, tiles, 3, 32, 32))
    tokens = looked_at(model, inputs)
    check([Token(t.kind, t.place, t.source[:, 1:]) for t in tokens], "p" * len(tokens))


@pytest.mark.parametrize("shapes", [[(2, 2)], [(2, 16)], [(16, 2)], [(2, 8), (4, 4)]])
def test_lfm2_counts_in_patches(shapes: list[tuple[int, int]]) -> None:
    model, most = alone("lfm2_vl"), max(h * w for h, w in shapes)
    mask = torch.stack([torch.arange(most) < h * w for h, w in shapes]).long()
    pixels = noise(len(shapes), most, 48) * mask[..., None]
    inputs = prompted(model, pixel_values=pixels, spatial_shapes=torch.tensor(shapes), pixel_attention_mask=mask)
    tokens = looked_at(model, inputs)
    for image, (h, w) in enumerate(shapes):

        def where(source: Tensor, w: int = w, image: int = image) -> tuple[int, int, int]:
            ((own, row, column),) = torch.stack([source[:, 0], source[:, 1] // w // 2, source[:, 1] % w // 2], 1).unique(dim=0).tolist()
            assert own == image
            return 0, row, column

        check([t for t in tokens if t.place[0] == image], "p" * (h * w // 4), where)


# ---- the tokens that a tower has beside its patches


def test_llama_4_has_its_cls_behind_the_patches() -> None:
    model = alone("llama4")
    tower, pixels = read(model).tower, noise(2, 3, 32, 32)
    assert tuple(extras_of(tower)) == (True, 1, True)
    arrived: list[Tensor] = []
    hook = blocks(tower)[0].register_forward_pre_hook(lambda m, args, given: arrived.append((*args, *given.values())[0]), with_kwargs=True)
    with torch.no_grad():
        tower(pixels)
    hook.remove()
    same = (arrived[0][0] == arrived[0][1]).all(-1)
    assert same.tolist() == [False] * (len(same) - 1) + [True]
    # Every token looks at the one behind it, the last, which is [CLS], at the first.
    keys = torch.eye(len(same))[None, None]
    (values,) = values_of(ClsAttention(), AttentionRows(200 * keys.roll(1, 3), keys, 1.0), extras_of(tower))
    assert values.tolist() == [1.0] + [0.0] * (len(same) - 2)


def test_a_head_that_pools_by_a_cls_token_adds_none() -> None:
    """AIMv2 has a token of that name in its pooling head, never in its sequence."""
    config = transformers.Aimv2VisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8, use_head=True
    )
    model = built("Llava", config, vision_feature_select_strategy="full", vision_feature_layer=-1)
    assert "cls_token" in {name.rpartition(".")[2] for name, _ in read(model).tower.named_parameters()}
    assert tuple(extras_of(read(model).tower)) == (False, 0, False)
    check(looked_at(model, prompted(model, pixel_values=noise(1, 3, 16, 16))), "pppp")


def test_scores_of_pictures_of_unlike_tokens_are_refused() -> None:
    """Of one call, one picture with a patch a token and one with four."""
    model = alone("video_llama_3")
    given = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "image_merge_sizes": torch.tensor([1, 2])}
    inputs = prompted(model, pixel_values=noise(32, 48), **given)
    check(looked_at(model, inputs)[:16], "p" * 16, grouped((1, 4, 4), 1))
    with foveate.attach(model, "fopru"), pytest.raises(NotApplicable, match="encode them apart"), torch.no_grad():
        model(**inputs, use_cache=False)
