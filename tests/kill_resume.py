"""Kill -9 a staged training run with a growing bridge, again and again, and compare the final weights bit by bit with those of a run that
was left alone. Run by hand for all kinds of kills, or from tests/train/test_kill.py for a few:

    python tests/kill_resume.py [--rounds 2] [--quick] [--keep FOLDER]

Kinds: in the middle of steps of stages 1, 2 and 3; while a checkpoint of each stage is written (its folder is there, its mark is not);
while the finished model of a stage is written; while the final model is copied.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "train"))

STAGES = ("0-pretrain", "1-grow", "2-all")
LIMIT = 900.0  # seconds that one process may take


def run_child(recipe: Path) -> None:
    import torch

    from foveate.train.run import main

    torch.set_num_threads(1)
    main(recipe, ["workers=1", "log_steps=1", "stages.2.steps=6"])


def start(recipe: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--child", str(recipe)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(recipe.with_suffix(".err"), "ab"), start_new_session=True)


def stop(child: subprocess.Popen[bytes]) -> None:
    """The process and its data workers, at once and without a word."""
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def logged(output: Path, stage: str) -> int:
    path = output / "log.jsonl"
    name = stage.partition("-")[2]
    return sum(f'"stage": "{name}"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def unmarked(output: Path, stage: str) -> list[Path]:
    return [p for p in (output / stage).glob("checkpoint-*") if not (p / "complete").exists()]


def moments() -> list[tuple[str, Callable[[Path], bool]]]:
    """(name, whether the moment has come)."""
    found: list[tuple[str, Callable[[Path], bool]]] = []
    for stage in STAGES:
        found += [
            (f"{stage}: step", lambda out, s=stage: logged(out, s) >= 3 and not unmarked(out, s)),
            (f"{stage}: saving a checkpoint", lambda out, s=stage: bool(unmarked(out, s)) and not (out / s / "model").exists()),
            (f"{stage}: saving the model", lambda out, s=stage: (out / s / "model").exists() and not (out / s / "model/complete").exists()),
        ]
    return [*found, ("final: copying", lambda out: (out / "final.tmp").exists())]


QUICK = ("0-pretrain: step", "1-grow: saving a checkpoint", "1-grow: saving the model", "2-all: step")


def kill_at(recipe: Path, output: Path, moment: Callable[[Path], bool], delay: float) -> bool:
    """Start the run and kill it `delay` seconds after the moment. False if the run was done before that."""
    child = start(recipe)
    begin = time.monotonic()
    while not moment(output):
        if child.poll() is not None:
            if child.returncode:
                raise SystemExit(f"the run failed:\n{recipe.with_suffix('.err').read_text()[-3000:]}")
            return False
        if time.monotonic() - begin > LIMIT:
            stop(child)
            raise SystemExit("the moment to kill at did not come")
        time.sleep(0.0005)
    time.sleep(delay)
    stop(child)
    return not (output / "final/complete").exists()


def finish(recipe: Path) -> None:
    child = start(recipe)
    if child.wait(timeout=LIMIT):
        raise SystemExit(f"the run failed:\n{recipe.with_suffix('.err').read_text()[-3000:]}")


def check(rounds: int, quick: bool, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from tiny_training import RECIPE, save_backbones, save_data

    save_backbones(folder, dropout=0.1)
    save_data(folder)
    recipes = {name: folder / f"{name}.yaml" for name in ("whole", *(f"killed{i}" for i in range(rounds)))}
    for name, path in recipes.items():
        path.write_text(RECIPE.format(root=folder, output=name))
    finish(recipes["whole"])
    dice = random.Random(0)
    for number in range(rounds):
        recipe, output = recipes[f"killed{number}"], folder / f"killed{number}"
        for name, moment in moments():
            if quick and name not in QUICK:
                continue
            delay = 0.0 if "step" not in name and number == 0 else dice.uniform(0, 0.01)
            hit = kill_at(recipe, output, moment, delay)
            torn = [str(p.relative_to(output)) for s in STAGES for p in unmarked(output, s)]
            print(
                f"round {number}, {name}: {'killed' if hit else 'was over before'}{f', left half written: {torn}' if torn else ''}",
                flush=True,
            )
        finish(recipe)
        a, b = (load_file(folder / n / "final/model.safetensors") for n in ("whole", f"killed{number}"))
        different = [key for key in a if not torch.equal(a[key], b[key])]
        if a.keys() != b.keys() or different:
            raise SystemExit(f"round {number}: weights differ: {different[:5]}")
        logs = [
            [
                {k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_s")}
                for line in (folder / n / "log.jsonl").read_text().splitlines()
            ]
            for n in ("whole", f"killed{number}")
        ]
        if logs[0] != logs[1]:
            raise SystemExit(f"round {number}: logs differ")
        left = [str(path) for stage in STAGES for path in (output / stage).iterdir() if path.name != "model"]
        if left:
            raise SystemExit(f"round {number}: left behind: {left}")
        print(f"round {number}: {len(a)} tensors and {len(logs[0])} log lines are the same to the last bit", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=2, help="runs that are killed")
    parser.add_argument("--quick", action="store_true", help="four kills a round instead of ten")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    given = parser.parse_args()
    if given.child:
        run_child(given.child)
    elif given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
        check(given.rounds, given.quick, given.keep.resolve())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            check(given.rounds, given.quick, Path(temporary))
