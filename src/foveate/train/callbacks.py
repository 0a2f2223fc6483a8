"""What happens around a training step: when to log, to save, to validate and to ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from foveate.train.loading import Loading
from foveate.train.settings import Keep


@dataclass(frozen=True)
class Held:
    """What loads the samples that are held back from training, and every how many steps their loss is logged."""

    loading: Loading
    every: int


class Flow(TrainerCallback):
    """When to log and when to save. The Trainer's own saves once more at the very end and keeps its intervals in the checkpoint."""

    ask_every: int | None = None

    def __init__(self, log_steps: int, save_steps: int, steps: int, held: Held | None) -> None:
        self.log_steps, self.save_steps, self.steps, self.held = log_steps, save_steps, steps, held

    def validates(self, step: int) -> bool:
        return self.held is not None and (step % self.held.every == 0 or step == self.steps)

    def asks(self, step: int) -> bool:
        return self.ask_every is not None and (step % self.ask_every == 0 or step == self.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        control.should_log = step == 1 or step % self.log_steps == 0 or step == self.steps or self.validates(step) or self.asks(step)
        control.should_save = step % self.save_steps == 0 and step < self.steps


class LetGo(TrainerCallback):
    """Leaves of what grown tokens keep as much as there shall be after so many optimiser steps: a resumed run goes on in the middle."""

    def __init__(self, keep: Keep) -> None:
        self.keep = keep

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if model.config.grown is not None:
            model.anneal_growth(self.keep.left(state.global_step))

    on_train_begin = on_step_end = on_step_begin
