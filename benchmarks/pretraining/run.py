"""Pre-training on few visual tokens against pre-training on all: Chain-of-Sight's claim (arXiv 2407.15819), and what else could make it.

    python benchmarks/pretraining/run.py                       # every arm that is not there yet, seed 0
    python benchmarks/pretraining/run.py --arms resampler chain-of-sight-32 --seeds 0 1 2
    python benchmarks/pretraining/run.py --time                # seconds of a step, arms in turns; the machine has to be idle
    python benchmarks/pretraining/run.py --table               # table.md and the pictures again
    python benchmarks/pretraining/run.py --curve 100 --output benchmarks/pretraining/tokens --arms chain-of-sight-16 chain-of-sight-80
    python benchmarks/pretraining/run.py --set real            # SmolLM2, EfficientNet and real pictures, recipes/pretraining/real

Each run is one `foveate train` of a recipe in recipes/pretraining and one evaluation. All arms have the same language model, tower,
samples, order and fine-tuning, whose samples are a tenth of the pre-training's; the features of the frozen tower are cached and shared. The
samples are short, of several tasks: the captions of half of the scenes, and two questions at a time about each. runs.json has what is
finished, which is not run again; an interrupted run goes on where it was, so that the set can be made over several sittings, and by two
processes at a time with one thread each (the seconds in runs.json are then no comparison; those of --time are). A seed is one draw of
bridge weights, adapters and the order of samples.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from foveate.files import write_json
from foveate.machine import environment
from foveate.report.pretraining import markdown, read_results, record, write_comparison
from foveate.report.runs import Arm
from foveate.train.plan import count_steps
from foveate.train.recipe import load_recipe
from foveate.train.run import train

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))  # the repository: what the benchmarks share lies in benchmarks/

from benchmarks.common import Usage  # noqa: E402
from benchmarks.pretraining.sets import SECOND, SETS, Set  # noqa: E402


def recipe_of(name: str, given: argparse.Namespace) -> Path:
    """The recipe with its folders below the work folder."""
    text = (SETS[given.set].recipes / f"{name}.yaml").read_text(encoding="utf-8").replace("runs/pretraining", str(given.work))
    path: Path = given.work / "recipes" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def run(name: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Trains and evaluates; goes on where it was."""
    own: Set = SETS[given.set]
    data, output = given.work / "data", given.work / f"{name}-{seed}"
    overrides = [f"output={output}", f"seed={seed}"]
    recipe = load_recipe(recipe_of(name, given))
    if given.curve:
        tasks = own.tasks(data)
        ask = f"{{tasks: {json.dumps(tasks)}, limit: {300 // len(tasks)}, every: {given.curve}}}"
        overrides += [f"stages.{i}.evaluate={ask}" for i, stage in enumerate(recipe.stages) if stage.kind != "align"]
    final = train(load_recipe(recipe_of(name, given), overrides))
    result = own.ask(final, data, output)
    write_once(given.output / "questions.json", [[row.image, row.family] for row in result.rows])
    return {**record(Arm(name, "", output, result), seed), "machine": environment(), "threads": torch.get_num_threads()}


def write_once(path: Path, content: Any) -> None:
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != content:
        raise SystemExit(f"{path} is of other questions; move it away with runs.json, or give another --output")
    write_json(path, content, indent=None)


@contextmanager
def records(output: Path, order: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """What runs.json holds, written again at the end, arms in this order; one process at a time."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "runs.json"
    with (output / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        yield found
        found.sort(key=lambda one: (order.index(one["arm"]), one["seed"]))
        write_json(path, found, indent=None)


def settings(given: argparse.Namespace) -> dict[str, int]:
    return {"scenes": given.scenes, "test": given.test}


def seconds_of_a_step(name: str, number: int, given: argparse.Namespace) -> list[float]:
    """Of each stage the seconds of an optimiser step, its reducers weighed by their shares, from a short run of all of them."""
    output = given.work / "timing" / f"{name}-{number}"
    recipe = load_recipe(recipe_of(name, given))
    overrides = [f"output={output}", "log_steps=1"]
    for i, stage in enumerate(recipe.stages):
        overrides += [f"stages.{i}.steps={given.steps * max(1, len(stage.parts))}"]
        overrides += [] if stage.epochs is None else [f"stages.{i}.epochs=null"]
    train(load_recipe(recipe_of(name, given), overrides))
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    before, found = 0.0, []
    for row in rows:
        row["took"], before = row["seconds"] - before, row["seconds"]
    for stage in recipe.stages:
        own = [row for row in rows if row["stage"] == stage.name]
        # The first step under a reducer makes what the others find made.
        parts = [[row["took"] for row in part][1:] for _, part in groupby(own, key=lambda row: str(row["reducer"]))]
        shares = [float(part.share) for part in stage.parts] or [1.0]
        found.append(sum(share * statistics.median(part) for share, part in zip(shares, parts, strict=True)))
    return found


def measure(given: argparse.Namespace, arms: Sequence[str]) -> None:
    """times.json: of each arm its stages with their steps, and round by round the seconds of a step in each."""
    path = given.output / "times.json"
    rounds: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rounds"] if path.is_file() else []
    stages = {name: [[stage.name, count_steps(stage)] for stage in load_recipe(recipe_of(name, given)).stages] for name in arms}
    for number in range(len(rounds), given.rounds):
        began = Usage()
        one = {name: seconds_of_a_step(name, number, given) for name in arms}
        rounds.append({"granted": began.granted(), "steps": one})
        how = {"machine": environment(), "threads": torch.get_num_threads(), **settings(given)}
        write_json(path, {**how, "stages": stages, "rounds": rounds}, indent=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--set", choices=SETS, default="world", help="of which parts and pictures")
    parser.add_argument("--arms", nargs="+", help="recipes of the set; all of them unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--scenes", type=int, help="pictures of pre-training; 8000 of the world, 1500 real ones unless given")
    parser.add_argument("--test", type=int, help="pictures to ask about; 300 of the world, 200 real ones unless given")
    parser.add_argument("--curve", type=int, default=0, help="steps between two evaluations on 300 questions; 0: none")
    parser.add_argument("--time", action="store_true", help="measure seconds instead")
    parser.add_argument("--steps", type=int, default=6, help="of each stage and reducer in a round of --time")
    parser.add_argument("--rounds", type=int, default=5, help="of --time")
    parser.add_argument("--table", action="store_true", help="only write the table and the pictures")
    parser.add_argument("--work", type=Path, help="where data, features, checkpoints and models go; runs/pretraining, -real unless given")
    parser.add_argument("--output", type=Path, help="folder of the results; this one, or real in it, unless given")
    given = parser.parse_args()
    own = SETS[given.set]
    for option in ("scenes", "test", "work", "output"):
        setattr(given, option, getattr(own, option) if getattr(given, option) is None else getattr(given, option))
    arms = given.arms or own.names()
    if unknown := set(arms) - set(own.names()):
        parser.error(f"--set {given.set} has no arm {', '.join(sorted(unknown))}; there are {', '.join(own.names())}")
    if not given.table:
        own.write(given.work / "data", given.scenes, given.test)
    if given.time:
        measure(given, arms)
    for seed in given.seeds if not (given.time or given.table) else []:
        for name in arms:
            with records(given.output, own.names()) as found:
                if any(one["arm"] == name and one["seed"] == seed for one in found):
                    continue
            made = {**run(name, seed, given), **settings(given)}
            with records(given.output, own.names()) as found:
                found.append(made)
    write_comparison(given.output, given.output)
    against(SECOND, given.output)


def against(first: str, output: Path) -> None:
    """against-<first>.md: the table once more, all arms compared with this one."""
    found = read_results(output)
    if any(one["arm"] == first for one in found.records):
        (output / f"against-{first}.md").write_text(markdown(found.compared(first)), encoding="utf-8")


if __name__ == "__main__":
    main()
