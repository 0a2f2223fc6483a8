"""Every reducer on every family, by six checks, against the committed outcomes. Without --whole: a representative part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from foveate.anatomy import TESTED
from foveate.errors import NotApplicable, Reason
from foveate.reducers import METHODS, in_model, parse
from tests.conformance.checks import CHECKS, Skip, bare_failure
from tests.conformance.expected import DATA, REASONS, WORDS, differs, words
from tests.conformance.family import families
from tests.conformance.table import render

# By method: a setting that reduces, and one that keeps everything. Methods that act before the processor have no cells.
SETTINGS = {name: (method.examples[0], method.keeps_all[0]) for name, method in METHODS.items() if in_model([method()])}
# One of each kind: plain, tiles and newlines, windows in the tower, DeepStack and video, sliding windows, tiles, convolutions, our own.
REPRESENTATIVE = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl:video", "gemma3", "internvl", "smolvlm", "lfm2_vl", "foveate")
# What the library's own models do not hold: an image's number in the batch enters its positions; the prefix of a prompt sees both ways, so
# that a longer prompt is another one.
BARE = {("hunyuan_vl", "batch"), ("paligemma", "decoding"), ("paligemma:2", "decoding")}


def test_every_method_has_its_settings() -> None:
    assert METHODS.keys() - SETTINGS.keys() == {"downsample"}
    for method, (setting, whole) in SETTINGS.items():
        assert [r.name for r in parse(setting)] == [r.name for r in parse(whole)] == [method]
        assert [str(r) for r in parse(setting)] != [str(r) for r in parse(whole)]


def test_what_is_said_to_be_tested_is() -> None:
    assert TESTED.keys() == {name.partition(":")[0] for name in families()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "check" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole", False)
        chosen = [name for name in families() if whole or name in REPRESENTATIVE]
        metafunc.parametrize(("name", "method", "check"), [(n, m, c) for n in chosen for m in SETTINGS for c in CHECKS])


def test_cell(name: str, method: str, check: str, record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> None:
    record_property("cell", [name, method, check])
    failure = bare_failure(check, name)
    assert failure is None or (name, check) in BARE, f"the bare model fails this check, and nobody has said why: {failure}"
    if failure is not None:
        record_property("bare", failure)
    word = "bare" if failure is not None else outcome(name, method, check)
    record_property("outcome", word)
    if request.config.getoption("--table", None) is None:
        assert not (wrong := differs(name, method, check, word)), wrong
    if word != "ok":
        pytest.skip(word)


def outcome(name: str, method: str, check: str) -> str:
    """The word for what comes of a check; AssertionError where it fails."""
    setting, whole = SETTINGS[method]
    try:
        try:
            CHECKS[check](name, setting, whole)
        except NotApplicable as reason:
            if not by_the_last_block(setting, reason):
                raise
            CHECKS[check](name, f"{setting},layer=-1", f"{whole},layer=-1")
    except NotApplicable as reason:
        return reason.reason.name
    except Skip as reason:
        return WORDS[str(reason)]
    return "ok"


def by_the_last_block(reducers: str, refused: NotApplicable) -> bool:
    """Whether reducers that a block of windows refuses may look at the last block, which attends to everything."""
    named = METHODS[reducers.partition(":")[0]].__dataclass_fields__
    return refused.reason == Reason.WINDOWED and "layer" in named and "+" not in reducers


def test_the_page_is_what_is_committed() -> None:
    """After a change: the command in `expected.HOW`."""
    page = Path(__file__).parent.parent.parent / "docs" / "conformance.md"
    assert page.read_text(encoding="utf-8") == render(DATA)


def test_every_cell_has_a_committed_outcome_and_none_failed(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--table", None) is not None:
        pytest.skip("they are being written")
    assert DATA["cells"].keys() == families().keys()
    for name, cells in DATA["cells"].items():
        assert cells.keys() == SETTINGS.keys(), name
        for method, cell in cells.items():
            for check, word in words(cell).items():
                assert word in ("ok", "bare", *REASONS), f"{name}, {method}, {check}: {word}"
                assert (word == "bare") == ((name, check) in BARE), f"{name}, {method}, {check}: {word}"
