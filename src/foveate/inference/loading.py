"""A model with its processor from a folder, the hub or the shipped assets, and the hash that tells two models apart."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import cached_file

import foveate.model  # noqa: F401  # registers the Auto classes
from foveate.errors import FoveateError
from foveate.model.weights import load_weights, reading
from foveate.tilings import parse
from foveate.world import resolve

DTYPES = ("float32", "bfloat16", "float16")
_MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


def load_model(name: str | Path, device: str | None = None, **options: Any) -> tuple[Any, Any]:
    """A vision-language model and its processor, from a folder, a hub name or a shipped asset ("asset:vlm").

    `device`: default the GPU if there is one, else the CPU. `options`: those of `from_pretrained`, with dtype float32 if it is not said;
    a device_map among them stands in place of `device`.
    """
    source = resolve(str(name))
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FoveateError(f"{folder} holds no model (no config.json); a training run leaves its model in <output>/final")
    if not folder.is_dir() and (folder.is_absolute() or source.count("/") != 1 or source.startswith(".")):
        raise FoveateError(f"no such model folder: {source}")
    message = f"cannot load a vision-language model and its processor from {source}"
    model = load_weights(AutoModelForImageTextToText, source, message, **{"dtype": torch.float32, **options})
    with reading(message):
        processor = AutoProcessor.from_pretrained(source)
    if "device_map" not in options:
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model, processor


def checked_dtype(name: str) -> str:
    """FoveateError for a name that is not one of `DTYPES`."""
    if name not in DTYPES:
        raise FoveateError(f"dtype={name} is not possible; choose one of {', '.join(DTYPES)}")
    return name


def loaded(model: Any, processor: Any, call: str, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any, str]:
    """(model, processor, name) of a model that is named, which `load_model` loads, or given with its `processor`.

    dtype: one of `DTYPES`; float32 unless given. FoveateError where a given model comes alone, or with a dtype; `call` is how to give
    both, such as "bench(model, …, processor=...)".
    """
    if isinstance(model, str | Path):
        return *load_model(model, device, dtype=checked_dtype(dtype or "float32")), str(model)
    if dtype is not None:
        raise FoveateError(f"dtype={dtype} is of a model that is named; one that is loaded already has its own: model.to(torch.{dtype})")
    if processor is None:
        raise FoveateError(f"{call.partition('(')[0]} needs the processor of a model that is already loaded: {call}")
    return model, processor, str(model.config.name_or_path or type(model).__name__)


def retiled(model: Any, processor: Any, tiling: str | None) -> None:
    """Have a model cut images by another tiling than its own; None leaves it. FoveateError for a model that is not Foveate's, and for a
    tiling whose marks between tokens, or whose lens, the model has not learned."""
    if tiling is None:
        return
    if not hasattr(model, "set_tiling"):
        raise FoveateError(f"the tiling {tiling} needs one of Foveate's own models; a {model.config.model_type} model cuts images itself")
    wanted, own = parse(tiling), model.config.tiled
    missing = [name for name in wanted.marks if name not in model.model.marks]
    if missing:
        raise FoveateError(
            f"the tiling {tiling} puts a learned {' and a learned '.join(missing)} between tokens, which this model has not learned: train "
            "it with that tiling, or take one without"
        )
    if wanted.lens is not None and (own is None or own.lens != wanted.lens):
        raise FoveateError(
            f"the tiling {tiling} has a lens ({wanted.lens['kind']}) between tower and bridge, which this model has not learned: train it "
            "with that tiling, or take one without"
        )
    model.set_tiling(tiling)
    processor.set_tiling(model.config.tiling)


def resized(processor: Any, image_size: int | None) -> Any:
    """A processor that makes images so many pixels wide and high, which is how many tokens they are; None: the same one. FoveateError for
    one that is not of Foveate's own models, and where the bridge is bound to its grid."""
    if image_size is None:
        return processor
    if image_size < 1:
        raise FoveateError(f"image_size={image_size} is not possible; give pixels, at least 1")
    if not hasattr(processor, "resized"):
        raise FoveateError(f"image_size={image_size} needs one of Foveate's own models; a {type(processor).__name__} sizes images itself")
    return processor.resized(image_size)


def model_hash(model: Any) -> str:
    """SHA-256 of a model: by name, of its files (weights, configurations, processor); of a loaded one, of its weights."""
    whole = hashlib.sha256()
    if isinstance(model, str | Path):
        source = resolve(str(model))
        folder = Path(source) if Path(source).is_dir() else Path(str(cached_file(source, "config.json"))).parent
        for path in sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES):
            with path.open("rb") as file:
                whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    else:
        for name, weight in sorted(model.state_dict().items()):
            whole.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            whole.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return whole.hexdigest()
