"""The demo: a finished small vision-language model on fewer visual tokens, then two ways to train one, in a world of its own.

    python -m foveate.demo demo

draws the world, asks the finished model (`asset:vlm`) under reducers at three budgets, trains two arms from one half-way model
(`asset:begun`: all tokens in every step; few tokens first, then many), evaluates them and writes `report.html`. Every step is one that the
command line has as well; run again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from foveate.errors import FoveateError
from foveate.evaluation.bench import bench
from foveate.evaluation.cells import Bench
from foveate.evaluation.evaluate import Result, evaluate
from foveate.files import write_json
from foveate.report.demo import print_summary, write_report
from foveate.report.runs import Arm
from foveate.train.recipe import load_recipe
from foveate.train.run import train
from foveate.world.scenes import in_turns, write_world

METHODS = ("random", "uniform", "divprune", "fastv", "tome")
KEEP = (0.5, 0.25, 0.11)
QUESTIONS = 300
LEARNED = ("presence", "count", "attribute", "reading", "locating")  # asset:vlm has not learned relations
TURNS = 2  # questions of one training sample

ARMS = {
    "all tokens": ("all-tokens", "84 tokens an image in every step: the half-way model's bridge grows from 20 before the first."),
    "few to many": ("few-to-many", "Pre-training goes on with 20 tokens an image; the bridge then grows to 84 (Chain-of-Sight)."),
}


def ask_finished(model: str, world: Path, out: Path) -> Bench:
    """The finished model under each method at each budget, on questions of the test scenes; answered cells are not asked again."""
    task = f"{world}:families={'/'.join(LEARNED)}"
    return bench(model, [task], METHODS, KEEP, out, baselines=False, limit=QUESTIONS)


def write_samples(world: Path, out: Path) -> None:
    """`out`/pretrain.json: the captions of the training scenes and every other short conversation; finetune.json: the other ones."""
    captions, talks = (json.loads((world / f"{name}.json").read_text(encoding="utf-8")) for name in ("pretrain", "finetune"))
    short = [part for talk in talks for part in in_turns(talk, TURNS)]
    write_json(out / "pretrain.json", [*captions, *short[::2]], indent=0)
    write_json(out / "finetune.json", short[1::2], indent=0)


def run_arm(recipe: Path, output: Path, world: Path, samples: Path, overrides: Sequence[str]) -> Result:
    """Trains one recipe and evaluates its final model on the test scenes of `world`; what is there already is not made again."""
    data = [f"stages.{i}.data.images={world / 'images'}" for i in range(2)]
    data += [f"stages.{i}.data.conversations={samples / name}.json" for i, name in enumerate(("pretrain", "finetune"))]
    final = train(load_recipe(recipe, [f"output={output}", *data, *overrides]))
    return answers(final, world, output / "evaluation.json")


def answers(model: Path, world: Path, path: Path, blind: bool = False) -> Result:
    """What a model answers to the test scenes of `world`, kept in `path`; `blind`: to grey pictures."""
    if not path.is_file():
        evaluate(model, world, blind=blind).save(path)
    return Result.load(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="foveate.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", type=Path, default=Path("recipes/demo"))
    parser.add_argument("--train", type=int, default=800, help="scenes to train on")
    parser.add_argument("--test", type=int, default=100, help="scenes to ask about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="asset:vlm", help="the finished model of the first part")
    parser.add_argument("--checkpoint", default="asset:begun", help="the half-way model of the second, a Chain-of-Sight model of 20 tokens")
    given = parser.parse_args(arguments)
    world, samples = given.out / "world", given.out / "data"
    write_world(world, train=given.train, test=given.test, seed=given.seed)
    print("1. A finished model on fewer tokens", flush=True)
    found = ask_finished(given.model, world, given.out / "bench")
    print("2. Trained on few tokens, then on many", flush=True)
    write_samples(world, samples)
    overrides = [f"seed={given.seed}", f"model.checkpoint={given.checkpoint}"]
    arms = []
    for name, (recipe, description) in ARMS.items():
        run = given.out / "runs" / recipe
        arms.append(Arm(name, description, run, run_arm(given.recipes / f"{recipe}.yaml", run, world, samples, overrides)))
    blind = answers(arms[0].run / "final", world, arms[0].run / "blind.json", blind=True)
    print_summary(arms)
    report = write_report(given.out / "report.html", arms, world, bench=found.folder, blind=blind)
    print(f"report: {report}")


if __name__ == "__main__":
    try:
        main()
    except FoveateError as error:
        print(f"foveate: {error}", file=sys.stderr)
        sys.exit(2)
