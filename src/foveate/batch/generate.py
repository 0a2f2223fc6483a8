"""`foveate generate`: a file of questions -> a file of answers, in its order, by one process, several, a cluster or a serving engine."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from foveate.batch.answering import Attached, Job, absolute
from foveate.batch.parts import Done, Parts, Work, carry_out, failures
from foveate.errors import FoveateError, nearest
from foveate.files import write
from foveate.processes import processes
from foveate.reducers.exporting import exported

ENGINES = ("transformers", "ray", "vllm")
ANSWERS, PARTS = "answers.jsonl", "parts"
_INSTALL = {
    "ray": 'pip install "foveate[ray]"',
    "vllm": "pip install vllm beside foveate (docs/serving.md says which version)",
}


def generate(
    job: Job,
    out: str | Path,
    *,
    engine: str = "transformers",
    workers: int | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Done | None:
    """Answers every row of a job's data into `out`/answers.jsonl: {"row", "id", "answer"}, or "error" where a row could not be asked.

    The same call goes on where an interrupted one was, with any engine. Started by `accelerate launch`, each process takes its share;
    None is returned in all but the main one.

    engine   transformers, in this process or in each of those of `accelerate launch`; ray, actors that hold an attached model each; vllm
    workers  of ray: how many actors; None: one a GPU, or one
    options  of vllm: what its `LLM` is given beside
    FoveateError for what is wrong with the job as a whole, before anything is asked where that can be known.
    """
    if engine not in ENGINES:
        raise FoveateError(f"engine={engine} is not known{nearest(engine, ENGINES)}; choose one of {', '.join(ENGINES)}")
    if (workers is not None and engine != "ray") or (options and engine != "vllm"):
        raise FoveateError("workers are of the engine ray, and engine options of vllm")
    reducing = job.reducing
    if engine != "transformers":
        check_installed(engine)
        if processes().num_processes > 1:
            raise FoveateError(f"the engine {engine} starts its own processes: start foveate without accelerate launch")
        if engine == "vllm" and reducing:
            exported(reducing, "vLLM")
    questions, folder = job.questions(), Path(out)
    parts = Parts(folder / PARTS, len(questions), job.batch_size, ".jsonl", folder / ANSWERS)

    def facts() -> dict[str, Any]:
        return {"job": "generate", **job.facts(questions), "max_new_tokens": job.max_new_tokens}

    return carry_out(folder, facts, parts, _work(job, engine, parts, workers, options or {}), partial(_merged, folder, parts), progress)


def check_installed(engine: str) -> None:
    if importlib.util.find_spec(engine) is None:
        raise FoveateError(f"the engine {engine} is not installed: {_INSTALL[engine]}; or leave out --engine")


def _work(job: Job, engine: str, parts: Parts, workers: int | None, options: Mapping[str, Any]) -> Work:
    if engine == "ray":
        from foveate.batch.on_ray import answered

        whole = replace(job, data=absolute(job.data), model=absolute(job.model), images=job.images and absolute(job.images))
        return lambda blocks: answered(whole, [(block, parts.rows(block)) for block in blocks], workers)
    if engine == "vllm":
        from foveate.batch.on_vllm import Served

        return lambda blocks: _one_by_one(lambda: Served(job, options), parts, blocks)
    return lambda blocks: _one_by_one(lambda: Attached(job, str(processes().device)), parts, blocks)


def _one_by_one(make: Callable[[], Callable[[Sequence[int]], str]], parts: Parts, blocks: Sequence[int]) -> Iterator[tuple[int, str]]:
    answerer = make()
    for block in blocks:
        yield block, answerer(parts.rows(block))


def _merged(folder: Path, parts: Parts) -> Done:
    """All answers in one file, in the order of the rows; what it was made of is removed when it is on the disk."""
    whole = folder / ANSWERS
    if not whole.is_file():
        write(whole, b"".join(parts.path(block).read_bytes() for block in parts.blocks))
    shutil.rmtree(parts.folder, ignore_errors=True)
    rows = [json.loads(line) for line in whole.read_text(encoding="utf-8").split("\n")[:-1]]
    return Done(whole, len(rows), failures(rows))
