"""A training run as YAML, with overrides: read into `settings`, with errors that name file, line, key, value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from foveate.errors import FoveateError
from foveate.train.settings import (
    TAGS,
    BridgeScales,
    Data,
    Evaluate,
    Features,
    Keep,
    Lora,
    LoraOf,
    Model,
    Rates,
    Recipe,
    Slot,
    Source,
    Stage,
    Term,
    Trained,
    Validation,
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe. `overrides` are `key.sub=value` (a number steps into a list: `stages.0.steps=5`), the value in YAML.

    Raises FoveateError with one line per mistake: file:line, key, given value, allowed values."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FoveateError(f"recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        document = YAML().load(text)
    except (YAMLError, ValueError, TypeError, AttributeError, RecursionError, NotImplementedError) as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        reason = error.problem if isinstance(error, MarkedYAMLError) else str(error).strip().splitlines()[0]
        raise FoveateError(f"{path}:{mark.line + 1 if mark is not None else 1}: not valid YAML: {reason}") from None
    if not isinstance(document, dict):
        raise FoveateError(f"{path}:1: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    changed = [_override(document, override) for override in overrides]
    try:
        return Recipe.model_validate(_plain(document))
    except ValidationError as error:
        messages = list(dict.fromkeys(_explain(path, document, changed, dict(detail)) for detail in error.errors()))
        raise FoveateError("\n".join(messages)) from None


def _override(document: Any, override: str) -> tuple[str, ...]:
    key, equals, text = override.partition("=")
    keys = tuple(key.split("."))
    if not equals or not all(keys):
        raise FoveateError(f"override {override!r}: expected key.sub=value, for example stages.0.steps=5")
    try:
        value = YAML(typ="safe").load(text)
    except (YAMLError, ValueError):
        value = text
    place = document
    for depth, step in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if not step.isdigit() or int(step) >= len(place):
                raise FoveateError(f"override {override!r}: {'.'.join(keys[:depth])} is a list of {len(place)}, there is no entry {step!r}")
            if last:
                place[int(step)] = value
            else:
                place = place[int(step)]
        elif isinstance(place, dict):
            if last:
                place[step] = value
            else:
                if not isinstance(place.get(step), (dict, list)):
                    place[step] = {}
                place = place[step]
        else:
            raise FoveateError(f"override {override!r}: {'.'.join(keys[:depth])} is {place!r}, there is nothing in it")
    return keys


def _plain(node: Any) -> Any:
    """Without ruamel's types, which pydantic would take for strangers."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    if isinstance(node, bool) or node is None:
        return node
    if isinstance(node, str):  # a character that JSON escapes as two, as one again
        return str(node).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for plain in (int, float):
        if isinstance(node, plain):
            return plain(node)
    return node


def _explain(path: Path, document: Any, changed: list[tuple[str, ...]], detail: dict[str, Any]) -> str:
    """One line for one mistake. The location is followed as far as the document goes."""
    keys: list[str] = []
    node, line = document, 1
    missing = detail["type"] == "missing"
    for key in detail["loc"]:
        if key in TAGS:
            continue
        if isinstance(node, dict) and key in node:
            line = node.lc.key(key)[0] + 1 if hasattr(node, "lc") and key in node.lc.data else line
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            line = node.lc.item(key)[0] + 1 if hasattr(node, "lc") and key in node.lc.data else line
        else:
            if missing and key == detail["loc"][-1]:
                keys.append(str(key))
            break
        node = node[key]
        keys.append(str(key))
    overridden = any(tuple(keys[: len(key)]) == key for key in changed)
    where = "command line" if overridden else f"{path}:{line}"
    return f"{where}: {'.'.join(keys) or 'recipe'}: {_reason(detail, keys)}"


def _reason(detail: dict[str, Any], keys: list[str]) -> str:
    kind, given, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    if kind == "missing":
        return "this key is required"
    if kind == "extra_forbidden":
        known = _known_keys(keys[:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1)
        return f"unknown key{f', did you mean {near[0]}?' if near else ''} (allowed: {', '.join(known)})"
    if kind == "literal_error":
        allowed = str(context["expected"]).replace("'", "")
        return f"{given!r} is not allowed; allowed: {allowed}"
    if kind == "value_error":
        message = str(context["error"])
        return message if isinstance(given, dict) else f"{given!r}: {message}"
    return f"{given!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _known_keys(keys: list[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    inside: dict[str, type[BaseModel]] = {"model": Model, "stages": Stage, "data": Data, "train": Trained, "lm": LoraOf, "lora": Lora}
    inside |= {"reducers": Slot, "bridge": BridgeScales, "learning_rate": Rates, "validation": Validation, "features": Features}
    inside |= {"evaluate": Evaluate, "keep": Keep, "losses": Term}
    for key in keys:
        model = inside.get(key, Source if model is Data and key.isdigit() else model)
    return list(model.model_fields)
