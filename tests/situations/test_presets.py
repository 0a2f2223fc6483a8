"""Presets: settings by the family of a model, with the measurements that speak for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate import FoveateError
from foveate.anatomy import TESTED
from foveate.cli import main
from foveate.presets import BY, FOLDER, NEUTRAL, known, presets, read_presets, resolved
from foveate.reducers import METHODS, parse, spell
from tests.command import refused
from tests.tiny import ROWS, Batch, assembled, llava

ROOT = Path(__file__).parent.parent.parent
PICTURES = ("careful", "balanced", "frugal")


@pytest.mark.parametrize("family", [NEUTRAL, *known()])
def test_a_file_names_what_there_is(family: str) -> None:
    assert family == NEUTRAL or family in TESTED
    for name, preset in read_presets(FOLDER / f"{family}.toml").items():
        reducers = parse(preset.reduce)
        assert preset == presets(family)[name]
        assert spell(reducers) == preset.reduce
        assert not any(METHODS[r.name].experimental for r in reducers)
        assert preset.by in BY
        papers = re.findall(r"arXiv (\d{4}\.\d{5})", preset.evidence)
        assert bool(papers) == (preset.by != "here"), "what others have measured has a paper, what was measured here a folder"
        assert all((ROOT / folder).is_dir() for folder in re.findall(r"benchmarks/[\w-]+", preset.evidence))
        own = {METHODS[r.name].paper for r in reducers}
        assert preset.by == "others" or preset.by == "here" or own & set(papers), "its authors have measured it"
        assert preset.by != "others" or set(papers) - own, "others have measured it"


def test_the_neutral_numbers_are_those_of_the_benchmark() -> None:
    table = (ROOT / "benchmarks" / "frontier-positions" / "table.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([\w:=]+) \| (.*) \|$", table, re.MULTILINE))
    columns = ("careful", "balanced", "frugal")
    for name, cell in zip(columns, rows["divprune:positions=keep"].split(" | "), strict=False):
        assert presets("").keys() >= {name}
        assert f"{cell.split(' ')[0]} of 92.2" in presets("")[name].evidence
    assert re.search(r"bare model 92\.2", table)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize(("make", "family"), [(llava, "llava"), (assembled, NEUTRAL)])
def test_a_model_takes_its_familys(make: Any, family: str, name: str) -> None:
    model, batch = make(), Batch([ROWS[1]])
    with foveate.attach(model, f"preset:{name}") as run, torch.no_grad():
        model(**batch.inputs)
        assert spell(run.reducers) == presets(family)[name].reduce
        left = run.last.visual_tokens
    assert 0 < left[-1] < 32
    with foveate.attach(model, f" preset:{name} ") as run:
        assert spell(run.reducers) == presets(family)[name].reduce


def test_a_family_is_lent_what_it_has_no_evidence_for() -> None:
    own, lent = presets("llava_next"), presets("unheard_of")
    assert {preset.family for preset in lent.values()} == {NEUTRAL}
    assert own["balanced"] == lent["balanced"]
    assert own["frugal"] != lent["frugal"]
    assert "video" not in lent
    assert set(PICTURES) == set(lent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset:balnced", r"no preset 'balnced' \(did you mean 'balanced'\?\) for a model of type 'llava'; there are .*careful.*frugal"),
        ("preset:", "no preset ''"),
        ("preset:video", "no preset 'video' for a model of type 'llava'"),
        ("preset:balanced+random:keep=0.5", "A preset stands alone"),
    ],
)
def test_a_preset_that_there_is_not_names_those_that_are(text: str, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        foveate.attach(llava(), text)


@pytest.mark.parametrize("text", ["preset:balanced", "random:keep=0.5+preset:balanced"])
def test_where_no_model_is_known_a_preset_is_refused(text: str) -> None:
    with pytest.raises(FoveateError, match=r"depends on the model.*foveate presets MODEL"):
        parse(text)


def test_other_spellings_are_left_alone() -> None:
    assert resolved("divprune:keep=0.3", "llava") == "divprune:keep=0.3"
    assert resolved("none", "llava") == "none"


@pytest.mark.parametrize(
    "table",
    ['[a]\nreduce = "fastv"', '[a]\nreduce = "fastv"\nby = "me"\nevidence = "x"', '[a]\nreduce = "fastv"\nby = "here"\nevidence = ""'],
)
def test_a_file_without_evidence_is_refused(table: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(table, encoding="utf-8")
    with pytest.raises(FoveateError, match=r"mine.toml: \[a\] needs reduce, by"):
        read_presets(path)


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(["presets", *arguments])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_command_prints_a_familys_presets_with_their_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(["llava", "--json"], capsys))
    assert [preset["name"] for preset in found] == list(PICTURES)
    assert found == [vars(preset) for preset in presets("llava").values()]
    said = " ".join(printed(["llava"], capsys).split())
    assert all(preset.reduce in said for preset in presets("llava").values())
    assert "search" not in said


def test_the_command_points_to_search_where_nothing_is_known(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assembled().config.save_pretrained(tmp_path)
    said = " ".join(printed([str(tmp_path)], capsys).split())
    assert "Nothing is known of how careful, balanced, frugal do on models of type 'foveate'" in said
    assert "`foveate search`" in said


def test_the_command_lists_all_and_refuses_what_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = json.loads(printed(["--json"], capsys))
    assert {preset["family"] for preset in found} == {NEUTRAL, *known()}
    assert "cannot read the configuration of" in refused(["presets", str(tmp_path)], capsys)
