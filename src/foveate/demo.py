"""The demo: three ways to train one small vision-language model, side by side, in a world of its own.

    python -m foveate.demo demo

writes the data, trains three arms from the same backbones (all tokens; Chain-of-Sight few to many; LLaVolta in four stages),
evaluates them and writes `report.html`. Every step is one that the command line has as well; run again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from foveate.errors import FoveateError
from foveate.evaluation.evaluate import Result, evaluate
from foveate.report.demo import print_summary, write_report
from foveate.report.runs import Arm
from foveate.train.recipe import load_recipe
from foveate.train.run import train
from foveate.world.scenes import write_world

ARMS = {
    "all tokens": ("all-tokens", "Every patch is a token in every step: 256 an image, in pre-training and in fine-tuning."),
    "Chain-of-Sight": ("chain-of-sight", "Pre-training with 20 tokens an image at 64 px; the bridge then grows to 324 at 128 px."),
    "LLaVolta": (
        "llavolta",
        "All tokens in pre-training; fine-tuning pools them inside the language model, heavily at first, then not at all.",
    ),
}


def run_arm(recipe: Path, output: Path, world: Path, overrides: list[str], batch_size: int = 64) -> tuple[Path, Result]:
    """Trains one recipe on `world` and evaluates its final model; what is there already is not made again."""
    data = [f"stages.{i}.data.images={world / 'images'}" for i in range(2)]
    data += [f"stages.0.data.conversations={world / 'pretrain.json'}", f"stages.1.data.conversations={world / 'finetune.json'}"]
    final = train(load_recipe(recipe, [f"output={output}", *data, *overrides]))
    answers = output / "evaluation.json"
    if not answers.is_file():
        evaluate(final, world, batch_size=batch_size).save(answers)
    return output, Result.load(answers)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="foveate.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", type=Path, default=Path("recipes/demo"))
    parser.add_argument("--train", type=int, default=800, help="scenes to train on")
    parser.add_argument("--test", type=int, default=100, help="scenes to ask about")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    world = given.out / "world"
    write_world(world, train=given.train, test=given.test, seed=given.seed)
    arms = []
    for name, (recipe, description) in ARMS.items():
        run, result = run_arm(given.recipes / f"{recipe}.yaml", given.out / "runs" / recipe, world, [f"seed={given.seed}"])
        arms.append(Arm(name, description, run, result))
    blind = evaluate(arms[0].run / "final", world, blind=True)
    print_summary(arms)
    report = write_report(given.out / "report.html", arms, world, blind=blind)
    print(f"report: {report}")


if __name__ == "__main__":
    try:
        main()
    except FoveateError as error:
        print(f"foveate: {error}", file=sys.stderr)
        sys.exit(2)
