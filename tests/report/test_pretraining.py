"""Means, spreads and ratios over seeds against numbers worked out by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate.errors import FoveateError
from foveate.report.pretraining import Question, Times, aggregate, markdown, plot, plot_curves, record, write_comparison
from foveate.report.runs import Arm

# Two pictures with 50 questions of presence and 40 of count each.
QUESTIONS = [Question(image, family) for image in ("a", "b") for family, n in (("presence", 50), ("count", 40)) for _ in range(n)]


def right(**shares: float) -> str:
    """The first questions of each family are right, as many as its share says."""
    left = {family: round(share * sum(q.family == family for q in QUESTIONS)) for family, share in shares.items()}
    found = ""
    for question in QUESTIONS:
        found += "1" if left[question.family] > 0 else "0"
        left[question.family] -= 1
    return found


def run(arm: str, seed: int, seconds: float, presence: float, count: float, learned: tuple[str, ...] = ("presence",)) -> dict[str, Any]:
    return {
        "right": right(presence=presence, count=count),
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
        "pace": [
            {"stage": "pretrain", "reducer": "none", "layers": [64.0], "flops": 10 * seconds, "seconds": seconds / 50, "stretch": 1.05},
            {"stage": "finetune", "reducer": "none", "layers": [64.0], "flops": 1000.0, "seconds": 2.0, "stretch": 1.05},
        ],
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
    comparison = aggregate(records, QUESTIONS)
    first, few = comparison.arms
    assert few.seeds == [0, 1, 2]
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
    assert first.interval is None
    assert few.interval is not None
    assert few.loses_nothing


def test_seeds_are_those_that_both_have(records: list[dict[str, Any]]) -> None:
    found = aggregate([*records, run("all", 7, 90.0, 0.9, 0.3), run("late", 9, 1.0, 0.9, 0.3), run("one", 1, 60.0, 0.9, 0.3)], QUESTIONS)
    assert {arm.arm: arm.seeds for arm in found.arms} == {"all": [0, 1, 2, 7], "few": [0, 1, 2], "one": [1]}
    assert found.arms[2].ratio["pretrain_seconds"].mean == 0.5


def test_the_interval_is_that_of_the_mean_over_families() -> None:
    """The other run is right on everything, the base on the first picture's presence alone: +50 points of presence, +100 of count; whole
    pictures are drawn anew, of which one differs by half of that and the other by all."""
    base, other = run("base", 0, 1.0, 0.5, 0.0), run("other", 0, 1.0, 1.0, 1.0)
    learned = [{**one, "learned": ["presence", "count"]} for one in (base, other)]
    found = aggregate(learned, QUESTIONS).arms[1]
    assert found.difference["mean"].mean == pytest.approx(0.75)
    assert found.interval == pytest.approx((0.5, 1.0))
    worse = aggregate(learned[::-1], QUESTIONS).arms[1]
    assert worse.interval == pytest.approx((-1.0, -0.5))
    assert (found.loses_nothing, worse.loses_nothing) == (True, False)


def test_table_has_an_arm_a_row(records: list[dict[str, Any]]) -> None:
    text = markdown(aggregate(records, QUESTIONS))
    assert "| few | 64 → 64 | 0.250 ± 0.050 | 0.250 ± 0.050 |" in text
    assert "| 90.0 ± 1.0 | 28.0 ± 7.5 | 90.0 ± 1.0 | +0.0 ± 2.6 |" in text
    assert "count: in no arm clearly above the majority answer" in text
    assert "equal work took about as long" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


@pytest.mark.parametrize("how", ["unknown", "uneven", "unequal"])
def test_seconds_of_a_busy_machine_are_no_comparison(how: str, records: list[dict[str, Any]]) -> None:
    """No log was looked at; one stage went unevenly; one run took longer for the same fine-tuning."""
    last = records[-1]["pace"][1]
    if how == "unknown":
        del records[-1]["pace"]
    else:
        last["stretch" if how == "uneven" else "seconds"] *= 1.5
    found = aggregate(records, QUESTIONS)
    assert not found.compares_seconds
    text = markdown(found)
    assert "| few | 64 → 64 | 0.250 ± 0.050 | – |" in text
    assert "Seconds are not compared" in text
    assert "few, seed 2" in text
    assert plot(found).axes[0].get_xlabel() == "pre-training FLOPs, ratio to all"
    measured = aggregate(records, QUESTIONS, {"all": [(200.0, 100.0)], "few": [(20.0, 100.0)]})
    assert "0.100" in markdown(measured)


def test_seconds_measured_by_themselves_take_the_place_of_the_runs(records: list[dict[str, Any]]) -> None:
    found = aggregate(records, QUESTIONS, {"all": [(200.0, 100.0)], "few": [(20.0, 100.0)]})
    assert found.arms[1].ratio["pretrain_seconds"].text(".3f") == "0.100"
    assert found.arms[1].ratio["seconds"].mean == pytest.approx(0.4)
    assert "arms in turns" in markdown(found)
    with pytest.raises(FoveateError, match=r"seconds of arm .few. were measured in 0 rounds, not in 1"):
        aggregate(records, QUESTIONS, {"all": [(200.0, 100.0)]})


def test_one_seed_has_no_spread(records: list[dict[str, Any]]) -> None:
    comparison = aggregate([records[0], records[3]], QUESTIONS)
    assert comparison.arms[1].ratio["pretrain_seconds"].deviation is None
    assert "±" not in markdown(comparison).split("\n\n")[0]


def test_order_of_later_records_does_not_matter(records: list[dict[str, Any]]) -> None:
    assert aggregate([records[0], *reversed(records[1:])], QUESTIONS).arms[0] == aggregate(records, QUESTIONS).arms[0]


def test_plot_shows_every_arm_but_the_first(records: list[dict[str, Any]]) -> None:
    figure = plot(aggregate(records, QUESTIONS))
    left, right = figure.axes
    (bar,) = left.containers
    point = bar.get_children()[0]
    assert (point.get_xdata().tolist(), point.get_ydata().tolist()) == (pytest.approx([0.25]), pytest.approx([0.0], abs=1e-9))  # type: ignore[attr-defined]
    assert [label.get_text() for label in right.get_xticklabels()] == ["presence", "count *"]


def test_bad_records_are_named(records: list[dict[str, Any]]) -> None:
    with pytest.raises(FoveateError, match="no records"):
        aggregate([], QUESTIONS)
    with pytest.raises(FoveateError, match="record 1 lacks pretrain_seconds"):
        aggregate([records[0], {key: value for key, value in records[1].items() if key != "pretrain_seconds"}], QUESTIONS)
    with pytest.raises(FoveateError, match="two records of arm 'all' with seed 0"):
        aggregate([records[0], records[0]], QUESTIONS)
    with pytest.raises(FoveateError, match="'all', seed 0: 180 answers to 179 questions"):
        aggregate(records, QUESTIONS[1:])
    with pytest.raises(FoveateError, match="'few', seed 0: other families"):
        aggregate([records[0], {**records[3], "n": {"presence": 100, "count": 79}}], QUESTIONS)


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "runs.json").write_text(json.dumps(records))
    (folder / "questions.json").write_text(json.dumps([[question.image, question.family] for question in QUESTIONS]))


def test_files_are_written(records: list[dict[str, Any]], tmp_path: Path) -> None:
    write(tmp_path, records)
    write_comparison(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "table.md").read_text() == markdown(aggregate(records, QUESTIONS))
    assert (tmp_path / "out" / "plot.svg").read_text().startswith("<?xml")
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    stages = {"all": [["pretrain", 10], ["finetune", 5]], "few": [["words", 2], ["pretrain", 10], ["finetune", 5]]}
    rounds = [{"steps": {"all": [1.0, 1.0], "few": [0.25, 0.05, 1.0]}}, {"steps": {"all": [2.0, 1.0], "few": [1.0, 0.2, 1.0]}}]
    (tmp_path / "times.json").write_text(json.dumps({"stages": stages, "rounds": rounds}))
    all_tokens, few = write_comparison(tmp_path, tmp_path / "out").arms
    assert all_tokens.numbers["pretrain_seconds"].mean == pytest.approx(15)
    ratio = few.ratio["pretrain_seconds"]
    assert (ratio.mean, ratio.deviation) == pytest.approx((0.15, 0.1 / 2**0.5))
    assert few.ratio["seconds"].mean == pytest.approx((6 / 15 + 9 / 25) / 2)
    assert few.ratio["pretrain_flops"] == aggregate(records, QUESTIONS).arms[1].ratio["pretrain_flops"]
    assert "| 0.150 ± 0.071 |" in (tmp_path / "out" / "table.md").read_text()
    assert "± over 2 rounds" in (tmp_path / "out" / "table.md").read_text()
    del rounds[1]["steps"]["few"]
    (tmp_path / "times.json").write_text(json.dumps({"stages": stages, "rounds": rounds}))
    with pytest.raises(FoveateError, match="seconds of arm 'few' were measured in 1 rounds, not in 2"):
        write_comparison(tmp_path, tmp_path / "out")
    (tmp_path / "runs.json").write_text("{}")
    with pytest.raises(FoveateError, match="must be a list of records"):
        write_comparison(tmp_path, tmp_path / "out")


def test_seconds_on_the_way_are_of_the_stages_own_pace() -> None:
    marks = [("few", 0), ("few", 10), ("many", 0), ("many", 2)]
    one = {"arm": "few", "curve": [{"stage": stage, "step": step, "seconds": 99.0, "flops": 1.0, "figures": {}} for stage, step in marks]}
    times = Times(
        {"few": [("words", 3), ("few", 10), ("many", 4)]}, [{"few": [2.0, 0.5, 7.0]}, {"few": [1.0, 0.25, 6.0]}, {"few": [9.0, 3.0, 8.0]}]
    )
    assert [mark["seconds"] for mark in times.paced(one)["curve"]] == [6.0, 11.0, 11.0, 25.0]
    assert times.paced({"arm": "few"})["curve"] == []


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
    assert llavolta["right"].count("1") == sum(row.correct for row in arms[2].result.rows)
    questions = [Question(row.image, row.family) for row in arms[0].result.rows]
    assert aggregate(records, questions).arms[1].ratio["pretrain_seconds"].mean == pytest.approx(0.3)


def test_curves_of_runs_that_were_asked(records: list[dict[str, Any]], tmp_path: Path) -> None:
    assert plot_curves(records, seconds=True) is None
    for number, one in enumerate(records[:4]):
        points = [{"seconds": 10.0 * step, "flops": 100.0 * step, "figures": {"t": {"accuracy": 20.0 * step + number}}} for step in (1, 2)]
        one["curve"] = [{"stage": "a", "step": step, **point} for step, point in enumerate(points)]
    without = plot_curves(records, seconds=False)
    assert without is not None
    assert [axes.get_xlabel() for axes in without.axes] == ["training, FLOPs"]
    figure = plot_curves(records, seconds=True)
    assert figure is not None
    left, right = figure.axes
    assert [line.get_ydata().tolist() for line in left.get_lines()] == [[20.0 + n, 40.0 + n] for n in range(4)]  # type: ignore[union-attr]
    assert right.get_lines()[0].get_xdata().tolist() == [100.0, 200.0]  # type: ignore[union-attr]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all", "few"]
    write(tmp_path, records)
    write_comparison(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "curves.svg").is_file()
