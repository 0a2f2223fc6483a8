"""The embedded world: small trained parts that ship with the package, so that everything runs where nothing can be downloaded."""

from pathlib import Path

from foveate.errors import FoveateError
from foveate.real import PREFIX as REAL
from foveate.real import real

ASSETS = {
    "tower": "CLIPVisionModel and its image processor, trained without a language model",
    "lm": "LlamaForCausalLM and its tokenizer, trained on text alone",
    "vlm": "a finished FoveateForConditionalGeneration and its processor",
    "begun": "one half-way through its training, with a Chain-of-Sight bridge of 20 tokens at 64 px, and its processor",
}
"""Name and contents of every asset. The arms of the demo start from "begun"."""

PREFIX = "asset:"


def asset(name: str) -> Path:
    """Folder of a shipped asset. FoveateError for an unknown name, and for one that this installation does not carry."""
    if name not in ASSETS:
        raise FoveateError(f"unknown asset {name!r}; there are " + ", ".join(f"{known!r} ({what})" for known, what in ASSETS.items()))
    folder = Path(__file__).parent / "assets" / name
    if not (folder / "config.json").is_file():
        raise FoveateError(f"asset {name!r} is not in this installation ({folder} has no config.json); reinstall foveate or train it anew")
    return folder


def resolve(name_or_path: str) -> str:
    """ "asset:<name>" and "real:<name>" as the folders they stand for; hub names and folders unchanged."""
    if name_or_path.startswith(PREFIX):
        return str(asset(name_or_path.removeprefix(PREFIX)))
    if name_or_path.startswith(REAL):
        return str(real(name_or_path.removeprefix(REAL)))
    return name_or_path
