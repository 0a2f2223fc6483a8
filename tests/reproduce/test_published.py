"""The shipped tables: they parse, their budgets are the papers' in tokens, and their numbers are those of the sources."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from foveate.errors import FoveateError
from foveate.reducers import parse, spell, visual_tokens
from foveate.reproduce.tables import Table, load_table, names

PATCHES, LAYERS = 576, 32
TABLES = {name: load_table(name) for name in names()}
PAPERS = {
    "cdpruner": "2506.10967",
    "dart": "2502.11494",
    "divprune": "2503.02175",
    "fastervlm": "2412.01818v1",
    "fastv": "2403.06764",
    "fastv-paper": "2403.06764",
    "pyramiddrop": "2410.17247",
    "restore": "2606.01711",
    "sparsevlm": "2410.04417",
    "visionzip": "2412.04467",
}


def test_every_table_is_there_with_its_paper() -> None:
    assert {name: table.paper for name, table in TABLES.items()} == PAPERS


@pytest.mark.parametrize("name", names())
def test_a_table_is_whole(name: str) -> None:
    table = TABLES[name]
    assert table.model.name == "llava-hf/llava-1.5-7b-hf"
    for row in table.rows.values():
        reducers = parse(row.reduce)
        assert parse(spell(reducers)) == reducers
        assert row.evidence.startswith("[")
        through = visual_tokens(reducers, PATCHES, LAYERS)
        assert sum(through) / LAYERS == row.tokens
        if row.budget.isdigit() and not row.note.startswith("the code keeps") and table.name != "sparsevlm":
            assert int(row.budget) == row.tokens == through[0]  # cut in front of the language model: the paper's number is what goes in
        assert table.title.startswith("DivPrune") or "order=pick" not in row.reduce
    if table.average is None:
        assert "full" in table.left_out  # there is nothing to take a share of
    assert {column.task for column in table.columns.values()} & {"seedbench", "vqav2_test", "mmvet"} == set()
    for column in table.columns.values():
        assert column.why
        assert column.counted in ("", "[M]")


@pytest.mark.parametrize(
    ("name", "row", "numbers"),
    [
        ("visionzip", "full", {"GQA": 61.9, "MME": 1862, "TextVQA": 58.2}),
        ("visionzip", "192", {"MMB": 63.0, "MME": 1782.6, "MMMU": 36.6}),
        ("visionzip", "64", {"GQA": 55.1, "POPE": 77.0, "SQA": 69.0}),
        ("divprune", "56", {"GQA": 56.85, "MME-P": 1328, "POPE": 86.02, "OKVQA": 46.98, "Nocaps": 0.92}),
        ("pyramiddrop", "full", {"SQA": 66.8, "MME-P": 1510.7}),
        ("pyramiddrop", "fastv", {"GQA": 59.4, "TextVQA": 57.2}),
        ("pyramiddrop", "pyramiddrop", {"MME-P": 1500.8, "SQA": 69.2, "POPE": 84.8}),
        ("sparsevlm", "192", {"GQA": 59.5, "MME": 1787}),
        ("sparsevlm", "64", {"POPE": 77.5, "TextVQA": 53.4}),
        ("dart", "192", {"GQA": 60.0, "MME": 1856}),
        ("dart", "128", {"POPE": 80.1, "SQA": 69.1}),
        ("fastv", "K3-R50", {"GQA": 60.4, "MME-P": 1511.7, "Flickr": 74.7}),
        ("fastv-paper", "K2-R90", {"Nocaps": 72.1, "Flickr": 43.7, "MMMU": 35.0}),
        ("restore", "divprune-64", {"GQA": 57.1, "MME": 1653, "TextVQA": 54.5}),
    ],
)
def test_numbers_are_those_of_the_sources(name: str, row: str, numbers: dict[str, float]) -> None:
    assert TABLES[name].rows[row].paper.items() >= numbers.items()


def test_positions_are_those_of_the_papers() -> None:
    def positions(name: str) -> set[str]:
        return {reducer.positions for row in TABLES[name].rows.values() for reducer in parse(row.reduce)}

    for name in ("visionzip", "divprune", "fastervlm", "cdpruner", "sparsevlm"):
        assert positions(name) == {"renumber"}, name
    for name in ("fastv", "fastv-paper", "dart", "restore"):
        assert positions(name) == {"keep"}, name


def test_what_the_sources_have_from_memory_or_not_at_all_is_marked() -> None:
    for name in ("192", "128"):
        assert "[M]" in TABLES["visionzip"].rows[name].note
    for name in ("fastervlm", "cdpruner"):  # no scores by benchmark: nothing is judged, the averages only shown
        table = TABLES[name]
        assert all(row.paper == {} for row in table.rows.values())
        assert table.average is not None
        assert not table.average.judged
        assert table.numbers == 0
    assert {row.average for row in TABLES["cdpruner"].rows.values()} == {None, 99.0, 97.0, 94.3}
    assert "FastV's rows" in TABLES["sparsevlm"].left_out  # disputed
    assert "[?]" in TABLES["visionzip"].columns["POPE"].note


# ---- one's own


OWN: dict[str, Any] = {
    "title": "own",
    "paper": "none",
    "where": "here",
    "model": {"name": "asset:vlm"},
    "columns": {"A": {"task": "a", "metric": ["acc"], "tolerance": 1, "why": "so"}},
    "rows": {"full": {"reduce": "none", "budget": "64", "tokens": 64, "evidence": "[D]", "paper": {"A": 50}}},
}


def own(folder: Path, **changes: Any) -> Table:
    with (folder / "own.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump({**OWN, **changes}, file)
    return load_table(str(folder / "own.yaml"))


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    table = own(tmp_path, tasks="mine", columns={**OWN["columns"], "GQA": "gqa", "B": {"like": "gqa", "tolerance": 9}})
    assert table.name == "own"
    assert table.tasks == str((tmp_path / "mine").resolve())
    assert table.columns["GQA"] == TABLES["visionzip"].columns["GQA"]
    assert (table.columns["B"].task, table.columns["B"].tolerance) == ("gqa", 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rows": {"full": {**OWN["rows"]["full"], "reduce": "fastw"}}},
            r"rows.full.reduce: unknown reducer 'fastw' \(did you mean 'fastv'\?\)",
        ),
        ({"rows": {"full": {**OWN["rows"]["full"], "paper": {"AA": 1}}}}, r"rows.full.paper: there is no column 'AA'"),
        ({"rows": {"full": {**OWN["rows"]["full"], "paper": {"A": float("nan")}}}}, r"rows.full.paper.A: .*finite"),
        ({"columns": {"A": "gqaa"}}, r"columns.A: 'gqaa' is not among the shared ones \(did you mean 'gqa'\?\)"),
        ({"columns": {"A": {**OWN["columns"]["A"], "tolerance": 0}}}, r"columns.A.tolerance: .*greater than 0"),
        ({"columns": {"A": {**OWN["columns"]["A"], "changes": {"x": 1}}}}, r"columns.A.changes: name the task that is changed by base"),
        ({"average": {"full": "ful"}}, r"average.full: there is no row 'ful' \(did you mean 'full'\?\)"),
        ({"colour": "red"}, r"colour: Extra inputs"),
        ({"model": "llava"}, r"model: 'llava' is not among the shared ones"),
        ({"rows": {}}, r"rows: .*at least 1"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        own(tmp_path, **changes)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"no table 'visionsip' \(did you mean 'visionzip'\?\); there are cdpruner, .*YAML file"):
        load_table("visionsip")
    with pytest.raises(FoveateError, match=r"no table 'shared'"):
        load_table("shared")
    with pytest.raises(FoveateError, match=r"nowhere.yaml cannot be read: No such file"):
        load_table(str(tmp_path / "nowhere.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(FoveateError, match=r"broken.yaml is not valid YAML"):
        load_table(str(tmp_path / "broken.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(FoveateError, match=r"a table is a mapping with the keys name, title"):
        load_table(str(tmp_path / "list.yaml"))


def test_the_page_has_every_table_and_its_example_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\|.*\| `foveate reproduce ([\w-]+)` \|.*\| (.*) \|$", page, re.MULTILINE))
    assert rows.keys() == TABLES.keys()
    for name, judged in rows.items():
        if TABLES[name].numbers:
            assert judged.startswith(f"{TABLES[name].numbers} numbers"), name
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.yaml").write_text(example, encoding="utf-8")
    assert load_table(str(tmp_path / "mine.yaml")).numbers == 4
