"""The report of three made-up arms: complete, self-contained, and with the right numbers in it."""

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from foveate.errors import FoveateError
from foveate.evaluation.bench import bench
from foveate.evaluation.metrics.scenes import FAMILY_RULES
from foveate.inspect.words import answer_text, duration, si
from foveate.report.arms import Difference, differences, findings, learned_families
from foveate.report.demo import print_summary, write_report
from foveate.report.plots import accuracy_curves, smooth, source_losses
from foveate.report.runs import Arm, marks, read_bridges, read_log, split_stages
from foveate.report.scenes import scene_svg

MakeArms = Callable[[Path], list[Arm]]


@pytest.fixture(scope="module")
def arms(make_arms: MakeArms, world: Path) -> list[Arm]:
    return make_arms(world)


@pytest.fixture(scope="module")
def html(arms: list[Arm], world: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_report(tmp_path_factory.mktemp("report") / "deep" / "report.html", arms, world, blind=replace(arms[0].result, blind=True))
    return path.read_text(encoding="utf-8")


class Balance(HTMLParser):
    """Every element is closed in order; counts elements; all ids differ."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_section_is_there_and_the_page_is_well_formed(html: str) -> None:
    page = Balance()
    page.feed(html)
    assert page.open == []
    assert {"summary", "accuracy", "loss", "layers", "windows", "examples", "conventions"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    # Seven plots, six window pictures (one grid; two scales, then three), two scenes.
    assert page.seen["svg"] == 7 + 6 + 2
    assert page.seen["image"] == 8
    assert "finished" not in page.ids


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    assert "http:" not in html
    assert "https:" not in html
    assert "<script" not in html
    assert "@import" not in html
    assert "<link" not in html
    for address in re.findall(r'(?:src|href)="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", html):
        assert address.startswith(("#", "data:image/png;base64,")), address


def test_references_inside_plots_have_their_targets(html: str) -> None:
    targets = set(re.findall(r'id="([^"]*)"', html))
    wanted = set(re.findall(r'href="#([^"]*)"', html)) | set(re.findall(r"url\(#([^)]*)\)", html))
    assert wanted
    assert wanted <= targets


def test_numbers_of_the_arms_are_in_it(html: str, arms: list[Arm]) -> None:
    for text in (
        "1 min 40 s",
        "30.0 s",
        "ratio 0.30",
        "40 TFLOP",
        "10 TFLOP",
        "ratio 0.25",
        "8 × 8 patches, 84 tokens",
        "All tokens",
        "LLaVolta",
    ):
        assert text in html
    for arm in arms:
        assert arm.description in html
        for score in arm.result.families.values():
            assert f"{100 * score.accuracy:.1f}" in html
    assert "vcc:layer=1,stride=8" in html
    assert "16 windows of 2 × 2 patches, 1 token each" in html


def test_findings(arms: list[Arm]) -> None:
    sentences = findings(arms, [read_log(arm.run) for arm in arms])
    assert sentences[0].startswith(
        "Chain-of-Sight: pre-training took 0.25 of the FLOPs and 0.30 of the wall clock of All tokens, "
        "fine-tuning 1.25 of the FLOPs and 1.11 of"
    )
    learned = learned_families(arms)
    assert {"presence", "count", "attribute", "reading"} <= set(learned)
    points = [100 * sum(arm.result.families[family].accuracy for family in learned) / len(learned) for arm in arms]
    assert f"{points[1] - points[0]:+.1f} points".replace("-", "−") in sentences[1]
    assert sentences[-2].startswith("Seconds are compared")
    assert sentences[-1].startswith("One seed:")


def seconds_of(run: Path, factors: Callable[[str, int], float]) -> None:
    """Makes the steps of a run take `factors`(stage, step) times their seconds."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    before = now = 0.0
    for row in rows:
        took, before = row["seconds"] - before, row["seconds"]
        now += took * factors(row["stage"], row["step"])
        row["seconds"] = now
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_seconds_of_a_busy_machine_are_not_compared(arms: list[Arm], world: Path, tmp_path: Path) -> None:
    shutil.copytree(arms[1].run, tmp_path / "run")
    seconds_of(tmp_path / "run", lambda stage, step: 2.0 if stage == "finetune" and step > 100 else 1.0)
    own = [arms[0], replace(arms[1], run=tmp_path / "run")]
    text = write_report(tmp_path / "report.html", own, world).read_text()
    assert "Seconds are not compared" in text
    assert "Chain-of-Sight, finetune: 1.50 times the seconds" in text
    assert "0.25 of the FLOPs of All tokens" in text
    assert "of the wall clock of" not in text
    assert "ratio 0.25" in text  # of the FLOPs
    assert "ratio 0.30" not in text  # of the seconds
    assert "seconds of training in this stage" not in text  # the axis
    console = Console(file=io.StringIO(), width=200)
    print_summary(own, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "×0.25" in printed
    assert "×0.30" not in printed


# ---- differences ---------------------------------------------------------------------------------------------------------------------


def changed(arm: Arm, right: Callable[[str, int], bool]) -> Arm:
    """The arm, right on the questions of which `right`(family, number within it) says so."""
    counts: dict[str, int] = {}
    rows = []
    for row in arm.result.rows:
        number = counts[row.family] = counts.get(row.family, -1) + 1
        rows.append(replace(row, correct=right(row.family, number)))
    return replace(arm, result=replace(arm.result, rows=rows))


def test_which_differences_mean_something(arms: list[Arm]) -> None:
    """Everything right against nothing in reading; in presence, one question apart; nothing apart in the others."""
    first = changed(arms[0], lambda family, number: family != "reading" and not (family == "presence" and number == 0))
    second = changed(arms[1], lambda family, number: True)
    found = {one.family: one for one in differences(first.result, second.result, ["presence", "count", "reading"])}
    n = first.result.families["presence"].n
    assert (found["reading"].points, found["reading"].low, found["reading"].high) == (100, 100, 100)
    assert found["presence"].points == pytest.approx(100 / n)
    assert found["presence"].low == 0  # the picture is not in every resample
    assert (found["count"].points, found["count"].means_something) == (0, False)
    assert found[""].points == pytest.approx((100 + 100 / n) / 3)
    assert {name for name, one in found.items() if one.means_something} == {"reading", ""}
    back = {one.family: one for one in differences(second.result, first.result, ["reading"])}
    assert (back["reading"].signed, back[""].high, back["reading"].means_something) == ("−100.0", -100, True)


def test_without_a_learned_family_there_is_no_mean(arms: list[Arm]) -> None:
    assert "" not in {one.family for one in differences(arms[0].result, arms[1].result, [])}


@pytest.mark.parametrize(
    ("low", "high", "means"), [(-1.0, 1.0, False), (0.0, 3.0, False), (-2.0, 0.0, False), (0.1, 3.0, True), (-3.0, -0.1, True)]
)
def test_an_interval_that_reaches_zero_means_nothing(low: float, high: float, means: bool) -> None:
    assert Difference("count", (low + high) / 2, low, high).means_something == means


def test_the_page_says_which_differences_mean_something(arms: list[Arm], world: Path, tmp_path: Path) -> None:
    same = write_report(tmp_path / "same.html", [arms[0], replace(arms[0], name="Other")], world).read_text()
    assert "Other less All tokens: +0.0 points" in same
    assert "no difference that these questions can show. In no family by itself does the interval leave out 0." in same
    families = {name: replace(score, accuracy=0.0, correct=0) for name, score in arms[0].result.families.items()}
    rows = [replace(row, correct=False) for row in arms[0].result.rows]
    mute = replace(arms[0], name="Mute", result=replace(arms[0].result, rows=rows, families=families))
    apart = write_report(tmp_path / "apart.html", [arms[0], mute], world).read_text()
    assert re.search(r"Mute less All tokens: −\d+\.\d points .*: worse\. By family the interval leaves out 0 in presence \(−", apart)
    assert re.search(r'<td class="apart"><b>−\d+\.\d</b>', apart)


# ---- the first part ------------------------------------------------------------------------------------------------------------------


def test_the_page_begins_with_the_finished_model(arms: list[Arm], world: Path, tmp_path: Path) -> None:
    task = f"{world}:families=presence/count/attribute"
    options = {"baselines": False, "seeds": 2, "limit": 40, "progress": False}
    bench("asset:vlm", [task], ["random", "uniform", "divprune"], [0.5, 0.11], tmp_path / "bench", **options)  # type: ignore[arg-type]
    text = write_report(tmp_path / "report.html", arms[:2], world, bench=tmp_path / "bench", scenes=1, progress=False).read_text()
    page = Balance()
    page.feed(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert text.index('id="finished"') < text.index('id="training"') < text.index('id="cost"')
    for part in ("asset:vlm", "random at the same budget", "divprune", "keep 0.11", "What was kept", "all tokens"):
        assert part in text
    assert text.count('<img src="data:image/png;base64,') == 1
    test_nothing_is_loaded_from_elsewhere(text)
    test_references_inside_plots_have_their_targets(text)


def test_nothing_learned_is_said(arms: list[Arm], world: Path, tmp_path: Path) -> None:
    """Everyone answers nothing: no family is compared, and the report says so."""
    rows = [replace(row, prediction="", correct=False) for row in arms[0].result.rows]
    families = {name: replace(score, accuracy=0.0, correct=0, low=0.0, high=0.03) for name, score in arms[0].result.families.items()}
    mute = [replace(arm, result=replace(arm.result, rows=rows, families=families)) for arm in arms]
    text = write_report(tmp_path / "report.html", mute, world).read_text()
    assert "no run has learned a family well enough" in text
    assert text.count(" *<br>") == len(FAMILY_RULES)


def test_printed_summary(arms: list[Arm]) -> None:
    console = Console(file=io.StringIO(), width=110)
    print_summary(arms, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("30.0 s ×0.30", "3 min 20 s ×1.11", "majority", *FAMILY_RULES, *(arm.name for arm in arms)):
        assert part in text


def test_arms_must_have_answered_the_same(arms: list[Arm], world: Path, tmp_path: Path) -> None:
    shorter = replace(arms[1], result=replace(arms[1].result, rows=arms[1].result.rows[:-1]))
    with pytest.raises(FoveateError, match="Chain-of-Sight and All tokens were not asked the same questions"):
        write_report(tmp_path / "report.html", [arms[0], shorter], world)
    with pytest.raises(FoveateError, match="at least one arm"):
        write_report(tmp_path / "report.html", [], world)


def test_names_are_escaped(arms: list[Arm], world: Path, tmp_path: Path) -> None:
    odd = [replace(arms[0], name="<b>A&B</b>", description="<script>"), arms[1]]
    text = write_report(tmp_path / "report.html", odd, world).read_text()
    assert "<script" not in text
    assert "<b>A&amp;B" not in text
    assert "&lt;b&gt;A&amp;B" in text


# ---- the log -------------------------------------------------------------------------------------------------------------------------


def test_log_is_cut_into_stages_and_parts(arms: list[Arm]) -> None:
    before, last = split_stages(read_log(arms[2].run))
    assert [stage.name for stage in before] == ["pretrain"]
    assert (last.name, last.images) == ("finetune", 6400)
    assert last.seconds == pytest.approx(140)
    assert last.points[0].seconds == pytest.approx(0.7)
    assert [(part.reducer, part.first, part.last) for part in last.parts] == [
        ("vcc:layer=1,stride=8", 1, 50),
        ("vcc:layer=3,stride=8", 51, 100),
        ("vcc:layer=3,stride=2", 101, 150),
        ("none", 151, 200),
    ]
    assert last.tokens == 64


def test_bridges_of_the_stages(arms: list[Arm]) -> None:
    found = read_bridges(arms[1].run)
    assert [(stage.name, stage.grid, stage.bridge["scales"]) for stage in found] == [
        ("pretrain", (8, 8), [[8, 4], [4, 1]]),
        ("finetune", (8, 8), [[8, 4], [2, 1], [1, 1]]),
    ]


def test_bad_logs_are_named(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="no training log"):
        read_log(tmp_path)
    log = tmp_path / "log.jsonl"
    for text, message in {"": "is empty", "{": "line 1 is not a logged step", '{"stage": "a", "step": 1}': "lacks a value .*loss"}.items():
        log.write_text(text)
        with pytest.raises(FoveateError, match=message):
            read_log(tmp_path)
    row = {"stage": "a", "step": 1, "loss": 1, "seconds": 1, "flops": 1, "tokens_per_image": 4, "visual_tokens_per_layer": [4], "images": 2}
    log.write_text(json.dumps({**row, "reducer": "none"}))
    with pytest.raises(FoveateError, match="one stage: 'a'"):
        split_stages(read_log(tmp_path))


# ---- small things --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.26, "8.3 s"), (125, "2 min 05 s"), (59.99, "60.0 s"), (3600, "1 h 00 min"), (4031, "1 h 07 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("flops", "text"), [(999, "999 FLOP"), (1.24e15, "1.24 PFLOP"), (4e13, "40 TFLOP"), (2e20, "200 EFLOP")])
def test_si(flops: float, text: str) -> None:
    assert si(flops) == text


def test_answer_text() -> None:
    assert answer_text("<loc3><loc1><loc8><loc15>") == "rows 3 to 8, columns 1 to 15"
    assert answer_text("red") == "red"
    assert answer_text("") == "–"


def test_smooth_is_a_trailing_mean() -> None:
    assert smooth([1, 2, 3, 4, 5], 2) == pytest.approx([1, 1.5, 2.5, 3.5, 4.5])
    assert smooth([1, 2, 3], 1) == [1, 2, 3]


def test_frames_lie_on_their_cells() -> None:
    svg = scene_svg("data:,", [((2, 4, 4, 8), "#ff0000", False)], (8, 8))
    x, y, width, height = (float(re.search(rf'<rect.* {name}="([\d.]+)"', svg)[1]) for name in ("x", "y", "width", "height"))  # type: ignore[index]
    assert (x, y, x + width, y + height) == pytest.approx((4, 2, 8, 4), abs=0.1)


def test_losses_by_source_are_drawn_where_a_stage_mixes(arms: list[Arm]) -> None:
    stage = read_log(arms[0].run)[0]
    assert source_losses(stage) is None
    points = [replace(point, sources={"a": point.loss, "b": 2.0} if point.step > 1 else {"a": point.loss}) for point in stage.points]
    figure = source_losses(replace(stage, points=points))
    assert figure is not None
    lines = figure.axes[0].get_lines()
    assert [(line.get_label(), len(line.get_xdata())) for line in lines] == [("a", len(points)), ("b", len(points) - 1)]  # type: ignore[arg-type]
    assert set(lines[1].get_ydata()) == {2.0}  # type: ignore[arg-type]


def test_evaluations_on_the_way_are_drawn_against_the_whole_run(arms: list[Arm], world: Path, tmp_path: Path) -> None:
    """Seconds and FLOPs count from the run's beginning, over its stages."""
    log = read_log(arms[0].run)
    assert marks(log) == []
    asked = [
        replace(log[0].points[-1], figures={"scenes": {"mean accuracy": 40.0}}),
        replace(log[1].points[5], figures={"scenes": {"mean accuracy": 60.0}}),
    ]
    found = marks(
        [
            replace(log[0], points=[*log[0].points[:-1], asked[0]]),
            replace(log[1], points=[*log[1].points[:5], asked[1], *log[1].points[6:]]),
        ]
    )
    assert [(mark.stage, mark.step) for mark in found] == [("pretrain", 200), ("finetune", 50)]
    assert found[0].seconds == pytest.approx(100)
    assert found[1].seconds == pytest.approx(100 + 0.9 * 50)
    assert found[1].flops == pytest.approx(200 * 2e11 + 50 * 4e11)
    (axes,) = accuracy_curves([("a", found), ("b", [])], "flops", "scenes").axes
    assert axes.get_lines()[0].get_ydata().tolist() == [40.0, 60.0]  # type: ignore[union-attr]
    assert axes.get_ylabel() == "scenes: mean accuracy"

    run = tmp_path / "run"
    shutil.copytree(arms[0].run, run)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rows[-1]["evaluation"] = {"scenes": {"mean accuracy": 60.0}}
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path / "report.html", [replace(arms[0], run=run), arms[1]], world).read_text()
    assert "Accuracy while training" in page
