"""The passes of a step whose stage has `losses`: one model, several reducers, some of them without gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engine.run import Run
from foveate.losses import Loss, Plan, Seen, Step, Whole, plan_step
from foveate.reducers import parse, visual_tokens
from foveate.tokens import TokenMap
from foveate.train.order import seed_of
from foveate.train.schedule import COUNTED, NONE, spread, steps_by_reducer
from foveate.train.settings import Recipe, Stage
from foveate.train.stages import Setup

ANSWERS = "answers"  # the students' cross entropy among the terms of the loss
LOOKED_AT = 2**12  # steps under one reducer of a schedule, where their passes are told beforehand


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


def passes_of(recipe: Recipe, stage: Stage, steps: int) -> Passes | None:
    """The passes of a stage's steps, where it has losses over several of them."""
    if not stage.losses:
        return None
    weights = [term.weight for term in stage.losses]
    return Passes(stage.terms, weights, seed_of(recipe.seed, stage.name, "losses"), steps, stage.batch_size)


@dataclass(frozen=True)
class Pass:
    """One of the passes that a stage's steps make: its reducers, whether it is trained, and the share of the steps that make it."""

    reducers: str
    trained: bool = True
    share: Fraction = Fraction(1)


def passes_made(setup: Setup, steps: int, passes: Passes | None) -> tuple[list[Pass], bool]:
    """The passes that so many steps of a stage make, and whether they are those of all of them. Where more kinds of steps are drawn than
    are counted, some stand for all, evenly spread by their visual tokens."""
    found, whole = list[Pass](), True
    for (share, reducers), numbers in zip(setup.slots, steps_by_reducer(setup.stage.parts, steps), strict=True):
        if passes is None:
            found.append(Pass(reducers, share=share))
            continue
        plans = [passes.plan(number, reducers) for number in spread(numbers or [0], LOOKED_AT)]
        kinds = Counter((plan.students, plan.teachers) for plan in plans)
        whole &= len(kinds) == 1 or (len(kinds) <= COUNTED and len(numbers) <= LOOKED_AT)
        if len(kinds) > COUNTED:
            tokens = {kind: sum(_tokens(setup, spelled) for spelled in (*kind[0], *kind[1])) for kind in kinds}
            kinds = Counter(spread(sorted(kinds.elements(), key=tokens.__getitem__)))
        shares: dict[tuple[str, bool], Fraction] = {}
        for (students, teachers), count in kinds.items():
            for made in [*((student, True) for student in students), *((teacher, False) for teacher in teachers)]:
                shares[made] = shares.get(made, Fraction(0)) + share * Fraction(count, kinds.total())
        found += [Pass(*made, shares[made]) for made in sorted(shares, key=lambda made: not made[1])]
    return found, whole


def _tokens(setup: Setup, reducers: str) -> int:
    """Visual tokens of an image, all decoder layers together."""
    return sum(visual_tokens(parse(reducers), setup.image.visual, setup.config.get_text_config().num_hidden_layers))


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
