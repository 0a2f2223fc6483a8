"""Kill -9 a staged training run with a growing bridge, again and again, and compare every tensor and every line of the log bit by bit with
those of a run that was left alone. Run by hand for all kinds of kills, or from tests/train/test_kill.py for a few:

    python tests/kill_resume.py [--rounds 2] [--quick] [--random 20 --seed 0] [--keep FOLDER]

Kinds: in the middle of steps of stages 1, 2 and 3; while a checkpoint of each stage is written (its folder is there, its mark is not);
while the finished model of a stage is written; while the final model is copied. With `--random`, at moments that a seeded die chooses,
every other round on a parquet data set; before each new start the data files are touched, and often the command is started twice at once,
of which one has to be refused.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from foveate.train.run import main
from tests.train.processes import started, stopped

STAGES = ("0-pretrain", "1-grow", "2-all")
STEPS = 18  # of all stages
LIMIT = 900.0  # seconds that one process may take


def run_child(recipe: Path) -> None:
    main(recipe, ["workers=1", "log_steps=1", "stages.2.steps=6"])


def start(recipe: Path) -> Any:
    return started(recipe.with_suffix(".err"), run_child, recipe)


def ended(child: Any) -> int:
    """The status of a child that is waited for."""
    child.join(LIMIT)
    if child.exitcode is None:
        raise SystemExit("a run did not end")
    return int(child.exitcode)


def logged(output: Path, stage: str) -> int:
    path = output / "log.jsonl"
    name = stage.partition("-")[2]
    return sum(f'"stage": "{name}"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def unmarked(output: Path, stage: str) -> list[Path]:
    return [p for p in (output / stage).glob("checkpoint-*") if not (p / "complete").exists()]


def moments() -> list[tuple[str, Callable[[Path], bool]]]:
    """(name, whether the moment has come)."""

    def of(stage: str) -> list[tuple[str, Callable[[Path], bool]]]:
        return [
            (f"{stage}: step", lambda out: logged(out, stage) >= 3 and not unmarked(out, stage)),
            (f"{stage}: saving a checkpoint", lambda out: bool(unmarked(out, stage)) and not (out / stage / "model").exists()),
            (f"{stage}: saving the model", lambda out: (out / stage / "model").exists() and not (out / stage / "model/complete").exists()),
        ]

    return [*(moment for stage in STAGES for moment in of(stage)), ("final: copying", lambda out: (out / "final.tmp").exists())]


QUICK = ("0-pretrain: step", "1-grow: saving a checkpoint", "1-grow: saving the model", "2-all: step")


def kill_at(recipe: Path, output: Path, moment: Callable[[Path], bool], delay: float) -> bool:
    """Start the run and kill it `delay` seconds after the moment. False if the run was done before that."""
    child = start(recipe)
    begin = time.monotonic()
    while not moment(output):
        if child.exitcode is not None:
            if child.exitcode:
                raise SystemExit(f"the run failed:\n{recipe.with_suffix('.err').read_text()[-3000:]}")
            return False
        if time.monotonic() - begin > LIMIT:
            stopped(child)
            raise SystemExit("the moment to kill at did not come")
        time.sleep(0.0005)
    time.sleep(delay)
    stopped(child)
    return not (output / "final/complete").exists()


def finish(recipe: Path) -> None:
    child = start(recipe)
    if ended(child):
        raise SystemExit(f"the run failed:\n{recipe.with_suffix('.err').read_text()[-3000:]}")


def start_both(recipe: Path) -> Any:
    """The same command twice at once: the one that goes on, after the other was refused."""
    children = [start(recipe), start(recipe)]
    begin = time.monotonic()
    while all(child.exitcode is None for child in children):
        if time.monotonic() - begin > LIMIT:
            raise SystemExit("neither of two runs in one folder was refused")
        time.sleep(0.01)
    first, second = sorted(children, key=lambda child: child.exitcode is None)
    if first.exitcode == 0:  # there was little left to do: the other came too early or too late
        ended(second)
        return first
    if "is in use: process" not in recipe.with_suffix(".err").read_text():
        raise SystemExit(f"two runs in one folder:\n{recipe.with_suffix('.err').read_text()[-3000:]}")
    return second


def random_round(recipe: Path, output: Path, dice: random.Random, touched: list[Path]) -> str:
    """Kills a run one to three times, each a moment after as many steps as a die says; returns what happened."""
    story = []
    for _ in range(dice.randint(1, 3)):
        two, steps, delay = dice.random() < 0.5, dice.randint(0, STEPS), dice.uniform(0, 0.3)
        child = start_both(recipe) if two else start(recipe)
        begin = time.monotonic()
        while child.exitcode is None and sum(logged(output, stage) for stage in STAGES) < steps:
            if time.monotonic() - begin > LIMIT:
                raise SystemExit("the moment to kill at did not come")
            time.sleep(0.002)
        time.sleep(delay)
        if child.exitcode:
            raise SystemExit(f"the run failed:\n{recipe.with_suffix('.err').read_text()[-3000:]}")
        over = child.exitcode is not None
        if not over:
            stopped(child)
        done = "+".join(str(logged(output, stage)) for stage in STAGES)
        story.append(f"{'two starts, ' if two else ''}{'was over before' if over else f'killed at step {done}'}")
        for path in touched:
            os.utime(path)
    return "; ".join(story)


def compare(whole: Path, killed: Path) -> str:
    """What was compared and found equal. SystemExit naming the first difference."""
    import torch
    from safetensors.torch import load_file

    files = [sorted(path.relative_to(run) for path in run.rglob("*.safetensors")) for run in (whole, killed)]
    if files[0] != files[1]:
        raise SystemExit(f"{killed.name}: other files: {files}")
    count = 0
    for name in files[0]:
        a, b = load_file(whole / name), load_file(killed / name)
        different = [key for key in a if not torch.equal(a[key], b[key])]
        if a.keys() != b.keys() or different:
            raise SystemExit(f"{killed.name}: weights of {name} differ: {different[:5]}")
        count += len(a)
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_s")}
            for line in (run / "log.jsonl").read_text().splitlines()
        ]
        for run in (whole, killed)
    ]
    if logs[0] != logs[1]:
        raise SystemExit(f"{killed.name}: logs differ")
    left = [str(path) for stage in STAGES for path in (killed / stage).iterdir() if path.name != "model"]
    if left:
        raise SystemExit(f"{killed.name}: left behind: {left}")
    return f"{count} tensors and {len(logs[0])} log lines are the same to the last bit"


def save_parquet(folder: Path) -> Path:
    """The samples of `folder`/data.json with their pictures in them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = json.loads((folder / "data.json").read_text())
    for row in rows:
        names = row.pop("image", [])
        names = names if isinstance(names, list) else [names]
        row["images"] = [{"bytes": (folder / "images" / name).read_bytes(), "path": name} for name in names]
    path = folder / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def check_at_random(rounds: int, seed: int, folder: Path) -> None:
    from tests.train.tiny_training import RECIPE, save_backbones, save_data

    save_backbones(folder, dropout=0.1)
    save_data(folder)
    parquet = save_parquet(folder)
    samples = "conversations: {root}/data.json, images: {root}/images"
    held_back = "    validation: {{" + samples + ", limit: 5, every: 2}}\n    reducers:\n"
    texts = [RECIPE.replace("    reducers:\n", held_back), RECIPE.replace(samples, f"dataset: {parquet}")]
    names = ("json", "parquet")

    def recipe(name: str, kind: int) -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(texts[kind].format(root=folder, output=name))
        return path

    for kind, name in enumerate(names):
        finish(recipe(name, kind))
    dice = random.Random(seed)
    for number in range(rounds):
        kind = number % 2
        path, output = recipe(f"random{number}", kind), folder / f"random{number}"
        story = random_round(path, output, dice, [folder / "data.json", parquet])
        finish(path)
        print(f"round {number + 1} of {rounds}, {names[kind]}: {story}: {compare(folder / names[kind], output)}", flush=True)


def check(rounds: int, quick: bool, folder: Path) -> None:
    from tests.train.tiny_training import RECIPE, save_backbones, save_data

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
        print(f"round {number}: {compare(folder / 'whole', output)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs that are killed")
    parser.add_argument("--quick", action="store_true", help="four kills a round instead of ten")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="instead, N runs that are killed at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place: Path = given.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        if given.random:
            check_at_random(given.random, given.seed, place.resolve())
        else:
            check(given.rounds, given.quick, place.resolve())
