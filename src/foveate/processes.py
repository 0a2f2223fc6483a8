"""The processes that work together, and how they part."""

from __future__ import annotations

import atexit
import os
import sys
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from accelerate import PartialState

_codes: list[int] = []  # with which this process is to end, where that is known


def processes(timeout: timedelta | None = None) -> PartialState:
    """The processes of this run, and where this one's model is to be: on its GPU, or else the CPU. A process alone has no group.

    timeout: how long they wait for each other; None: as long as accelerate does."""
    _part_at_the_end()
    return PartialState(cpu=not torch.cuda.is_available(), **({} if timeout is None else {"timeout": timeout}))


def ends_with(code: Any) -> None:
    """Says that this process ends with an exit code as `sys.exit` takes it: of several, it then does so without its interpreter's end."""
    _codes[:] = [code if isinstance(code, int) else int(code is not None)]


@cache
def _part_at_the_end() -> None:
    atexit.register(_part)  # as early as can be: what is registered later, such as a tracker's last word, comes before it


def _part() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        # DDP never lets go of its group, by whose threads a process has been seen to abort while its interpreter ended, its work done.
        if _codes:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_codes[-1])
