"""Two processes train on the same batches as one, and get the same losses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.train.processes import train_in_two

from foveate.errors import FoveateError
from foveate.train.order import Order, ProcessBatches, division
from foveate.train.run import main


@given(
    samples=st.integers(1, 50),
    per_process=st.integers(1, 6),
    processes=st.sampled_from([1, 2, 3]),
    accumulation=st.sampled_from([1, 2]),
    seed=st.integers(0, 3),
    grouped=st.booleans(),
)
def test_the_batch_of_a_step_does_not_depend_on_processes(
    samples: int, per_process: int, processes: int, accumulation: int, seed: int, grouped: bool
) -> None:
    batch, steps = per_process * processes * accumulation, 7
    sizes = np.arange(samples) % 5 if grouped else None
    order = Order(samples, batch, seed, "stage", sizes)
    streams = [list(ProcessBatches(order, steps, p, processes, accumulation)) for p in range(processes)]
    assert all(len(stream) == steps * accumulation == len(ProcessBatches(order, steps, 0, processes, accumulation)) for stream in streams)
    for step in range(steps):
        union = [i for stream in streams for micro in stream[step * accumulation : (step + 1) * accumulation] for i in micro]
        assert union == order.batch(step).tolist()
        assert len(union) == batch


@given(samples=st.integers(1, 60), batch=st.integers(1, 20), seed=st.integers(0, 3), grouped=st.booleans())
def test_an_epoch_has_every_sample(samples: int, batch: int, seed: int, grouped: bool) -> None:
    order = Order(samples, batch, seed, "stage", np.arange(samples) % 7 if grouped else None)
    steps = -(-samples // batch)
    seen = np.concatenate([order.batch(step) for step in range(steps)])
    assert len(seen) == steps * batch
    assert set(seen.tolist()) == set(range(samples))
    if not grouped:
        assert sorted(seen[:samples].tolist()) == list(range(samples))


def test_epochs_seeds_and_stages_differ() -> None:
    base = Order(100, 10, 0, "a").epoch(0).tolist()
    others = [Order(100, 10, 0, "a").epoch(1), Order(100, 10, 1, "a").epoch(0), Order(100, 10, 0, "b").epoch(0)]
    assert all(other.tolist() != base for other in others)
    assert Order(100, 10, 0, "a").epoch(0).tolist() == base


def test_grouped_batches_are_of_one_length() -> None:
    order = Order(400, 10, 0, "a", np.repeat([1, 9], 200))
    assert all(len({i < 200 for i in order.batch(step)}) == 1 for step in range(40))


def test_division() -> None:
    assert division(32, None, 1, "s") == (32, 1)
    assert division(32, 8, 2, "s") == (8, 2)
    with pytest.raises(FoveateError, match="batch_size 32 must be micro_batch 32 x accumulation x 2 processes"):
        division(32, 32, 2, "s")
    with pytest.raises(FoveateError, match="batch_size 32 cannot be divided among 3 processes"):
        division(32, None, 3, "s")


def test_two_processes_give_the_same_losses(recipe_file: Callable[..., Path]) -> None:
    """Accumulation, LoRA, schedule and text-only samples; no dropout, which would draw other numbers in other processes."""
    one, two = recipe_file("one-process"), recipe_file("two-processes")
    root = one.parent
    overrides = ["stages.1.train.lm.lora.dropout=0", f"model.text={root}/lm-plain", "stages.2.steps=3"]
    main(one, overrides)
    train_in_two(root, two, overrides)

    logs = [
        [json.loads(line) for line in (root / name / "log.jsonl").read_text().splitlines()] for name in ("one-process", "two-processes")
    ]
    exact = ("stage", "step", "learning_rate", "images", "supervised_tokens", "visual_tokens_per_layer", "flops", "reducer")
    assert [[row[key] for key in exact] for row in logs[0]] == [[row[key] for key in exact] for row in logs[1]]
    for mine, theirs in zip(*logs, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    a, b = (load_file(root / name / "final/model.safetensors") for name in ("one-process", "two-processes"))
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)
