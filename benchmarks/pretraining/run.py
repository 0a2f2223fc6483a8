"""The demo's three arms, longer and over several seeds: pre-training time of the few-token arm over the all-token arm, and accuracy.

    python benchmarks/pretraining/run.py --seeds 0 1 2

Each run is one `foveate train` of a recipe in recipes/demo on one world, and one evaluation. What is in results.json is not run again, and
an interrupted run goes on where it was, so that the set can be made over several sittings. A seed is one draw of everything but the world:
bridge weights and data order. The arms of one seed run one after another, so that a drift of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from foveate.demo import ARMS, run_arm
from foveate.machine import environment
from foveate.report.pretraining import record, write_comparison
from foveate.report.runs import Arm
from foveate.world.scenes import write_world

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=3000, help="scenes to train on")
    parser.add_argument("--test", type=int, default=300, help="scenes to ask about")
    parser.add_argument("--work", type=Path, default=Path("runs/pretraining"), help="where worlds, checkpoints and models go")
    given = parser.parse_args()
    results = HERE / "results.json"
    records = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else []
    world = given.work / "world"
    write_world(world, train=given.train, test=given.test, seed=0)
    recipes = HERE.parent.parent / "recipes" / "demo"
    for seed in given.seeds:
        for name, (recipe, description) in ARMS.items():
            if any(r["arm"] == name and r["seed"] == seed for r in records):
                continue
            run, result = run_arm(recipes / f"{recipe}.yaml", given.work / f"{recipe}-{seed}", world, [f"seed={seed}"])
            records.append({**record(Arm(name, description, run, result), seed), "train": given.train, "machine": environment()})
            results.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    write_comparison(results, HERE)


if __name__ == "__main__":
    main()
