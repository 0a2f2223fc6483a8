"""The worked example of docs/adding-a-method.md is run as it stands there, and what it makes must be a reducer like any other.

What other pages list and count is compared with what there is.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

import foveate
from foveate.accounting import predict
from foveate.anatomy import TESTED
from foveate.cli import app
from foveate.evaluation.metrics import METRICS
from foveate.evaluation.tasks import load_task
from foveate.reducers import METHODS, Reducer
from foveate.tokens import budget
from foveate.world import asset
from foveate.world.pictures import render, scene
from tests.conformance.family import picture
from tests.tiny import LAYERS, PATCHES, ROWS, Batch, llava
from tests.train.tiny_training import save_backbones

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


# ---- README


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The lines of a page that call foveate, continued ones whole."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if re.match(r"    foveate \w", line)]


def test_the_readme_is_short_and_its_code_runs(tmp_path: Path) -> None:
    """As it stands, but for the names of models, their devices and their depth."""
    page = ROOT / "README.md"
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 110
    attaching, assembling = blocks(page)
    for name, other in (('"Qwen/Qwen2.5-VL-7B-Instruct"', repr(str(asset("vlm")))), (', device_map="cuda"', ""), ('.to("cuda")', "")):
        assert name in attaching
        attaching = attaching.replace(name, other)
    pictures = [Image.fromarray(render(scene(number, "test"), 128)) for number in (13, 27)]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat number is printed?"}]}]
    prompt = AutoProcessor.from_pretrained(asset("vlm")).apply_chat_template(chat, add_generation_prompt=True)
    names: dict[str, Any] = {"prompts": [prompt, prompt], "images": [[image] for image in pictures]}
    exec(compile(attaching, str(page), "exec"), names)
    assert names["run"].last.visual_tokens[0] == 2 * 16
    assert names["smaller"]["pixel_values"].shape[-1] == 32
    assert names["answers"].shape[0] == 2

    save_backbones(tmp_path, image_token=False)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )  # the patches of CLIP-L
    CLIPVisionModel(vision).save_pretrained(tmp_path / "tower")
    CLIPImageProcessorPil(size={"height": 224, "width": 224}, crop_size={"height": 224, "width": 224}).save_pretrained(tmp_path / "tower")
    for name, other in (
        ('"openai/clip-vit-large-patch14"', repr(str(tmp_path / "tower"))),
        ('"lmsys/vicuna-7b-v1.5"', repr(str(tmp_path / "lm"))),
        ("[16, 23]", "[1, 2]"),
        ("model.scale_bridge(", "before = model.model.bridge.tokens(model.grid)\nmodel.scale_bridge("),
    ):
        assert name in assembling
        assembling = assembling.replace(name, other)
    exec(compile(assembling, str(page), "exec"), names)
    assert (names["before"], names["model"].model.bridge.tokens(names["model"].grid)) == (80, 1296)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_pages_have_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 15


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_are_ones(page: Path) -> None:
    """Names, options and the types of their values; nothing is run."""
    root: Any = typer.main.get_command(app)
    for line in commands(page):
        words = [word for word in shlex.split(line, comments=True)[1:] if word not in ("…", "...")]
        command = root
        while hasattr(command, "commands"):
            assert words, line
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        command.make_context("foveate", words)


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*PAGES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG"))]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))]
    missing = [f"{page.name}: {link}" for page, link in links if "://" not in link and not (page.parent / link).exists()]
    assert len(links) > 50
    assert missing == []


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert foveate.__version__ == project["version"]


def test_the_command_says_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(args=["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"foveate {foveate.__version__}\n"
