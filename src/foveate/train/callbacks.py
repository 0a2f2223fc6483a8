"""What happens around a training step: the reducer of the moment, and when to log, to save and to validate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainerCallback

from foveate.engine.attach import attach
from foveate.engine.run import Run
from foveate.reducers import parse
from foveate.train.loading import Loading
from foveate.train.schedule import NONE, Part, reducer_at


@dataclass(frozen=True)
class Held:
    """What loads the samples that are held back from training, and every how many steps their loss is logged."""

    loading: Loading
    every: int


class ReducerSwitch(TrainerCallback):
    """Before each optimiser step, the reducer that the schedule names for it; hooks are only changed when it changes."""

    def __init__(self, model: nn.Module, parts: Sequence[Part], steps: int) -> None:
        self.model, self.parts, self.steps = model, parts, steps
        self.current = NONE
        self._run: Run | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.switch(reducer_at(self.parts, state.global_step, self.steps))

    def switch(self, reducer: str) -> None:
        if reducer == self.current:
            return
        if self._run is not None:
            self._run.detach()
            self._run = None
        if reducer != NONE:
            self._run = attach(self.model, parse(reducer), record="none")
        self.current = reducer


class Flow(TrainerCallback):
    """When to log and when to save. The Trainer's own saves once more at the very end and keeps its intervals in the checkpoint."""

    def __init__(self, log_steps: int, save_steps: int, steps: int, held: Held | None) -> None:
        self.log_steps, self.save_steps, self.steps, self.held = log_steps, save_steps, steps, held

    def validates(self, step: int) -> bool:
        return self.held is not None and (step % self.held.every == 0 or step == self.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        control.should_log = step == 1 or step % self.log_steps == 0 or step == self.steps or self.validates(step)
        control.should_save = step % self.save_steps == 0 and step < self.steps
