"""Means, spreads and ratios over seeds against numbers worked out by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate.errors import FoveateError
from foveate.report.pretraining import aggregate, markdown, plot, plot_curves, record, write_comparison
from foveate.report.runs import Arm


def run(arm: str, seed: int, seconds: float, presence: float, count: float, learned: tuple[str, ...] = ("presence",)) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "pretrain_seconds": seconds,
        "finetune_seconds": 100.0,
        "pretrain_flops": 10 * seconds,
        "finetune_flops": 1000.0,
        "pretrain_tokens": 64.0,
        "finetune_tokens": 64.0,
        "accuracy": {"presence": presence, "count": count},
        "majority": {"presence": 0.5, "count": 0.25},
        "n": {"presence": 100, "count": 80},
        "learned": list(learned),
    }


@pytest.fixture
def records() -> list[dict[str, Any]]:
    return [
        run("all", 0, 100.0, 0.90, 0.30),
        run("all", 1, 120.0, 0.92, 0.26),
        run("all", 2, 110.0, 0.88, 0.31),
        run("few", 0, 25.0, 0.91, 0.35),
        run("few", 1, 36.0, 0.89, 0.29, learned=("presence", "count")),
        run("few", 2, 22.0, 0.90, 0.20),
    ]


def test_numbers_by_hand(records: list[dict[str, Any]]) -> None:
    comparison = aggregate(records)
    first, few = comparison.arms
    assert comparison.seeds == [0, 1, 2]
    assert first.numbers["pretrain_seconds"].mean == pytest.approx(110.0)
    assert first.numbers["pretrain_seconds"].deviation == pytest.approx(10.0)
    # Ratios by seed: 25/100, 36/120, 22/110 = .25, .30, .20.
    assert few.ratio["pretrain_seconds"].mean == pytest.approx(0.25)
    assert few.ratio["pretrain_seconds"].deviation == pytest.approx(0.05)
    # Both stages: 125/200, 136/220, 122/210.
    assert few.ratio["seconds"].mean == pytest.approx((0.625 + 136 / 220 + 122 / 210) / 3)
    assert first.ratio["seconds"].mean == 1.0
    assert first.ratio["seconds"].deviation == 0.0
    # Presence: +.01, -.03, +.02.
    assert few.difference["presence"].mean == pytest.approx(0.0, abs=1e-12)
    assert few.difference["presence"].deviation == pytest.approx(0.02645751, abs=1e-8)
    assert comparison.learned == ["presence"]  # count only in one seed
    assert few.accuracy["mean"].mean == pytest.approx(0.90)
    assert few.by_seed[1] == pytest.approx((0.3, -0.03))


def test_table_says_what_was_left_out(records: list[dict[str, Any]]) -> None:
    text = markdown(aggregate([*records, run("all", 7, 90.0, 0.9, 0.3)]))
    assert "| pre-training, wall clock, ratio | 1 | 0.250 ± 0.050 |" in text
    assert "| presence, % (n = 100, majority 50.0) | 90.0 ± 2.0 | 90.0 ± 1.0 |" in text
    assert "| count, % (n = 80, majority 25.0) \\* | 29.0 ± 2.6 | 28.0 ± 7.5 |" in text
    assert "| mean accuracy, difference in points |  | +0.0 ± 2.6 |" in text
    assert "count: in no arm clearly above the majority answer" in text
    assert "seeds 7" in text
    assert "3 seeds (0, 1, 2)" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_one_seed_has_no_spread(records: list[dict[str, Any]]) -> None:
    comparison = aggregate([records[0], records[3]])
    assert comparison.arms[1].ratio["pretrain_seconds"].deviation is None
    assert "±" not in markdown(comparison).split("\n\n")[0]


def test_order_of_later_records_does_not_matter(records: list[dict[str, Any]]) -> None:
    assert aggregate([records[0], *reversed(records[1:])]).arms[0] == aggregate(records).arms[0]


def test_plot_shows_every_seed(records: list[dict[str, Any]]) -> None:
    left, right = plot(aggregate(records)).axes
    assert [len(np.asarray(dots.get_offsets())) for dots in left.collections[:2]] == [3, 3]
    assert [label.get_text() for label in right.get_xticklabels()] == ["presence", "count *"]


def test_bad_records_are_named(records: list[dict[str, Any]]) -> None:
    with pytest.raises(FoveateError, match="no records"):
        aggregate([])
    with pytest.raises(FoveateError, match="record 1 lacks pretrain_seconds"):
        aggregate([records[0], {key: value for key, value in records[1].items() if key != "pretrain_seconds"}])
    with pytest.raises(FoveateError, match="two records of arm 'all' with seed 0"):
        aggregate([records[0], records[0]])
    with pytest.raises(FoveateError, match="no seed was run for every arm"):
        aggregate([records[0], records[4]])
    with pytest.raises(FoveateError, match="'few', seed 0: other families"):
        aggregate([records[0], {**records[3], "n": {"presence": 100, "count": 79}}])


def test_files_are_written(records: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(records))
    write_comparison(tmp_path / "results.json", tmp_path / "out")
    assert (tmp_path / "out" / "table.md").read_text() == markdown(aggregate(records))
    assert (tmp_path / "out" / "plot.svg").read_text().startswith("<?xml")
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(FoveateError, match="must be a list of records"):
        write_comparison(tmp_path / "results.json", tmp_path / "out")


def test_record_of_a_run(make_arms: Callable[[Path], list[Arm]], world: Path) -> None:
    """200 steps of .5 s and 2e11 FLOPs, then 200 of .7 s and 3e11 in four equal parts of 64, 8, 8 and 32 tokens behind their layers."""
    arms = make_arms(world)
    records = [record(arm, 4) for arm in arms]
    llavolta = records[2]
    assert llavolta["pretrain_seconds"] == pytest.approx(100)
    assert llavolta["finetune_seconds"] == pytest.approx(140)
    assert llavolta["finetune_flops"] == pytest.approx(200 * 3e11)
    assert llavolta["pretrain_tokens"] == 64
    parts = [(64 + 5 * 8) / 6, (3 * 64 + 3 * 8) / 6, (3 * 64 + 3 * 32) / 6, 64]
    assert llavolta["finetune_tokens"] == pytest.approx(sum(parts) / 4)
    assert sum(llavolta["n"].values()) == len(arms[2].result.rows)
    assert aggregate(records).arms[1].ratio["pretrain_seconds"].mean == pytest.approx(0.3)


def test_curves_of_runs_that_were_asked(records: list[dict[str, Any]], tmp_path: Path) -> None:
    assert plot_curves(records) is None
    for number, one in enumerate(records[:4]):
        points = [{"seconds": 10.0 * step, "flops": 100.0 * step, "figures": {"t": {"accuracy": 20.0 * step + number}}} for step in (1, 2)]
        one["curve"] = [{"stage": "a", "step": step, **point} for step, point in enumerate(points)]
    figure = plot_curves(records)
    assert figure is not None
    left, right = figure.axes
    assert [line.get_ydata().tolist() for line in left.get_lines()] == [[20.0 + n, 40.0 + n] for n in range(4)]  # type: ignore[union-attr]
    assert right.get_lines()[0].get_xdata().tolist() == [100.0, 200.0]  # type: ignore[union-attr]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["all", "few"]  # type: ignore[union-attr]
    (tmp_path / "results.json").write_text(json.dumps(records))
    write_comparison(tmp_path / "results.json", tmp_path / "out")
    assert (tmp_path / "out" / "curves.svg").is_file()
