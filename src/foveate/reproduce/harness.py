"""lmms-eval's own command on one benchmark under one method, and what it found. The model answers through `foveate.integrations`."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from foveate.errors import FoveateError
from foveate.reproduce.tables import Column


@dataclass(frozen=True)
class Job:
    """One benchmark under one method.

    model: a folder or an "asset:" name. limit: its first questions only. include: a folder of tasks."""

    model: str
    reduce: str
    column: Column
    dtype: str = "auto"
    batch_size: int = 8
    device: str | None = None
    limit: int | None = None
    include: str | None = None


@dataclass(frozen=True)
class Measured:
    """What lmms-eval found. metrics: all numbers of the task; tokens: visual tokens of a request with pictures, mean over the layers;
    seconds: of answering, loading left out. command: what it was asked by; harness: which release answered."""

    metrics: dict[str, float]
    questions: int
    tokens: float | None = None
    seconds: float | None = None
    command: str = ""
    harness: str = ""


Harness = Callable[[Job, Path], Measured]
"""Runs a job and writes its log to a file."""


def require() -> None:
    """FoveateError where lmms-eval is not installed."""
    if find_spec("lmms_eval") is None:
        raise FoveateError('lmms-eval is not installed: pip install "foveate[lmms-eval]"')


def lmms_eval(job: Job, log: Path, *, show: bool = True) -> Measured:
    """The job by lmms-eval, in a process of its own; its output goes to `log`, and with `show` to this process' errors as well. A task that
    the table changes is written beside the log.

    FoveateError where it is not installed, and, with the reason, where it leaves no result.
    """
    require()
    with tempfile.TemporaryDirectory(prefix=".running-", dir=log.parent) as scratch:
        words = command(job, log.with_suffix(".tasks"))
        _follow([sys.executable, "-m", *words, "--output_path", scratch], log, show)
        found = sorted(Path(scratch).rglob("*_results.json"))
        if not found:
            raise FoveateError(_reason(log, job))
        measured = read_results(json.loads(found[-1].read_text(encoding="utf-8")), job.column.task)
        return replace(measured, command=shlex.join(words), harness=f"lmms-eval {version('lmms-eval')}")


def command(job: Job, tasks: Path) -> list[str]:
    """The words of lmms-eval's command. A task that the table changes is written into the folder `tasks`."""
    if set(job.model) & set(',"'):
        raise FoveateError(
            f"the model's path {job.model} has a comma or a quotation mark, which lmms-eval cannot be given: rename the folder"
        )
    model = f"pretrained={job.model},dtype={job.dtype},reduce={job.reduce.replace(',', ':')}"
    words = ["lmms_eval", "--model", "foveate", "--model_args", model, "--tasks", job.column.task]
    include = job.include
    if job.column.base is not None:
        include = str(_changed(job.column, include, tasks))
    words += ["--include_path", include] if include else []
    words += ["--device", job.device] if job.device else []
    words += ["--limit", str(job.limit)] if job.limit else []
    return [*words, "--batch_size", str(job.batch_size)]


def _changed(column: Column, include: str | None, folder: Path) -> Path:
    """A folder with the column's task: the one of `base` with what the table changes in it."""
    places = [Path(include)] if include else []
    found = find_spec("lmms_eval")
    places += [Path(place) / "tasks" for place in (found.submodule_search_locations or [])] if found else []
    base = next((place / str(column.base) for place in places if (place / str(column.base)).is_file()), None)
    if base is None:
        raise FoveateError(f"task {column.task}: there is no {column.base} in {' or in '.join(map(str, places)) or 'any folder of tasks'}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{column.task}.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump({"include": str(base.resolve()), "task": column.task, **column.changes}, file)
    return folder


def _follow(words: list[str], log: Path, show: bool) -> None:
    """Run the command, with all that it prints in `log`. It ends with this process' interruption, too."""
    with log.open("wb") as file, subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        try:
            while part := process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
                file.write(part)
                file.flush()
                if show:
                    sys.stderr.write(part.decode(errors="replace"))
                    sys.stderr.flush()
        except BaseException:
            process.kill()
            raise


def read_results(found: Mapping[str, Any], task: str) -> Measured:
    """What an lmms-eval results file says of `task`. FoveateError where it says nothing."""
    results = found.get("results", {}).get(task)
    if results is None:
        raise FoveateError(f"lmms-eval's results have no task {task!r}; they have {', '.join(found.get('results', {})) or 'none'}")
    metrics: dict[str, float] = {}
    for key, value in results.items():
        name = key.partition(",")[0]
        if isinstance(value, int | float) and not isinstance(value, bool) and "_stderr" not in name:
            metrics.setdefault(name, float(value))
    metrics.pop("samples", None)
    counts, throughput = found.get("n-samples", {}).get(task, {}), found.get("throughput", {})
    return Measured(
        metrics,
        int(counts.get("effective", counts.get("original", 0))),
        throughput.get("avg_visual_tokens_all_layers"),
        throughput.get("total_elapsed_time"),
    )


_REASONS = (
    (r"no space left on device", "the disk is full; make room, or move the Hugging Face cache (HF_HOME)"),
    (r"tasks? (?:were )?not found", "it has no such task; see lmms_eval --tasks list, and foveate reproduce --include-path for your own"),
    (r"out of memory", "memory ran out; give a smaller --batch-size"),
    (r"token is required|LocalTokenNotFound|401 client error", "the data set wants you to be logged in: hf auth login"),
    (
        r"offline ?mode|ConnectionError|couldn't reach|max retries|name resolution|LocalEntryNotFound|requested files in the cached",
        "its data set is not in the cache, and the hub cannot be reached",
    ),
)


def _reason(log: Path, job: Job) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    ours = re.findall(r"^(?:foveate\.\S*|FoveateError|NotApplicable)[^\n:]*: (.+)$", text, re.MULTILINE)
    known = next((told for pattern, told in _REASONS if re.search(pattern, text, re.IGNORECASE)), None)
    errors = re.findall(r"^\w[\w.]*(?:Error|Exception|Interrupt)\b.*$", text, re.MULTILINE)
    reason = ours[-1] if ours else known or (errors[-1] if errors else "it says nothing")
    return f"lmms-eval left no result of {job.column.task} under {job.reduce}: {reason}. Its output is in {log}"
