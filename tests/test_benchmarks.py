"""What the benchmarks share, and that committed results are what their numbers give."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import benchmarks.common as common
import pytest
from benchmarks.accounting.run import table as accounting
from benchmarks.arms import keep, whole
from benchmarks.common import Usage, before, busy, command, earlier, measured
from benchmarks.depth.flex.run import table as flex
from benchmarks.depth.show import table as depth
from benchmarks.elastic.run import RECIPES, difference, parts
from benchmarks.elastic.run import table as elastic
from benchmarks.learned.run import ARMS as METHODS
from benchmarks.learned.run import LEARNED, RECIPE
from benchmarks.learned.run import plot as draw_learned
from benchmarks.learned.run import table as learned
from benchmarks.overhead.run import table as overhead
from benchmarks.prefill.show import table as prefill
from benchmarks.pretraining.run import against
from benchmarks.pretraining.sets import SECOND
from benchmarks.serving.server.checkpoint import SHAPES, build
from benchmarks.serving.server.run import wanted
from benchmarks.serving.server.server import counted, read_metrics
from benchmarks.serving.server.show import draw, growth, missed
from benchmarks.serving.server.show import table as server
from benchmarks.serving.show import table as serving
from benchmarks.tower_cuts.show import table as tower_cuts
from benchmarks.training_step.report import table as steps
from benchmarks.training_step.report import unequal
from benchmarks.training_step.run import ARMS, VARIANTS, peaks, recipe_of
from benchmarks.training_step.run import main as measure_steps
from benchmarks.training_step.sizes import table as training_step
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from transformers import AutoProcessor

from foveate.report.pretraining import write_comparison
from foveate.train.recipe import load_recipe
from foveate.train.values import fitting_precision

FOLDER = Path(__file__).parent.parent / "benchmarks"
TABLES = {
    "accounting": accounting,
    "depth": depth,
    "depth/flex": flex,
    "elastic": lambda kept: elastic(whole(kept)),
    "elastic/longer": lambda kept: elastic(whole(kept)),
    "learned": lambda kept: learned(whole(kept)),
    "overhead": overhead,
    "prefill": prefill,
    "serving": serving,
    "serving/server": server,
    "tower_cuts": tower_cuts,
    "training_step": training_step,
}
STEPS = FOLDER / "training_step" / "results.json"
RESULTS = [path for name in TABLES for path in sorted((FOLDER / name).glob("*.json"))]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_committed_tables_are_made_of_committed_numbers(path: Path) -> None:
    table = steps if path == STEPS else TABLES[path.parent.relative_to(FOLDER).as_posix()]
    written = path.with_suffix(".md") if path.with_suffix(".md").is_file() else path.with_name("table.md")
    assert table(json.loads(path.read_text(encoding="utf-8"))) == written.read_text(encoding="utf-8")


@pytest.mark.parametrize("results", ["pretraining", "pretraining/tokens"])
def test_the_tables_of_pretraining_are_made_of_its_runs(results: str, tmp_path: Path) -> None:
    for path in (FOLDER / results).glob("*.json"):
        shutil.copy(path, tmp_path)
    write_comparison(tmp_path, tmp_path)
    against(SECOND, tmp_path)
    for name in ("table.md", f"against-{SECOND}.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (FOLDER / results / name).read_text(encoding="utf-8")


def test_there_are_results() -> None:
    assert len(RESULTS) >= 6


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """What the machine grants, round after round."""
    found: list[float | None] = []
    monkeypatch.setattr(Usage, "granted", lambda self: found.pop(0))
    return found


def results() -> Any:
    return iter(range(10)).__next__


QUIET = Console(quiet=True)


@pytest.mark.parametrize("share", [None, 0.9, 1.0])
def test_a_quiet_round_is_measured_once(shares: list[float | None], share: float | None) -> None:
    shares.append(share)
    assert measured(0, results(), QUIET) == (0, share)


def test_a_busy_round_is_measured_again(shares: list[float | None]) -> None:
    shares += [0.5, 0.95]
    assert measured(0, results(), QUIET) == (1, 0.95)


def test_of_busy_rounds_the_best_is_taken_and_marked(shares: list[float | None]) -> None:
    shares += [0.5, 0.8, 0.7]
    result, share = measured(0, results(), QUIET)
    assert (result, share, shares) == (1, 0.8, [])
    assert "round 2 (80%)" in busy({"granted": [1.0, share, None]})[1]
    assert busy({"granted": [1.0, None]}) == []
    assert busy({}) == []  # results of before


@pytest.mark.parametrize(("ran", "waited", "share"), [(9.0, 1.0, 0.9), (3.0, 0.0, 1.0), (1.0, 3.0, 0.25), (0.0, 0.0, 1.0)])
def test_what_is_granted(monkeypatch: pytest.MonkeyPatch, ran: float, waited: float, share: float) -> None:
    now = Usage(10.0, 5.0 + ran, 2.0 + waited)
    monkeypatch.setattr(common, "Usage", lambda: now)
    assert Usage(0.0, 5.0, 2.0).granted() == pytest.approx(share)
    assert Usage(0.0, 5.0, None).granted() is None


def test_rounds_go_on_where_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert earlier(path, {"settings": 1}) == ([], [])
    path.write_text(json.dumps({"settings": 1, "rounds": [{"a": 1}, {"a": 2}]}))
    assert earlier(path, {"settings": 1}) == ([{"a": 1}, {"a": 2}], [None, None])
    path.write_text(json.dumps({"settings": 1, "rounds": [{"a": 1}], "granted": [0.97]}))
    assert earlier(path, {"settings": 1}) == ([{"a": 1}], [0.97])
    assert before(path, {"settings": 1})["granted"] == [0.97]
    for read in (before, earlier):
        with pytest.raises(SystemExit, match="measured with other settings"):
            read(path, {"settings": 2})


def test_the_command_names_what_was_given() -> None:
    given = argparse.Namespace(shape="tiny", layers=None, rounds=2)
    found = command("benchmarks/x/run.py", given, ("shape", "layers", "rounds"), keep=[0.5, 0.25], reducers=None)
    assert found == "python benchmarks/x/run.py --shape tiny --rounds 2 --keep 0.5 0.25"


# ---- a server under load

METRICS = """# HELP vllm:num_preemptions_total Preemptions.
vllm:num_preemptions_total{engine="0",model_name="/a b/c"} 3.0
vllm:num_preemptions_total{engine="1",model_name="/a b/c"} 4.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="682",sliding_window="None"} 1.0
vllm:cache_config_info{block_size="32",engine="1",num_gpu_blocks="None"} 1.0
process_start_time_seconds 1.7e+09
odd nan_is_a_number NaN
"""


def test_metrics_are_read_with_their_blocks() -> None:
    found = read_metrics(METRICS)
    assert (found["vllm:num_preemptions_total"], found["vllm:kv_cache_usage_perc"], found["kv_blocks"]) == (7.0, 0.25, 682.0)
    assert found["process_start_time_seconds"] == 1.7e9
    assert read_metrics("") == {}
    told = counted({}, found)
    assert (told["preemptions"], told["image_hits"]) == (7.0, 0.0)
    assert counted(found, found)["preemptions"] == 0.0


def test_all_is_measured_once_in_the_same_order_each_time() -> None:
    found = wanted(2, [1, 8], ["a", "b", "c"])
    assert found == wanted(2, [1, 8], ["a", "b", "c"])
    assert len(set(found)) == len(found) == 12
    assert [number for number, _, _ in found] == [0] * 6 + [1] * 6
    assert found[:6] == wanted(1, [1, 8], ["a", "b", "c"])  # so that rounds may be added
    for start in range(0, 12, 3):  # variants of a number of clients one after the other
        assert len({several for _, several, _ in found[start : start + 3]}) == 1


def loaded(gains: dict[int, float], others: float = 0.01) -> dict[str, Any]:
    """A report of two rounds: at so many clients the reduced model has so many times the bare one's requests/s."""
    cells = []
    for number in range(2):
        for clients, gain in gains.items():
            for variant, times in (("bare", 1.0), ("divprune:keep=0.25", gain)):
                cell = {
                    "round": number,
                    "clients": clients,
                    "variant": variant,
                    "completed": 8,
                    "failed": 0,
                    "errors": [],
                    "cpu": 8 / times,
                }
                cell |= {
                    "rate": 2.0 * times,
                    "prompt": 5000 / times,
                    "kv_peak": 40.0,
                    "kv_blocks": 682.0,
                    "preemptions": 1,
                    "others": others,
                }
                cell |= dict.fromkeys(("ttft_p50", "ttft_p95", "itl_p50", "itl_p95"), 0.5 / times)
                cell |= {"prefix_asked": 100, "prefix_hits": 7, "image_asked": 0, "image_hits": 0}
                cells.append(cell)
    flops = {"bare": 30.0, "divprune:keep=0.25": 12.0}
    report = {"settings": {"shape": "tiny", "clients": list(gains)}, "variants": list(flops), "cells": cells, "flops": flops}
    return {**report, "command": "python run.py", "machine": "a machine", "what": "A model"}


def test_goals_that_are_met() -> None:
    report = loaded({1: 1.05, 8: 1.3, 32: 1.6})
    assert missed(report) == []
    text = server(report)
    assert "TTFT p95 is lower: met.**" in text
    assert "| `divprune:keep=0.25` | 391 | 3.20 (3.20–3.20) | 1.60 (1.60–1.60) | 2.50 |" in text
    assert "| 40 of 682 | 2 | 7%, – |" in text
    assert "busy" not in text


def test_goals_that_are_missed_are_told_with_what_tells_why() -> None:
    report = loaded({1: 0.9, 8: 1.3, 32: 1.4}, others=0.2)
    one, many = missed(report)
    assert one.startswith("`divprune:keep=0.25` at 1 client: 0.90 times the bare model's requests/s (goal 1), 1.11 times its TTFT p95;")
    assert "goal 1.5" in many
    assert "its FLOPs would allow 2.50, a request takes 0.71 of the bare model's CPU seconds, others took 20% of the machine" in many
    assert "TTFT p95 is lower: missed.**" in server(report)
    assert "in 12 of 12 measurements others took up to 20% of it" in server(report)
    report["flops"] = {}
    assert "FLOPs would" not in missed(report)[0]


def test_what_is_not_measured_yet_is_left_out(tmp_path: Path) -> None:
    report = loaded({1: 1.05, 8: 1.3, 32: 1.6})
    report["cells"] = report["cells"][:3]  # of 8 clients the bare model alone
    assert "8 clients" in server(report)
    assert server(report).count("divprune") == 1
    draw(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    report["cells"] = []
    assert missed(report) == []
    assert "Goal" not in server(report)


def test_faults_and_memory_are_in_the_table() -> None:
    seen = [{"name": "half an image", "wanted": "400", "seen": "answered", "good": False}]
    looks = [(100 * number, 2**20 * (500 + (10 if number < 5 else 50 + number))) for number in range(10)]
    text = server({**loaded({1: 1.1}), "faults": seen, "soak": {"requests": 1000, "failed": 0, "seconds": 120.0, "memory": looks}})
    assert "| half an image | 400 | **no**: answered |" in text
    assert "1000 small requests in 2 minutes, 0 failed" in text
    assert "510 MiB after 0, 555 MiB after 500, 559 MiB at the end; over the second half it grows by 10.0 MiB a thousand requests" in text
    assert growth([(0, 5.0), (1000, 5.0)]) == growth([(0, 5.0)]) == 0.0


def test_a_checkpoint_is_written_once_with_published_names(tmp_path: Path) -> None:
    build(SHAPES["tiny"], tmp_path)
    names = safe_open(tmp_path / "model.safetensors", "pt").keys()
    assert any(".vision_tower.vision_model.encoder." in f".{name}" for name in names)
    time = (tmp_path / "model.safetensors").stat().st_mtime_ns
    build(SHAPES["tiny"], tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == time
    processor = AutoProcessor.from_pretrained(tmp_path)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1 w2"}]}]
    inputs = processor(text=processor.apply_chat_template(talk), images=[Image.new("RGB", (96, 48))])
    assert len(inputs["input_ids"][0]) == 64 + 2


# ---- a training step, before and after


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arm", ARMS)
def test_the_recipes_of_a_step_are_recipes(arm: str, variant: str, tmp_path: Path) -> None:
    chosen = VARIANTS[variant]
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe_of(ARMS[arm], chosen, tmp_path, "run", 7, {"batch_size": 4})))
    (stage,) = load_recipe(path).stages
    assert (stage.steps, stage.epochs, stage.batch_size, stage.precision) == (7, None, 4, fitting_precision("auto"))
    assert (stage.features is not None) is ("features" in chosen.changes)
    assert stage.pack is chosen.changes.get("pack", False)
    assert stage.optimizer == chosen.changes.get("optimizer", "adamw_torch")


def test_losses_that_differ_are_named() -> None:
    variants = {
        "before": {"losses": [2.0, 1.0]},
        "rounded": {"losses": [2.001, 1.005]},
        "another first": {"losses": [2.1, 0.9]},
        "another mean": {"losses": [2.0, 1.2]},
    }
    assert unequal(variants) == ["another first", "another mean"]


def test_a_step_is_measured_and_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--trial", "--rounds", "2", "--steps", "1", "--threads", "1", "--arms", "few", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "--variants", "none of the savings", "all of them"])
    measure_steps()
    report = json.loads((tmp_path / "results.json").read_text())
    assert steps(report) == (tmp_path / "table.md").read_text()
    plain, whole = report["arms"]["few"].values()
    assert len(plain["seconds"]) == len(plain["cpu"]) == 2
    assert len(plain["losses"]) == len(whole["losses"]) == 4
    assert unequal(report["arms"]["few"]) == []
    assert plain["flops"] > whole["flops"] > 0  # no tower, and logits for answers alone
    assert "tower" in plain["parts"]
    assert "tower" not in whole["parts"]
    for of in (plain, whole):
        assert all(wall >= 0 and cpu >= 0 for wall, cpu in of["parts"].values())
        assert {"language model, forward", "language model, backward", "optimiser", "waiting for data"} <= of["parts"].keys()
        assert of["peak_bytes"] > 2**27
    assert "Losses differ" not in capsys.readouterr().out


def test_what_is_no_checkout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--before", str(tmp_path)])
    with pytest.raises(SystemExit, match="no checkout"):
        measure_steps()


def test_the_processors_peak_is_told_for_both_types_and_each_number_of_threads() -> None:
    found = peaks(threads=2, sizes=(32, 64))
    assert {name: list(counts) for name, counts in found.items()} == {"bfloat16": ["1", "2"], "float32": ["1", "2"]}
    assert all(flops > 0 for counts in found.values() for flops in counts.values())


def test_elastic_bridges_are_compared_on_the_same_questions() -> None:
    def row(arm: str, tokens: int, *correct: int) -> dict[str, Any]:
        return {"arm": arm, "seed": 0, "tokens": tokens, "pictures": ["a", "a", "b", "b"], "correct": list(correct)}

    few, many, alone = row("mqt", 4, 1, 0, 0, 0), row("mqt", 16, 1, 1, 1, 0), row("mqt-16", 16, 1, 1, 1, 0)
    assert difference(many, few) == (50.0, 0.0)  # one more in each picture
    assert difference(row("mqt", 4, 1, 1, 0, 0), few)[0] == 25.0
    assert difference(row("mqt", 4, 1, 1, 0, 0), few)[1] == pytest.approx(100 * 1.96 * 0.5**0.5 / 4)
    shown = elastic({"rows": [few, many, alone], "steps": 0, "scenes": 9, "machine": "here"})
    assert "| mqt | 16 | 75.0 | +50.0 ± 0.0 | 75.0 | +0.0 ± 0.0 |" in shown
    assert "chain-of-sight" not in shown
    assert [parts(arm) for arm in ("mqt", "chain-of-sight-20")] == [("mqt", None), ("chain-of-sight", 20)]
    for name in ("mqt", "chain-of-sight"):
        assert load_recipe(RECIPES / f"{name}.yaml", ["stages.0.view_tokens=4"]).stages[0].view_tokens == 4


def test_pictures_are_kept_once(tmp_path: Path) -> None:
    rows = [{"arm": arm, "pictures": ["a", "b"], "correct": [1, 0]} for arm in ("one", "other")]
    keep(tmp_path / "results.json", {"steps": 3, "rows": rows})
    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert "pictures" not in kept["rows"][0]
    assert whole(kept) == {"steps": 3, "rows": rows}
    with pytest.raises(ValueError, match="rows of other questions"):
        keep(tmp_path / "results.json", {"steps": 3, "rows": [*rows, {**rows[0], "pictures": ["a", "c"]}]})


def test_learned_methods_are_compared_at_as_many_tokens_and_on_the_same_questions() -> None:
    def row(arm: str, seed: int, tuned: bool, *correct: int) -> dict[str, Any]:
        found = {"arm": arm, "seed": seed, "tuned": tuned, "tokens": 35.0, "pictures": ["a", "a", "b", "b"], "correct": list(correct)}
        return {**found, "families": {"count": sum(correct[:2]) / 2, "reading": sum(correct[2:]) / 2}}

    rows = [row("none", 0, True, 1, 1, 1, 1), row("pmod", 0, True, 1, 0, 1, 0), row("pmod", 1, True, 1, 0, 0, 0)]
    rows += [row("divprune as pmod", 0, True, 1, 1, 1, 1), row("divprune as pmod", 0, False, 1, 0, 0, 0)]
    report = {"rows": rows, "steps": 3, "scenes": 9, "machine": "here"}
    shown = learned(report)
    assert "| pmod | yes | 35.0 | 37.5 ± 17.7 |  | 50 | 25 | 0, 1 |" in shown
    assert "| divprune as pmod | yes | 35.0 | 100.0 | +50.0 (+50.0 to +50.0) | 100 | 100 | 0 |" in shown  # of the seed that both have
    assert "| divprune as pmod | no | 35.0 | 25.0 | −25.0 (−50.0 to +0.0) | 50 | 0 | 0 |" in shown
    assert len(draw_learned(report).axes[0].lines) == 4
    for arm, spelling in LEARNED.items():
        stage = load_recipe(RECIPE, [f"stages.0.reducers=[{{share: 1, reducer: '{spelling}'}}]", "stages.0.train.reducers=true"]).stages[0]
        assert stage.train.reducers
        assert f"random as {arm}" in METHODS
