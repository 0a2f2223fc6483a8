"""The passes of a step whose stage has `losses`: one model, several reducers, some of them without gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engine.run import Run
from foveate.losses import Loss, Plan, Seen, Step, Whole, plan_step
from foveate.tokens import TokenMap
from foveate.train.schedule import NONE

ANSWERS = "answers"  # the students' cross entropy among the terms of the loss


@dataclass(frozen=True)
class Passes:
    """The losses of a stage with their weights, and what its steps are drawn by. samples: of an optimiser step, over all processes."""

    losses: Sequence[Loss]
    weights: Sequence[float]
    seed: int
    steps: int
    samples: int

    @cached_property
    def names(self) -> list[str]:
        """Of the terms that the loss is made of, in the order of the log."""
        return [ANSWERS, *(loss.name for loss in self.losses if loss.compares)]

    def plan(self, number: int, reducers: str) -> Plan:
        """The passes of optimiser step `number` (from 0), for which the schedule names `reducers`."""
        return plan_step(self.losses, Step(self.seed, number, self.steps, reducers))

    def whole(self, labels: Tensor, tokens: Tensor | int, processes: int) -> Whole:
        """What a micro-batch's terms are divided by. Gradients are means over the processes, so that each has its share of the step."""
        return Whole(labels, tokens / processes, self.samples / processes)

    def terms(
        self,
        plan: Plan,
        run: Run,
        attached: str,
        model: nn.Module,
        whole: Whole,
        forward: Callable[[], tuple[Tensor, Any]],
    ) -> dict[str, Tensor]:
        """The terms of a micro-batch's loss by name, weighted: they add up to it.

        run, attached  the model's attachment and the spelling of its reducers
        forward        calls the model on the micro-batch: (cross entropy of the answers, outputs)
        """
        taught: dict[str, Seen] = {}
        for teacher in plan.teachers:
            with torch.no_grad(), _evaluating(model), _under(run, attached, teacher):
                taught[teacher] = self._seen(run, forward()[1])
        terms: dict[str, Tensor] = {}
        for student in plan.students:
            with _under(run, attached, student):
                loss, outputs = forward()
            seen = self._seen(run, outputs)
            _add(terms, ANSWERS, plan.answers * loss)
            for number, of, teacher in plan.pairs:
                if of == student:
                    term = self.losses[number].between(seen, taught[teacher], whole)
                    _add(terms, self.losses[number].name, self.weights[number] * term)
        return terms

    def _seen(self, run: Run, outputs: Any) -> Seen:
        left: TokenMap | None = run.last.left if run.passes and run.last.maps else None
        return Seen(outputs["logits"], left)


def _add(terms: dict[str, Tensor], name: str, value: Tensor) -> None:
    terms[name] = terms[name] + value if name in terms else value


@contextmanager
def _under(run: Run, attached: str, wanted: str) -> Iterator[None]:
    run.passes = []  # a pass without images leaves no record
    with nullcontext() if wanted == attached else run.suspended() if wanted == NONE else run.instead(wanted):
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which nothing is drawn and no running mean moves; afterwards each module is as it was."""
    training: Mapping[nn.Module, bool] = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
