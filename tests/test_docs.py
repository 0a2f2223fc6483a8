"""The worked example of docs/adding-a-method.md is run as it stands there, and what it makes must be a reducer like any other.

What other pages list and count is compared with what there is.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.accounting import predict
from foveate.anatomy import TESTED
from foveate.evaluation.metrics import METRICS
from foveate.evaluation.tasks import load_task
from foveate.reducers import METHODS, Reducer
from foveate.tokens import budget
from tests.conformance.family import picture
from tests.tiny import LAYERS, PATCHES, ROWS, Batch, llava

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adding-a-method.md"
MODULE = "foveate.reducers.mean_distance"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Reducer]:
    """The class of the page's first block, which is a file by itself."""
    path = tmp_path / "mean_distance.py"
    path.write_text(BLOCKS[0], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, MODULE, module)
    spec.loader.exec_module(module)
    found: type[Reducer] = module.MeanDistance
    return found


def test_the_page_runs_from_top_to_bottom(method: type[Reducer], monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS) == 4
    assert len(BLOCKS[0].splitlines()) <= 40
    monkeypatch.setitem(METHODS, method.name, method)  # the page's own line is undone with it
    names: dict[str, Any] = {"model": llava(), "inputs": Batch([ROWS[1]]).inputs}
    for block in BLOCKS[1:]:
        exec(compile(block, str(PAGE), "exec"), names)


@pytest.mark.parametrize("shortcuts", [True, False])
def test_keep_all_is_bit_identical(method: Any, shortcuts: bool) -> None:
    model, batch = llava(), Batch(ROWS, "left")
    with torch.no_grad():
        bare = model(**batch.inputs).logits
        for keep, same in ((1.0, True), (0.5, False)):
            with foveate.attach(model, method(keep=keep), shortcuts=shortcuts):
                assert torch.equal(model(**batch.inputs).logits, bare) == same


@pytest.mark.parametrize("keep", [1.0, 0.3, 0.01, 5, 100])
def test_as_many_stay_as_the_budget_says(method: Any, keep: Any) -> None:
    model, reducer = llava(), method(keep=keep)
    with foveate.attach(model, reducer) as run, torch.no_grad():
        model(**Batch([ROWS[1]]).inputs)
    assert run.last.visual_tokens == [2 * budget(keep, PATCHES)] * LAYERS
    assert run.ledger == predict(model.config, images=2, text_tokens=len(ROWS[1]) - 2 * PATCHES, reducers=[reducer])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_does_not_depend_on_its_batch(method: Any, side: str) -> None:
    model, batch = llava(), Batch(ROWS, side)
    with foveate.attach(model, method(keep=0.5)), torch.no_grad():
        together = model(**batch.inputs).logits
        for i, single in enumerate(batch.singles):
            torch.testing.assert_close(batch.own(together, i), model(**single).logits[0], rtol=1e-4, atol=1e-5)


def test_impossible_budgets_are_errors(method: Any) -> None:
    with pytest.raises(foveate.FoveateError, match="keep=0 is not possible"):
        method(keep=0)


# ---- what pages list and count


def served() -> dict[str, bool]:
    """Of the architectures in docs/conformance.md, whether any reducer serves some variant of them."""
    found: dict[str, bool] = {}
    for line in (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8").splitlines():
        cells = re.match(r"\| ([a-z0-9_]+)(?::\S+)? \|(.*)\|$", line)
        if cells and cells[1] in TESTED:  # another table has the reducers
            found[cells[1]] = found.get(cells[1], False) or "✓" in cells[2]
    return found


def test_the_readme_counts_the_reducers_and_the_architectures_that_they_serve() -> None:
    table = served()
    assert table.keys() == TESTED.keys()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (reducers,) = re.findall(r"(\d+) reducers \(`foveate list`", readme)
    (architectures,) = re.findall(r"(\d+) architectures of transformers 5", readme)
    assert int(reducers) == len(METHODS)
    assert int(architectures) == sum(table.values())


def test_the_bench_page_lists_every_metric_with_its_longest_answer() -> None:
    page = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (\w+) \| (\d+) \| ", page, re.MULTILINE))
    assert {name: int(tokens) for name, tokens in listed.items()} == {name: metric.new_tokens for name, metric in METRICS.items()}


def test_the_bench_pages_photographs_are_a_task(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    (rows,) = re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (task,) = re.findall(r'--tasks "photos.json:(\S+?),images=photos,(suffix=[^"]+)"', page)
    (tmp_path / "photos").mkdir()
    for number, name in enumerate(sorted({row["image"] for row in json.loads(rows)})):
        picture((64, 48), number).save(tmp_path / "photos" / name)
    (tmp_path / "photos.json").write_text(rows, encoding="utf-8")
    found = load_task(f"{tmp_path}/photos.json:{task[0]},images={tmp_path}/photos,{task[1]}", progress=False)
    assert [sample.id for sample in found.samples] == ["chairs", "door", "sign"]
    assert found.samples[0].answers == ("4", "four")
    assert found.samples[2].group == "text"
    assert found.samples[1].question.endswith("\nAnswer with a single word or phrase.")
    assert (found.metric.name, found.max_new_tokens) == ("exact", METRICS["exact"].new_tokens)


def test_the_page_of_methods_names_every_reducer_and_marks_what_is_experimental() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\|(?:.*\breducer)? `(\w+)`(.*)$", page, re.MULTILINE))
    named = set(re.findall(r"`(\w+)`", " ".join(line for line in page.splitlines() if line.startswith("|"))))
    assert METHODS.keys() <= named
    for name, method in METHODS.items():
        assert ("experimental: " in rows.get(name, "")) == method.experimental, name


# ---- the three touches


CELLS = """
import pytest
from tests.conformance.checks import CHECKS
from tests.conformance.test_conformance import SETTINGS, outcome

@pytest.mark.parametrize("check", CHECKS)
def test_meandistance_conforms(check):
    assert SETTINGS["meandistance"] == ("meandistance:keep=0.5", "meandistance:keep=1.0")
    assert outcome("llava", "meandistance", check) == "ok"
"""


def test_a_file_and_a_line_are_all_that_the_common_tests_need(tmp_path: Path) -> None:
    """A copy of the package with the page's file and the page's line; the common tests, as they are, find the method in it and hold."""
    shutil.copytree(Path(foveate.__file__).parent, tmp_path / "foveate", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (line,) = re.findall(r"^    (from foveate\.reducers\.mean_distance import .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    (tmp_path / "foveate" / "reducers" / "mean_distance.py").write_text(BLOCKS[0], encoding="utf-8")
    listed = tmp_path / "foveate" / "reducers" / "__init__.py"
    before = listed.read_text(encoding="utf-8")
    assert before.count("# isort: on\n") == 1
    listed.write_text(before.replace("# isort: on\n", f"{line}\n# isort: on\n"), encoding="utf-8")
    (tmp_path / "test_cells.py").write_text(CELLS, encoding="utf-8")
    suites = ["tests/test_attach.py", "tests/reducers/test_at.py", str(tmp_path / "test_cells.py")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "meandistance and not foveate-", *suites]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", ran.stdout)
    assert int(passed) >= 30
    assert "skipped" not in ran.stdout


def test_the_pages_row_is_a_row_of_the_table() -> None:
    (row,) = re.findall(r"^    (\| `meandistance` .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    table = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    (head,) = re.findall(r"^\| method \| paper \| what it does .*$", table, re.MULTILINE)
    assert row.count("|") == head.count("|")
