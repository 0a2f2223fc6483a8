"""One training step with few and with all tokens, before and after what the trainer saves: samples/s, share of the processor's peak.

    git worktree add ../before 3b2c5df
    python benchmarks/training_step/run.py --before ../before       # without --before: this tree alone

Two pre-training stages by Chain-of-Sight, 20 tokens an image, and by an MLP bridge, all 256: real runs of `foveate train` on a world of
scenes. Every variant has a process of its own, which stands still while another one runs, its data loader too. In each round every variant
makes a block of steps, in shuffled order, all on the same samples. After the last round a block of the first and of the last variant is
taken apart. The processes of an arm are in memory together, up to 2 GB each. Writes results.json and table.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.progress import track

from foveate.files import write, write_json
from foveate.machine import environment
from foveate.world import resolve
from foveate.world.scenes import write_world

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))  # the repository: what the benchmarks share lies in benchmarks/

from benchmarks.training_step.report import BEFORE, table  # noqa: E402

WARM_UP, TAKEN_APART = 2, 4  # steps before the first round, and those whose parts are timed
STARTING = 2  # processes that start at the same time
BATCH, TRIAL = 16, {"batch_size": 2, "precision": "fp32"}  # samples a step; and what makes a trial smaller
MEMORY = 2.0e9  # bytes of a process
SIZES = (512, 1024, 2048)  # of square matrices, whose product shows the processor's peak


@dataclass(frozen=True)
class Arm:
    """`levels`: of the tower's features; `stage`: what the arm's stage has of its own."""

    what: str
    levels: list[int]
    bridge: str
    stage: dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A stage with some keys changed, `without` what the trainer saves by itself, in the tree of before or in this one."""

    changes: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    before: bool = False


ARMS = {
    "few": Arm(
        "Chain-of-Sight with 20 tokens an image", [-3, -1], "chain_of_sight", {"image_size": 64, "bridge": {"scales": [[8, 4], [2, 1]]}}
    ),
    "all": Arm("all tokens, 256 an image", [-1], "mlp", {"image_size": 128}),
}
OFF = ("rows", "memory")
CACHE = {"at_most": "50GB"}  # the folder is added
SAVINGS: dict[str, dict[str, Any]] = {
    "features from a cache": {"features": CACHE},
    "packed": {"pack": True},
    "fused optimiser": {"optimizer": "adamw_torch_fused"},
}
VARIANTS = {
    BEFORE: Variant(before=True),
    "none of the savings": Variant(without=OFF),
    "supervised rows alone": Variant(without=("memory",)),
    "memory kept": Variant(without=("rows",)),
    **{name: Variant(changes, OFF) for name, changes in SAVINGS.items()},
    "all of them": Variant({key: value for changes in SAVINGS.values() for key, value in changes.items()}),
}


# ---- the processor ---------------------------------------------------------------------------------------------------------------------


def matrix_peak(dtype: torch.dtype, threads: int, sizes: Sequence[int]) -> float:
    """FLOPs a second of a product of two square matrices, the best of some."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        times = (sizes[-1] // size) ** 2  # long enough for the clock
        for _ in range(8):
            start = time.perf_counter()
            for _ in range(times):
                torch.mm(a, b)
            best = max(best, times * 2 * size**3 / (time.perf_counter() - start))
    torch.set_num_threads(before)
    return best


def peaks(threads: int, sizes: Sequence[int]) -> dict[str, dict[str, float]]:
    """By type and number of threads."""
    kinds = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    return {name: {str(count): matrix_peak(kind, count, sizes) for count in sorted({1, threads})} for name, kind in kinds.items()}


# ---- the processes ---------------------------------------------------------------------------------------------------------------------


class Trained:
    """A variant's process, which stands still but while it is asked for a block of steps."""

    def __init__(self, tree: Path, recipe: dict[str, Any], without: Sequence[str], threads: int) -> None:
        self.output = Path(recipe["output"])
        path = self.output.with_suffix(".json")
        write_json(path, recipe)
        environment = {**os.environ, "PYTHONPATH": str(tree.resolve() / "src"), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        words = [sys.executable, str(HERE / "work.py"), str(path), "--threads", str(threads), "--without", *without]
        self._noise = self.output.with_suffix(".txt").open("w+")
        self._process: Any = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._noise, text=True, start_new_session=True
        )

    def wait(self) -> None:
        """Until its first step would begin."""
        self._answer()

    def run(self, kind: str, steps: int) -> dict[str, Any]:
        """Seconds of a block, `steps` or `parts`, and what the rest of the machine did meanwhile, in seconds of its processors."""
        os.killpg(self._process.pid, signal.SIGCONT)
        busy = _busy()
        self._process.stdin.write(f"{kind} {steps}\n")
        self._process.stdin.flush()
        found = self._answer()
        return {**found, "others": max(0.0, _busy() - busy - found["cpu"])}

    def _answer(self) -> dict[str, Any]:
        line = next((line for line in self._process.stdout if line.startswith("{")), "")
        if not line:
            self._noise.seek(0)
            sys.exit(f"{self.output.name} has ended:\n{self._noise.read()[-4000:]}")
        os.killpg(self._process.pid, signal.SIGSTOP)
        found: dict[str, Any] = json.loads(line)
        return found

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / "log.jsonl").read_text(encoding="utf-8").splitlines()]

    def end(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._noise.close()


def _busy() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)


def recipe_of(arm: Arm, variant: Variant, work: Path, name: str, steps: int, smaller: Mapping[str, Any]) -> dict[str, Any]:
    """One stage of `steps` steps, which older trees take too, on the models of this one; `smaller`: keys that make it smaller."""
    stage = {
        "name": "pretrain",
        "data": {"conversations": str(work / "world" / "pretrain.json"), "images": str(work / "world" / "images")},
        "train": {"bridge": True, "lm": True},
        "steps": steps,
        "save_steps": 10 * steps,
        "batch_size": BATCH,
        "learning_rate": 1.5e-3,
        "warmup": 0.03,
        "precision": "auto",
        "optimizer": "adamw_torch",
        **arm.stage,
        **variant.changes,
        **smaller,
    }
    if "features" in stage:
        stage["features"] = {**CACHE, "cache": str(work / "features")}
    model = {
        "vision": resolve("asset:tower"),
        "text": resolve("asset:lm"),
        "vision_feature_layer": arm.levels,
        "bridge": {"kind": arm.bridge},
        "attn_implementation": "eager",  # with bfloat16 on a processor, its backward pass is the faster one at these sizes
    }
    return {"name": name, "output": str(work / name), "seed": 0, "log_steps": 1, "model": model, "stages": [stage]}


@contextmanager
def started(arm: str, work: Path, given: argparse.Namespace, steps: int) -> Iterator[dict[str, Trained]]:
    """The processes of an arm, by variant, each in front of its first step."""
    there: dict[str, Trained] = {}

    def start(name: str) -> None:
        variant = VARIANTS[name]
        recipe = recipe_of(ARMS[arm], variant, work, f"{arm}-{given.variants.index(name)}", steps, TRIAL if given.trial else {})
        there[name] = Trained(given.before if variant.before else ROOT, recipe, variant.without, given.threads)
        there[name].wait()

    try:
        with ThreadPoolExecutor(STARTING) as pool:
            list(track(pool.map(start, given.variants), f"{arm}: starting", len(given.variants)))
        yield {name: there[name] for name in given.variants}
    finally:
        for process in there.values():
            process.end()


# ---- the rounds ------------------------------------------------------------------------------------------------------------------------


def measure(arm: str, work: Path, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of each variant: seconds a step by the clock and of the processors (of each round), FLOPs a step, losses, peak memory, parts."""
    last = WARM_UP + given.rounds * given.steps
    with started(arm, work, given, last + TAKEN_APART + 1) as there:
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in there}
        for process in there.values():
            process.run("steps", WARM_UP)
        for number in track(range(given.rounds), f"{arm}: rounds"):
            for name in random.Random(number).sample(list(there), len(there)):
                rounds[name].append(there[name].run("steps", given.steps))
        ends = dict.fromkeys([given.variants[0], given.variants[-1]])
        parts = {name: there[name].run("parts", TAKEN_APART)["parts"] for name in ends}
        found = {}
        for name, process in there.items():
            log, blocks = process.log(), rounds[name]
            spent = (log[last - 1]["flops"] - log[WARM_UP - 1]["flops"]) / (last - WARM_UP)
            found[name] = {
                "seconds": [round(block["wall"] / given.steps, 5) for block in blocks],
                "cpu": [round(block["cpu"] / given.steps, 5) for block in blocks],
                "others": round(sum(block["others"] for block in blocks) / sum(block["wall"] for block in blocks), 3),
                "flops": spent,
                "peak_bytes": blocks[-1]["peak"],
                "losses": [row["loss"] for row in log[:last]],
                **({"parts": parts[name]} if name in parts else {}),
            }
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout of an older version")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps in a block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--trial", action="store_true", help="two samples a step, in float32, to try the benchmark itself")
    given = parser.parse_args()
    command = "python benchmarks/training_step/run.py " + " ".join(words(given))
    given.variants = [name for name in VARIANTS if name in given.variants and not (VARIANTS[name].before and given.before is None)]
    if given.before is not None and not (given.before / "src" / "foveate").is_dir():
        sys.exit(f"--before {given.before} is no checkout: there is no src/foveate in it")
    if not given.trial and psutil.virtual_memory().available < MEMORY * len(given.variants):
        sys.exit(
            f"{len(given.variants)} processes want {MEMORY * len(given.variants) / 1e9:.0f} GB of memory together: name fewer --variants"
        )
    torch.set_num_threads(given.threads)
    batch = TRIAL["batch_size"] if given.trial else BATCH
    steps = WARM_UP + given.rounds * given.steps + TAKEN_APART + 1
    sizes = SIZES[:1] if given.trial else SIZES
    first = peaks(given.threads, sizes)
    report: dict[str, Any] = {
        "command": command,
        "machine": environment(),
        "threads": given.threads,
        "batch": batch,
        "what": {name: ARMS[name].what for name in given.arms},
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_world(work / "world", train=steps * batch, test=1, seed=0)
        report["arms"] = {name: measure(name, work, given) for name in given.arms}
    again = peaks(given.threads, sizes)  # the better of two moments
    report["peak_flops"] = {name: {count: max(flops, again[name][count]) for count, flops in of.items()} for name, of in first.items()}
    given.output.mkdir(parents=True, exist_ok=True)
    write_json(given.output / "results.json", report)
    write(given.output / "table.md", table(report))
    print(table(report))


def words(given: argparse.Namespace) -> list[str]:
    """The options of a command that measures the same."""
    found = ["--before BEFORE"] if given.before else []
    found += [f"--{name} {getattr(given, name)}" for name in ("rounds", "steps", "threads")]
    found += [f"--arms {' '.join(given.arms)}"] if given.arms != list(ARMS) else []
    found += ["--variants " + " ".join(f"'{name}'" for name in given.variants)] if given.variants != list(VARIANTS) else []
    return found + (["--trial"] if given.trial else [])


if __name__ == "__main__":
    main()
