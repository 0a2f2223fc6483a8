"""Methods for videos, and what any of them has to beat, on scenes that move: accuracy against cost.

    python benchmarks/video/run.py                # data, training, every cell, report; what is finished is not done again
    python benchmarks/video/run.py --report       # the report and the picture again
    python benchmarks/video/run.py --clips 24 --test 4 --steps 2 --limit 8 --work runs/video-try --output runs/video-try/results

A model is trained on clips by recipes/video/moving.yaml as it is, from the model that ships with the package: eight frames of a clip are
eight pictures of one prompt, so that the methods take all pictures of a prompt for the frames of one clip (scope=sample). Then the same
held-out questions are asked under each method at each budget. Beside the seven methods: fewer frames, the same share of every frame, any
tokens at random, and smaller frames. What most questions ask is not to be seen in one frame, and writing is there for a quarter of the
clip. Differences to the bare model are paired by question, with 95 % intervals from drawing clips anew.

An interrupted training goes on from its checkpoint, and a bench run with the next cell. The folder of the results gets what
`foveate bench` writes: tables, report and picture. The answers themselves stay in the folder of the work.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from foveate.evaluation.bench import bench
from foveate.report.bench import write_bench_report
from foveate.train.recipe import load_recipe
from foveate.train.run import train
from foveate.world.films import write_films

HERE = Path(__file__).parent
RECIPE = HERE.parent.parent / "recipes" / "video" / "moving.yaml"
METHODS = [f"{name}:scope=sample" for name in ("evs", "vidcom2", "dycoke", "prunevid", "holitom", "flashvid", "fastvid", "fewerframes")]
KEEP = (0.5, 0.35, 0.25, 0.125)
WRITTEN = ("bench.json", "summary.csv", "summary.json", "table.md", "report.html", "frontier.png", "frontier.svg")


def recipe_in(work: Path) -> Path:
    """The recipe, with its data and its model in the folder of the work."""
    path = work / "recipe.yaml"
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(RECIPE.read_text(encoding="utf-8").replace("runs/video/", f"{work}/"), encoding="utf-8")
    return path


def trained(work: Path, steps: int) -> Path:
    """The folder of the finished model, which is trained, or goes on being trained. `steps`: of each stage; 0: those of the recipe."""
    overrides = [f"stages.{i}.{key}" for i in range(2) for key in (f"steps={steps}", "epochs=null")] if steps else []
    return train(load_recipe(recipe_in(work), overrides))


def reported(work: Path, output: Path) -> None:
    """Writes the report of what is there, and copies all but the answers."""
    print(write_bench_report(work / "bench"))
    output.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:
        if (work / "bench" / name).is_file():
            shutil.copyfile(work / "bench" / name, output / name)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=2400, help="to train on, once with questions and once with an account")
    parser.add_argument("--test", type=int, default=200, help="clips to ask about, five to seven questions each")
    parser.add_argument("--steps", type=int, default=0, help="of each stage; 0: the recipe's epochs")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--keep", type=float, nargs="+", default=KEEP)
    parser.add_argument("--limit", type=int, help="only about so many questions")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--work", type=Path, default=Path("runs/video"), help="where data, checkpoints, model and answers go")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if not given.report:
        write_films(given.work / "data", train=given.clips, test=given.test, seed=0)
        model = trained(given.work, given.steps)
        task = f"{given.work / 'data'}:name=moving"
        how = {"seeds": 1, "blind": True, "batch_size": given.batch_size, "limit": given.limit}
        bench(str(model), [task], given.methods, list(given.keep), given.work / "bench", progress=sys.stderr.isatty(), **how)
    reported(given.work, given.output)


if __name__ == "__main__":
    main()
