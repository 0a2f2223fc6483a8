"""A process of the benchmark: `foveate train` of one recipe, which waits before every block of steps until it is told to go on.

    python benchmarks/training_step/work.py RECIPE.json --threads 2 [--without rows memory]

It reads lines `steps N` or `parts N` and answers each, after N optimiser steps, with a line of JSON: seconds by the clock, and of all
threads and loaders together, and the peak of resident memory; after `parts` also what each part of these steps took. It runs in older
trees too, so that it knows of the library only `train`, `load_recipe` and the class of the trainer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import TrainerCallback

import foveate.train.run as run
from foveate.train.recipe import load_recipe
from foveate.train.trainer import FoveateTrainer

BETWEEN, COPIES = "trainer between its parts", "weights' copies, embeddings"
TOWER, BRIDGE, DECODER, HEAD = "tower", "bridge, forward", "language model, forward", "head and loss, forward"
HEAD_BACK, DECODER_BACK, BRIDGE_BACK = "head and loss, backward", "language model, backward", "bridge, backward; casts of gradients"
CLIPPING, OPTIMISER, DATA = "clipping", "optimiser", "waiting for data"


class Clock:
    """Seconds by part, by the clock and of this process' threads: what passes between two marks belongs to the later one's part."""

    def __init__(self) -> None:
        self.on = False
        self.parts: dict[str, list[float]] = {}
        self._last = (0.0, 0.0)

    def start(self) -> None:
        self.on, self.parts, self._last = True, defaultdict(lambda: [0.0, 0.0]), now()

    def mark(self, part: str) -> None:
        if self.on:
            moment = now()
            for kind in (0, 1):
                self.parts[part][kind] += moment[kind] - self._last[kind]
            self._last = moment

    def watch(self, model: Any) -> None:
        """Marks where the parts of a forward pass begin and end, and where gradients arrive between them in the backward pass."""
        core = model.model

        def when(module: Any, before: str, after: str) -> None:
            module.register_forward_pre_hook(lambda *_: self.mark(before))
            module.register_forward_hook(lambda *_: self.mark(after))

        def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self._mark_gradient(kwargs["inputs_embeds"], DECODER_BACK)
            self.mark(COPIES)

        def leave(module: Any, args: Any, output: Any) -> None:
            self._mark_gradient(output.last_hidden_state, HEAD_BACK)
            self.mark(DECODER)

        when(core.vision_tower, COPIES, TOWER)
        when(core.bridge, COPIES, BRIDGE)
        decoder = core.causal_lm.get_decoder()
        decoder.register_forward_pre_hook(enter, with_kwargs=True)
        decoder.register_forward_hook(leave)

    def _mark_gradient(self, state: Tensor, part: str) -> None:
        if state.requires_grad:
            state.register_hook(lambda gradient: self.mark(part))


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def used() -> tuple[float, float]:
    """Seconds by the clock, and of the processors, of this process and those that load its data."""
    me = psutil.Process()
    cpu = 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            cpu += sum(process.cpu_times()[:2])
    return time.perf_counter(), cpu


def peak() -> int:
    """Bytes of resident memory at its highest, without the processes that load data."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


class Blocks(TrainerCallback):
    """Waits where a step begins whose batch is there: between two such moments lies one step with all that belongs to it."""

    def __init__(self, clock: Clock, model: Any) -> None:
        self.clock, self.model = clock, model
        self._left = self._steps = 0
        self._began = used()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.mark(BETWEEN)
        if not self._left:
            self._tell()
            kind, count = sys.stdin.readline().split()
            self._left = self._steps = int(count)
            self._began = used()
            if kind == "parts":
                self.clock.watch(self.model)
                self.clock.start()
        self._left -= 1

    def _tell(self) -> None:
        wall, cpu = (after - before for before, after in zip(self._began, used(), strict=True))
        parts = {part: [seconds / self._steps for seconds in spent] for part, spent in self.clock.parts.items()}
        print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak(), "parts": parts}), flush=True)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.clock.mark(CLIPPING)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.clock.mark(OPTIMISER)


class Watched(FoveateTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = Clock()
        self.add_callback(Blocks(self.clock, self.model))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.mark(BETWEEN)
        found = super().get_batch_samples(*args, **kwargs)
        self.clock.mark(DATA)
        return found

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.clock.mark(BRIDGE_BACK)
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.mark(BETWEEN)
        loss = super().compute_loss(*args, **kwargs)
        self.clock.mark(HEAD)
        return loss


def leave_out(savings: list[str]) -> None:
    """Trains without some of what the trainer saves by itself."""
    changed: Any = run
    if "rows" in savings:
        from foveate.train.supervised import SupervisedRows  # older trees have none

        changed.try_rows = lambda *args: SupervisedRows(None)
    if "memory" in savings:
        changed.kept_memory = lambda device: contextlib.nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--without", nargs="*", default=[], choices=["rows", "memory"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    leave_out(given.without)
    exchanged: Any = run
    exchanged.FoveateTrainer = Watched
    run.train(load_recipe(given.recipe))


if __name__ == "__main__":
    main()
