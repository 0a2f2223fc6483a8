"""Work of many equal parts, spread over processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def spread(function: Callable[[Job], Result], jobs: Sequence[Job], processes: int | None, few: int) -> Iterator[Result]:
    """What `function` makes of each job, in their order, made by so many processes (None: one a core; of fewer than `few` jobs, this one).

    The processes are started anew, since forking can hang where threads are about: `function` and the jobs must be such as can be pickled.
    """
    if processes == 1 or (processes is None and len(jobs) < few):
        yield from map(function, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(function, jobs, chunksize=32)
