"""What the benchmarks share, and that committed results are what their numbers give."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import benchmarks.common as common
import pytest
from benchmarks.common import Usage, busy, command, earlier, measured
from benchmarks.overhead.run import table as overhead
from benchmarks.prefill.show import table as prefill
from benchmarks.serving.show import table as serving
from benchmarks.training_step.run import table as training_step
from rich.console import Console

FOLDER = Path(__file__).parent.parent / "benchmarks"
TABLES = {"overhead": overhead, "prefill": prefill, "serving": serving, "training_step": training_step}
RESULTS = [path for name in TABLES for path in sorted((FOLDER / name).glob("*.json"))]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_tables_are_made_of_committed_numbers(path: Path) -> None:
    made = TABLES[path.parent.name](json.loads(path.read_text(encoding="utf-8")))
    assert made == path.with_suffix(".md").read_text(encoding="utf-8")


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
