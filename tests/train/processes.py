"""Training in processes of its own: two that train together, by torchrun or by accelerate, or one that is killed."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from foveate.train.run import main

ROOT = Path(__file__).parents[2]


def in_two(folder: Path, *lines: str) -> str:
    """Runs a script of these lines in two processes of one thread each whose home is `folder`: what they wrote to stderr."""
    script = folder / "two.py"
    head = [
        "import faulthandler, os, sys, torch",
        "from pathlib import Path",
        "faulthandler.enable()",
        "torch.set_num_threads(1)",
        f"Path.home = lambda: Path({str(folder)!r})",
    ]
    # What has been done is tested, and not how an interpreter ends, in which torch's threads have been seen to abort.
    end = ["sys.stdout.flush()", "sys.stderr.flush()", "os._exit(0)"]
    script.write_text("\n".join([*head, *lines, *end]) + "\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def train_in_two(folder: Path, recipe: Path, overrides: Sequence[str] = (), *before: str) -> str:
    """Trains a recipe in two processes, after the lines `before`."""
    call = f"main(Path({str(recipe)!r}), {list(overrides)!r})"
    return in_two(folder, "from foveate.train.run import main", *before, call)


def launched(config: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What `accelerate launch` with one of the repository's configurations has come to, in two processes on the CPU whose home is
    `folder`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "accelerate" / config)]
    command += ["--num_processes", "2", "--main_process_port", "0", *arguments]
    where = {"HOME": str(folder), "TORCH_EXTENSIONS_DIR": os.path.join(sys.prefix, "torch_extensions")}
    environment = {**os.environ, **where, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=ROOT, env=environment)


def _slow(recipe: Path, overrides: Sequence[str]) -> None:
    """A run whose steps, and whose writing of features, take their time, so that a kill meets them."""
    from foveate.data import features
    from foveate.train.trainer import FoveateTrainer

    put, step = features.put, FoveateTrainer.training_step

    def slow_put(*args: Any) -> None:
        put(*args)
        time.sleep(0.05)

    def slow_step(*args: Any) -> Any:
        time.sleep(0.05)
        return step(*args)

    features.put = slow_put  # type: ignore[assignment]
    FoveateTrainer.training_step = slow_step  # type: ignore[method-assign,assignment]
    main(recipe, overrides)


def killed(recipe: Path, overrides: Sequence[str], moment: Callable[[], bool]) -> None:
    """Trains a recipe and kills it, -9, at the moment."""
    process = multiprocessing.get_context("fork").Process(target=_slow, args=(recipe, overrides))
    process.start()
    while not moment():
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
