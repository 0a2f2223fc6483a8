"""Spellings of reducers near the grammar: read, or refused with a FoveateError, and what is read is spelled and decides as it says.

`python -m tests.situations.test_fuzz_spellings 2500` tries more of them, drawn anew.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from foveate import FoveateError
from foveate.contract import Attention, AttentionRows, BeforeLM, FromLayer, Keys, Signal, States, TowerKeys, View
from foveate.reducers import METHODS, Reducer, before_processor, in_model, parse, spell, visual_tokens
from tests.reducers.ragged import mapped

GRID, TEXT, WIDTH = (4, 4), 4, 8
PATCHES, SLOTS = 16, 20

WORDS = sorted({value for method in METHODS.values() for f in dataclasses.fields(method) if isinstance(value := f.default, str)})
NUMBERS = [
    *("0", "1", "2", "3", "8", "576", "-1", "-2", "+4", "007", "1e3", "1e400", "-1e400", "nan", "inf", "-inf", "infinity", "1_000"),
    *("0.5", ".25", "1.", "1.0", "0.0", "-0.0", "5e-324", "1e-9", "0.1e1", "1/3", "2/4", "1/0", "0/1", "-1/2", "1//2", "0x10", "1,5"),
    *("9" * 30, "9" * 5000, "0." + "3" * 400, "٣", "½", "１２", "²", "−1"),
]
LISTS = [
    "300-200-110",
    "0.5-0.25",
    "3-7-16",
    "3-3",
    "--",
    "1-",
    "-",
    "v1-64",
    "v2-64",
    "v9",
    "1:0.5",
    "1:0.75/3:0.4",
    "1:/2",
    ":",
    "/",
    "1:0.5/0:0.2",
]
OTHER = [
    "true",
    "false",
    "True",
    "none",
    "null",
    "",
    " ",
    "cls",
    "raster",
    "tower",
    "é",
    "\u202e",
    "\x00",
    "🦊",
    "[1]",
    "(1,)",
    "'a'",
    "a=b",
    "=",
]

plain = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=6)
anything = st.one_of(st.sampled_from([*WORDS, *NUMBERS, *LISTS, *OTHER]), st.integers().map(str), st.floats().map(str), plain)


def mostly(usual: st.SearchStrategy[str], other: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.integers(0, 9).flatmap(lambda n: other if n == 9 else usual)


def fitting(default: Any) -> st.SearchStrategy[str]:
    """Values that an option may well have."""
    if isinstance(default, bool):
        return st.sampled_from(["true", "false"])
    if isinstance(default, int):
        return st.integers(0, 4).map(str)
    if isinstance(default, float):
        return st.one_of(st.sampled_from(["0.25", "0.5", "1.0", "1/3", "0.3", "3", "16"]), st.floats(0.01, 1.0).map(str))
    return st.sampled_from([*WORDS, *LISTS, str(default)])


@st.composite
def parts(draw: st.DrawFn) -> str:
    """One method, mostly a known one with options of its own."""
    name = draw(mostly(st.sampled_from(list(METHODS)), st.one_of(st.sampled_from(["", "none", "FastV", "tomé", "tome ", "replay"]), plain)))
    options = {f.name: f.default for f in dataclasses.fields(METHODS[name])} if name in METHODS else {"keep": 0.5}
    items = []
    for option in draw(st.lists(st.sampled_from(list(options)), max_size=3)):
        key = draw(mostly(st.just(option), st.one_of(st.sampled_from(["keep", "Keep", "method", "version", "__class__", "name"]), plain)))
        is_ = draw(mostly(st.just("="), st.sampled_from([" = ", "", "==", ":", "=\t", "\u00a0="])))
        items.append(key + is_ + draw(mostly(fitting(options[option]), anything)))
    return (
        name
        + (draw(mostly(st.just(":"), st.sampled_from(["", "::", " :"]))) if items else "")
        + draw(mostly(st.just(","), st.sampled_from([";", ",,", ", "]))).join(items)
    )


spellings = st.one_of(
    st.lists(parts(), min_size=1, max_size=3).flatmap(lambda ps: st.sampled_from(["+", "+", " + ", "++"]).map(lambda plus: plus.join(ps))),
    plain,
)


class Everything(dict[Signal, Any]):
    """Signals of any kind for one image and a few words."""

    def __contains__(self, signal: object) -> bool:
        return True

    def __missing__(self, signal: Signal) -> Any:
        torch.manual_seed(0)
        if isinstance(signal, Attention):
            return AttentionRows.of(torch.rand(1, 2, SLOTS, SLOTS).tril().softmax(-1))
        return torch.rand(1, SLOTS, WIDTH) if isinstance(signal, Keys | States | TowerKeys) else torch.rand(1, SLOTS)


def view() -> View:
    torch.manual_seed(0)
    made = View.of(torch.randn(1, SLOTS, WIDTH), grid=GRID, text=TEXT, image_keys=torch.tensor([7]), layers=4)
    return dataclasses.replace(made, signals=Everything())


def read(text: str) -> list[Reducer]:
    """What a spelling gives, [] where it is refused."""
    try:
        return parse(text)
    except FoveateError:
        return []


def tried(text: str) -> str:
    """What has become of a spelling; AssertionError, or whatever should not come up, where something is wrong."""
    reducers = read(text)
    if not reducers:
        return "refused"
    spelled = spell(reducers)
    again = parse(spelled)
    assert again == reducers, spelled
    assert spell(again) == spelled
    assert [type(r).from_dict(r.to_dict()) for r in reducers] == reducers
    try:
        assert len(before_processor(reducers)) + len(in_model(reducers)) == len(reducers)
        counts = visual_tokens(reducers, PATCHES, 4)
        assert len(counts) == 4
        assert all(0 <= n <= PATCHES for n in counts)
        for reducer in reducers:
            for stage, site in enumerate(reducer.sites(4)):
                if isinstance(site, BeforeLM | FromLayer) and site.layer < 4:
                    decided = mapped(reducer.reduce(view(), stage))
                    assert bool((decided.target.kind[decided.target.valid] == 0).sum() == TEXT)
    except FoveateError:
        return "read, and cannot act here"
    return "read"


@settings(max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(spellings)
def test_a_spelling_is_read_or_refused(text: str) -> None:
    tried(text)


EXTREMES = ["1" + "0" * 9, "1" + "0" * 18, "9" * 30, "-" + "9" * 30, "1e-300", "1e300", "0.9999999999999999", "-1", "0"]
BASES = {"schedule": ["schedule:keeps=1:0.5", "schedule:keeps=1:0.5,signal=random"], "tome": ["tome:keep=0.5", "tome:site=tower"]}


@pytest.mark.parametrize("value", EXTREMES)
@pytest.mark.parametrize("method", METHODS)
def test_every_option_at_its_extremes(method: str, value: str) -> None:
    """Neither an overflow nor an endless list of sites."""
    for base in BASES.get(method, [f"{method}:"]):
        for option in dataclasses.fields(METHODS[method]):
            tried(f"{base},{option.name}={value}".replace(":,", ":"))


def test_enough_of_them_are_read() -> None:
    """Else the others would not be near the grammar."""
    seen: list[str] = []

    @settings(max_examples=100, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
    @given(spellings)
    def look(text: str) -> None:
        seen.append("read" if read(text) else "refused")

    look()
    assert 0.05 < seen.count("read") / len(seen) < 0.9


if __name__ == "__main__":
    seen: dict[str, int] = {}

    @settings(max_examples=int(sys.argv[1]), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(spellings)
    def more(text: str) -> None:
        word = tried(text)
        seen[word] = seen.get(word, 0) + 1

    more()
    print(seen)
