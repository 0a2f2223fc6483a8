"""What being attached costs: CPU milliseconds of a prompt and of a decoding step on a thin model, beside the bare model's.

    python benchmarks/overhead/run.py
    python benchmarks/overhead/run.py --old ../older/src        # beside another tree of this library too

A LLaVA of 24 layers and a few thousand weights, 64 visual tokens, one thread: matrix products take no time, what is left is calls.
Each tree has a process of its own. In each round every variant runs once in each, in shuffled order, one tree right after the other.
CPU time of the process, not time by the clock, so that other jobs on the machine disturb it less. Writes results.json and results.md.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import foveate

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))  # the repository: what the benchmarks share lies in benchmarks/

from benchmarks.shapes import SHAPES, build, prompt  # noqa: E402

LAYERS, TOWER, STEPS = 24, 2, 8
VARIANTS = {
    "bare": None,
    "keep-all": "random:keep=1.0",
    "random 0.5": "random:keep=0.5",
    "FastV 0.5": "fastv:keep=0.5",
    "PyramidDrop": "pyramiddrop",
}
PARTS = ("prefill", "step")


def work() -> None:
    """A tree's process: for every variant that is named to it, seconds of CPU and by the clock, of the prompt and of each step."""
    torch.set_num_threads(1)
    shape = SHAPES["tiny"]
    config = shape.config(LAYERS)
    config.vision_config.num_hidden_layers = TOWER
    model = build(config, "cpu", torch.float32)
    inputs = prompt(shape, config, shape.per_image, "cpu", torch.float32)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        reducers, seconds, given = VARIANTS[line.strip()], [], inputs
        gc.collect()
        with torch.no_grad(), contextlib.nullcontext() if reducers is None else foveate.attach(model, reducers):
            for _ in range(1 + STEPS):
                ran, start = time.process_time(), time.perf_counter()
                out = model(**given, use_cache=True, logits_to_keep=1)
                seconds.append((time.process_time() - ran, time.perf_counter() - start))
                given = {"input_ids": out.logits[:, -1].argmax(-1, keepdim=True), "past_key_values": out.past_key_values}
        print(json.dumps(seconds), flush=True)


class Tree:
    """One tree's process."""

    def __init__(self, source: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(source.resolve())}
        self._process: Any = subprocess.Popen(
            [sys.executable, __file__, "--work"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, variant: str) -> list[tuple[float, float]]:
        self._process.stdin.write(variant + "\n")
        self._process.stdin.flush()
        seconds: list[tuple[float, float]] = json.loads(self._process.stdout.readline())
        return seconds

    def end(self) -> None:
        self._process.communicate()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    trees = {name: Tree(path) for name, path in (("old", given.old), ("new", ROOT / "src")) if path is not None}
    ms: dict[str, dict[str, dict[str, list[float]]]] = {v: {name: {part: [] for part in PARTS} for name in trees} for v in VARIANTS}
    cpu = wall = 0.0
    for number in track(range(-1, given.rounds), "rounds, after one that does not count"):
        shuffled = random.Random(number)
        for variant in shuffled.sample(list(VARIANTS), len(VARIANTS)):
            for name in shuffled.sample(list(trees), len(trees)):
                seconds = trees[name].run(variant)
                if number < 0:
                    continue
                cpu, wall = cpu + sum(ran for ran, _ in seconds), wall + sum(passed for _, passed in seconds)
                ms[variant][name]["prefill"].append(round(1e3 * seconds[0][0], 3))
                ms[variant][name]["step"].append(round(1e3 * statistics.median(ran for ran, _ in seconds[1:]), 3))
    for tree in trees.values():
        tree.end()
    return {"rounds": given.rounds, "granted": round(cpu / wall, 3), "ms": ms}


def table(report: dict[str, Any]) -> str:
    """Medians, quartiles in parentheses; of old and new also the median of their difference, taken in each round."""
    names = list(next(iter(report["ms"].values())))
    columns = [*names, "new - old"] if len(names) > 1 else names
    head = [f"{part}, {column}" for part in PARTS for column in columns]
    lines = ["| CPU ms | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for variant, of in report["ms"].items():
        cells = []
        for part in PARTS:
            values = [of[name][part] for name in names]
            values += [[new - old for old, new in zip(*values, strict=True)]] if len(names) > 1 else []
            for low, median, high in (statistics.quantiles(found, n=4) for found in values):
                cells.append(f"{median:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    text = f"{report['machine']}. {report['rounds']} rounds: medians, quartiles in parentheses; a difference is taken in each round."
    shared = f"The machine was shared: the processes ran {report['granted']:.0%} of the time." if report["granted"] < 0.9 else ""
    return f"`{report['command']}`\n\n{' '.join(filter(None, (text, shared)))}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--old", type=Path, help="the src folder of another tree")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    given = parser.parse_args()

    from benchmarks.common import machine  # of this tree; a process of an older one does not need it

    from foveate.files import write_json

    command = "python benchmarks/overhead/run.py" + (" --old OLD/src" if given.old else "") + f" --rounds {given.rounds}"
    report = {"command": command, "machine": machine("cpu"), **measure(given)}
    given.output.mkdir(parents=True, exist_ok=True)
    write_json(given.output / "results.json", report)
    (given.output / "results.md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    work() if "--work" in sys.argv[1:] else main()
