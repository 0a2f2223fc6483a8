"""Stages that grow the bridge and keep the function at first: let go of step by step, also where the run was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.train.test_resume import Stopped, assert_same, stop_after
from tests.train.test_run import ONE

from foveate.errors import FoveateError
from foveate.model import FoveateForConditionalGeneration
from foveate.train.plan import plan
from foveate.train.run import main

Write = Callable[..., Path]

GROWING = (
    ONE
    + """  - name: grow
    data: {{conversations: {root}/data.json, images: {root}/images}}
    image_size: 64
    bridge: {{scales: [[8, 2], [4, 2], [2, 1]], keep: {{steps: 4}}}}
    train: {{bridge: true, lm: true}}
    steps: 6
    batch_size: 4
    micro_batch: 2
    learning_rate: 1.0e-2
    save_steps: 2
  - name: after
    data: {{conversations: {root}/data.json, images: {root}/images}}
    steps: 1
    batch_size: 4
    learning_rate: 1.0e-2
"""
)


def left(final: Path) -> list[Any]:
    rows = [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]
    return [row.get("growth_left") for row in rows if row["stage"] == "grow"]


def kept(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["grown"]


def test_it_is_let_go_of_and_resumed_in_the_middle(recipe_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = main(recipe_file("growing", GROWING))
    assert left(whole) == [0.75, 0.5, 0.25, None, None, None]  # after each step
    assert kept(whole.parent / "1-grow" / "model") is None
    again = recipe_file("growing-again", GROWING)
    for calls in (3 + 5, 2):  # micro-batches: the first stage has 3, the second two a step
        with monkeypatch.context() as patched:
            stop_after(patched, calls)
            with pytest.raises(Stopped):
                main(again)
    assert_same(main(again).parent, whole.parent)


def test_it_changes_what_is_trained_and_stays_where_it_shall(recipe_file: Write) -> None:
    finals = {name: main(recipe_file(f"growing-{name}", GROWING), [f"stages.1.bridge.keep={keep}"]) for name, keep in (
        ("plain", "null"), ("whole", "{steps: 1000}"), ("stays", "{order: false}"),
    )}  # fmt: skip
    first = {}
    for name, final in finals.items():
        rows = [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]
        first[name] = next(row["loss"] for row in rows if row["stage"] == "grow")
    assert len(set(first.values())) == 3
    assert kept(finals["plain"]) is None
    assert kept(finals["whole"])["left"] == pytest.approx(0.994)
    assert left(finals["stays"]) == [1.0] * 6
    held = kept(finals["stays"])  # a stage that does not grow leaves it as it is
    assert (held["kept"], held["left"], held["scales"]) == (["positions", "keys"], 1.0, [[4, 2], [2, 1]])
    assert FoveateForConditionalGeneration.from_pretrained(finals["stays"]).config.grown == held


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.1.bridge.keep={positions: false, keys: false, order: false}"], "nothing is kept: set at least one of positions, keys"),
        (["stages.1.bridge.keep={step: 3}"], "unknown key, did you mean steps"),
        (["stages.2.bridge={scales: [[8, 2], [4, 2], [2, 1]], keep: {}}"], "stage after: `bridge.keep` says what grown tokens keep, but"),
        (["stages.0.bridge={scales: [[4, 2], [2, 1]], keep: {}}"], "stage only: `bridge.keep` says what grown tokens keep, but"),
        (["model.attn_implementation=flex_attention"], "stage grow: a growth that is kept needs an additive mask"),
    ],
)
def test_refused(recipe_file: Write, overrides: list[str], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        plan(recipe_file("growing-refused", GROWING), overrides)


@pytest.mark.parametrize("precision", ["bf16", "bf16-copy"])
def test_precisions(recipe_file: Write, precision: str) -> None:
    final = main(recipe_file(f"growing-{precision}", GROWING), [f"stages.1.precision={precision}", "stages.1.bridge.keep={}"])
    assert kept(final)["left"] == 1.0
