"""Processes that work together part before they end."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from foveate import processes


def test_a_group_is_left_at_the_end_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[Any] = []
    monkeypatch.setattr(atexit, "register", ends.append)
    monkeypatch.setattr(atexit, "unregister", lambda end: ends.clear())
    processes.processes()
    processes.processes()
    (end,) = ends
    end()  # a process alone has no group to leave
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    distributed.all_reduce(torch.ones(1))
    end()
    assert not distributed.is_initialized()
