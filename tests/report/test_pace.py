"""Whether logs show that the machine was busy: made-up ones, whose steps take what they are made to take."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from foveate.evaluation.cells import Answer, Cell
from foveate.report.compared import Line, unrest
from foveate.report.pace import LIMIT, Clock, Pace, clock, paces, read_pace
from foveate.report.runs import Point, StageLog

STEPS = 60


def stage(
    name: str = "pretrain",
    slow: Callable[[int], float] = lambda step: 1.0,
    *,
    noise: float = 0.05,
    flops: float = 4e10,
    rate: float = 1e11,
    steps: int = STEPS,
    every: int = 1,
    reducers: Sequence[str] = ("none",),
    seed: int = 0,
) -> StageLog:
    """Steps of `flops` each, a tenth more or less, at `rate` FLOPs a second; step i takes `slow`(i) times as long. The first takes a
    second more. `reducers` take turns, a part of the steps each."""
    generator = random.Random(seed)
    seconds = done = 0.0
    points = []
    for step in range(1, steps + 1):
        work = flops * generator.uniform(0.9, 1.1)
        seconds += work / rate * slow(step) * generator.lognormvariate(0, noise) + (1.0 if step == 1 else 0.0)
        done += work
        if step % every == 0 or step == 1:
            points.append(Point(step, 1.0, seconds, done, 84.0, (84.0,) * 6, reducers[(step - 1) * len(reducers) // steps]))
    return StageLog(name, points, steps * 16)


def stretches(*stages: StageLog) -> list[float | None]:
    return [pace.stretch for pace in paces(stages)]


def of(**runs: list[StageLog]) -> Clock:
    return clock([(name, paces(log)) for name, log in runs.items()])


# ---- one log


@pytest.mark.parametrize(("noise", "steps"), [(0.0, 12), (0.07, 12), (0.1, 60), (0.15, 60), (0.15, 200)])
@pytest.mark.parametrize("seed", range(5))
def test_a_quiet_log_is_quiet(noise: float, steps: int, seed: int) -> None:
    (stretch,) = stretches(stage(noise=noise, steps=steps, seed=seed))
    assert stretch is not None
    assert 1.0 <= stretch <= LIMIT
    if noise == 0:
        assert stretch == pytest.approx(1.0)


@pytest.mark.parametrize(
    "slow",
    [
        lambda step: 2.0 if step > STEPS / 2 else 1.0,  # from the middle on
        lambda step: 2.0 if step <= STEPS / 3 else 1.0,  # at the beginning
        lambda step: 1.8 if step % 2 else 1.0,  # every other step
        lambda step: 3.0 if 20 <= step < 30 else 1.0,  # a while
        lambda step: 30.0 if step == 40 else 1.0,  # one long pause
        lambda step: 1.0 + 2 * step / STEPS,  # slower and slower
    ],
)
def test_a_busy_log_is_seen(slow: Callable[[int], float]) -> None:
    (stretch,) = stretches(stage(slow=slow))
    assert stretch is not None
    assert stretch > LIMIT
    found = of(a=[stage(slow=slow)], b=[stage("other")])
    assert not found.quiet
    assert f"a, pretrain: {stretch:.2f} times the seconds" in found.told
    assert found.told.startswith("Seconds are not compared, FLOPs are")


def test_the_stretch_is_how_much_longer_it_took() -> None:
    """A third of the steps at three times their seconds: 5/3 of what it would have taken; the first step does not count."""
    (stretch,) = stretches(stage(slow=lambda step: 3.0 if step > 2 * STEPS / 3 else 1.0, noise=0.0, flops=1.0, rate=1.0))
    assert stretch == pytest.approx(5 / 3, rel=0.03)


def test_reducers_have_paces_of_their_own() -> None:
    """Pooled steps do less work and take more seconds for it: no sign of a busy machine."""
    slow = [1.0] * 15 + [2.5] * 15 + [1.0] * 15 + [1.6] * 15
    log = stage(slow=lambda step: slow[step - 1], reducers=["none", "vcc:stride=8", "none", "vcc:stride=2"])
    found = paces([log])
    assert [pace.reducer for pace in found] == ["none", "vcc:stride=8", "vcc:stride=2"]
    assert found[0].stretch is not None
    assert found[0].stretch <= LIMIT
    assert len({pace.stretch for pace in found}) == 1  # the stage's


@pytest.mark.parametrize(
    "log",
    [
        stage(steps=8),  # the first does not count
        stage(steps=40, every=10),
        stage(steps=24, reducers=["none", "vcc:stride=8", "vcc:stride=4", "vcc:stride=2", "fastv", "tome"]),
    ],
)
def test_too_few_steps_cannot_tell(log: StageLog) -> None:
    assert set(stretches(log)) == {None}
    found = of(a=[log], b=[log])
    assert not found.quiet
    assert "a, pretrain: too few steps are logged to tell" in found.told


def test_what_is_logged_every_tenth_step_tells_as_well() -> None:
    quiet, busy = stage(steps=200, every=10), stage(steps=200, every=10, slow=lambda step: 2.0 if step > 100 else 1.0)
    assert (of(a=[quiet], b=[quiet]).quiet, of(a=[busy], b=[quiet]).quiet) == (True, False)


# ---- several logs


def test_a_steady_load_is_seen_only_where_another_run_did_the_same() -> None:
    """Twice the seconds in every step of one arm: its own log is even; the common fine-tuning tells."""
    few, many = stage(flops=2e10), stage(flops=4e10, seed=1)
    tuned, slow = stage("finetune"), stage("finetune", slow=lambda step: 2.0)
    assert of(few=[few, slow]).quiet
    found = of(few=[few, slow], many=[many, tuned])
    assert not found.quiet
    told = r"equal work took unequal time, finetune: 0\.8\d* s a step in few, 0\.4\d* s in many, a ratio of 2\.0\d"
    assert re.search(told, found.told)
    unseen = of(few=[few], many=[stage(slow=lambda step: 2.0)])  # nothing in common
    assert unseen.quiet
    assert "a load which was there evenly for the whole of one would not be seen" in unseen.told


def test_equal_work_in_equal_time_is_said() -> None:
    found = of(few=[stage(flops=2e10), stage("finetune")], many=[stage(), stage("finetune", noise=0.08)])
    assert found.quiet
    assert len(found.even) == 1
    assert "equal work took about as long (finetune: 0." in found.told
    assert re.search(r", a ratio of 1\.\d\d\)", found.told)


def test_a_load_throughout_both_runs_changes_no_ratio_and_is_not_seen() -> None:
    found = of(few=[stage(slow=lambda step: 2.0)], many=[stage(slow=lambda step: 2.0)])
    assert found.quiet


@pytest.mark.parametrize(
    "other",
    [
        {"stage": "finetune"},
        {"reducer": "vcc:stride=8"},
        {"layers": (84.0, 20.0)},
        {"flops": 1.01e10},
    ],
)
def test_other_work_is_not_compared(other: dict[str, object]) -> None:
    one = Pace("pretrain", "none", (84.0, 84.0), 1e10, 0.5, 1.05)
    two = replace(one, seconds=5.0)
    assert not clock([("a", [one]), ("b", [two])]).quiet
    found = clock([("a", [one]), ("b", [replace(two, **other)])])  # type: ignore[arg-type]
    assert (found.quiet, found.even) == (True, ())


@pytest.mark.parametrize(("seconds", "quiet"), [(0.5, True), (0.59, True), (0.61, False), (0.4, False), (0.45, True)])
def test_the_limit_is_one_in_both_directions(seconds: float, quiet: bool) -> None:
    one = Pace("pretrain", "none", (84.0,), 1e10, 0.5, 1.05)
    assert clock([("a", [one]), ("b", [replace(one, seconds=seconds, flops=1.004e10)])]).quiet == quiet


def test_a_run_without_paces_is_unknown() -> None:
    found = clock([("a", paces([stage()])), ("b", [])])
    assert "b: nothing is known of its pace" in found.told


def test_of_many_reasons_a_few_are_told() -> None:
    told = clock([(f"run {i}", []) for i in range(9)]).told
    assert told.count("nothing is known") == 3
    assert "and 6 more" in told


def test_paces_survive_json() -> None:
    found = paces([stage(), stage("short", steps=3)])
    assert [read_pace({**asdict(pace), "layers": list(pace.layers)}) for pace in found] == found


# ---- bench runs


def line(method: str, seconds: Sequence[float]) -> Line:
    answers = [Answer("q", "p", "", "yes", 1.0)]
    cells = [Cell("t", method, 0.5, i, method, answers, [8.0], {}, 0.0, second) for i, second in enumerate(seconds)]
    return Line(method, 0.5, cells, 100.0, 100.0, 100.0, None)


def test_seeds_of_a_method_are_equal_work() -> None:
    assert unrest([line("random", [3.0, 3.2, 3.5]), line("fastv", [9.0])]) == ""
    told = unrest([line("random", [3.0, 3.2, 3.5]), line("noise", [3.0, 6.0]), line("fastv", [9.0])])
    assert "equal work took unequal time (noise at keep 0.5, 2 seeds: 3.0 to 6.0 s)" in told
    assert unrest([line("random", [0.0, 3.0]), line("fastv", [9.0])]) == ""


def test_made_up_steps_scatter_as_they_should() -> None:
    """The tests above stand on it: rates of a log with noise differ, those of one without do not."""
    rates = []
    for noise in (0.0, 0.1):
        points = stage(noise=noise).points
        rates.append([(b.seconds - a.seconds) / (b.flops - a.flops) for a, b in pairwise(points)])
    assert max(rates[0]) == pytest.approx(min(rates[0]))
    assert max(rates[1]) > 1.2 * min(rates[1])
