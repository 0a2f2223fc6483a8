"""Files that are whole or not there: a kill, or a full disk, at any moment leaves the older content."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock


def write(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, text as UTF-8, all of it or nothing; it is on the disk when this returns. OSError as of any writing."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write `content` as JSON, like `write`; folders above `path` are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(content, indent=indent) + "\n")


def build(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make(half)` unless it is there: in a folder beside it that takes its name when all of it is on the disk.

    One process makes it, the others wait; what a killed one has left is made anew."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    with FileLock(lock):
        if not folder.is_dir():
            half = folder.with_name(f".{folder.name}.half")
            if half.exists():
                shutil.rmtree(half)
            half.mkdir()
            try:
                make(half)
            except BaseException:
                shutil.rmtree(half, ignore_errors=True)
                raise
            os.sync()
            half.rename(folder)
            sync(folder.parent)
        lock.unlink(missing_ok=True)  # who waits for it, or makes another, finds the folder
    return folder


def sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
