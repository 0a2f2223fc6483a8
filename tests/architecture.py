"""The imports between the rooms of src/foveate, held against the table of docs/architecture.md.

    python -m tests.architecture            # what is wrong, if anything
    python -m tests.architecture --write    # writes the column of imports anew

A room is a folder, or a file that lies by itself. The page's table has a row for each, the ground first; a room imports only rooms whose
rows are above its own. The rows and their sentences are written by hand, the last column by this script.
"""

from __future__ import annotations

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "foveate"
PAGE = ROOT / "docs" / "architecture.md"
TOP = "foveate"  # the room of foveate/__init__.py
_ROW = re.compile(r"^\| `(\w+)` \| (.+) \| (.*) \|$", re.MULTILINE)

Arrows = dict[str, dict[str, str]]
"""Room, room that it imports, and the first place at which it does, as file:line."""


def arrows(source: Path = SOURCE) -> Arrows:
    """All imports between rooms, those inside of functions and for type checkers too."""
    found: Arrows = {}
    for path in sorted(source.rglob("*.py")):
        file = path.relative_to(source)
        room = _room(file.parts[0].removesuffix(".py"))
        own = found.setdefault(room, {})
        package = (TOP, *file.parts[:-1])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for module in _imported(node, package):
                parts = module.split(".")
                if parts[0] == TOP:
                    other = _room(parts[1]) if len(parts) > 1 and _is_module(source, parts[1]) else TOP
                    if other != room:
                        own.setdefault(other, f"{file}:{getattr(node, 'lineno', 0)}")
    return found


def _room(name: str) -> str:
    return TOP if name == "__init__" else name


def _is_module(source: Path, name: str) -> bool:
    return (source / name).is_dir() or (source / f"{name}.py").is_file()


def _imported(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    """Full names of the modules (or of what is taken from them) that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = package[: len(package) + 1 - node.level] if node.level else ()
    module = ".".join([*base, *([node.module] if node.module else [])])
    return [f"{module}.{alias.name}" for alias in node.names]


def table(page: str) -> dict[str, list[str]]:
    """The rooms of the page from the ground up, each with the rooms that it imports."""
    return {room: re.findall(r"`(\w+)`", imports) for room, _, imports in _ROW.findall(page)}


def faults(found: Arrows, page: str) -> list[str]:
    """What is wrong, in words: rooms without a row, arrows that the table does not have, stale entries, arrows upwards and circles."""
    rows = table(page)
    order = {room: floor for floor, room in enumerate(rows)}
    out = [f"{room}: has no row in the table of docs/architecture.md" for room in found if room not in rows]
    out += [f"{room}: has a row in docs/architecture.md, but there is no such room" for room in rows if room not in found]
    for room, others in found.items():
        for other, place in others.items():
            if other not in rows.get(room, ()):
                out.append(f"{room} -> {other} ({place}): not in the table; if it is meant, python -m tests.architecture --write")
            if room in order and other in order and order[other] > order[room]:
                out.append(f"{room} -> {other} ({place}): upwards, {other} stands above {room}")
        stale = [other for other in rows.get(room, ()) if other not in others]
        out += [f"{room} -> {other}: in the table, but nothing imports so; python -m tests.architecture --write" for other in stale]
    try:
        TopologicalSorter({room: list(others) for room, others in found.items()}).prepare()
    except CycleError as error:
        out.append(f"a circle: {' <- '.join(error.args[1])}")
    return out


def written(found: Arrows, page: str) -> str:
    """The page with its column of imports as they are, in the order of its rows."""
    order = list(table(page))

    def row(match: re.Match[str]) -> str:
        others = sorted(found.get(match[1], {}), key=lambda room: (order.index(room) if room in order else len(order), room))
        return f"| `{match[1]}` | {match[2]} | {', '.join(f'`{other}`' for other in others) or '–'} |"

    return _ROW.sub(row, page)


def main() -> None:
    found, page = arrows(), PAGE.read_text(encoding="utf-8")
    if "--write" in sys.argv[1:]:
        page = written(found, page)
        PAGE.write_text(page, encoding="utf-8")
    wrong = faults(found, page)
    print("\n".join(wrong) or f"{len(found)} rooms, {sum(map(len, found.values()))} arrows, all of them down")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
