"""What a training step does once in place of every time, and what it keeps: the same numbers, and all as before afterwards."""

from __future__ import annotations

import copy
import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from foveate.bridges.cross_attention import attention
from foveate.machine import exact_peaks, kept_memory
from foveate.train.bf16_copy import BFloat16Copy
from foveate.train.run import main
from foveate.train.trainer import FoveateTrainer
from tests.situations.runs import prepare, recipe, rows, same, stage

# ---- the copy in bfloat16


class Noting(nn.Module):
    """A trained and a frozen map, and numbers that are no weights; notes what it was called on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trained, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.steps = nn.Parameter(torch.arange(3), requires_grad=False)
        self.seen: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append({"trained": self.trained.weight, "frozen": self.frozen.weight, "steps": self.steps})
        found: Tensor = self.frozen(self.trained(x))
        return found


X = torch.linspace(-1, 1, 8).view(2, 4).to(torch.bfloat16)


def test_what_is_frozen_is_copied_once() -> None:
    model = Noting()
    call = BFloat16Copy().of(model)
    for _ in range(3):
        call(x=X).sum().backward()
    first, *later = model.seen
    assert first["frozen"].dtype == first["trained"].dtype == torch.bfloat16
    assert first["steps"].dtype == torch.int64
    for seen in later:
        assert seen["frozen"] is first["frozen"]
        assert seen["trained"] is not first["trained"]
    assert model.frozen.weight.grad is None
    assert model.trained.weight.grad is not None


def load(model: Noting, values: Tensor) -> None:
    model.load_state_dict({**model.state_dict(), "frozen.weight": values})


def write(model: Noting, values: Tensor) -> None:
    with torch.no_grad():
        model.frozen.weight.copy_(values)


def thaw(model: Noting, values: Tensor) -> None:
    """Trained for a while, and frozen again."""
    model.frozen.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([model.frozen.weight], lr=1.0)
    model.frozen.weight.grad = model.frozen.weight.detach() - values
    optimizer.step()
    model.frozen.weight.requires_grad_(False)


@pytest.mark.parametrize("change", [load, write, thaw])
def test_values_that_were_changed_are_copied_again(change: Any) -> None:
    model = Noting()
    call, values = BFloat16Copy().of(model), torch.full((4, 4), 0.25)
    before = call(x=X)
    change(model, values)
    after = call(x=X)
    fresh = functional_call(model, {name: p.to(torch.bfloat16) if p.is_floating_point() else p for name, p in model.named_parameters()}, X)
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("trains", [False, True])
def test_batch_norms_calculate_in_the_precision_of_their_statistics(trains: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)).train(trains)
    plain = copy.deepcopy(model)
    pixels = torch.randn(4, 3, 6, 6)
    found = BFloat16Copy().of(model)(input=pixels.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), plain(pixels), atol=0.05, rtol=0.05)
    found.float().square().sum().backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in model.parameters())
    mean = model.get_buffer("1.running_mean")
    assert mean.dtype == torch.float32
    assert bool(mean.any()) == trains
    torch.testing.assert_close(mean, plain.get_buffer("1.running_mean"), atol=0.01, rtol=0.02)


@pytest.mark.usefixtures("home")
def test_runs_on_kept_copies_are_those_on_fresh_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters that are merged into what was frozen, a growth, validation and packing; in one go, and stopped and gone on with."""
    prepare(tmp_path)
    held = {"conversations": str(tmp_path / "data.json"), "images": str(tmp_path / "images"), "limit": 5, "every": 2}
    common = {"precision": "bf16-copy", "pack": True, "save_steps": 1, "validation": held}
    changes = stage(0, **common, train={"bridge": True, "lm": {"lora": {"rank": 2}}}), stage(1, **common)
    kept = main(recipe(tmp_path, "kept", *changes)).parent
    assert all("validation_loss" in row for row in rows(kept) if row["step"] in (2, 3))
    with monkeypatch.context() as patch:
        patch.setattr(BFloat16Copy, "_copy", lambda self, value: value.to(torch.bfloat16) if value.is_floating_point() else value)
        fresh = main(recipe(tmp_path, "fresh", *changes)).parent
    assert same(kept, fresh)

    stopped, step = recipe(tmp_path, "stopped", *changes), FoveateTrainer.training_step

    def stopping(self: FoveateTrainer, *args: Any, **options: Any) -> Tensor:
        if self.stage.index == 1 and self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(FoveateTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            main(stopped)
    assert same(main(stopped).parent, kept)


# ---- freed memory


class Library:
    """The C library in place of the real one: notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def mallopt(self, option: int, value: int) -> None:
        self.told.append((option, value))

    def malloc_trim(self, left: int) -> None:
        self.told.append(("trim", left))


HABIT = [(-3, 32 << 20), (-1, 64 << 20)]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: found)
    return found


def test_memory_is_kept_inside_of_the_block(library: Library) -> None:
    with kept_memory("cpu"):
        assert library.told == [*HABIT, (-3, 2**31 - 1), (-1, 2**31 - 1)]
        library.told.clear()
    assert library.told == [*HABIT, ("trim", 0)]


def test_the_habit_comes_back_after_an_error(library: Library) -> None:
    with pytest.raises(KeyError), kept_memory("cpu"):
        raise KeyError
    assert library.told[-3:] == [*HABIT, ("trim", 0)]


def test_on_a_gpu_the_allocator_is_left_alone(library: Library) -> None:
    with kept_memory("cuda"):
        pass
    assert library.told == []


def test_exact_peaks_end_in_the_habit_too(library: Library) -> None:
    with exact_peaks():
        assert library.told == [(-3, 1 << 16)]
        library.told.clear()
    assert library.told == HABIT


@pytest.mark.parametrize("lacks", [OSError, AttributeError])
def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch, lacks: type[Exception]) -> None:
    def none(name: str) -> Any:
        raise lacks

    monkeypatch.setattr(ctypes, "CDLL", none)
    ran = False
    with kept_memory("cpu"):
        ran = True
    assert ran


# ---- attention of a bridge


@given(
    windows=st.integers(1, 5), queries=st.integers(1, 4), keys=st.integers(1, 9), heads=st.integers(1, 3), width=st.sampled_from([8, 32])
)
@settings(max_examples=25, deadline=None)
def test_a_bridges_attention_in_bfloat16_is_that_of_float32_but_for_rounding(
    windows: int, queries: int, keys: int, heads: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(windows + 7 * queries + 31 * keys)
    shapes = [(windows, heads, count, width) for count in (queries, keys, keys)]
    halves = [torch.randn(shape, generator=generator).to(torch.bfloat16).requires_grad_() for shape in shapes]
    whole = [half.detach().float().requires_grad_() for half in halves]
    upstream = torch.randn(shapes[0], generator=generator).to(torch.bfloat16)
    found, expected = attention(*halves), attention(*whole)
    found.backward(upstream)
    expected.backward(upstream.float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=5e-2, atol=5e-2)
    for half, full in zip(halves, whole, strict=True):
        assert half.grad is not None
        assert full.grad is not None
        torch.testing.assert_close(half.grad.float(), full.grad, rtol=5e-2, atol=1e-1)
