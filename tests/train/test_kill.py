"""The real thing: kill -9 in stages 1, 2 and 3 and during saves. More kinds of kills by hand: tests/kill_resume.py."""

from pathlib import Path

import pytest
from tests import kill_resume


def test_killed_runs_end_in_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kill_resume.check(rounds=1, quick=True, folder=tmp_path)
    said = capsys.readouterr().out
    assert "are the same to the last bit" in said
    assert said.count(": killed") == 4
