"""Sizes that keep the core readable, and the only exceptions from them."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "foveate"
FILE, FUNCTION, ARGUMENTS = 450, 80, 10

EXCEPTIONS = {
    "accounting/predict.py::predict arguments": "each is a part of the workload that a caller may leave out",
    "accounting/predict.py::observed arguments": "those of `predict`, for tokens that are known",
    "cli.py::bench arguments": "each is an option of the command",
    "cli.py::generate arguments": "each is an option of the command",
    "cli.py::reproduce arguments": "each is an option of the command",
    "cli.py::search arguments": "each is an option of the command",
    "evaluation/bench.py::bench arguments": "each is an option of the command",
    "evaluation/evaluate.py::evaluate arguments": "each is an option of the command, or a part that a caller has loaded already",
    "model/assembly.py::from_backbones arguments": "each is a field of the configuration that it writes",
    "model/modeling.py::FoveateForConditionalGeneration.forward arguments": "generation hands inputs on by the names that are here",
    "model/modeling.py::FoveateModel.forward arguments": "those of the model around it, and how far to run",
    "search/run.py::search arguments": "each is an option of the command, or a part that a caller has loaded already",
}
"""What may be larger, and why. An entry that is no longer needed is an error."""


def too_large(source: Path) -> dict[str, int]:
    """Files by name, functions by "file::function lines" or "file::function arguments", with their size where it is over a limit."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        text, file = path.read_text(encoding="utf-8"), path.relative_to(source).as_posix()
        if len(text.splitlines()) > FILE:
            found[file] = len(text.splitlines())
        for name, function in functions(ast.parse(text)):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > FUNCTION:
                found[f"{file}::{name} lines"] = lines
            if arguments(function) > ARGUMENTS:
                found[f"{file}::{name} arguments"] = arguments(function)
    return found


def functions(node: ast.AST, outer: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions and methods, by their qualified names."""
    for child in ast.iter_child_nodes(node):
        name = outer
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{outer}.{child.name}" if outer else child.name
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, child
        yield from functions(child, name)


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Arguments that a caller may give; `self` is none."""
    names = [argument.arg for argument in [*function.args.posonlyargs, *function.args.args]]
    return len(names) - (names[:1] in (["self"], ["cls"])) + len(function.args.kwonlyargs)


def test_nothing_is_larger_than_it_may_be() -> None:
    assert {name: size for name, size in too_large(SOURCE).items() if name not in EXCEPTIONS} == {}


def test_every_exception_is_still_needed() -> None:
    found = too_large(SOURCE)
    assert [name for name in EXCEPTIONS if name not in found] == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("\n" * 451, "a.py"),
        ("def f():\n" + "    x = 1\n" * 80, "a.py::f lines"),
        ("class C:\n    def m(self, a, b, c, d, e, *, f, g, h, i, j, k): ...", "a.py::C.m arguments"),
        ("def f(a, b, c, d, e, f, g, h, /, i, j, k): ...", "a.py::f arguments"),
        ("if 1:\n    async def f(a, b, c, d, e, f, g, h, i, *, j, k): ...", "a.py::f arguments"),
    ],
)
def test_what_is_too_large_is_seen(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "a.py").write_text(text)
    assert list(too_large(tmp_path)) == [name]


@pytest.mark.parametrize(
    "text",
    ["\n" * 450, "def f():\n" + "    x = 1\n" * 79, "class C:\n    def m(self, a, b, c, d, e, *more, f, g, h, i, j, **rest): ..."],
)
def test_what_is_just_small_enough_passes(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.py").write_text(text)
    assert too_large(tmp_path) == {}


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_warnings_that_our_own_calls_cause_are_errors(category: type[Warning]) -> None:
    for module in ("foveate", "foveate.engine.run"):
        with pytest.raises(category):
            warnings.warn_explicit("old", category, "a.py", 1, module=module)
    warnings.warn_explicit("old", category, "a.py", 1, module="transformers.foveate")
