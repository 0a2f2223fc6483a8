"""A schedule of reducers for anybody's Trainer: that of transformers, those that inherit from it such as TRL's, and Foveate's own.

    schedule = foveate.ScheduleCallback([("1/3", "vcc:layer=2,stride=8"), ("1/3", "vcc:layer=2,stride=2"), ("1/3", "none")])
    trainer = SFTTrainer(model, ..., callbacks=[schedule])
    with schedule:
        trainer.train()

The reducer is a function of the optimiser step alone (`foveate.train.schedule`): gradients may be accumulated over any number of
micro-batches, and a run that is resumed from a checkpoint goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from types import TracebackType
from typing import Any, Self

from torch import nn
from transformers import TrainerCallback

from foveate.engine.attach import attach
from foveate.engine.run import Run
from foveate.errors import FoveateError
from foveate.probes.watched import Watched
from foveate.reducers import Reducer, before_processor, parse, spell
from foveate.train.schedule import NONE, Part, reducer_at

STEP = "step"
Reducers = str | Reducer | Sequence[Reducer] | None


class ScheduleCallback(TrainerCallback):
    """Attaches to a Trainer's model, before each optimiser step, the reducer that the schedule names for it.

    schedule: parts in their order. A part is a pair (share of the optimiser steps, reducer), or written as in a recipe:
        {"share": "1/3", "reducer": "vcc:layer=2,stride=8"}, or {"share": ..., "cycle": [...]} for several that take turns step by step.
        Shares are numbers or fractions such as "1/3" and add up to 1. A reducer is what `attach` takes: a spelling, a Reducer, a list of
        them, None or "none". One reducer in place of parts is for all steps.
    evaluation: what is attached while the model is in evaluation mode (`model.eval()`) in the middle of training: "step", the reducer of
        the step that was made last, or one reducer for the whole training, "none" for all tokens.
    record: has the last pass readable in `run`, whatever the reducer, none among them; `log` does so too.
    log: adds to each line of the Trainer's log `reducer` and `visual_tokens_per_layer` (of an image, the mean over the last forward pass
        that had any). They stand in `trainer.state.log_history`, `trainer_state.json` and what is printed.

    The model is what the Trainer trains, also in PEFT's or accelerate's wrapping. At the end of `train` it is left as it was; a later
    `trainer.evaluate()` sees all tokens. **Exceptions are not told to callbacks**: leave the `with` block of the callback, or call
    `detach`, to have the model as it was after one, too; the next `train` begins anew in either case.

    Raises FoveateError for what is no schedule, and before the first step for reducers that the model cannot take, of any part.
    """

    def __init__(
        self,
        schedule: Reducers | Sequence[Part | Mapping[str, Any] | tuple[Any, Any]],
        *,
        evaluation: Reducers = STEP,
        log: bool = True,
        record: bool = False,
    ) -> None:
        self._reducers: dict[str, list[Reducer]] = {NONE: []}
        self.parts = self._read(schedule)
        self._evaluation = None if evaluation == STEP else self._name(evaluation)
        self._log, self._record = log, log or record
        self.current = NONE
        self._of_step = NONE
        self._model: nn.Module | None = None
        self._run: Run | None = None
        self._mode: Watched | None = None

    def _read(self, schedule: Any) -> list[Part]:
        whole = schedule is None or isinstance(schedule, str | Reducer)
        if whole or (schedule and all(isinstance(one, Reducer) for one in schedule)):
            return [Part(Fraction(1), (self._name(schedule),))]
        parts = []
        for given in schedule:
            share, cycle = _turns(given)
            parts.append(Part(_fraction(share), tuple(self._name(reducer) for reducer in cycle)))
        total = sum((part.share for part in parts), Fraction(0))
        if parts and total != 1:
            shares = " + ".join(str(part.share) for part in parts)
            raise FoveateError(f"the shares of the schedule must add up to 1, but {shares} = {total} (fractions such as '1/3' are exact)")
        return parts

    def _name(self, given: Reducers) -> str:
        """The spelling by which the reducers are known from here on, and logged: as it was given, or else the canonical one, which a method
        of the user's own has as well."""
        found: Any = parse(given or "") if given is None or isinstance(given, str) else [given] if isinstance(given, Reducer) else given
        if not isinstance(found, Sequence) or not all(isinstance(one, Reducer) for one in found):
            raise FoveateError(f"{given!r} is no reducer; write a spelling such as 'vcc:layer=2,stride=8', a Reducer or a list of Reducers")
        if before := before_processor(found):
            raise FoveateError(
                f"{spell(before)!r} acts on the images, in front of the processor, where a Trainer's callback cannot reach: prepare the "
                "images in the data collator by foveate.reducers.prepare"
            )
        name = given.strip() if isinstance(given, str) and found else spell(found)
        self._reducers[name] = list(found)
        return name

    @property
    def run(self) -> Run | None:
        """What is attached, None before and after training and, without `log` or `record`, where the reducer is none."""
        return self._run

    # ---- what the Trainer tells

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.detach()
        for reducers in self._reducers.values():
            attach(model, reducers, record="none").detach()  # one that does not fit is found now, not when its part begins
        self._model = model
        if self._evaluation is not None:
            self._mode = Watched(model, "train", self._set_mode)
        self._go_to(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._go_to(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not self._log or self._run is None or "train_runtime" in logs:
            return
        shown: dict[str, Any] = {"reducer": self.current}
        if self._run.passes:
            seen = self._run.last
            shown["visual_tokens_per_layer"] = [round(tokens / seen.images, 2) for tokens in seen.visual_tokens]
        logs.update(shown)
        state.log_history[-1].update(shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()

    # ---- what is attached

    def _go_to(self, state: Any) -> None:
        last = state.max_steps - 1  # a finished run that is resumed begins after its last step
        self._of_step = reducer_at(self.parts, min(state.global_step, last), state.max_steps)
        self._switch()

    def _set_mode(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`model.train(mode)`: Trainers call it, or `eval`, before the model is used in another way than before."""
        result = watched.method(*args, **kwargs)
        self._switch()
        return result

    def _switch(self) -> None:
        """Hooks are only changed when the reducer changes."""
        assert self._model is not None
        name = self._of_step if self._evaluation is None or self._model.training else self._evaluation
        if name == self.current and self._run is not None:
            return
        self._drop()
        if self._record or name != NONE:
            self._run = attach(self._model, self._reducers[name], record="last" if self._record else "none")
        self.current = name

    @contextmanager
    def away(self) -> Iterator[None]:
        """The model is bare inside of the block, and has the reducer of the moment again after it."""
        self._drop()
        try:
            yield
        finally:
            self._switch()

    def _drop(self) -> None:
        if self._run is not None:
            self._run.detach()
        self._run, self.current = None, NONE

    def detach(self) -> None:
        """Leaves the model as it was. Does nothing where nothing is attached."""
        if self._mode is not None:
            self._mode.remove()
        self._drop()
        self._mode = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()


def _turns(given: Any) -> tuple[Any, Sequence[Any]]:
    """(share, the reducers that take turns) of one part."""
    if isinstance(given, Part):
        return given.share, given.cycle
    if isinstance(given, Mapping) and set(given) == {"share", "reducer"}:
        return given["share"], [given["reducer"]]
    if isinstance(given, Mapping) and set(given) == {"share", "cycle"} and given["cycle"] and not isinstance(given["cycle"], str):
        return given["share"], given["cycle"]
    if isinstance(given, tuple | list) and len(given) == 2:
        return given[0], [given[1]]
    raise FoveateError(
        f"{given!r} is no part of a schedule; write ('1/3', 'vcc:layer=2,stride=8'), or a mapping with `share` and either `reducer` or "
        "`cycle`"
    )


def _fraction(share: Any) -> Fraction:
    try:
        found = Fraction(str(share))
    except (ValueError, ZeroDivisionError):
        found = Fraction(0)
    if not 0 < found <= 1:
        raise FoveateError(f"{share!r} is no share of the steps: write a number or a fraction such as '1/3', above 0 and at most 1")
    return found
