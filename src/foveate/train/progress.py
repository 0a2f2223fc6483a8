"""What is shown of a stage under way: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from foveate.tokens import ImagePlan
from foveate.train.align import Align
from foveate.train.passes import Passes
from foveate.train.schedule import Part

QUIET_EVERY = 10.0  # seconds between lines where there is no terminal


@dataclass
class StageInfo:
    """What the trainer needs to know of the stage beside the arguments of the Trainer. `image`: what an image becomes, as far as that is
    known before any is seen, `cached`: whether the tower's features are read instead of made, `sources`: names of what is mixed, where
    there are several, `align`: its loss, where no language model runs, `passes`: those of a step where there are several."""

    index: int
    count: int
    name: str
    steps: int
    parts: Sequence[Part]
    layers: int
    image: ImagePlan
    bf16_copy: bool = False
    cached: bool = False
    sources: Sequence[str] = ()
    align: Align | None = None
    passes: Passes | None = None


class ProgressLine(TrainerCallback):
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, stage: StageInfo, batch_size: int, visual_tokens: Callable[[], list[int]]) -> None:
        self.stage, self.batch_size, self.visual_tokens = stage, batch_size, visual_tokens
        self.loss: float | None = None
        self._bar: Progress | None = None
        self._task: Any = None
        self._start = self._last = 0.0
        self._first = 0

    def announce(self, done: int) -> None:
        going_on = f", going on from step {done}" if done else ""
        print(f"{self._name}: {self.stage.steps} steps of {self.batch_size} samples{going_on}", file=sys.stderr, flush=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = self._last = time.monotonic()
        self._first = state.global_step
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[now]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self.stage.steps, completed=state.global_step, now="")

    @property
    def _name(self) -> str:
        return f"stage {self.stage.index + 1}/{self.stage.count} {self.stage.name}"

    def _now(self, step: int) -> tuple[str, float]:
        rate = (step - self._first) * self.batch_size / max(time.monotonic() - self._start, 1e-9)
        counts = self.visual_tokens()
        tokens = f"{counts[0]}" if len(set(counts)) == 1 else f"{max(counts)}→{min(counts)}"
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        return f"{tokens} tokens/image, {rate:.1f} samples/s{loss}", rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            now = time.monotonic()
            if now - self._last > 0.2 or state.global_step == self.stage.steps:
                self._last = now
                self._bar.update(self._task, completed=state.global_step, now=self._now(state.global_step)[0])
        elif time.monotonic() - self._last > QUIET_EVERY:
            self._last = time.monotonic()
            text, rate = self._now(state.global_step)
            left = (self.stage.steps - state.global_step) * self.batch_size / rate
            print(f"{self._name}: step {state.global_step}/{self.stage.steps}, {text}, {left:.0f} s left", file=sys.stderr, flush=True)

    @contextmanager
    def beside(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A function that is told how much more is done of something beside training, whose time is not that of the steps."""
        begun = last = time.monotonic()
        done = 0
        task = None if self._bar is None else self._bar.add_task(f"{self._name}: {what}", total=total, now="")

        def tell(more: int) -> None:
            nonlocal last, done
            done += more
            if self._bar is not None and task is not None:
                self._bar.update(task, completed=done)
            elif time.monotonic() - last > QUIET_EVERY:
                last = time.monotonic()
                print(f"{self._name}: {what}, {done} of {total}", file=sys.stderr, flush=True)

        try:
            yield tell
        finally:
            if self._bar is not None and task is not None:
                self._bar.remove_task(task)
            self._start += time.monotonic() - begun

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
