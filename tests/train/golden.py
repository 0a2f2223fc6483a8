"""Golden losses: a short run of each of three recipes, written down, so that a change that moves training is seen.

    python -m tests.train.golden

makes `golden/ARM.json` of `golden/ARM.yaml` anew from the code as it is. Do that only for a change that means to move training, and say so
in its commit.
A run is the recipe on a small world: 10 steps of pre-training and 20 of fine-tuning, two samples each, float32 on one thread. The
learning rate is a fifteenth of the recipe's: at that one rounding grows to percents in 30 steps, and no tolerance tells it from a change.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from foveate.train.recipe import load_recipe
from foveate.train.run import train
from foveate.world.scenes import write_world

ARMS = ("all-tokens", "chain-of-sight", "llavolta")
GOLDEN = Path(__file__).parent / "golden"
STEPS = (10, 20)
COUNTED = ("stage", "step", "images", "supervised_tokens", "tokens_per_image", "visual_tokens_per_layer", "flops", "reducer")


def make_world(folder: Path) -> Path:
    """A world of 24 scenes in `folder`/world."""
    write_world(folder / "world", train=24, test=1, seed=0, progress=False)
    return folder / "world"


def trajectory(arm: str, world: Path, output: Path) -> list[dict[str, Any]]:
    """Of each optimiser step the loss and what was counted (FLOPs over all steps so far)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(load_recipe(GOLDEN / f"{arm}.yaml", overrides(world, output)))
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: row[name] for name in (*COUNTED, "loss")} for row in rows]


def overrides(world: Path, output: Path) -> list[str]:
    found = [f"output={output}", "workers=0"]
    for index, (data, steps) in enumerate(zip(("pretrain", "finetune"), STEPS, strict=True)):
        stage = f"stages.{index}"
        found += [f"{stage}.data.conversations={world / data}.json", f"{stage}.data.images={world / 'images'}"]
        found += [f"{stage}.epochs=null", f"{stage}.steps={steps}", f"{stage}.batch_size=2"]
        found += [f"{stage}.learning_rate=1.0e-4", f"{stage}.precision=fp32"]
    return found


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        for arm in ARMS:
            rows = trajectory(arm, world, Path(folder) / arm)
            lines = ",\n".join(json.dumps(row) for row in rows)
            (GOLDEN / f"{arm}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
