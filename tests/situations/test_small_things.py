"""Scenes with things that are many times smaller than usual: where they lie, what is asked about them, and the worlds that hold them."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from foveate.errors import FoveateError
from foveate.evaluation.metrics.scenes import FAMILY_RULES
from foveate.inference.strategies.words import WORLD
from foveate.world.pictures import RASTER, render, scene
from foveate.world.questions import conversation
from foveate.world.scenes import world_scene, write_world

BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "high-resolution" / "run.py"


@pytest.mark.parametrize("detail", [2, 3, 8])
def test_things_are_so_many_times_smaller_and_lie_apart(detail: int) -> None:
    tallest = 46 / RASTER / detail
    for seed in range(30):
        things = scene(seed, "test", detail).things
        assert things
        for thing in things:
            top, left, bottom, right = thing.box
            assert 0 < top < bottom < 1
            assert 0 < left < right < 1
            assert 20 / RASTER / detail < bottom - top < tallest + 1e-9
        for one, other in combinations([thing.box for thing in things], 2):
            assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


@pytest.mark.parametrize("detail", [1, 3, 8])
def test_every_question_about_them_has_an_answer_that_is_right(detail: int) -> None:
    asked = [one for seed in range(40) for one in conversation(scene(seed, "train", detail))]
    assert {one.family for one in asked} == FAMILY_RULES.keys()
    assert all(FAMILY_RULES[one.family](one.answer, one.answer) for one in asked)


def test_things_keep_their_pixels_where_the_picture_has_as_many_more() -> None:
    """A thing of a scene of 384 px at detail 3 is drawn as of one of 128 px."""
    item = scene(3, "test", 3)
    picture = render(item, 384)
    for thing in item.shapes:
        top, left, bottom, right = (round(edge * 384) for edge in thing.box)
        middle = picture[(top + bottom) // 2, (left + right) // 2].astype(int)
        if thing.name != "ring":
            assert np.abs(middle - thing.rgb).max() <= 40  # a speck may have fallen there


def test_a_world_says_of_what_detail_it_is(tmp_path: Path) -> None:
    write_world(tmp_path / "fine", train=1, test=1, seed=0, size=64, detail=3, progress=False)
    assert json.loads((tmp_path / "fine" / "world.json").read_text())["detail"] == 3
    truth = json.loads((tmp_path / "fine" / "scenes.json").read_text())[0]["things"]
    assert [tuple(thing["box"]) for thing in truth] == [thing.box for thing in world_scene(0, "test", 0, 3).things]
    with pytest.raises(FoveateError, match="holds another world"):
        write_world(tmp_path / "fine", train=1, test=1, seed=0, size=64, progress=False)
    write_world(tmp_path / "usual", train=0, test=1, seed=0, size=64, progress=False)
    assert "detail" not in json.loads((tmp_path / "usual" / "world.json").read_text())
    with pytest.raises(FoveateError, match="detail=0: a world needs detail >= 1"):
        write_world(tmp_path / "none", train=1, test=1, seed=0, detail=0)


# ---- what the benchmark asks


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("high_resolution", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["high_resolution"] = module
    spec.loader.exec_module(module)
    return module


def test_the_benchmarks_questions_of_yes_and_no_are_true(benchmark: ModuleType, tmp_path: Path) -> None:
    """A thing is there where its middle is; it is large in a part that holds it, but for a tenth at each edge."""
    one = benchmark.Question("what digit is handwritten?", "7", "reading", (240, 10, 290, 60))
    assert [benchmark.there(one, part) for part in ((0, 0, 256, 256), (256, 0, 512, 256), (0, 0, 512, 512))] == [False, True, True]
    assert [benchmark.large(one, part) for part in ((0, 0, 512, 512), (256, 0, 512, 256), (245, 15, 400, 200), (246, 15, 400, 200))] == [
        False,
        False,
        True,
        False,
    ]
    benchmark.write_data(tmp_path, 3, 1)
    whole, parts = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "parts.json"))
    assert len(parts) == 3 * len(whole)
    assert all((tmp_path / "images" / talk["image"]).is_file() for talk in [*whole, *parts])
    said = [
        (a["value"], b["value"]) for talk in parts for a, b in zip(talk["conversations"][::2], talk["conversations"][1::2], strict=True)
    ]
    posed = [(q, a) for q, a in said if WORLD.exists.partition("{")[0] in q or WORLD.answerable.partition("{")[0] in q]
    assert {a for _, a in posed} == {"yes", "no"}
    rows = json.loads((tmp_path / "asked.json").read_text())
    assert rows
    assert all(FAMILY_RULES[row["family"]](row["answer"], row["answer"]) for row in rows)


def test_the_benchmarks_table_compares_by_question(benchmark: ModuleType) -> None:
    questions = [{"image": f"{i // 2}", "family": "reading" if i % 2 else "attribute"} for i in range(8)]
    shared = {"seed": 0, "visual": 64, "seconds": 1.0, "answers": []}
    runs = [
        {"arm": arm, "model": model, "tokens": tokens, "passes": passes, "flops": flops, "scores": scores, **shared}
        for arm, model, tokens, passes, flops, scores in (
            ("one view", "view-64", 76, 1, 6e8, [0.0] * 4 + [1.0] * 4),
            ("InternVL tiles", "internvl", 340, 1, 3e9, [1.0] * 6 + [0.0] * 2),
            ("zoom search", "zoom", 700, 8, 5e9, [1.0] * 8),
        )
    ]
    results = {"scenes": 1, "test": 4, "epochs": 1, "questions": questions, "machine": "a machine", "runs": runs}
    table = benchmark.table(results)
    assert "| one view | 76 | 1.0 | 600 MFLOP | 50.0 | 50.0 | 50.0 |  |" in table
    assert "| zoom search | 700 | 8.0 | 5 GFLOP | 100.0 | 100.0 | 100.0 | +50.0 (" in table
    assert "At the nearest cost to the search's, InternVL tiles takes 0.60 of its FLOPs; the search is +25.0 points (" in table
    assert len(benchmark.plot(results).axes) == 2
