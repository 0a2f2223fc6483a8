"""What is said of each patch, and the pictures that are drawn of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tests.command import refused

import foveate
from foveate.cli import main
from foveate.data.clips import open_clip
from foveate.errors import FoveateError
from foveate.inference import load_model, prompts
from foveate.inspect import draw as drawing
from foveate.inspect import look as looking
from foveate.inspect.draw import Panel, draw
from foveate.inspect.fate import COLOURS, Patch, Raster, colours, patches, rasters
from foveate.inspect.look import at_budget, look, open_image
from foveate.model import from_backbones
from foveate.reducers import parse
from foveate.tokens import Layout, TokenMap
from foveate.world import asset

QUESTION = "what number is printed?"


@pytest.fixture(scope="module")
def vlm() -> tuple[Any, Any]:
    return load_model("asset:vlm", "cpu")


def layout(rows: int = 2, columns: int = 4, before: int = 1) -> Layout:
    """One sequence: text, an image, text."""
    visual = torch.zeros((1, before + rows * columns + 2), dtype=torch.bool)
    visual[0, before : before + rows * columns] = True
    return Layout.sequence(visual, [rows * columns], grids=[(rows, columns)])


def tokens(found: list[Patch]) -> dict[tuple[int, int], int | None]:
    return {(patch.row, patch.column): patch.token for patch in found}


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


# ---- what became of the patches


def test_kept_patches_live_in_their_slots_and_the_others_nowhere() -> None:
    kept = torch.zeros((1, 11), dtype=torch.bool)
    kept[0, [2, 8]] = True  # the patches (0, 1) and (1, 3)
    found = tokens(patches(TokenMap.keep(layout(), kept)))
    assert len(found) == 8
    assert {at: token for at, token in found.items() if token is not None} == {(0, 1): 1, (1, 3): 2}


def test_pooled_patches_share_a_token() -> None:
    found = tokens(patches(TokenMap.pool(layout(), 3)))
    assert [found[row, column] for row in range(2) for column in range(4)] == [1, 1, 1, 2, 2, 2, None, None]


def test_nested_maps() -> None:
    kept = torch.zeros((1, 11), dtype=torch.bool)
    kept[0, [1, 3, 4, 6, 8]] = True
    first = TokenMap.keep(layout(), kept)
    found = tokens(patches(first.then(TokenMap.pool(first.target, 2))))
    assert [found[row, column] for row in range(2) for column in range(4)] == [1, None, 1, 2, None, 2, None, None]


def test_a_member_of_no_weight_is_dropped_and_the_first_of_several_tokens_counts() -> None:
    source = layout(1, 3, before=0)
    member = torch.tensor([[[0, 1], [1, 2], [3, -1], [4, -1]]])
    weight = torch.tensor([[[1.0, 0.5], [0.5, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    found = patches(TokenMap.merge(source, member, weight, torch.tensor([[0, 1, 3, 4]])))
    assert tokens(found) == {(0, 0): 0, (0, 1): 0, (0, 2): None}


def test_a_row_of_a_batch() -> None:
    visual = torch.tensor([[True, True, False], [False, True, True]])
    source = Layout.sequence(visual, [2, 2], grids=[(1, 2), (2, 1)])
    whole = TokenMap.keep(source, torch.tensor([[True, False, False], [False, False, True]]))
    assert patches(whole) == [Patch(0, -1, -1, 0, 0, 0), Patch(0, -1, -1, 0, 1, None)]
    assert patches(whole, 1) == [Patch(1, -1, -1, 0, 0, None), Patch(1, -1, -1, 1, 0, 1)]


def test_crops_and_images_are_rasters_of_their_own() -> None:
    found = [Patch(0, crop, -1, row, column, row) for crop in (0, 1) for row in range(2) for column in range(2 - crop)]
    made = rasters([*found, Patch(1, -1, 0, 0, 0, None)])
    assert [(raster.image, raster.crop, raster.frame, raster.shape) for raster in made] == [
        (0, 0, -1, (2, 2)),
        (0, 1, -1, (2, 2)),  # with a column of padding cut off
        (1, -1, 0, (1, 1)),
    ]
    assert made[1].cells == {(0, 0): 0, (1, 0): 1}


def test_patches_without_a_place() -> None:
    visual = torch.tensor([[True, True]])
    with pytest.raises(FoveateError, match="no rows and columns"):
        rasters(patches(TokenMap.identity(Layout.sequence(visual, [2]))))


# ---- drawing


def test_merged_tokens_that_touch_have_different_colours() -> None:
    cells: dict[tuple[int, int], int | None] = {(row, column): 6 * (row // 2) + column // 2 for row in range(12) for column in range(12)}
    cells[0, 0] = None
    cells[11, 11] = 99
    given = colours([Raster(0, -1, -1, (12, 12), cells)])
    assert set(given) == set(range(36))
    assert set(given.values()) == set(COLOURS)
    for (row, column), token in cells.items():
        for other in (cells.get((row + 1, column + step)) for step in (-1, 0, 1)):
            assert token == other or token not in given or other not in given or given[token] != given[other]


def test_colours_stay_from_layer_to_layer() -> None:
    def raster(*values: int | None) -> list[Raster]:
        return [Raster(0, -1, -1, (1, len(values)), {(0, column): value for column, value in enumerate(values)})]

    before = raster(1, 1, 2, 2, 3, 3)
    shades = colours(before)
    assert [shades[1], shades[2], shades[3]] == list(COLOURS[:3])
    assert colours(raster(None, None, 7, 7, 8, 8), before, shades) == {7: shades[2], 8: shades[3]}


@pytest.mark.parametrize("inset", [0.0, 0.1])
def test_outlines_close(inset: float) -> None:
    own = {(0, 0), (1, 0), (1, 1), (1, 2), (2, 2), (0, 2), (4, 4)}  # bends in both directions, and one apart
    cells: dict[tuple[int, int], int | None] = {(row, column): 5 if (row, column) in own else 6 for row in range(5) for column in range(5)}
    edges = list(drawing._outline(Raster(0, -1, -1, (5, 5), cells), 5, inset))
    ends = Counter((round(x, 6), round(y, 6)) for edge in edges for x, y in edge)
    assert all(count % 2 == 0 for count in ends.values())
    if inset == 0:
        assert sum(abs(x1 - x0) + abs(y1 - y0) for (x0, y0), (x1, y1) in edges) == 14 + 4


def test_dropped_patches_are_grey_and_kept_ones_as_they_were() -> None:
    raster = Raster(0, -1, -1, (2, 2), {(0, 0): 1, (0, 1): None, (1, 0): 2})
    pixels = drawing._pixels(raster, Image.new("RGB", (8, 8), (200, 10, 30)))
    half = len(pixels) // 2
    assert (pixels[:half, :half] == (200, 10, 30)).all()
    assert (pixels[half:, half:] == 255).all()  # no patch was there
    dropped = pixels[:half, half:].reshape(-1, 3)
    assert (dropped == dropped[0]).all()
    assert dropped[0, 0] == dropped[0, 1] == dropped[0, 2]


def test_names() -> None:
    def named(images: int, *items: tuple[int, int, int]) -> list[str]:
        return looking._names([Raster(image, crop, frame, (1, 1), {}) for image, crop, frame in items], images)

    assert named(1, (0, -1, -1)) == [""]
    assert named(2, (0, -1, -1), (1, 0, -1), (1, 1, -1)) == ["image 1", "image 2, crop 1", "image 2, crop 2"]
    assert named(1, (0, -1, -1), (1, -1, -1)) == ["part 1", "part 2"]  # tiles that the model takes for images
    assert named(1, (0, -1, 0), (0, -1, 1)) == ["frame 1", "frame 2"]


def test_the_picture_is_what_the_tower_was_shown() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (8, 16, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((64, 32), Image.Resampling.BICUBIC)
    how = SimpleNamespace(do_normalize=True, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])

    def given(picture: Image.Image) -> torch.Tensor:
        pixels = torch.tensor(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)[None]
        return (pixels - torch.tensor(how.image_mean).view(3, 1, 1)) / torch.tensor(how.image_std).view(3, 1, 1)

    def drawn(pixels: torch.Tensor | None, number: int) -> list[Image.Image | None]:
        found = [Raster(0, crop, -1, (2, 2), {}) for crop in range(number)]
        seen = looking._Asked("", cast(Any, None), SimpleNamespace(image_processor=how), {"pixel_values": pixels}, [image])
        return looking._pictures(seen, found)

    assert drawn(given(image.resize((16, 16), Image.Resampling.BICUBIC)), 1) == [image]  # resized, no more: the image is sharper
    middle = image.crop((16, 0, 48, 32))
    shown = drawn(given(middle), 1)[0]
    assert shown is not None
    assert (np.asarray(shown) == np.asarray(middle)).all()
    assert drawn(None, 1) == [image]
    assert drawn(torch.zeros(16, 48), 1) == [image]  # patches in a row, as for towers of any resolution
    assert drawn(given(middle), 3) == [None] * 3  # three crops of nobody knows what


def test_crops_are_drawn_side_by_side_also_without_a_picture(tmp_path: Path) -> None:
    found = rasters(
        [Patch(0, crop, -1, row, column, None if crop else row) for crop in range(3) for row in range(2) for column in range(3)]
    )
    names = looking._names(found, 1)
    assert names == ["crop 1", "crop 2", "crop 3"]
    panel = Panel(found, names, [None] * 3, colours(found), "x" * 30 + ",y=$1$" * 20, "half a line " * 40, True)
    figure = draw("why? " * 50, "answer", [Image.new("RGB", (900, 20)), Image.new("RGB", (20, 90))], [[panel, panel]])
    figure.savefig(tmp_path / "crops.png")
    assert [text.get_text() for text in figure.axes[-1].texts] == names
    assert all("…" in text for text in texts(figure) if text.startswith("half"))


# ---- asking


def test_another_budget() -> None:
    def spelled(text: str, keep: float) -> str:
        written, reducers = at_budget(parse(text), keep)
        assert parse(written) == reducers == [part.at(keep) for part in parse(text)]
        return written

    assert spelled("random", 0.5) == "random:keep=0.5"
    assert spelled("random:seed=3,keep=0.1", 0.25) == "random:keep=0.25,seed=3"
    assert spelled("random:keep=0.5+vcc:layer=2,stride=4", 0.1) == "random:keep=0.1+vcc:stride=10"
    with pytest.raises(FoveateError, match="schedule has no option keep"):
        at_budget(parse("schedule:keeps=1:0.5"), 0.5)
    with pytest.raises(FoveateError, match="keep=7 is not possible"):
        at_budget(parse("random"), 7)
    with pytest.raises(FoveateError, match="the bare model has no budget"):
        at_budget(parse("none"), 0.5)


@pytest.mark.parametrize("spelling", ["random:keep=0.25", "vcc:layer=2,stride=3", "pyramiddrop", "tome:keep=0.2+random:keep=0.5,layer=3"])
def test_as_many_tokens_are_drawn_as_the_ledger_counts(vlm: tuple[Any, Any], spelling: str) -> None:
    model, processor = vlm
    inputs = processor(images=[open_image("scene:13")], text=prompts(processor, [QUESTION]), return_tensors="pt")
    with foveate.attach(model, spelling) as run, torch.inference_mode():
        model(**inputs)
    for layer, count in enumerate(run.last.visual_tokens):
        (raster,) = rasters(patches(run.last.provenance(layer)))
        assert raster.shape == (8, 8)
        assert len(raster.cells) == 64
        assert len(set(raster.cells.values()) - {None}) == count


def test_one_panel_for_each_reducer(vlm: tuple[Any, Any]) -> None:
    model, processor = vlm
    figure = look(model, ["scene:10"], QUESTION, ["random:keep=0.25", "vcc:layer=2,stride=4"], processor=processor)
    assert titles(figure) == ["random:keep=0.25", "vcc:layer=2,stride=4"]
    written = texts(figure)
    assert written[0] == QUESTION
    assert written[1] == "vlm, all 64 tokens: “61”"
    assert any(text.startswith("16 of 64 tokens, “") for text in written)
    assert any(text.startswith("16 of 64 tokens from layer 2, “") for text in written)


def test_budgets_are_columns(vlm: tuple[Any, Any]) -> None:
    model, processor = vlm
    figure = look(model, ["scene:10"], QUESTION, ["random:seed=1", "divprune"], processor=processor, keep=[0.5, 0.25])
    names = ["random:keep=0.5,seed=1", "random:keep=0.25,seed=1", "divprune:keep=0.5", "divprune:keep=0.25"]
    assert titles(figure) == names
    places = {axes.get_title(loc="left"): axes.get_position() for axes in figure.axes}
    assert places[names[0]].x0 == places[names[2]].x0 < places[names[1]].x0
    assert places[names[0]].y0 == places[names[1]].y0 > places[names[2]].y0


def test_layers(vlm: tuple[Any, Any]) -> None:
    model, processor = vlm
    chosen = texts(look(model, ["scene:10"], QUESTION, ["pyramiddrop"], processor=processor, layers=[0, 3]))
    assert [text.split(",")[0] for text in chosen if text.startswith("layer")] == ["layer 0: 64 of 64 tokens", "layer 3: 16 of 64 tokens"]
    every = texts(look(model, ["scene:10"], QUESTION, ["pyramiddrop", "fastv:keep=0.25"], processor=processor, per_layer=True))
    assert [text.split(" tokens")[0] for text in every if text.startswith("layer")] == [
        "layer 1: 32 of 64",
        "layer 3: 16 of 64",
        "layer 4: 8 of 64",
        "layer 2: 16 of 64",
    ]


def test_two_images_and_a_smaller_one(vlm: tuple[Any, Any]) -> None:
    model, processor = vlm
    figure = look(model, ["scene:6", open_image("scene:3")], "how many objects are there?", ["downsample:keep=0.5"], processor=processor)
    drawn = next(axes for axes in figure.axes if axes.get_title(loc="left"))
    assert [text.get_text() for text in drawn.texts] == ["image 1", "image 2"]
    assert any(text.startswith("128 of 128 tokens") for text in texts(figure))  # this processor makes every image as large as any other


def test_a_bridge_whose_tokens_have_no_place() -> None:
    bridge = {"kind": "chain_of_sight", "scales": [[8, 4], [2, 1]]}
    model, processor = from_backbones(asset("tower"), asset("lm"), bridge, vision_feature_layer=[-1])
    with pytest.raises(
        FoveateError, match=r"chain_of_sight bridge makes its tokens by learned queries .* none of them has a place of its own"
    ):
        look(model, ["scene:10"], QUESTION, ["random"], processor=processor, max_new_tokens=1)


# ---- the command


def test_the_command_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "scene.png"
    open_image("scene:10").save(image)
    out = tmp_path / "new" / "look.png"
    reducers = ["--reduce", "random:keep=0.25", "--reduce", "vcc:layer=2,stride=4"]
    with pytest.raises(SystemExit) as stop:
        main(["look", "asset:vlm", str(image), "--ask", QUESTION, *reducers, "--layer", "1,2", "--out", str(out)])
    assert stop.value.code in (0, None)
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        width, height = picture.size
        picture.load()
    assert width == 1020
    assert height > 600


@pytest.mark.parametrize(
    ("words", "model", "images"),
    [
        (["scene:1"], "asset:vlm", ["scene:1"]),
        (["scene:1", "a.png"], "asset:vlm", ["scene:1", "a.png"]),
        (["a.png", "scene:1"], "asset:vlm", ["a.png", "scene:1"]),
        (["owner/name", "a.png"], "owner/name", ["a.png"]),
        (["folder", "a.png", "scene:1"], "folder", ["a.png", "scene:1"]),
    ],
)
def test_what_is_the_model(words: list[str], model: str, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").touch()
    Path("folder").mkdir()
    given: list[Any] = []

    def looked(*arguments: Any, **options: Any) -> Figure:
        given.extend(arguments[:2])
        return Figure()

    monkeypatch.setattr(looking, "look", looked)
    assert looking.main(words, "why?", ["random"], None, [], False, Path("out.png")).is_file()
    assert given == [model, images]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.png", "--ask", "what?", "--reduce", "random"], "cannot read the image nowhere.png"),
        (["scene:x", "--ask", "what?", "--reduce", "random"], "a scene is named by a number"),
        (["nowhere", "scene:1", "--ask", "what?", "--reduce", "random"], "no such model folder: nowhere"),
        (["scene:1", "--ask", "what?", "--reduce", "rndom"], "unknown reducer 'rndom' (did you mean 'random'?)"),
        (["scene:1", "--ask", "what?", "--reduce", "schedule:keeps=1:0.5", "--keep", "0.5"], "schedule has no option keep"),
        (["scene:1", "--ask", "what?", "--reduce", "random", "--keep", "0.5,,1"], "--keep 0.5,,1 has an empty entry"),
        (["scene:1", "--ask", "what?", "--reduce", "random", "--keep", "most"], "keep='most' is not possible"),
        (["scene:1", "--ask", "what?"], "nothing to look at: name at least one image and one reducer"),
        (["scene:1", "--reduce", "random"], "Missing option '--ask'"),
        (["scene:1", "--ask", " ", "--reduce", "random"], "the question is empty"),
        (
            ["scene:1", "--ask", "what?", "--reduce", "random", "--layer", "6"],
            "there is no layer 6: the model has 6 decoder layers, 0 to 5",
        ),
        (["scene:1", "--ask", "what?", "--reduce", "random", "--layer", "last"], "--layer last is no layer"),
        (["scene:1", "--ask", "what?", "--reduce", "random", "--layer", "1", "--per-layer"], "either layers or per_layer"),
        (["scene:1", "--ask", "what?", "--reduce", "random", "--out", "look.jpg"], "name a file that ends in .png"),
    ],
)
def test_what_cannot_be(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(["look", *words], capsys)


# ---- clips


def film(path: Path) -> Path:
    """A folder of four frames, the last two of another scene."""
    path.mkdir()
    for number, name in enumerate((27, 27, 13, 13)):
        open_image(f"scene:{name}").save(path / f"{number}.png")
    return path


def test_a_clip_is_a_strip_of_its_frames(vlm: tuple[Any, Any], tmp_path: Path) -> None:
    """Of the second frame, which is the first again, nothing is kept; the third is another scene."""
    clip = open_clip(film(tmp_path / "shots"), rate=2)
    figure = look(vlm[0], [clip], QUESTION, ["evs:keep=128,scope=sample", "fewerframes:keep=1,scope=sample"], processor=vlm[1])
    assert titles(figure) == ["evs:keep=128,scope=sample", "fewerframes:keep=1,scope=sample"]
    strips = [axes for axes in figure.axes if axes.get_title(loc="left")]
    for strip in strips:
        assert [text.get_text() for text in strip.texts] == ["0.0 s", "0.5 s", "1.0 s", "1.5 s"]
        assert len({image.get_extent()[3] for image in strip.images}) == 1  # side by side
    colour = [[float(np.ptp(np.asarray(image.get_array(), np.float32), axis=-1).mean()) for image in strip.images] for strip in strips]
    assert colour[0][1] == colour[0][3] == 0.0
    assert min(colour[0][0], colour[0][2]) > 5
    assert colour[1][0] == colour[1][1] == colour[1][3] == 0.0 < colour[1][2]


def test_the_command_takes_a_film(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(film(tmp_path / "shots"))
    out = str(tmp_path / "strip.png")
    with pytest.raises(SystemExit) as end:
        main(["look", path, "--frames", "uniform:frames=2", "--ask", QUESTION, "--reduce", "evs:scope=sample", "--out", out])
    assert end.value.code == 0
    assert Image.open(out).width > 1000
    for words, says in (
        ([path, "--frames", "unifrom"], "did you mean 'uniform'"),
        (["asset:vlm", path, path, "--frames", "uniform"], "--frames is for one film, and 2 are named"),
        (["gone.mp4", "--frames", "uniform"], "cannot read the clip gone.mp4: it is missing"),
    ):
        assert says in refused(["look", *words, "--ask", QUESTION, "--reduce", "evs", "--out", out], capsys)


def test_a_clip_is_looked_at_by_itself(vlm: tuple[Any, Any], tmp_path: Path) -> None:
    clip = open_clip(film(tmp_path / "shots"))
    with pytest.raises(FoveateError, match="a clip is looked at by itself"):
        look(vlm[0], [clip, "scene:1"], QUESTION, ["random"], processor=vlm[1])
