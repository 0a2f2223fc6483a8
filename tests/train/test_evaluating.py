"""Questions in the middle of training: figures in the log, the training as it would be without them, and the best weights kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.train.processes import train_in_two
from tests.train.test_run import ONE, Write, weights
from tests.train.tiny_training import RECIPE

import foveate
from foveate.engine.run import RUN
from foveate.errors import FoveateError
from foveate.evaluation.asking import Asked, answered, limited
from foveate.evaluation.samples import Task
from foveate.evaluation.tasks import load_task
from foveate.inference import answering, loaded
from foveate.train import evaluating
from foveate.train.evaluating import Examiner, scored
from foveate.train.recipe import load_recipe
from foveate.train.run import main
from foveate.train.trainer import FoveateTrainer

CLOCK = ("seconds", "images_per_s", "evaluation_seconds")


def task(root: Path, more: str = "") -> str:
    return f"{root}/data.json:metric=anls,images={root}/images{more}"


def asking(root: Path, stage: int = 0, every: int = 2, more: str = "limit: 6") -> str:
    return f"stages.{stage}.evaluate={{tasks: '{task(root)}', every: {every}, {more}}}"


def rows(final: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in found]


def unasked(final: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "evaluation"} for row in rows(final)]


def asked_of(final: Path) -> dict[int, dict[str, dict[str, float]]]:
    return {row["step"]: row["evaluation"] for row in rows(final) if "evaluation" in row}


def said(recipe: Path, folder: str, reducers: str = "") -> list[str]:
    """The answers of a model that was saved, by the way of `foveate bench`."""
    model, processor, _ = loaded(folder, None, "", None)
    asked = Asked.of(processor, limited(load_task(task(recipe.parent), False), 6), 64)
    with answering(model):
        return answered(model, processor, asked, foveate.reducers.parse(reducers)).texts


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The answers of each evaluation."""
    found = []

    def noted(task: Task, texts: list[str]) -> dict[str, float]:
        found.append(texts)
        return scored(task, texts)

    monkeypatch.setattr(evaluating, "scored", noted)
    return found


# ---- the training is what it is without questions --------------------------------------------------------------------------------------


def test_nothing_of_the_training_changes(recipe_file: Write, root: Path) -> None:
    """Dropout draws the same numbers, and schedules have their reducers, with questions under these and under others."""
    plain = main(recipe_file("not-asked"), ["log_steps=1"])
    own = ["", ", reducers: 'uniform:keep=0.5'", ", reducers: none"]
    asked = main(
        recipe_file("asked"), ["log_steps=1", *(asking(root, stage, 1 + stage, f"limit: 4{more}") for stage, more in enumerate(own))]
    )
    assert unasked(asked) == rows(plain)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(asked).items())
    found = [(row["stage"], row["step"]) for row in rows(asked) if "evaluation" in row]
    assert found == [*(("pretrain", s) for s in range(1, 7)), *(("grow", s) for s in (2, 4, 6)), *(("all", s) for s in (3, 5))]


def test_after_questions_the_model_is_as_it_was(recipe_file: Write, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examine, seen = Examiner.examine, []

    def noted(self: Examiner, model: Any, switch: Any, tell: Any) -> Any:
        def state() -> tuple[Any, ...]:
            run = getattr(model.model, RUN, None)
            return model.training, all(m.training for m in model.modules()), None if run is None else foveate.reducers.spell(run.reducers)

        before, random = state(), torch.get_rng_state()
        found = examine(self, model, switch, tell)
        assert state() == before
        assert torch.equal(random, torch.get_rng_state())
        seen.append(before)
        return found

    monkeypatch.setattr(Examiner, "examine", noted)
    scheduled = "stages.0.reducers=[{share: 1/3, reducer: none}, {share: 2/3, reducer: 'vcc:layer=1,stride=4'}]"
    main(recipe_file("as-it-was", ONE), [scheduled, asking(root, every=1, more="limit: 3, reducers: 'uniform:keep=0.5'")])
    assert seen == [(True, True, None), (True, True, "vcc:layer=1,stride=4"), (True, True, "vcc:layer=1,stride=4")]


def test_seconds_are_those_of_training(recipe_file: Write, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    examine = Examiner.examine

    def slow(self: Examiner, *args: Any) -> Any:
        now[0] += 100
        return examine(self, *args)

    monkeypatch.setattr(Examiner, "examine", slow)
    monkeypatch.setattr("foveate.train.trainer.time", SimpleNamespace(monotonic=lambda: now[0]))
    final = main(recipe_file("seconds", ONE), [asking(root, every=1)])
    logged = [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]
    assert [row["seconds"] for row in logged] == [0.0, 0.0, 0.0]
    assert all(row["evaluation_seconds"] > 0 for row in logged)


# ---- the figures -----------------------------------------------------------------------------------------------------------------------


LEARNING = ["stages.0.train={bridge: true, lm: true}", "stages.0.steps=6"]


@pytest.mark.parametrize("reducers", ["", "uniform:keep=0.5"])
def test_answers_are_those_of_a_bench(recipe_file: Write, root: Path, heard: list[list[str]], reducers: str) -> None:
    recipe, more = recipe_file(f"figures-{len(reducers)}", ONE), f", reducers: '{reducers}'" if reducers else ""
    final = main(recipe, [*LEARNING, asking(root, every=6, more=f"limit: 6{more}")])
    assert heard == [said(recipe, str(final), reducers)]
    assert any(heard[0])


def test_the_reducer_of_the_moment(recipe_file: Write, root: Path, heard: list[list[str]]) -> None:
    recipe = recipe_file("moment", ONE)
    final = main(recipe, [*LEARNING, "stages.0.reducers=[{share: 1, reducer: 'uniform:keep=0.1'}]", asking(root, every=6)])
    assert heard == [said(recipe, str(final), "uniform:keep=0.1")]
    assert heard != [said(recipe, str(final), "none")]


def test_several_tasks_by_family(recipe_file: Write, root: Path) -> None:
    tasks = f"['scenes:count=2,size=32', '{task(root, ',name=own')}']"
    final = main(recipe_file("tasks", ONE), [f"stages.0.evaluate={{tasks: {tasks}, every: 9, limit: 5}}"])
    (found,) = asked_of(final).values()
    assert list(found) == ["scenes", "own"]
    assert {"mean accuracy", "accuracy/presence"} <= set(found["scenes"])


def test_two_processes_have_the_same_figures(recipe_file: Write, root: Path, tmp_path: Path) -> None:
    more = [f"model.text={root}/lm-plain", "stages.0.train={bridge: true, lm: true}", "stages.0.steps=4"]
    more.append(asking(root, every=2, more="limit: 7, batch_size: 2, keep_best: anls"))
    plain, recipe = main(recipe_file("asked-one", ONE), more), recipe_file("asked-two", ONE)
    train_in_two(tmp_path, recipe, more)
    both = asked_of(recipe.parent / "asked-two" / "final")
    assert list(both) == [2, 4]
    for step, figures in asked_of(plain).items():
        assert both[step]["data"] == pytest.approx(figures["data"], abs=1e-6)
    assert (recipe.parent / "asked-two" / "best" / "complete").is_file()


# ---- the best ---------------------------------------------------------------------------------------------------------------------------


def rated(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
    """Evaluations find these values at these steps."""
    examine = FoveateTrainer._ask
    step = [0]

    def ask(self: FoveateTrainer) -> Any:
        step[0] = self.state.global_step
        return examine(self)

    monkeypatch.setattr(FoveateTrainer, "_ask", ask)
    monkeypatch.setattr(evaluating, "scored", lambda task, texts: {"anls": values.get(step[0], 0.0)})


BEST = ["stages.0.lr_schedule=constant", "stages.0.train={bridge: true, lm: {lora: {rank: 2, dropout: 0.1}}}", "stages.0.save_steps=2"]


def test_the_best_model_is_kept(recipe_file: Write, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = main(recipe_file("short", ONE), [*BEST, "stages.0.steps=3"])
    rated(monkeypatch, {1: 10, 2: 5, 3: 30, 4: 30})
    recipe = recipe_file("best", ONE)
    final = main(recipe, [*BEST, "stages.0.steps=5", asking(root, every=1, more="limit: 3, keep_best: anls, reducers: 'uniform:keep=0.5'")])
    best = final.parent / "best"
    note = {"stage": "only", "step": 3, "figure": "anls", "value": 30, "reducer": "uniform:keep=0.5"}
    assert json.loads((best / "best.json").read_text()) == note
    assert all(torch.equal(value, weights(short)[name]) for name, value in weights(best).items())
    assert weights(best).keys() == weights(short).keys()
    assert json.loads((best / "foveate.json").read_text())["reducers"]
    assert not list((final.parent / "0-only").glob("best-*"))
    loaded(str(best), None, "", None)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_the_best_is_the_same_if_the_run_was_stopped(recipe_file: Write, root: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    rated(monkeypatch, {1: 10, 3: 30, 5: 20})
    overrides = [*BEST, "stages.0.steps=6", asking(root, every=1, more="limit: 3, keep_best: anls")]
    whole = main(recipe_file("best-whole", ONE), overrides)
    recipe, step = recipe_file(f"best-stopped-{stop}", ONE), FoveateTrainer.training_step

    def stopping(self: FoveateTrainer, *args: Any) -> Any:
        if self.state.global_step == stop:
            raise Stopped
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FoveateTrainer, "training_step", stopping)
        with pytest.raises(Stopped):
            main(recipe, overrides)
    torn = recipe.parent / recipe.stem / "0-only" / "best-99"  # as a kill leaves it
    torn.mkdir()
    again = main(recipe, overrides)
    assert rows(again) == rows(whole)
    for folder in ("best", "final"):
        one, other = weights(whole.parent / folder), weights(again.parent / folder)
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert (again.parent / "best" / "best.json").read_text() == (whole.parent / "best" / "best.json").read_text()


def test_questions_may_change_when_a_run_goes_on(recipe_file: Write, root: Path) -> None:
    recipe = recipe_file("other-questions", ONE)
    main(recipe, [asking(root)])
    main(recipe, [asking(root, every=1)])
    main(recipe)


# ---- refused ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluate", "reason"),
    [
        ("{tasks: nowhere.json, every: 2}", "stage only: no such task: nowhere.json"),
        (
            "{tasks: '{task}', every: 2, keep_best: accuracy}",
            r"stage only: evaluate.keep_best: no figure is called 'accuracy'; there are .*anls",
        ),
        ("{tasks: ['{task}', '{task}'], every: 2}", r"stage only: evaluate.tasks: each task needs a name of its own"),
        ("{tasks: '{task}', every: 0}", r"stages\.0\.evaluate\.every"),
        ("{tasks: [], every: 2}", r"stages\.0\.evaluate\.tasks"),
        ("{tasks: '{task}', every: 2, limits: 3}", r"stages\.0\.evaluate\.limits: unknown key, did you mean limit\?"),
        ("{tasks: '{task}', every: 2, reducers: 'fastvv'}", r"stages\.0\.evaluate\.reducers"),
        ("{tasks: '{task}', every: 2, reducers: 'fastv:layer=2,keep=0.5'}", r"stage only: fastv.*no decoder layer 2"),
    ],
)
def test_what_cannot_be_asked_is_refused(recipe_file: Write, root: Path, evaluate: str, reason: str) -> None:
    with pytest.raises(FoveateError, match=reason):
        main(recipe_file("not-possible", ONE), ["stages.0.evaluate=" + evaluate.replace("{task}", task(root))])
    assert not (root / "not-possible" / "0-only").exists()


def test_reducers_of_questions_are_checked_with_those_of_the_schedule(recipe_file: Write, root: Path) -> None:
    stage = load_recipe(recipe_file("spelled", RECIPE), [asking(root, 1, more="reducers: 'uniform:keep=0.5'")]).stages[1]
    assert stage.spelled == ["vcc:layer=1,stride=4", "none", "random:keep=0.5", "uniform:keep=0.5"]
    assert isinstance(load_task(task(root), False), Task)
