"""`foveate plan`, `look` and `bench` with a tiling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.cli import main
from foveate.errors import FoveateError
from foveate.evaluation.bench import bench
from foveate.inspect.look import look, open_image
from foveate.tilings import TILINGS
from foveate.train.plan import plan

RECIPE = """
name: t
output: out
model: {vision: openai/clip-vit-large-patch14-336, text: lmsys/vicuna-7b-v1.5, bridge: {kind: mlp}, tiling: anyres}
stages:
  - {name: s, data: {conversations: d.json, images: i}, steps: 1, batch_size: 1, learning_rate: 1.0e-3}
"""


def said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code, and what was printed."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    seen = capsys.readouterr()
    return int(stopped.value.code or 0), seen.out + seen.err


@pytest.mark.parametrize("tiling", TILINGS)
def test_plan_prints_the_published_counts(tiling: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(["plan", tiling, "--image", "1000x500", "--json"], capsys)
    (found,) = json.loads(text)["images"]
    expected = TILINGS[tiling]().plan(1000, 500)
    assert (code, found["passes"], found["placeholders"]) == (0, len(expected.crops), expected.tokens)
    assert [view["tokens"] for view in found["views"]] == [crop.tokens for crop in expected.crops]


def test_plan_of_several_images_shares_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(["plan", "leopard", *["--image", "1700x2200"] * 4], capsys)
    assert code == 0
    assert "6760" in text
    for argv, why in (
        (["plan", "leopard:budget=2", *["--image", "10x10"] * 3], "3 images cannot share a budget of 2 views"),
        (["plan", "leopard", "--image", "10by10"], "'10by10' is no size"),
        (["plan", "leopard:size=3"], "has no option 'size'"),
    ):
        code, text = said(argv, capsys)
        assert (code, why in text) == (2, True)


def mlp_flops(tokens: int) -> int:
    """Of LLaVA-1.5's bridge between CLIP-L and a 7B model."""
    return 2 * tokens * (1024 * 4096 + 4096 * 4096)


def queries_flops(queries: int, patches: int, width: int) -> int:
    """Of SliME's lens for one tile: maps of queries and outputs, of keys and values; scores and sums."""
    return 2 * (2 * queries * width**2 + 2 * patches * width**2 + 2 * queries * patches * width)


def dual_flops(n: int, patches: int, width: int) -> int:
    """Of INF-LLaVA's lens: two attentions in n² pieces of one view's patches each, and two maps to half of the width."""
    one = 4 * patches * width**2 + 2 * patches**2 * width
    return 2 * n * n * (2 * one + patches * width**2)


def test_plan_of_a_recipe_with_a_tiling(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (stage,) = plan(tmp_path / "recipe.yaml", image=(1000, 500)).stages
    assert stage.tokens_per_image == 1752 - 24
    assert any("1000 x 500 px becomes 3 views, 1728 visual tokens and 24 marks" in note for note in stage.notes)
    (s2,) = plan(tmp_path / "recipe.yaml", ["model.tiling=s2"]).stages
    assert (s2.tokens_per_image, 3 * s2.forward_flops["tower"]) == (576, 14 * stage.forward_flops["tower"])
    (slime,) = plan(tmp_path / "recipe.yaml", ["model.tiling=slime"], image=(1000, 500)).stages
    assert (slime.tokens_per_image, 3 * slime.forward_flops["tower"]) == (576 + 6 * 144, 7 * stage.forward_flops["tower"])
    (inf,) = plan(tmp_path / "recipe.yaml", ["model.tiling=inf_llava"]).stages
    assert (inf.tokens_per_image, 3 * inf.forward_flops["tower"]) == (576, 19 * stage.forward_flops["tower"])
    assert inf.forward_flops["bridge"] == mlp_flops(576) + dual_flops(3, 576, 1024)
    assert slime.forward_flops["bridge"] == mlp_flops(576 + 6 * 144) + 6 * queries_flops(144, 576, 1024)


def wide() -> Image.Image:
    """Two scenes side by side."""
    found = Image.new("RGB", (256, 128))
    for place, name in enumerate(("scene:7", "scene:13")):
        found.paste(open_image(name), (128 * place, 0))
    return found


def test_look_draws_every_view() -> None:
    figure = look("asset:vlm", [wide()], "what digit is handwritten?", ["divprune:keep=0.3"], tiling="internvl:tiles=4", max_new_tokens=2)
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert [word for word in words if word.startswith("crop")] == ["crop 2", "crop 3", "crop 1"]
    with pytest.raises(FoveateError, match="puts a learned newline between tokens, which this model has not learned"):
        look("asset:vlm", [wide()], "what?", ["random"], tiling="anyres")
    with pytest.raises(FoveateError, match=r"has a lens \(dual_perspective\) between tower and bridge, which this model has not learned"):
        look("asset:vlm", [wide()], "what?", ["random"], tiling="inf_llava")


def test_bench_on_tiles(tmp_path: Path) -> None:
    how: dict[str, Any] = {"baselines": False, "progress": False, "limit": 1}
    found = bench("asset:vlm", ["scenes:count=1"], ["hired"], [0.5], tmp_path / "out", tiling="internvl:tiles=4,fewest=2", **how)
    cells = {cell.method: cell for cell in found.cells}
    assert cells["none"].visual_tokens[0] == 5 * 64
    assert cells["hired"].refused == ""
    assert found.meta["tiling"] == "internvl:tiles=4,fewest=2"
    with pytest.raises(FoveateError, match="another tiling"):
        bench("asset:vlm", ["scenes:count=1"], ["hired"], [0.5], tmp_path / "out", **how)
