"""The programs of examples/ run as they are, on what ships with the package, and show what they say."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from types import ModuleType

import pytest

from foveate.model import FoveateForConditionalGeneration

FOLDER = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    """The example as a module: what it does only as a program is not done."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_attach(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / "attach.py"), run_name="__main__")
    bare, fastv, divprune, both = capsys.readouterr().out.splitlines()
    assert bare.split()[:2] == ["none", "68"]
    assert bare.endswith("[64, 64, 64, 64, 64, 64]")
    assert fastv.endswith("[64, 64, 16, 16, 16, 16]")
    assert divprune.endswith("[16, 16, 16, 16, 16, 16]")
    assert both.endswith("[32, 16, 16, 8, 4, 4]")


def test_attach_is_short() -> None:
    lines = (FOLDER / "attach.py").read_text(encoding="utf-8").split('"""')[2].splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 15


def test_own_method(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / "own_method.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("32 of 64 tokens; ")


def test_own_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("own_metric").main(tmp_path)
    bare, reduced = capsys.readouterr().out.splitlines()[-2:]
    assert bare.startswith("none       keep 1: {'likeness'")
    assert reduced.startswith("divprune   keep 0.25: {'likeness'")
    assert (tmp_path / "summary.csv").is_file()


def test_own_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("own_trainer").main(str(tmp_path))
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split(",", 1)[0] for line in lines] == ["step 1: vcc:layer=2", "step 2: vcc:layer=2", "step 3: none", "step 4: none"]
    counts = [[float(n) for n in line[line.index("[") + 1 : line.index("]")].split(", ")] for line in lines]
    assert counts == [[64, 64, 8, 8, 8, 8], [64, 64, 32, 32, 32, 32], [64] * 6, [64] * 6]
    assert max(float(line.rpartition(" ")[2]) for line in lines) < 5  # the model is a finished one


def test_train_with_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("train_with_a_recipe").main(tmp_path)
    assert "model.safetensors" in capsys.readouterr().out
    model = FoveateForConditionalGeneration.from_pretrained(tmp_path / "run" / "final")
    assert model.config.bridge["kind"] == "mlp"
    assert not (tmp_path / "run" / "final" / "foveate.json").exists()  # the last step of the last stage had no reducer


def test_every_example_has_a_test() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    assert [path.stem for path in sorted(FOLDER.glob("*.py")) if f"def test_{path.stem}(" not in tests] == []
