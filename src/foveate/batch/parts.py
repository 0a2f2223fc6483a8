"""A job in blocks of rows: one file for each, whole or not there, so that the files say what is left to do.

A block is asked together, whoever asks it: its answers are the same in one process or many, and after a kill.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list

from foveate.errors import FoveateError, NotApplicable, readable
from foveate.files import write, write_json
from foveate.inference import Broken, progress_bar
from foveate.lock import locked
from foveate.processes import processes

JOB = "job.json"
SHOWN = 5  # of the rows that failed, so many are named
_NAMES = ("data", "images", "model")  # what a job calls what it reads; what these hold is told by hashes
_GLANCE = 0.5  # seconds between two looks at what other processes have finished

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Sequence[int]], Iterator[tuple[int, str | bytes]]]
"""Blocks -> each with the content of its file, in any order."""


class Parts:
    """The files of `rows` rows in `folder`, `size` of them in each. `whole`: what becomes of all of them; none is missing where it is."""

    def __init__(self, folder: Path, rows: int, size: int, suffix: str, whole: Path | None = None) -> None:
        self.folder, self.total, self.size, self.suffix, self.whole = folder, rows, size, suffix, whole

    @property
    def blocks(self) -> range:
        return range(-(-self.total // self.size))

    def rows(self, block: int) -> range:
        return range(block * self.size, min((block + 1) * self.size, self.total))

    def path(self, block: int) -> Path:
        return self.folder / f"{block:06d}{self.suffix}"

    def missing(self) -> list[int]:
        if self.whole is not None and self.whole.is_file():
            return []
        there = {path.name for path in self.folder.iterdir()}
        return [block for block in self.blocks if self.path(block).name not in there]

    def done(self) -> int:
        """Rows whose file is there."""
        return self.total - sum(len(self.rows(block)) for block in self.missing())


def carry_out(
    out: Path, facts: Callable[[], dict[str, Any]], parts: Parts, work: Work, finish: Callable[[], Result], progress: bool = True
) -> Result | None:
    """Has `work` done for the blocks that are missing, shared by the processes of this run, and returns what `finish` makes of all of them
    in the main one; None in the others, which do not wait for it.

    facts: what the job is; kept in `out`, and held against what is there. FoveateError where that is another job's, and where another run
    works there.
    """
    state = processes()
    with locked(out, state):
        missing: list[Any] = [None]
        if state.is_main_process:
            begin(out, facts())
            parts.folder.mkdir(exist_ok=True)
            missing = [parts.missing()]
        if state.num_processes > 1:
            broadcast_object_list(missing)
        own = missing[0][state.process_index :: state.num_processes]
        with progress_bar(progress and state.is_main_process) as bar:
            shown = bar.add_task("rows", total=parts.total, completed=parts.done())
            for block, content in work(own) if own else ():
                write(parts.path(block), content)
                bar.update(shown, completed=parts.done())
            while state.is_main_process and parts.missing():
                time.sleep(_GLANCE)
                bar.update(shown, completed=parts.done())
        return finish() if state.is_main_process else None


def begin(out: Path, facts: dict[str, Any]) -> None:
    """Notes what the job in a folder is. FoveateError where it was another."""
    path = out / JOB
    if not path.is_file():
        write_json(path, facts)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    differs = [f"{name} (there {before.get(name)}, now {facts[name]})" for name in facts if before.get(name) != facts[name]]
    differs = [each for each in differs if each.split(" ", 1)[0] not in _NAMES]
    if differs:
        raise FoveateError(f"{out} holds a job with another {'; another '.join(differs)}. Choose another folder with --out")


class Alone:
    """Does things together, and where that fails one by one, so that one of them spoils no other."""

    def __init__(self) -> None:
        self._worked = False

    def __call__(self, act: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result | FoveateError]:
        """What `act` makes of each item, or what is wrong with it.

        What no other item would mend is raised: a broken model, a method that is not for it, and the first of several things to be done
        all failing."""
        found = self._each(act, items)
        failed = [result for result in found if isinstance(result, FoveateError)]
        if len(items) > 1 and len(failed) == len(items) and not self._worked:
            raise FoveateError(f"none of {len(items)} rows could be done; the first: {failed[0]}")
        self._worked = self._worked or len(failed) < len(items)
        return found

    def _each(self, act: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result | FoveateError]:
        try:
            return list(act(items)) if items else []
        except (Broken, NotApplicable):
            raise
        except Exception as error:  # processors and models raise anything at all for what they were not made for
            if len(items) == 1:
                return [error if isinstance(error, FoveateError) else FoveateError(f"{type(error).__name__}: {error}")]
        return [result for item in items for result in self._each(act, [item])]


@dataclass(frozen=True)
class Done:
    """A finished job: its file, how many `rows` it has, the name and the reason of each of those that failed, and of embeddings how many
    `images` there are, with how many tokens before and after."""

    path: Path
    rows: int
    failed: list[tuple[str, str]]
    images: int = 0
    tokens: int = 0
    kept: int = 0


def told(done: Done) -> str:
    """A finished job in words, a line for each of the first rows that failed."""
    content = f", {done.images} images: {done.kept} of {done.tokens} tokens" if done.images else ""
    lines = [f"{done.path}: {done.rows} rows{content}, {len(done.failed)} failed"]
    lines += [f"  {name}: {reason}" for name, reason in done.failed[:SHOWN]]
    return "\n".join(lines + ([f"  and {len(done.failed) - SHOWN} more"] if len(done.failed) > SHOWN else []))


def failures(rows: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Name and reason of the rows of a file that failed."""
    return [(row["id"], row["error"]) for row in rows if "error" in row]


def entry(row: int, name: str, found: dict[str, Any] | FoveateError) -> dict[str, Any]:
    """What a job's file says of a row: what was found, or what is wrong with it."""
    return {"row": row, "id": name, **({"error": readable(str(found))} if isinstance(found, FoveateError) else found)}
