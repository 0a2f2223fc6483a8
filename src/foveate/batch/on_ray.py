"""By Ray Data: a pool of actors, on this machine or a cluster, each of which holds an attached model and answers block after block.

Data, pictures and model are read by the actors, at the same paths as here. Answers come back to the driver, which alone writes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.data

from foveate.batch.answering import Attached, Job
from foveate.errors import FoveateError


class Actor:
    """What a worker of Ray runs. What is wrong with the job is told as data: raised there, it would be tried again and again."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._attached: Attached | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """One block: {"block": [its number], "start": [its first row], "end": [the row after its last]}."""
        block, start, end = (int(batch[name][0]) for name in ("block", "start", "end"))
        try:
            self._attached = self._attached or Attached(self._job)
            return {"block": [block], "text": [self._attached(range(start, end))], "refused": [""]}
        except FoveateError as error:
            return {"block": [block], "text": [""], "refused": [str(error)]}


def answered(job: Job, blocks: Sequence[tuple[int, range]], workers: int | None) -> Iterator[tuple[int, str]]:
    """Blocks of rows with their lines, as they get ready. `workers`: actors; None: one for each GPU of the cluster, or one."""
    mine = not ray.is_initialized()
    if mine:
        ray.init(logging_level="ERROR", log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the bar is ours
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        gpus = int(ray.cluster_resources().get("GPU", 0))
        items = [{"block": block, "start": rows.start, "end": rows.stop} for block, rows in blocks]
        # A block of Ray's own for each of ours, so that none waits for others before it is written.
        found = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Actor,
            fn_constructor_args=(job,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers or max(1, gpus)),
            num_cpus=1,
            num_gpus=1 if gpus else 0,
        )
        for row in found.iter_rows():
            if row["refused"]:
                raise FoveateError(row["refused"])
            yield row["block"], row["text"]
    finally:
        if mine:
            ray.shutdown()
