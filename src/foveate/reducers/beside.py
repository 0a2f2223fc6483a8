"""What lies beside a model's weights: `foveate.json`, which names its reducers, and `foveate.safetensors`, what they decide by."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import cached_file


def beside(model: str | Path, name: str) -> Path | None:
    """The file `name` of a model, None where it has none. model: a folder, or a name on the Hub (its main revision); without a connection
    the local cache is what there is."""
    path = Path(model) / name
    if path.is_file():
        return path
    if not str(model) or Path(model).is_dir():
        return None
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    try:
        found = cached_file(str(model), name, **quiet)
    except (OSError, ValueError):  # neither a folder nor what could be a name on the Hub
        return None
    return None if found is None else Path(found)
