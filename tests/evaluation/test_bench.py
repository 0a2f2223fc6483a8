"""The runner of `foveate bench`: what is asked, what stays on disk, how a stopped run goes on, and bad input."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from tests.command import refused
from transformers import LlavaProcessor

from foveate.accounting import predict
from foveate.cli import main
from foveate.data.pixels import open_image as load_image
from foveate.engine.attach import attach
from foveate.errors import FoveateError
from foveate.evaluation import asking
from foveate.evaluation.asking import batches, limited
from foveate.evaluation.bench import bench, plan
from foveate.evaluation.cells import Bench, load_bench
from foveate.evaluation.evaluate import evaluate
from foveate.evaluation.samples import Metric, Sample, Task, picture
from foveate.evaluation.table import CARD_BEGIN, CARD_END, markdown, print_table, push_to_model_card, rows
from foveate.inference import Broken, ask, load_model, model_hash, prompts, resized
from foveate.probes.encoding import KEPT
from foveate.reducers import parse
from foveate.world import asset

SIZE = 6  # of a batch


class Counted:
    """Stands in for the runner's `ask` and counts its calls; stops the run in front of call `stop`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None = None, error: type[FoveateError] = FoveateError) -> None:
        self.calls, self.stop, self.error, self.answer = 0, stop, error, ask
        monkeypatch.setattr(asking, "ask", self)

    def __call__(self, *args: Any) -> Any:
        if self.calls == self.stop:
            raise self.error("stopped")
        self.calls += 1
        return self.answer(*args)


@dataclass(frozen=True)
class Length(Metric):
    """A metric of no sense that is a share: letters of the answer, at most ten."""

    name = "length"

    def score(self, prediction: str, sample: Sample) -> float:
        return min(len(prediction), 10) / 10

    def summary(self, samples: Any, predictions: Any, scores: Any) -> dict[str, float]:
        return {"length": 100 * sum(scores) / len(scores)}


def run(given: tuple[Any, Any], world: Path, out: Path, reducers: list[str], keep: list[float], **options: Any) -> Bench:
    model, processor = given
    options = {"seeds": 2, "batch_size": SIZE, "progress": False, **options}
    return bench(model, [str(world)], reducers, keep, out, processor=processor, **options)


def files(out: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (out / "cells").glob("*.json")}


def said(found: Bench, reducer: str) -> dict[str, str]:
    (cell,) = (cell for cell in found.cells if cell.reducer == reducer)
    return {answer.id: answer.prediction for answer in cell.answers}


@pytest.fixture
def given(model: Any, processor: Any) -> tuple[Any, Any]:
    return model, processor


@pytest.fixture(scope="module")
def vlm() -> tuple[Any, Any]:
    return load_model("asset:vlm", "cpu")


# ---- what is asked


def test_the_plan_has_the_bare_model_once_and_seeds_where_there_are_any() -> None:
    arms = plan(["fastv:layer=3,keep=0.9", "random:seed=7", "vcc"], [0.25, 1, 0.5, 0.25], seeds=3)
    assert [(arm.method, arm.keep, arm.seed) for arm in arms] == [
        ("none", 1.0, None),
        *(("fastv:layer=3", keep, None) for keep in (0.5, 0.25)),
        *(("random", keep, seed) for keep in (0.5, 0.25) for seed in range(3)),
        *((method, keep, None) for method in ("vcc", "uniform", "downsample") for keep in (0.5, 0.25)),
    ]
    spelled = [arm.cell("t").reducer for arm in arms]
    assert spelled[:5] == ["none", "fastv:layer=3", "fastv:keep=0.25,layer=3", "random:keep=0.5", "random:keep=0.5,seed=1"]
    assert len({arm.cell("t").name for arm in arms}) == len(arms)


def test_a_chain_of_methods_has_one_budget_and_one_seed() -> None:
    (_, arm) = plan(["random:seed=1+vcc:layer=1"], [0.5], seeds=1, baselines=False)
    assert (arm.method, arm.cell("t").reducer) == ("random+vcc:layer=1", "random:keep=0.5+vcc:layer=1,stride=2")


def test_a_budget_that_a_method_cannot_have_is_refused_and_the_others_are_not() -> None:
    (_, half, quarter) = plan(["avgpool2d"], [0.5, 0.25], seeds=1, baselines=False)
    assert "keep=0.5" in half.refused
    assert (quarter.refused, quarter.cell("t").reducer) == ("", "avgpool2d")


@pytest.mark.parametrize(
    ("reducers", "keep", "seeds", "message"),
    [
        (["fastw"], [0.5], 1, "unknown reducer 'fastw'"),
        (["none"], [0.5], 1, "is the bare model"),
        (["fastv"], [0], 1, "keep=0 is not possible"),
        (["fastv"], [64], 1, "keep=64 is not possible"),
        (["fastv"], [float("nan")], 1, "keep=nan is not possible"),
        (["fastv"], [0.5], 0, "seeds=0"),
    ],
)
def test_plans_that_cannot_be(reducers: list[str], keep: list[float], seeds: int, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        plan(reducers, keep, seeds)


def test_a_limit_takes_groups_in_turn_and_pictures_whole() -> None:
    samples = tuple(
        Sample(f"{name}{number}", (Path(name),), "?", ("a",), group)
        for name, group in (("a", "x"), ("b", "x"), ("c", "y"))
        for number in range(3)
    )
    task = Task("t", samples, Length(), 4, "h")
    assert [sample.id for sample in limited(task, 6).samples] == ["a0", "a1", "a2", "c0", "c1", "c2"]
    assert [sample.id for sample in limited(task, 4).samples] == ["a0", "a1", "a2", "c0", "c1", "c2"]
    assert len(limited(task, 1).samples) == 3
    assert limited(task, 9) == limited(task, None) == task
    with pytest.raises(FoveateError, match="limit must be at least 1"):
        limited(task, 0)


def test_batches_keep_pictures_together_and_questions_without_one_apart() -> None:
    names = ["b", "a", "", "a", "b", ""]
    samples = [Sample(str(i), (Path(name),) if name else (), "?" * (9 - i), ("a",)) for i, name in enumerate(names)]
    assert batches(samples, [picture(sample) for sample in samples], 2) == [[2, 5], [3, 1], [4, 0]]
    assert batches(samples, [picture(sample) for sample in samples], 3) == [[2, 5], [3, 1, 4], [0]]


# ---- cells


def test_pictures_go_through_the_tower_once_for_all_methods_that_do_not_look_into_it(
    given: tuple[Any, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, methods = given[0], [], ["fastv:layer=1", "fastervlm"]
    hook = model.model.vision_tower.register_forward_hook(lambda *given: calls.append(1))
    found = []
    try:
        for at_most in (0, asking.KEPT_BYTES):
            monkeypatch.setattr(asking, "KEPT_BYTES", at_most)
            calls.clear()
            found.append((run(given, world, tmp_path / str(at_most), methods, [0.5, 0.25], baselines=False), len(calls)))
    finally:
        hook.remove()
    (anew, often), (kept, once) = found
    assert often > 0
    assert once * 5 == often * 3, "the bare model, and twice fastervlm; not fastv, which was asked twice as well"
    for cells in zip(anew.cells, kept.cells, strict=True):
        assert cells[0] == replace(cells[1], seconds=cells[0].seconds), "answers, tokens, costs"
    assert not vars(model.model).keys() & {KEPT}


def test_cells_are_what_evaluation_says(given: tuple[Any, Any], world: Path, tmp_path: Path) -> None:
    found = run(given, world, tmp_path / "out", ["fastv:layer=1", "vcc:layer=1"], [1, 0.5, 0.25])
    cells = {cell.reducer: cell for cell in found.cells}
    assert [(cell.method, cell.keep, cell.seed) for cell in found.cells] == [
        (arm.method, arm.keep, arm.seed) for arm in plan(["fastv:layer=1", "vcc:layer=1"], [1, 0.5, 0.25], 2)
    ]
    assert {reducer: cell.visual_tokens for reducer, cell in cells.items()} == {
        "none": [16, 16],
        "fastv:layer=1": [16, 8],
        "fastv:keep=0.25,layer=1": [16, 4],
        "vcc:layer=1,stride=2": [16, 8],
        "vcc:layer=1,stride=4": [16, 4],
        **{f"random:keep=0.5{seed}": [8, 8] for seed in ("", ",seed=1")},
        **{f"random{seed}": [4, 4] for seed in ("", ":seed=1")},
        "uniform:keep=0.5": [8, 8],
        "uniform": [4, 4],
        "downsample:keep=0.5": [16, 16],  # this processor makes all pictures one size
        "downsample": [16, 16],
    }
    model, processor = given
    for reducer in ("none", "fastv:keep=0.25,layer=1", "random:keep=0.5,seed=1"):
        result = evaluate(model, world, processor=processor, reducers=reducer, batch_size=SIZE, progress=False)
        assert said(found, reducer) == {row.id: row.prediction for row in result.rows}
        assert [answer.score for answer in cells[reducer].answers] == [float(row.correct) for row in result.rows]
        assert cells[reducer].accuracy == pytest.approx(100 * result.mean)
        assert len(set(said(found, reducer).values())) > 3
    assert {answer.image for answer in cells["none"].answers} == {str(world / f"images/test/00000{i}.png") for i in range(3)}
    assert all(cell.seconds > 0 for cell in found.cells)


def test_costs_are_those_of_each_question_alone(given: tuple[Any, Any], world: Path, tmp_path: Path) -> None:
    """Summed over all batches, whatever shares a batch or a picture."""
    model, processor = given
    found = run(given, world, tmp_path / "out", ["vcc:layer=1"], [0.25], baselines=False)
    questions = [row["question"] for row in json.loads((world / "test.json").read_text())]
    lengths = [len(processor.tokenizer(text)["input_ids"]) - 1 for text in prompts(processor, questions)]
    for cell in found.cells:
        alone = [predict(model.config, text_tokens=n, reducers=parse(cell.reducer), dtype_bytes=4) for n in lengths]
        for part, flops in cell.flops.items():
            assert flops == pytest.approx(sum(ledger.flops[part] for ledger in alone) / len(alone))
        assert cell.kv_bytes == pytest.approx(sum(sum(ledger.kv_bytes) for ledger in alone) / len(alone))


def test_no_cost_where_it_cannot_be_predicted(given: tuple[Any, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise FoveateError("no such model")

    monkeypatch.setattr("foveate.engine.record.observed", refuse)
    found = run(given, world, tmp_path / "out", [], [1])
    assert (found.cells[0].flops, found.cells[0].kv_bytes, found.cells[0].visual_tokens) == ({}, 0, [16, 16])
    assert rows(found)[0].flops is None


def test_a_method_that_does_not_work_on_the_model_is_said_so_and_the_run_goes_on(
    given: tuple[Any, Any], world: Path, tmp_path: Path
) -> None:
    found = run(given, world, tmp_path / "out", ["fastv", "avgpool2d", "sparsevlm:layers=1,keep=0.9"], [0.5, 0.25], baselines=False)
    refused = {(cell.method, cell.keep): cell.refused for cell in found.cells}
    assert "no decoder layer 2" in refused["fastv", 0.5]
    assert "keep=0.5" in refused["avgpool2d", 0.5]
    assert refused["avgpool2d", 0.25] == refused["sparsevlm:layers=1", 0.5] == ""
    assert all(not cell.answers for cell in found.cells if cell.refused)
    assert "not possible" in markdown(found)
    assert "fastv at 0.25: " in markdown(found)


def test_pictures_by_number_and_none(vlm: tuple[Any, Any], tmp_path: Path) -> None:
    """Prompts with no, one and two pictures in one task, against each of them asked alone."""
    model, processor = vlm
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    shown = [(), (paths[0],), tuple(paths), (paths[1],), (paths[1], paths[0])]
    samples = tuple(Sample(str(i), images, f"what is in picture {i}?", ("a",)) for i, images in enumerate(shown))
    task = Task("mixed", samples, Length(), 5, "hash")
    found = bench(model, [task], ["fastv"], [0.25], tmp_path / "out", processor=processor, baselines=False, batch_size=4, progress=False)
    for cell, reducers, tokens in zip(found.cells, ("none", "fastv:keep=0.25"), ([64] * 6, [64] * 2 + [16] * 4), strict=True):
        assert cell.visual_tokens == [n * 6 / 5 for n in tokens]  # six pictures, five questions
        for sample, answer in zip(samples, cell.answers, strict=True):
            text = prompts(processor, [sample.question], [len(sample.images)])
            assert text[0].count("<image>") == len(sample.images)
            pictures = {"images": [Image.open(path) for path in sample.images if isinstance(path, Path)]} if sample.images else {}
            inputs = processor(text=text, return_tensors="pt", add_special_tokens=False, **pictures)
            with torch.no_grad(), attach(model, reducers):
                output = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :].tolist()
            kept = output[: output.index(2)] if 2 in output else output
            assert answer.prediction == processor.tokenizer.decode(kept).strip()
    assert [answer.image for answer in found.cells[0].answers[:2]] == ["0", str(paths[0])]


def test_a_smaller_picture_is_fewer_tokens(vlm: tuple[Any, Any], tmp_path: Path) -> None:
    """8 x 8 patches of 8 px: 64 px times the root of the budget, to the nearest patch, is 6, 4, 3 and 2 patches."""
    model, processor = vlm
    options = {"processor": processor, "progress": False, "limit": 10, "seeds": 1}
    found = bench(model, ["scenes:count=1"], [], [0.5, 0.25, 0.11, 0.05], tmp_path / "out", **options)
    tokens = {cell.keep: cell.visual_tokens for cell in found.cells if cell.method in ("none", "downsample")}
    assert tokens == {1.0: [64] * 6, 0.5: [36] * 6, 0.25: [16] * 6, 0.11: [9] * 6, 0.05: [4] * 6}
    towers = [cell.flops["tower"] for cell in found.cells if cell.method in ("none", "downsample")]
    assert towers == sorted(set(towers), reverse=True)
    assert processor.image_size == 64


def test_all_pictures_of_another_size(vlm: tuple[Any, Any], tmp_path: Path) -> None:
    """As many tokens as the `downsample` to that size has, and the same answers."""
    model, processor = vlm
    ask = partial(bench, model, ["scenes:count=1"], [], processor=processor, progress=False, limit=10, seeds=1)
    found = ask([1.0], tmp_path / "small", image_size=32, baselines=False)
    small, same = found.bare("scenes"), ask([0.25], tmp_path / "out")
    assert small.visual_tokens == [16] * 6
    assert small.answers == next(cell for cell in same.cells if cell.method == "downsample").answers
    assert found.meta["command"].endswith(" --image-size 32")
    assert processor.image_size == 64
    with pytest.raises(FoveateError, match=r"another image_size \(there None, now 32\)"):
        ask([0.25], tmp_path / "out", image_size=32)
    with pytest.raises(FoveateError, match="image_size=0 is not possible"):
        ask([1.0], tmp_path / "none", image_size=0)
    with pytest.raises(FoveateError, match="image_size=32 needs one of Foveate's own models; a LlavaProcessor sizes images itself"):
        resized(LlavaProcessor.__new__(LlavaProcessor), 32)


# ---- going on


def test_nothing_is_computed_twice(given: tuple[Any, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, counted = tmp_path / "out", Counted(monkeypatch)
    first = run(given, world, out, ["vcc:layer=1"], [0.5])
    cells = len(first.cells)
    assert counted.calls == 3 * cells  # 15 questions in batches of 6
    before = files(out)
    assert run(given, world, out, ["vcc:layer=1"], [0.5]).cells == first.cells
    assert counted.calls == 3 * cells
    assert files(out) == before

    gone = next(cell for cell in first.cells if cell.method == "random")
    (out / "cells" / f"{gone.name}.json").unlink()
    again = run(given, world, out, ["vcc:layer=1"], [0.5])
    assert counted.calls == 3 * (cells + 1)
    after = files(out)
    assert {name for name in before if after[name] != before[name]} == {f"{gone.name}.json"}
    assert [cell.answers for cell in again.cells] == [cell.answers for cell in first.cells]


def test_more_can_be_asked_later(given: tuple[Any, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run(given, world, out, ["vcc:layer=1"], [0.5], baselines=False)
    before, counted = files(out), Counted(monkeypatch)
    found = run(given, world, out, ["fastv:layer=1"], [0.5, 0.25], baselines=False)
    assert counted.calls == 3 * 2
    assert files(out).items() > before.items()
    assert [cell.method for cell in found.cells] == ["none", "vcc:layer=1", "fastv:layer=1", "fastv:layer=1"]
    assert found.meta["keep"] == [1.0, 0.5, 0.25]
    assert [line.split()[4] for line in found.meta["command"].splitlines()] == ["vcc:layer=1", "fastv:layer=1"]


def test_another_model_or_other_data_or_settings_are_refused(given: tuple[Any, Any], world: Path, tmp_path: Path) -> None:
    model, _ = given
    out = tmp_path / "out"
    run(given, world, out, [], [1])
    before = files(out)
    with pytest.raises(FoveateError, match=r"another batch_size \(there 6, now 5\)"):
        run(given, world, out, [], [1], batch_size=5)
    with pytest.raises(FoveateError, match="another limit"):
        run(given, world, out, [], [1], limit=5)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(FoveateError, match="another model_hash"):
        run(given, world, out, [], [1])
    with torch.no_grad():
        model.lm_head.weight[0, 0] -= 1
    asked = json.loads((world / "test.json").read_text())
    asked[0]["question"] = "Is there a blue circle?"
    (world / "test.json").write_text(json.dumps(asked))
    with pytest.raises(FoveateError, match="another data_hash of task scenes"):
        run(given, world, out, [], [1])
    assert files(out) == before


def test_weights_are_loaded_as_told_and_a_folder_has_one_kind_of_them(given: tuple[Any, Any], world: Path, tmp_path: Path) -> None:
    ask_vlm = partial(bench, "asset:vlm", [str(world)], [], [1.0], baselines=False, limit=4, progress=False)
    found = ask_vlm(tmp_path / "half", dtype="bfloat16")
    whole = ask_vlm(tmp_path / "whole")
    assert (found.meta["dtype"], whole.meta["dtype"]) == ("bfloat16", "float32")
    assert found.meta["command"].endswith(" --dtype bfloat16")
    assert "--dtype" not in whole.meta["command"]
    (half_cell,), (whole_cell,) = found.cells, whole.cells
    assert half_cell.kv_bytes * 2 == whole_cell.kv_bytes > 0
    assert half_cell.flops == whole_cell.flops
    with pytest.raises(FoveateError, match=r"another dtype \(there bfloat16, now float32\)"):
        ask_vlm(tmp_path / "half")
    with pytest.raises(FoveateError, match="dtype=int8 is not possible; choose one of float32, bfloat16, float16"):
        ask_vlm(tmp_path / "none", dtype="int8")
    with pytest.raises(FoveateError, match="loaded already has its own"):
        run(given, world, tmp_path / "loaded", [], [1.0], dtype="bfloat16")


def test_a_model_is_known_by_its_files_or_weights(tmp_path: Path, vlm: tuple[Any, Any]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(asset("vlm"), folder)
    whole = model_hash(folder)
    assert whole == model_hash("asset:vlm")
    (folder / "README.md").write_text("a card is no part of a model")
    assert model_hash(folder) == whole
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert model_hash(folder) != whole
    loaded = model_hash(vlm[0])
    assert loaded == model_hash(load_model("asset:vlm", "cpu")[0])


def test_a_picture_that_goes_missing_is_no_fault_of_the_method(
    given: tuple[Any, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def open_image(ref: Any) -> Image.Image:
        opened.append(ref)
        if len(opened) > 5:  # three batches of the bare model, which share pictures
            raise FoveateError(f"cannot read the image {ref}")
        return load_image(ref)

    monkeypatch.setattr("foveate.data.footage.open_image", open_image)
    with pytest.raises(FoveateError, match=r"scenes, vcc:layer=1,stride=2: cannot read the image .*\.png"):
        run(given, world, tmp_path / "out", ["vcc:layer=1"], [0.5])
    assert [cell.reducer for cell in load_bench(tmp_path / "out").cells] == ["none"]


def test_a_stopped_run_leaves_its_cells_and_tables(
    given: tuple[Any, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    counted = Counted(monkeypatch, stop=7, error=Broken)
    with pytest.raises(FoveateError, match="scenes, vcc:layer=1,stride=4: stopped"):
        run(given, world, out, ["vcc:layer=1"], [0.5, 0.25], baselines=False, progress=True)
    assert [cell.reducer for cell in load_bench(out).cells] == ["none", "vcc:layer=1,stride=2"]
    assert "vcc:layer=1" in capsys.readouterr().out
    assert "keep 0.5" in (out / "table.md").read_text()
    counted.stop = None
    found = run(given, world, out, ["vcc:layer=1"], [0.5, 0.25], baselines=False)
    fresh = run(given, world, tmp_path / "fresh", ["vcc:layer=1"], [0.5, 0.25], baselines=False)
    assert counted.calls == 7 + (3 * len(found.cells) - 6) + 3 * len(fresh.cells)
    assert (out / "table.md").read_text() == (tmp_path / "fresh" / "table.md").read_text()


COMMAND = ["bench", "asset:vlm", "--keep", "0.5,0.25", "--tasks", "scenes:count=2", "--seeds", "2", "--batch-size", "20"]
COMMAND += [word for name in ("fastv", "divprune") for word in ("--reduce", name)]


def test_killed_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 with some cells finished, then the same command: no finished cell is written again, and the table is that of a run that was
    left alone."""
    monkeypatch.setattr("foveate.report.bench.write_bench_report", lambda folder: folder)  # it has tests of its own
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*COMMAND, "--out", str(tmp_path / "killed")]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen([sys.executable, "-m", "foveate", *command], env=environment, **quiet)
    end = time.monotonic() + 120
    while len(files(tmp_path / "killed")) < 4 and child.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    before = files(tmp_path / "killed")
    for arguments in (command, [*COMMAND, "--out", str(tmp_path / "alone")]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    after, alone = files(tmp_path / "killed"), files(tmp_path / "alone")
    assert 4 <= len(before) < len(after)
    assert {name: after[name] for name in before} == before
    assert after.keys() == alone.keys()
    assert (tmp_path / "killed/table.md").read_text() == (tmp_path / "alone/table.md").read_text()
    tables = [list(csv.DictReader(io.StringIO((tmp_path / name / "summary.csv").read_text()))) for name in ("killed", "alone")]
    assert [{**row, "seconds": ""} for row in tables[0]] == [{**row, "seconds": ""} for row in tables[1]]


# ---- tables


def test_the_table_says_what_was_seen(given: tuple[Any, Any], world: Path, tmp_path: Path) -> None:
    found = run(given, world, tmp_path / "out", ["vcc:layer=1"], [0.5, 0.25])
    lines = rows(found)
    assert [(row.method, row.keep, row.seeds) for row in lines] == [
        ("none", 1.0, 1),
        *(
            (name, keep, 2 if name == "random" else 1)
            for name in ("vcc:layer=1", "random", "uniform", "downsample")
            for keep in (0.5, 0.25)
        ),
    ]
    bare, half = lines[0], lines[1]
    assert half.accuracy is not None
    assert bare.accuracy is not None
    assert (half.tokens, half.change) == (12, half.accuracy - bare.accuracy)
    assert bare.paired is None
    assert half.paired is not None
    written = json.loads((tmp_path / "out/summary.json").read_text())["rows"]
    assert [row["reducer"] for row in written] == [row.reducer for row in lines]
    assert written[1]["p"] == half.paired.p
    table = list(csv.DictReader(io.StringIO((tmp_path / "out/summary.csv").read_text())))
    assert [float(row["tokens"]) for row in table] == [row.tokens for row in lines]
    console = Console(file=io.StringIO(), width=160)
    print_table(found, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("keep 0.25", "downsample", "vcc:layer=1", "15 questions", "12.0", "(mean accuracy)"):
        assert word in text
        assert word in (tmp_path / "out/table.md").read_text()


def test_a_model_card_gets_a_section_that_is_replaced(given: tuple[Any, Any], world: Path, tmp_path: Path) -> None:
    found, card = run(given, world, tmp_path / "out", [], [0.5]), tmp_path / "model" / "README.md"
    push_to_model_card(found, card)
    assert card.read_text().startswith(CARD_BEGIN)
    card.write_text("---\nlicense: mit\n---\n# Mine\n" + card.read_text().replace("uniform", "older") + "\nthe end\n")
    push_to_model_card(found, card)
    text = card.read_text()
    assert text.startswith("---\nlicense: mit\n---\n# Mine\n" + CARD_BEGIN)
    assert text.endswith(CARD_END + "\n\nthe end\n")
    assert text.count("uniform") == 1
    assert "older" not in text
    push_to_model_card(found, card)
    assert card.read_text() == text
    card.write_text(f"# Mine\n{CARD_END}\n")
    with pytest.raises(FoveateError, match="only one of the marks"):
        push_to_model_card(found, card)
    assert card.read_text() == f"# Mine\n{CARD_END}\n"


# ---- bad input on the command line


def refused_once(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    message = refused(["bench", *arguments], capsys)
    assert message.count("foveate: ") == 1
    return message


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of the shipped model on a world on disk."""
    from foveate.world.scenes import write_world

    folder = tmp_path_factory.mktemp("finished")
    write_world(folder / "world", train=0, test=2, seed=3, size=64, progress=False, processes=1)
    bench("asset:vlm", [str(folder / "world")], ["fastv"], [0.5], folder / "out", baselines=False, progress=False)
    return folder


def test_bad_input_is_one_message_and_finished_cells_stay(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, world = finished / "out", finished / "world"
    before = files(out)
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "file").write_text("")
    broken = tmp_path / "broken"
    shutil.copytree(asset("vlm"), broken)
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    save_file({**weights, name: weights[name] * float("nan")}, broken / "model.safetensors", {"format": "pt"})
    common = ["--out", str(out), "--reduce", "fastv", "--keep", "0.5"]
    asked = ["--tasks", str(world)]
    cases = [
        (["asset:vlm", "--tasks", f"{tmp_path / 'empty.json'}:metric=exact", *common], "empty.json"),
        (["asset:vlm", "--tasks", "nowhere", *common], "nowhere"),
        (["asset:vlm", "--tasks", "scenes:colour=red", *common], "has no option 'colour'"),
        (["asset:vlm", *asked, *common, "--reduce", "fastw"], "unknown reducer 'fastw' (did you mean 'fastv'?)"),
        (["asset:vlm", *asked, *common, "--keep", "0.5,few"], "keep=0.5,few is not possible"),
        (["asset:vlm", *asked, *common, "--keep", "2"], "keep=2 is not possible"),
        (["asset:lm", *asked, *common], "cannot load a vision-language model and its processor"),
        (["asset:vla", *asked, *common], "unknown asset 'vla'"),
        ([str(broken), *asked, *common], "another model_hash"),
        ([str(broken), *asked, "--out", str(tmp_path / "new")], "logits are not finite"),
        (["asset:vlm", *asked, "--out", str(tmp_path / "file")], "is a file"),
    ]
    for arguments, message in cases:
        assert message in refused_once(arguments, capsys)
        assert files(out) == before
    assert files(tmp_path / "new") == {}


def test_a_missing_or_broken_image_is_named(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    before = files(folder / "out")
    arguments = ["asset:vlm", "--tasks", str(folder / "world"), "--out", str(folder / "out"), "--reduce", "uniform", "--keep", "0.5"]
    path = folder / "world/images/test/000001.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert "000001.png" in refused_once(arguments, capsys)
    path.unlink()
    assert "000001.png" in refused_once(arguments, capsys)
    assert files(folder / "out") == before
