"""Loading what training has left: by the Auto classes alone, without foveate, and from a cache of the Hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import foveate
from foveate.errors import FoveateError
from foveate.evaluation.evaluate import evaluate
from foveate.model import FoveateForConditionalGeneration
from foveate.reducers import METHODS, load_reducers, parse, save_reducers, saved_reducers
from tests.model.tiny_backbones import save_clip, save_lm


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its processor, as a run leaves it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("trained")
    model, processor = FoveateForConditionalGeneration.from_backbones(save_clip(root / "clip"), save_lm(root / "lm"), {"kind": "mlp"})
    model.save_pretrained(root / "final")
    processor.save_pretrained(root / "final")
    return root / "final"


# ---- the Auto classes


CODE = """
import sys, transformers
transformers.logging.set_verbosity_error()

def ask():
    for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer"):
        try:
            print("@", name, "gives", type(getattr(transformers, name).from_pretrained(sys.argv[1])).__name__)
        except Exception as error:
            print("@", name, "says", str(error).replace(chr(10), " "))

ask()
print("@", "package", [name for name in sys.modules if name.startswith("foveate")])
import foveate
ask()
"""


def test_importing_foveate_is_enough_and_without_it_the_package_is_named(trained: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(trained)], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=dict(os.environ)
    )
    # what asks whether to run code leaves its question in front
    lines = [line.partition("@ ")[2].split(" ", 1) for line in done.stdout.splitlines() if "@ " in line]
    without, package, with_it = dict(lines[:5]), lines[5], dict(lines[6:])
    assert package == ["package", "[]"], done.stderr
    for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"):
        assert without[name].startswith("says the Python package foveate is needed: pip install foveate, then `import foveate`")
    assert without["AutoTokenizer"] == "gives TokenizersBackend"  # who asks for the tokenizer gets it
    assert with_it == {
        "AutoConfig": "gives FoveateConfig",
        "AutoModel": "gives FoveateModel",
        "AutoModelForImageTextToText": "gives FoveateForConditionalGeneration",
        "AutoProcessor": "gives FoveateProcessor",
        "AutoTokenizer": "gives TokenizersBackend",
    }


@pytest.mark.parametrize("trust", [None, False, True])
def test_with_foveate_no_remote_code_is_asked_for(trained: Path, trust: bool | None) -> None:
    for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor):
        assert type(auto.from_pretrained(trained, trust_remote_code=trust)).__module__.startswith("foveate.")
    assert not type(AutoTokenizer.from_pretrained(trained, trust_remote_code=trust)).__module__.startswith("foveate")


def test_models_from_before_load_and_are_saved_with_the_note(trained: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    for name in ("config.json", "processor_config.json"):
        content = json.loads((old / name).read_text())
        assert "foveate is needed" in str(content.pop("auto_map"))
        (old / name).write_text(json.dumps(content))
    model, processor = AutoModelForImageTextToText.from_pretrained(old), AutoProcessor.from_pretrained(old)
    model.save_pretrained(tmp_path / "new")
    processor.save_pretrained(tmp_path / "new")
    for name in ("config.json", "processor_config.json"):
        assert json.loads((tmp_path / "new" / name).read_text()) == json.loads((trained / name).read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_modules_in_another_precision_are_what_is_saved(dtype: torch.dtype, trained: Path, tmp_path: Path) -> None:
    """Rotary frequencies are not saved: a model that rounds them would be another one after loading."""
    whole = AutoModelForImageTextToText.from_pretrained(trained)
    processor = AutoProcessor.from_pretrained(trained)
    how = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor, "dtype": dtype}
    parts = whole.model.vision_tower, whole.model.causal_lm, {"kind": "mlp"}
    model, _ = FoveateForConditionalGeneration.from_backbones(*parts, **how)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.dtype == again.dtype == dtype
    for (name, ours), (_, theirs) in zip(model.named_buffers(), again.named_buffers(), strict=True):
        assert ours.dtype == theirs.dtype, name
    inputs = processor(text=["hello there, what is it"], return_tensors="pt")
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)


# ---- reducers beside the weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, which cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def cached(hub: Path, name: str, source: Path, spelling: str | None = None) -> None:
    """`source` as it would lie in the cache after a download of `name`."""
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(source, folder / "snapshots" / commit)
    if spelling is not None:
        save_reducers(parse(spelling), folder / "snapshots" / commit)


@pytest.mark.parametrize("spelling", ["vcc:layer=1,stride=2", "fastervlm:keep=0.5+pyramiddrop:stages=2", "random:keep=0.5,seed=3"])
def test_attach_finds_them_beside_a_model_of_the_hub(spelling: str, hub: Path, trained: Path) -> None:
    cached(hub, "someone/small", trained, spelling)
    model = AutoModelForImageTextToText.from_pretrained("someone/small")
    assert saved_reducers("someone/small") == load_reducers("someone/small") == parse(spelling)
    with foveate.attach(model) as run:
        assert run.reducers == parse(spelling)


def test_where_there_are_none(hub: Path, trained: Path) -> None:
    cached(hub, "someone/bare", trained)
    for name in ("someone/bare", "someone/unknown", trained, "", "no name at all", "a/b/c", "/nowhere"):
        assert saved_reducers(name) is None
    with pytest.raises(FoveateError, match=r"someone/bare has no foveate.json: the model was not trained with a reducer"):
        foveate.attach(AutoModelForImageTextToText.from_pretrained("someone/bare"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "is not a list of reducers as foveate writes it"),
        ("[]", "is not a list of reducers as foveate writes it"),
        ('{"reducers": ["vcc"]}', "is not a list of reducers as foveate writes it"),
        ('{"reducers": [{"method": "magic"}]}', "unknown reducer 'magic'; known are"),
        ('{"reducers": [{"method": "vcc", "version": 99}]}', "vcc was saved at version 99, this is version"),
    ],
)
def test_broken_files_are_named(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "foveate.json").write_text(content)
    with pytest.raises(FoveateError, match=f"foveate.json.*{says}"):
        saved_reducers(tmp_path)


def test_every_method_is_saved_and_found(tmp_path: Path) -> None:
    for name, method in METHODS.items():
        spelling = f"{name}:keeps=1:0.5" if name == "schedule" else name
        save_reducers(parse(spelling), tmp_path)
        assert saved_reducers(tmp_path) == parse(spelling)
        assert type(load_reducers(tmp_path)[0]) is method


def test_eval_takes_the_saved_ones_of_a_hub_model(hub: Path, trained: Path, tmp_path: Path) -> None:
    from foveate.world.scenes import write_world

    write_world(tmp_path / "world", train=1, test=2, seed=0, size=32)
    cached(hub, "someone/small", trained, "vcc:layer=1,stride=2")
    how: dict[str, Any] = {"limit": 4, "max_new_tokens": 1, "progress": False}
    assert evaluate("someone/small", tmp_path / "world", **how).reducers == "vcc:layer=1,stride=2"
    assert evaluate("someone/small", tmp_path / "world", reducers="none", **how).reducers == "none"
