"""What is written is whole or not there, whoever writes it."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate.evaluation.cells import Cell, load_cell, save_cell
from foveate.files import write, write_json
from foveate.train.files import RunLog


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def save(folder: Path, content: str) -> None:
    save_cell(folder, Cell(content, "none", 1.0, None, "none"))


WRITERS: dict[str, tuple[Callable[[Path, str], None], Callable[[Path], Any]]] = {
    "text": (write, Path.read_text),
    "json": (write_json, lambda path: json.loads(path.read_text())),
}


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("writer", sorted(WRITERS))
def test_a_full_disk_leaves_the_older_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, step: str) -> None:
    put, look = WRITERS[writer]
    path = tmp_path / "file"
    put(path, "older")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        put(path, "newer")
    assert look(path) == "older"
    monkeypatch.undo()
    put(path, "newer")  # what the failure left behind is in nobody's way
    assert look(path) == "newer"


def test_content_that_is_not_json_leaves_the_older_content(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "a.json", {"a": object()})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"a": 1}


def test_a_cell_that_could_not_be_saved_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "one")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, "two")
    (path,) = (tmp_path / "cells").glob("*.json")
    assert load_cell(path).task == "one"


def test_a_log_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for step in range(3):
        log.append({"step": step})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        log.keep(lambda row: row["step"] < 1)
    assert len(log.path.read_text().splitlines()) == 3
