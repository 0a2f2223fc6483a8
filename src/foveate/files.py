"""Files that are whole or not there: a kill, or a full disk, at any moment leaves the older content."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write(path: Path, text: str) -> None:
    """Write `text` to `path`, all of it or nothing; it is on the disk when this returns. OSError as of any writing."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write `content` as JSON, like `write`; folders above `path` are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(content, indent=indent) + "\n")


def sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
