"""Weights in the older format: read as tensors or refused, at every door, and nothing that they hold is run."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from foveate.errors import FoveateError
from foveate.inference import load_model
from foveate.model import from_backbones
from foveate.train.run import main as train
from tests.command import refused
from tests.situations.runs import checkpoint, model, prepare, recipe, same, save_llava, stage, stages
from tests.train.test_resume import Stopped, stop_after

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("weights"))
    save_llava(folder / "llava")
    Image.new("RGB", (32, 32)).save(folder / "picture.png")
    return folder


class Call:
    """Unpickled as any other object is, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it-was-run"


def older(folder: Path, to: Path, **more: Any) -> Path:
    """A copy whose weights are in pytorch_model.bin, with `more` beside them."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    torch.save({**weights, **more}, to / "pytorch_model.bin")
    return to


def test_the_call_is_one(tmp_path: Path, mark: Path) -> None:
    """Otherwise nothing below could fail."""
    pickle.loads(pickle.dumps(Call(mark)))
    assert mark.is_dir()
    mark.rmdir()
    torch.save({"a": Call(mark)}, tmp_path / "a.bin")
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert mark.is_dir()


# ---- read as tensors


def test_a_model_is_the_same(root: Path, tmp_path: Path) -> None:
    one, other = load_model(root / "llava")[0], load_model(older(root / "llava", tmp_path / "older"))[0]
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(other.state_dict()[name], value) for name, value in one.state_dict().items())


def test_backbones_are_the_same(root: Path, tmp_path: Path) -> None:
    def states(tower: Path, lm: Path) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return from_backbones(tower, lm, {"kind": "mlp"})[0].state_dict()

    found = states(older(root / "tower", tmp_path / "tower"), older(root / "lm", tmp_path / "lm"))
    assert all(torch.equal(found[name], value) for name, value in states(root / "tower", root / "lm").items())


def test_a_run_is_the_same(root: Path, tmp_path: Path) -> None:
    for name, folder in (("plain", root / "llava"), ("older", older(root / "llava", tmp_path / "older"))):
        train(recipe(root, name, checkpoint(folder)))
    assert same(root / "plain", root / "older")


# ---- refused

Door = Callable[[Path, Path, Path], list[str]]  # (folder of the model, world, folder for what is written)
DOORS: dict[str, Door] = {
    "eval": lambda folder, world, out: ["eval", str(folder), "--data", str(world)],
    "bench": lambda folder, world, out: ["bench", str(folder), "--tasks", f"{world}:name=w", "--out", str(out / "bench")],
    "search": lambda folder, world, out: [
        "search",
        str(folder),
        "--tasks",
        f"{world}:name=w",
        "--out",
        str(out / "found"),
        "--tokens",
        "0.5",
    ],
    "look": lambda folder, world, out: ["look", str(folder), str(folder.parent / "picture.png"), "--ask", "what?", "--reduce", "random"],
    "profile": lambda folder, world, out: ["profile", str(folder), "--image", str(folder.parent / "picture.png"), "--reduce", "random"],
    "export": lambda folder, world, out: ["export", str(folder), str(out / "exported")],
}


@pytest.mark.parametrize("door", DOORS)
def test_what_would_be_run_is_refused(
    door: str, root: Path, world: Path, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = older(root / "llava", tmp_path / "llava", more=Call(mark))
    shutil.copy(root / "picture.png", tmp_path)
    said = refused(DOORS[door](folder, world, tmp_path), capsys)
    assert f"{folder}: its weights (.bin) hold more than tensors" in said
    assert not mark.exists()


@pytest.mark.parametrize("part", ["llava", "tower", "lm"])
def test_a_recipe_whose_model_would_be_run_is_refused(
    part: str, root: Path, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = older(root / part, tmp_path / part, more=Call(mark))
    change = {"llava": checkpoint(folder), "tower": model(vision=str(folder)), "lm": model(text=str(folder))}[part]
    said = refused(["train", str(recipe(root, f"refused-{part}", change))], capsys)
    assert "its weights (.bin) hold more than tensors" in said
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all, but a text", None])
def test_a_file_that_is_not_whole_is_named_in_one_line(root: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = older(root / "llava", tmp_path / "older") if name.endswith(".bin") else shutil.copytree(root / "llava", tmp_path / "older")
    path = Path(folder) / name
    path.write_bytes(path.read_bytes()[:20_000] if content is None else content)
    with pytest.raises(FoveateError, match=r"cannot load a vision-language model .*older: .") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def without(folder: Path, to: Path, part: str) -> Path:
    """A copy whose files lack the tensors with `part` in their names."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    kept = {name: value for name, value in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("part", ["layers.1.mlp.down_proj", "multi_modal_projector", "patch_embedding"])
def test_a_model_that_lacks_weights_is_refused(root: Path, tmp_path: Path, part: str) -> None:
    folder = without(root / "llava", tmp_path / "llava", part)
    with pytest.raises(FoveateError, match=f"its files lack .*{part}.* which would be random;"):
        load_model(folder)
    with pytest.raises(FoveateError, match="which would be random;"):
        train(recipe(root, f"lacks-{part}", checkpoint(folder)))


@pytest.mark.parametrize(("which", "part"), [("tower", "layers.0.mlp.fc1"), ("lm", "layers.1.mlp.down_proj"), ("lm", "embed_tokens")])
def test_a_backbone_that_lacks_weights_is_refused(root: Path, tmp_path: Path, which: str, part: str) -> None:
    folders = {name: root / name for name in ("tower", "lm")} | {which: without(root / which, tmp_path / which, part)}
    with pytest.raises(FoveateError, match=f"its files lack .*{part}.* which would be random;"):
        from_backbones(folders["tower"], folders["lm"], {"kind": "mlp"})


def test_a_towers_pooler_may_be_missing(root: Path, tmp_path: Path) -> None:
    tower = SiglipVisionModel(
        SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    )
    tower.save_pretrained(tmp_path / "whole")
    shutil.copy(root / "tower" / "preprocessor_config.json", tmp_path / "whole")
    folder = without(tmp_path / "whole", tmp_path / "tower", "head.")
    model, _ = from_backbones(folder, root / "lm", {"kind": "mlp"}, image_size=32)
    assert torch.equal(*(one.state_dict()["embeddings.position_embedding.weight"] for one in (model.model.vision_tower, tower)))


# ---- the state of a run that goes on


STATE = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]  # all that a checkpoint pickles


@pytest.mark.parametrize("name", STATE)
def test_the_state_of_a_run_is_not_run(root: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = recipe(root, f"state-{name}", stages(1), stage(0, save_steps=1))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            train(path)
    newest = root / f"state-{name}" / "0-one" / "checkpoint-2"
    assert {file.name for file in newest.iterdir() if file.suffix in (".bin", ".pt", ".pth")} == set(STATE)
    torch.save({"state": Call(mark)}, newest / name)
    with pytest.raises(FoveateError, match=f"{newest}: its state holds more than tensors.*Remove this folder"):
        train(path)
    assert not mark.exists()
    shutil.rmtree(newest)
    train(path)
