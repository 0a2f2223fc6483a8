"""The processes that work together, and how they part."""

from __future__ import annotations

import atexit
from datetime import timedelta

import torch
from accelerate import PartialState


def processes(timeout: timedelta | None = None) -> PartialState:
    """The processes of this run, and where this one's model is to be: on its GPU, or else the CPU. A process alone has no group.

    timeout: how long they wait for each other; None: as long as accelerate does."""
    state = PartialState(cpu=not torch.cuda.is_available(), **({} if timeout is None else {"timeout": timeout}))
    # torch wants a group to be left: one that is still there when the interpreter ends has been seen to abort a process after its work.
    atexit.unregister(_part)
    atexit.register(_part)
    return state


def _part() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
