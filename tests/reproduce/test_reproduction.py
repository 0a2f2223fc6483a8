"""The command with a stand-in for lmms-eval: what runs, what is kept, what is judged, and what is said where something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from ruamel.yaml import YAML
from tests.command import refused

from foveate.cli import main as command_line
from foveate.errors import FoveateError
from foveate.reproduce import fetch, harness, plan, run
from foveate.reproduce.compare import AVERAGE, Verdict, code, compare, verdict
from foveate.reproduce.harness import Job, Measured, command, read_results
from foveate.reproduce.run import Choice, How, main
from foveate.reproduce.tables import Column, Table, load_table

YES = How(yes=True)
COLUMN = {"metric": ["acc"], "scale": 100, "tolerance": 2.0, "why": "so", "questions": 40}


def row(reduce: str, tokens: float, **paper: float) -> dict[str, Any]:
    return {"reduce": reduce, "budget": f"{tokens:g}", "tokens": tokens, "evidence": "[P]", "paper": paper}


TABLE: dict[str, Any] = {
    "title": "Made up",
    "paper": "2412.04467",
    "where": "nowhere",
    "model": {"name": "asset:vlm"},
    "text_tokens": 12,
    "columns": {"A": {"task": "a", **COLUMN}, "B": {"task": "b", **COLUMN}},
    "rows": {
        "full": row("none", 64, A=80.0, B=60.0),
        "half": row("divprune:keep=0.5", 32, A=70.0, B=50.0),
        "quarter": row("fastv:keep=0.25,layer=2", 32, A=60.0),
    },
    "average": {"full": "full", "tolerance": 2.0},
}
OURS = {
    ("none", "a"): 0.81,
    ("none", "b"): 0.60,
    ("divprune:keep=0.5", "a"): 0.72,
    ("divprune:keep=0.5", "b"): 0.48,
    ("fastv:keep=0.25,layer=2", "a"): 0.60,
    ("fastv:keep=0.25,layer=2", "b"): 0.40,
}


class Harness:
    """Answers from OURS, and remembers what it was asked; `after` runs so often, then `fails`."""

    def __init__(self, ours: dict[tuple[str, str], float] = OURS, after: int = 99, fails: BaseException | None = None) -> None:
        self.ours, self.after, self.fails = ours, after, fails
        self.asked: list[tuple[str, str, int | None]] = []

    def __call__(self, job: Job, log: Path) -> Measured:
        if self.fails is not None and len(self.asked) >= self.after:
            raise self.fails
        self.asked.append((job.reduce, job.column.task, job.limit))
        tokens = {"none": 64.0}.get(job.reduce, 32.0)
        return Measured(
            {"acc": self.ours[job.reduce, job.column.task], "other": 1.0}, job.limit or 40, tokens, 2.0, "lmms_eval", "lmms-eval 0"
        )


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    def written(**changes: Any) -> str:
        with (tmp_path / "made.yaml").open("w", encoding="utf-8") as stream:
            YAML(typ="safe").dump({**TABLE, **changes}, stream)
        return str(tmp_path / "made.yaml")

    return written


def cells(out: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in (out / "cells").glob("*.json"))


# ---- runs


def test_a_table_runs_and_is_judged(file: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, asked = tmp_path / "out", Harness()
    assert main(file(), out, Choice(), YES, harness=asked) == 0
    assert asked.asked == [(reduce, task, None) for reduce, task in OURS]
    said = capsys.readouterr().out
    assert "| half | 32 | 72.00 / 70.00 (+2.00) | 48.00 / 50.00 (-2.00) | 84.44 / 85.42 (-0.97) | within |" in said
    assert "| quarter | 32 | 60.00 / 60.00 (+0.00) | 40.00 / – | 74.07 / 75.00 (-0.93) | within |" in said
    results = json.loads((out / "results.json").read_text())
    assert (results["code"], results["rows"]["half"]["cells"]["A"]["difference"]) == (0, 2.0)
    assert results["rows"]["quarter"]["cells"]["B"]["verdict"] == "not judged"
    assert "Made up" in (out / "table.md").read_text()
    page = (out / "report.html").read_text()
    assert "60.00 / 60.00" in page
    assert "lmms-eval 0" in page

    again = Harness()
    assert main(file(), out, Choice(), How(), harness=again) == 0  # nothing is left to run, so nothing is asked
    assert again.asked == []


def test_one_number_outside_is_code_1(file: Callable[..., str], tmp_path: Path) -> None:
    ours = {**OURS, ("divprune:keep=0.5", "b"): 0.521}
    assert main(file(), tmp_path / "out", Choice(), YES, harness=Harness(ours)) == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"]["half"]["verdict"] == "outside"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), FoveateError("lmms-eval left no result"), SystemExit(137)])
def test_a_stopped_run_goes_on_with_the_cell_that_is_missing(stop: BaseException, file: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(type(stop)):
        main(file(), out, Choice(), YES, harness=Harness(after=3, fails=stop))
    assert cells(out) == ["full-A", "full-B", "half-A"]
    assert json.loads((out / "results.json").read_text())["rows"]["quarter"]["verdict"] == "not run"
    rest = Harness()
    assert main(file(), out, Choice(), YES, harness=rest) == 0
    assert [(reduce, task) for reduce, task, _ in rest.asked] == list(OURS)[3:]


def test_half_a_file_is_no_cell(file: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(file(), out, Choice(only=("full",)), YES, harness=Harness())
    cell = next((out / "cells").glob("full-A-*.json"))
    cell.with_name(cell.name + ".tmp").write_text(cell.read_text()[:20])  # what a kill within a write leaves
    rest = Harness()
    main(file(), out, Choice(only=("full",)), YES, harness=rest)
    assert rest.asked == []
    cell.write_text("{")
    with pytest.raises(FoveateError, match=r"full-A-\w+.json is not a cell .*; remove it, and the same command runs it again"):
        main(file(), out, Choice(only=("full",)), YES, harness=rest)


def test_rows_benchmarks_tasks_and_limits_are_chosen(file: Callable[..., str], tmp_path: Path) -> None:
    out, asked = tmp_path / "out", Harness({**OURS, ("none", "c"): 0.5})
    main(file(), out, Choice(only=("half",), tasks=("B",)), YES, harness=asked)
    main(file(), out, Choice(only=("full",), tasks=("A=c",)), YES, harness=asked)
    assert main(file(), out, Choice(only=("full",), limit=4), YES, harness=asked) == 0
    assert asked.asked == [("divprune:keep=0.5", "b", None), ("none", "c", None), ("none", "a", 4), ("none", "b", 4)]
    results = json.loads((out / "results.json").read_text())
    assert results["rows"]["full"]["cells"]["A"]["reason"] == "the first 4 questions only"
    everything = Harness()
    main(file(), out, Choice(), YES, harness=everything)  # neither another task's cell nor a limited one stands for a whole one
    assert len(everything.asked) == 5


def test_another_checkpoint_is_another_cell(file: Callable[..., str], tmp_path: Path) -> None:
    class Told(Harness):
        def __call__(self, job: Job, log: Path) -> Measured:
            assert job.model == str(folder)
            return super().__call__(job, log)

    from foveate.world import asset

    folder = asset("vlm")
    out = tmp_path / "out"
    main(file(), out, Choice(only=("full",)), YES, harness=Harness())
    asked = Told()
    main(file(), out, Choice(only=("full",), model=str(folder)), YES, harness=asked)
    assert len(asked.asked) == 2
    assert f"The paper's numbers are of asset:vlm, ours of {folder}." in (out / "table.md").read_text()


# ---- the plan


def test_the_plan_counts_and_runs_nothing(file: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = Harness()
    assert main(file(), tmp_path / "out", Choice(), How(plan=True, tflops=1.0), harness=asked) == 0
    said = capsys.readouterr().out
    assert asked.asked == []
    assert not (tmp_path / "out").exists()
    assert "3 rows x 2 benchmarks: 6 runs of lmms-eval to do, 0 finished" in said
    lines = {line.split()[0]: line for line in said.partition("tokens: ")[0].splitlines() if line}
    assert lines["half"].split()[1:3] == ["32", "32"]
    assert " 80 " in lines["half"]
    assert "at 1 TFLOP/s (declared by --tflops)" in said
    assert "in asset:vlm" in said


def test_a_7b_table_is_planned_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("visionzip", None, Choice(only=("64",)), How(plan=True)) == 0
    said = capsys.readouterr().out
    assert "llava-hf/llava-1.5-7b-hf, revision main, 14.1 GB at two bytes a parameter" in said
    assert "36,198" in said  # 12578 + 9000 + 2374 + 2017 + 5000 + 4329 + 900
    assert "1.82 TFLOP" in said
    assert "declared, not measured" in said
    assert "from memory [M]: GQA" in said
    assert "54 dominant" not in said
    assert "left out, VQAv2: the answers" in said


def test_a_probe_measures_the_rate(file: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = Harness()
    main(file(), tmp_path / "out", Choice(), How(plan=True, probe=True, yes=True), harness=asked)
    assert asked.asked == [("none", "a", run.PROBE)]
    assert "measured on 16 questions of A" in capsys.readouterr().out
    assert cells(tmp_path / "out") == []
    costs = {"full": plan.Cost(64, 10)}
    assert plan.measured_rate(costs, [("full", Measured({}, 16, None, 2.0))], "") == plan.Rate(80.0, "")
    assert plan.measured_rate(costs, [("full", Measured({}, 16))], "") is None


# ---- tolerances


def numbers(ours: dict[str, dict[str, float]], limit: int | None = None, **changes: Any) -> Any:
    table = Table.model_validate({**TABLE, "name": "made", **changes})
    return compare(table, {name: {at: Measured({"acc": one}, 40) for at, one in rows.items()} for name, rows in ours.items()}, limit)


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (0.78, Verdict.WITHIN),  # the tolerance itself is within, below and above
        (0.82, Verdict.WITHIN),
        (0.7799, Verdict.OUTSIDE),
        (0.8201, Verdict.OUTSIDE),  # better than the paper is not the paper's number either
        (0.80, Verdict.WITHIN),
    ],
)
def test_the_tolerance_is_held_on_both_sides(ours: float, expected: Verdict) -> None:
    found = numbers({"full": {"A": ours}})
    assert found["full"]["A"].verdict is expected
    assert code(found) == (expected is Verdict.OUTSIDE)
    assert found["full"]["B"].verdict is Verdict.ABSENT


def test_what_is_not_judged_is_never_outside() -> None:
    far = {"full": {"A": 0.1, "B": 0.1}}
    assert code(numbers(far)) == 1
    assert code(numbers(far, limit=8)) == 0
    columns = {name: {**column, "judged": False, "note": "unknown"} for name, column in TABLE["columns"].items()}
    found = numbers(far, columns=columns)
    assert code(found) == 0
    assert (found["full"]["A"].verdict, found["full"]["A"].reason) == (Verdict.SHOWN, "unknown")
    rows = {**TABLE["rows"], "full": {**TABLE["rows"]["full"], "judged": False, "note": "disputed"}}
    assert numbers(far, rows=rows)["full"]["A"].reason == "disputed"
    assert verdict(found["full"]) is Verdict.SHOWN


def test_an_average_takes_the_same_columns_on_both_sides() -> None:
    ours = {"full": {"A": 0.4, "B": 0.6}, "half": {"A": 0.2, "B": 0.6}, "quarter": {"A": 0.3, "B": 0.6}}
    found = numbers(ours)
    assert found["half"][AVERAGE].ours == pytest.approx(75.0)  # (50 + 100) / 2
    assert found["half"][AVERAGE].paper == pytest.approx(50 * (70 / 80 + 50 / 60))
    assert (found["quarter"][AVERAGE].ours, found["quarter"][AVERAGE].paper) == (pytest.approx(75.0), 75.0)  # A alone has a number
    assert AVERAGE not in found["full"]
    assert numbers({"half": {"A": 0.2}})["half"][AVERAGE].verdict is Verdict.ABSENT


def test_a_papers_own_average_is_shown_and_not_judged() -> None:
    rows = {**TABLE["rows"], "half": {**TABLE["rows"]["half"], "paper": {}, "average": 99.0}}
    found = numbers({"full": {"A": 0.4, "B": 0.6}, "half": {"A": 0.1, "B": 0.1}}, rows=rows)["half"][AVERAGE]
    assert (found.paper, found.verdict, found.reason) == (99.0, Verdict.SHOWN, "the paper's own, over other benchmarks")


# ---- what lmms-eval is asked, and what it says


def job(**changes: Any) -> Job:
    return replace(Job("asset:vlm", "fastv:keep=0.25,layer=2", Column(task="a", metric=["acc"], tolerance=1, why="")), **changes)


def test_the_command_is_one_that_lmms_eval_takes(tmp_path: Path) -> None:
    words = command(job(limit=5, device="cpu", include="mine"), tmp_path)
    assert "pretrained=asset:vlm,dtype=auto,reduce=fastv:keep=0.25:layer=2" in words
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--tasks"] == "a"
    assert (options["--limit"], options["--device"], options["--include_path"], options["--batch_size"]) == ("5", "cpu", "mine", "8")
    with pytest.raises(FoveateError, match="has a comma"):
        command(job(model="/my,model"), tmp_path)


def test_a_changed_task_is_written(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("task: base\n")
    column = load_table("visionzip").columns["TextVQA"].model_copy(update={"base": "base.yaml"})
    words = command(job(column=column, include=str(tmp_path)), tmp_path / "changed")
    assert words[words.index("--include_path") + 1] == str(tmp_path / "changed")
    written = YAML(typ="safe").load((tmp_path / "changed" / f"{column.task}.yaml").read_text())
    assert written["include"] == str((tmp_path / "base.yaml").resolve())
    assert written["task"] == column.task
    assert written["lmms_eval_specific_kwargs"]["default"]["ocr"] is True
    with pytest.raises(FoveateError, match=r"task \w+: there is no gone.yaml in "):
        command(job(column=column.model_copy(update={"base": "gone.yaml"}), include=str(tmp_path)), tmp_path / "changed")


def test_results_are_read() -> None:
    told = {
        "results": {
            "mme": {"alias": "mme", "p,none": 1500.5, "p_stderr,none": "N/A", "c,none": 300, "c_stderr_clt,none": 1.0, "s,none": []}
        },
        "n-samples": {"mme": {"original": 2374, "effective": 8}},
        "throughput": {"avg_visual_tokens_all_layers": 306.0, "total_elapsed_time": 3.5},
    }
    assert read_results(told, "mme") == Measured({"p": 1500.5, "c": 300.0}, 8, 306.0, 3.5)
    with pytest.raises(FoveateError, match="no task 'pope'; they have mme"):
        read_results(told, "pope")
    column = Column(task="mme", metric=["p", "c"], tolerance=1, why="")
    from foveate.reproduce.compare import value

    assert value(column, read_results(told, "mme")) == 1800.5
    with pytest.raises(FoveateError, match=r"lmms-eval's result of mme has no metric 'q'.*; it has p, c\. Name one"):
        value(column.model_copy(update={"metric": ["q"]}), read_results(told, "mme"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ConnectionError: Couldn't reach 'x' on the Hub", "its data set is not in the cache, and the hub cannot be reached"),
        ("huggingface_hub.errors.OfflineModeIsEnabled: no", "its data set is not in the cache"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "smaller --batch-size"),
        ("huggingface_hub.errors.LocalTokenNotFoundError: Token is required", "hf auth login"),
        ("\x1b[31mTasks were not found: a\x1b[0m", "it has no such task"),
        ("foveate.errors.FoveateError: there is no decoder layer 9", "there is no decoder layer 9"),
        ("Traceback\n  x\nKeyError: 'y'\nlater", "KeyError: 'y'"),
        ("", "it says nothing"),
    ],
)
def test_the_reason_of_no_result_is_told(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def printed(words: list[str], log: Path, show: bool) -> None:
        log.write_text(text, encoding="utf-8")

    monkeypatch.setattr(harness, "_follow", printed)
    monkeypatch.setattr(harness, "require", lambda: None)
    with pytest.raises(FoveateError) as told:
        harness.lmms_eval(job(), tmp_path / "log", show=False)
    assert str(told.value).startswith("lmms-eval left no result of a under fastv:keep=0.25,layer=2: ")
    assert reason in str(told.value)
    assert str(tmp_path / "log") in str(told.value)
    assert list(tmp_path.glob(".running-*")) == []


# ---- bad input


def test_bad_input_is_named(
    file: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = file(), ["--out", str(tmp_path / "out")]
    assert "no table 'fastvv' (did you mean 'fastv'?)" in refused(["reproduce", "fastvv"], capsys)
    assert "table made has no row 'hal' (did you mean 'half'?)" in refused(["reproduce", path, "--only", "hal"], capsys)
    assert "table made has no benchmark 'C'; there are A, B" in refused(["reproduce", path, "--task", "C"], capsys)
    assert "no such model folder: ./gone" in refused(["reproduce", path, "--model", "./gone"], capsys)
    assert "tflops=0.0 is not possible" in refused(["reproduce", path, "--tflops", "0", "--plan"], capsys)
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert 'lmms-eval is not installed: pip install "foveate[lmms-eval]"' in refused(["reproduce", path, "--yes", *out], capsys)
    monkeypatch.setattr(run, "require", lambda: None)
    assert "give --yes to download and run, or --plan" in refused(["reproduce", path, *out], capsys)
    assert not (tmp_path / "out").exists()


def test_it_lists_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command_line(["reproduce"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "visionzip    arXiv 2412.04467   VisionZip on LLaVA-1.5-7B: full, 192, 128, 64; 28 numbers" in said
    assert "judged by its averages" in said
    assert said.count("nothing is judged") == 2


def test_a_metric_that_is_not_in_the_result_is_said_at_once_and_keeps_the_cell(file: Callable[..., str], tmp_path: Path) -> None:
    columns = {"A": {"task": "a", **COLUMN, "metric": ["accc"]}, "B": TABLE["columns"]["B"]}
    asked = Harness()
    with pytest.raises(FoveateError, match=r"no metric 'accc' \(did you mean 'acc'\?\); it has acc, other"):
        main(file(columns=columns), tmp_path / "out", Choice(), YES, harness=asked)
    assert len(asked.asked) == 1
    rest = Harness()
    assert main(file(), tmp_path / "out", Choice(), YES, harness=rest) == 0  # the table mended: what ran is not run again
    assert len(rest.asked) == 5


def test_a_full_disk_is_said(file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_json", full)
    with pytest.raises(FoveateError, match=r"the disk is full: .*out; make room, and the same command goes on"):
        main(file(), tmp_path / "out", Choice(), YES, harness=Harness())


def test_a_model_that_is_not_here_and_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, **how: Any) -> str:
        raise LocalEntryNotFoundError("offline mode is enabled.")

    monkeypatch.setattr(fetch, "snapshot_download", absent)
    with pytest.raises(FoveateError, match=r"llava-hf/llava-1.5-7b-hf, revision main is not in the cache .*--model FOLDER"):
        main("dart", tmp_path / "out", Choice(), YES, harness=Harness())
    monkeypatch.setattr(fetch, "free", lambda: 5e9)
    with pytest.raises(FoveateError, match=r"the model takes 14.1 GB, but .* has 5.0 GB free"):
        main("dart", tmp_path / "out", Choice(), YES, harness=Harness())


def test_a_model_of_the_cache_is_taken_at_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "snapshots" / "abc123"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    monkeypatch.setattr(fetch, "snapshot_download", lambda name, **how: str(folder))
    found = fetch.locate("a/b", "v1")
    assert (found.folder, found.version, found.told) == (str(folder), "abc123", "a/b, revision v1")
    (folder / "model.safetensors").unlink()  # a configuration alone is not a model
    assert fetch.locate("a/b", "v1").folder is None
    assert fetch.fetch(fetch.locate("a/b", "v1")).version == "abc123"
