"""Processes that work together part before they end."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from foveate import cli, processes


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """With which the process would have ended."""
    found: list[int] = []
    monkeypatch.setattr(os, "_exit", found.append)
    monkeypatch.setattr(processes, "_codes", [])
    return found


def together(folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    distributed.all_reduce(torch.ones(1))


def test_a_group_is_left_and_the_interpreter_ends_as_ever(tmp_path: Path, codes: list[int]) -> None:
    processes._part()  # a process alone has no group to leave
    together(tmp_path)
    processes._part()
    assert not distributed.is_initialized()
    assert codes == []


@pytest.mark.parametrize(("argv", "code"), [(["--version"], 0), (["plan", "nowhere.yaml"], 2), (["no-such-command"], 2)])
def test_a_command_of_several_processes_ends_at_once(tmp_path: Path, codes: list[int], argv: list[str], code: int) -> None:
    with pytest.raises(SystemExit):
        cli.main(argv)
    processes._part()
    assert codes == []  # a process alone ends as ever
    together(tmp_path)
    processes._part()
    assert (codes, distributed.is_initialized()) == ([code], False)


@pytest.mark.parametrize(("given", "code"), [(None, 0), (0, 0), (3, 3), ("words", 1)])
def test_codes_are_those_of_sys_exit(codes: list[int], given: Any, code: int) -> None:
    processes.ends_with(given)
    assert processes._codes == [code]
    assert "foveate.processes" in sys.modules
