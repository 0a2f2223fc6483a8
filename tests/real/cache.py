"""What `foveate real prepare` has left on this machine; tests that need it are skipped, with its command, where it has not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.errors import FoveateError
from foveate.real import packages, real


def cached(name: str) -> Path:
    """Folder of a model."""
    try:
        return real(name)
    except FoveateError as reason:
        pytest.skip(str(reason))


def files(name: str) -> Path:
    """Folder of a package."""
    try:
        return packages.folder(name)
    except FoveateError as reason:
        pytest.skip(str(reason))
