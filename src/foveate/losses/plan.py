"""Several losses in one step: the passes that they need between them. Pure functions of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.errors import FoveateError
from foveate.losses.base import Loss, Step


@dataclass(frozen=True)
class Plan:
    """The passes of a step, by the spelling of their reducers.

    students  those that are trained
    teachers  those without gradient, each once
    answers   the weight of the students' cross entropy
    pairs     (number of the loss, student, teacher) of what is compared
    """

    students: tuple[str, ...]
    teachers: tuple[str, ...]
    answers: float
    pairs: tuple[tuple[int, str, str], ...]


def plan_step(losses: Sequence[Loss], step: Step) -> Plan:
    """What a step with these losses runs. One of them at most chooses its students; without it they are the schedule's."""
    chooser = next((loss for loss in losses if loss.chooses), None)
    students = (step.reducers,) if chooser is None else chooser.students(step)
    pairs = [(i, student, loss.teacher(step, student)) for student in students for i, loss in enumerate(losses)]
    found = tuple((i, student, teacher) for i, student, teacher in pairs if teacher is not None)
    teachers = tuple(dict.fromkeys(teacher for _, _, teacher in found))
    return Plan(students, teachers, 1.0 if chooser is None else chooser.answers, found)


def check_together(losses: Sequence[Loss], schedule: Sequence[str]) -> None:
    """Raises FoveateError where losses do not go together, or with the reducers that a stage's schedule names."""
    names = [loss.name for loss in losses]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise FoveateError(f"{double[0]} stands among the losses twice; leave one out")
    choosing = [loss.name for loss in losses if loss.chooses]
    if len(choosing) > 1:
        raise FoveateError(f"{' and '.join(choosing)} each say which passes a step trains; leave one of them out")
    for loss in losses:
        for reducers in schedule:
            loss.check(reducers)
    if not choosing and losses and all(reducers == "none" for reducers in schedule):
        raise FoveateError(
            f"{' and '.join(names)} compare a pass on fewer tokens with one on all of them, but in this stage every pass has all: give the "
            "stage `reducers`"
        )
