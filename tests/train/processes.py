"""Training in processes of its own: two that train together, as under torchrun or by accelerate, or one that is killed."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from foveate.train.run import main

ROOT = Path(__file__).parents[2]
WARM = multiprocessing.get_context("forkserver")  # its server has imported what a training imports, which takes longer than tiny ones
WARM.set_forkserver_preload(["tests.train.processes", "foveate.model.assembly", "foveate.data.library", "transformers.trainer"])


def started(said: Path, work: Callable[..., object], *arguments: object, **environment: str) -> Any:
    """A process of its own, and of one thread, that leads a group, appends all that it writes to a file, and works with an environment."""
    process = WARM.Process(target=_alone, args=(said, environment, work, *arguments))
    process.start()
    return process


def _alone(said: Path, environment: dict[str, str], work: Callable[..., object], *arguments: object) -> None:
    os.setsid()
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()
    torch.set_num_threads(1)
    work(*arguments)


def stopped(process: Any) -> None:
    """Kills a started process and its data workers, at once and without a word."""
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def in_two(folder: Path, *lines: str) -> str:
    """Runs a script of these lines in two processes, as torchrun starts them, whose home is `folder`: what they wrote."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    said = folder / "two.txt"
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    each = [started(said, _script, folder, lines, RANK=str(rank), LOCAL_RANK=str(rank), **both) for rank in range(2)]
    for process in each:
        process.join(600)
    found, seen = said.read_text(), [process.exitcode for process in each]
    for process in each:
        if process.is_alive():
            stopped(process)
    said.unlink()
    assert seen == [0, 0], (seen, found[-3000:])
    return found


def _script(folder: Path, lines: Sequence[str]) -> None:
    Path.home = lambda: folder  # type: ignore[method-assign]
    exec("\n".join(lines), {"Path": Path, "torch": torch})
    # What has been done is tested, and not how an interpreter ends, in which torch's threads have been seen to abort.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def train_in_two(folder: Path, recipe: Path, overrides: Sequence[str] = (), *before: str) -> str:
    """Trains a recipe in two processes, after the lines `before`."""
    call = f"main(Path({str(recipe)!r}), {list(overrides)!r})"
    return in_two(folder, "from foveate.train.run import main", *before, call)


def launched(config: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What `accelerate launch` with one of the repository's configurations has come to, in two processes on the CPU whose home is
    `folder`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "accelerate" / config)]
    command += ["--num_processes", "2", "--main_process_port", "0", *arguments]
    extensions = Path(sys.prefix, "torch_extensions")
    for lock in extensions.glob("*/lock"):  # of a run that was killed as it compiled: torch would wait for it for ever
        lock.unlink()
    where = {"HOME": str(folder), "TORCH_EXTENSIONS_DIR": str(extensions)}
    environment = {**os.environ, **where, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=ROOT, env=environment)


def dying(moment: Callable[[], bool], act: Callable[..., Any]) -> Callable[..., Any]:
    """`act`, in a process that kills itself, -9, before or after it when the moment has come: whoever watched it might come too late."""

    def watched(*given: Any) -> Any:
        die(moment)
        result = act(*given)
        die(moment)
        return result

    return watched


def die(moment: Callable[[], bool]) -> None:
    if moment():
        os.kill(os.getpid(), signal.SIGKILL)


def _until(moment: Callable[[], bool], recipe: Path, overrides: Sequence[str]) -> None:
    from foveate.data import features
    from foveate.train.trainer import FoveateTrainer

    features.put = dying(moment, features.put)
    FoveateTrainer.training_step = dying(moment, FoveateTrainer.training_step)  # type: ignore[method-assign]
    main(recipe, overrides)


def killed(recipe: Path, overrides: Sequence[str], moment: Callable[[], bool]) -> None:
    """Trains a recipe, and kills it, -9, at the moment, between steps or where features are written."""
    killed_in(_until, moment, recipe, overrides)


def killed_in(work: Callable[..., object], *arguments: object) -> None:
    """Work in a process of its own, in the midst of which it kills itself."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
