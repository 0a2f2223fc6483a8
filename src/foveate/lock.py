"""One run at a time in an output folder.

The lock is the operating system's, so that it ends with the process that holds it, kill -9 included. Beside it stands who holds it: for the
message, and because some shared file systems do not carry such locks from one machine to another.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from foveate.errors import FoveateError

LOCK, OWNER = "run.lock", "run.owner.json"
ORPHANS = 10.0  # seconds after the death of a process in which its data workers notice it; they hold its lock too


@contextmanager
def locked(output: Path, state: PartialState) -> Iterator[None]:
    """Holds `output` for the processes of this run, of which the main one takes the lock for all.

    FoveateError in every process if another run has it, or if the folder cannot be written to."""
    held, refusal = None, [""]
    if state.is_main_process:
        try:
            held = acquire(output)
        except FoveateError as error:
            refusal = [str(error)]
    if state.num_processes > 1:
        refusal = broadcast_object_list(refusal)
    if refusal[0]:
        raise FoveateError(refusal[0])
    try:
        yield
    finally:
        if held is not None:
            (output / OWNER).unlink(missing_ok=True)
            held.release()


def acquire(output: Path) -> Any:
    """The lock of `output`, held by this process."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / LOCK)
        owner = read_owner(output)
        lock.acquire(timeout=ORPHANS if is_dead(owner) else 0)
    except Timeout:
        raise FoveateError(f"{output} is in use: {described(holder(output))}. Wait for that run, or name another folder") from None
    except OSError as error:
        raise FoveateError(f"output {output} cannot be written to: {error.strerror or error}") from None
    owner = read_owner(output)
    if owner and owner["host"] != socket.gethostname():
        lock.release()
        raise FoveateError(f"{output} is in use: {described(owner)}. If that run has ended, remove {output / OWNER} and start again")
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    (output / OWNER).write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}) + "\n", encoding="utf-8")
    return lock


def read_owner(output: Path) -> dict[str, Any]:
    """What the holder has written of itself; empty if there is none, or if it was killed while writing."""
    try:
        owner = json.loads((output / OWNER).read_text(encoding="utf-8"))
        return {"host": str(owner["host"]), "pid": int(owner["pid"]), "since": str(owner["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def holder(output: Path) -> dict[str, Any]:
    """The process that has the lock; it writes of itself only a moment after it was given it."""
    for _ in range(20):
        if (owner := read_owner(output)) and not is_dead(owner):
            return owner
        time.sleep(0.05)
    return {}


def is_dead(owner: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    if not owner or owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def described(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']} works there since {owner['since']}" if owner else "another process works there"
