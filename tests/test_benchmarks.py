"""What the benchmarks share, and that committed results are what their numbers give."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import benchmarks.common as common
import pytest
from benchmarks.common import Usage, busy, command, earlier, measured
from benchmarks.elastic.run import RECIPES, difference, parts
from benchmarks.elastic.run import table as elastic
from benchmarks.overhead.run import table as overhead
from benchmarks.prefill.show import table as prefill
from benchmarks.serving.show import table as serving
from benchmarks.training_step.report import table as steps
from benchmarks.training_step.report import unequal
from benchmarks.training_step.run import ARMS, VARIANTS, peaks, recipe_of
from benchmarks.training_step.run import main as measure_steps
from benchmarks.training_step.sizes import table as training_step
from rich.console import Console

from foveate.train.recipe import load_recipe

FOLDER = Path(__file__).parent.parent / "benchmarks"
TABLES = {"overhead": overhead, "prefill": prefill, "serving": serving, "training_step": training_step}
STEPS = FOLDER / "training_step" / "results.json"
RESULTS = [path for name in TABLES for path in sorted((FOLDER / name).glob("*.json"))]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_tables_are_made_of_committed_numbers(path: Path) -> None:
    table, written = (steps, path.with_name("table.md")) if path == STEPS else (TABLES[path.parent.name], path.with_suffix(".md"))
    assert table(json.loads(path.read_text(encoding="utf-8"))) == written.read_text(encoding="utf-8")


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
    with pytest.raises(SystemExit, match="measured with other settings"):
        earlier(path, {"settings": 2})


def test_the_command_names_what_was_given() -> None:
    given = argparse.Namespace(shape="tiny", layers=None, rounds=2)
    found = command("benchmarks/x/run.py", given, ("shape", "layers", "rounds"), keep=[0.5, 0.25], reducers=None)
    assert found == "python benchmarks/x/run.py --shape tiny --rounds 2 --keep 0.5 0.25"


# ---- a training step, before and after


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arm", ARMS)
def test_the_recipes_of_a_step_are_recipes(arm: str, variant: str, tmp_path: Path) -> None:
    chosen = VARIANTS[variant]
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe_of(ARMS[arm], chosen, tmp_path, "run", 7, {"batch_size": 4})))
    (stage,) = load_recipe(path).stages
    assert (stage.steps, stage.epochs, stage.batch_size, stage.precision) == (7, None, 4, "bf16-copy")
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
