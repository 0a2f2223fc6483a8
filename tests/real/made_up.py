"""A made-up package, and a folder that pip takes for all that there is to download."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from foveate.real.packages import Package

NAME, VERSION = "foveate-made-up", "1.0"


def package(file: Path, **own: Any) -> Package:
    """What the table would say of a file."""
    facts: dict[str, Any] = {
        "group": "pictures",
        "name": NAME,
        "version": VERSION,
        "manager": "pip",
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "size": 0.1,
        "licence": "MIT",
        "holds": "nothing of use",
    }
    return Package(**facts | own)


def wheel(folder: Path, files: dict[str, str | bytes]) -> Package:
    """A wheel in `folder` with `files`, by their names in it."""
    folder.mkdir(parents=True, exist_ok=True)
    own = f"foveate_made_up-{VERSION}"
    path = folder / f"{own}-py3-none-any.whl"
    notes = {
        f"{own}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n",
        f"{own}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{own}.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files | notes).items():
            archive.writestr(name, content)
    return package(path)


def only_source(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From here on pip finds what is in `folder`, and nothing else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
