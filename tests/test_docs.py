"""The worked example of docs/adding-a-method.md is run as it stands there, and what it makes must be a reducer like any other.

What other pages list and count is compared with what there is.
"""

import importlib.util
import json
import re
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
