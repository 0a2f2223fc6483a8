"""Imports go one way, and docs/architecture.md shows them as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture import PAGE, SOURCE, arrows, faults, written

ROWS = "| room | holds | imports |\n|---|---|---|\n| `ground` | x | – |\n| `middle` | y | `ground` |\n| `foveate` | z | `middle` |\n"


def test_the_tree_keeps_to_the_table() -> None:
    assert faults(arrows(), PAGE.read_text(encoding="utf-8")) == []


def test_every_room_is_seen() -> None:
    rooms = {path.name.removesuffix(".py") for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert arrows().keys() == rooms - {"__init__"} | {"foveate"}


def test_writing_changes_nothing_where_the_table_is_true() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert written(arrows(), page) == page


def tree(folder: Path, **files: str) -> Path:
    base = {"__init__": "from foveate.middle import b", "ground": "a = 1", "middle/__init__": "from foveate.ground import a\nb = a"}
    for name, text in (base | {name.replace("__in__", "/"): text for name, text in files.items()}).items():
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_a_true_table_has_no_fault(tmp_path: Path) -> None:
    assert faults(arrows(tree(tmp_path)), ROWS) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import foveate.middle",
        "from foveate import middle",
        "from foveate.middle import b",
        "from . import middle",
        "def f():\n    from .middle import b",
        "if TYPE_CHECKING:\n    from foveate.middle import b",
    ],
)
def test_an_arrow_upwards_is_found_however_it_is_spelled(tmp_path: Path, statement: str) -> None:
    found = faults(arrows(tree(tmp_path, ground=statement)), ROWS)
    assert any("ground -> middle" in fault and "not in the table" in fault for fault in found)
    assert any("ground -> middle" in fault and "upwards" in fault for fault in found)
    assert any(fault.startswith("a circle: ") for fault in found)


def test_the_top_is_a_room_of_its_own(tmp_path: Path) -> None:
    found = faults(arrows(tree(tmp_path, ground="from foveate import attach")), ROWS)
    assert any("ground -> foveate (ground.py:1): upwards" in fault for fault in found)


def test_a_stale_row_a_stale_arrow_and_a_new_room_are_found(tmp_path: Path) -> None:
    tree(tmp_path, new="import foveate.ground")
    (tmp_path / "middle" / "__init__.py").write_text("b = 1")
    found = faults(arrows(tmp_path), ROWS + "| `gone` | w | – |\n")
    assert "gone: has a row in docs/architecture.md, but there is no such room" in found
    assert any(fault.startswith("middle -> ground: in the table, but nothing imports so") for fault in found)
    assert "new: has no row in the table of docs/architecture.md" in found


def test_writing_mends_what_can_be_mended_and_hides_no_arrow_upwards(tmp_path: Path) -> None:
    tree(tmp_path, ground="from foveate import middle")
    found = arrows(tmp_path)
    page = written(found, ROWS)
    assert "| `ground` | x | `middle` |" in page
    assert not any("not in the table" in fault for fault in faults(found, page))
    assert any("upwards" in fault for fault in faults(found, page))
