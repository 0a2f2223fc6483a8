"""V2PE: the cases by hand, and positions between integers against a plain rotary embedding."""

from __future__ import annotations

import math

import pytest
import torch

import foveate
from foveate.engine.moves import saved
from foveate.errors import FoveateError
from foveate.reducers import V2PE, parse
from tests.reducers.plain_decoder import decode, embedded
from tests.tiny import IMAGE, ROWS, Batch, llava


def walked(kinds: list[int], delta: float, samples: list[int] | None = None) -> tuple[list[float], int]:
    """Positions of visual (1), text (0) and padding (-1) slots, and where the text goes on after them."""
    kind = torch.tensor([kinds])
    count = [sum(k >= 0 for k in kinds[: n + 1]) - 1 for n in range(len(kinds))]
    if samples is not None:
        count = [n - samples.index(sample) for n, sample in enumerate(samples)]
    position = torch.tensor([count]).clamp(min=0)
    steps = torch.ones_like(kind, dtype=torch.float64).masked_fill(kind == 1, delta)
    less, after = saved(steps, position, kind >= 0, None if samples is None else torch.tensor([samples]))
    return (position - less)[0].tolist(), count[-1] + 1 - int(after)


@pytest.mark.parametrize(
    ("p", "N", "delta", "first", "last", "text"),
    [
        (10, 256, 1 / 4, 10.25, 74, 75),
        (10, 256, 1 / 256, 10 + 1 / 256, 11, 12),
        (4, 512, 1 / 16, 4.0625, 36, 37),
        (10, 256, 1.0, 11, 266, 267),
    ],
)
def test_the_four_cases_by_hand(p: int, N: int, delta: float, first: float, last: float, text: int) -> None:
    found, after = walked([0] * (p + 1) + [1] * N + [0], delta)
    assert found == [*range(p + 1), *(p + (i + 1) * delta for i in range(N)), text]
    assert (found[p + 1], found[p + N]) == (first, last)
    assert after == text + 1


@pytest.mark.parametrize("delta", [0.1, 0.3, 1 / 3, 0.7, 0.9])
@pytest.mark.parametrize("N", [1, 7, 10, 30, 100])
def test_steps_that_are_no_powers_of_two_do_not_drift(N: int, delta: float) -> None:
    found, after = walked([0, *[1] * N, 0, *[1] * N], delta)
    end = math.ceil(round(N * delta, 6))
    assert found[N + 1] == end + 1
    assert found[1:] == sorted(set(found[1:]))
    assert after == 2 * end + 2


def test_padding_and_packed_samples() -> None:
    assert walked([-1, -1, 0, 1, 1, 0, -1], 0.5)[0][2:6] == [0, 0.5, 1, 2]
    assert walked([0, 1, 1, 0, 0, 1, 1, 1, 0], 0.5, [0, 0, 0, 0, 1, 1, 1, 1, 1])[0] == [0, 0.5, 1, 2, 0, 0.5, 1, 1.5, 3]
    assert walked([1, 1, 0], 0.5)[0] == [0, 0.5, 2]  # the first of all stays where it is


@pytest.mark.parametrize("delta", [0.25, 1 / 3])
def test_positions_are_turned_as_they_are(delta: float) -> None:
    model, row = llava(), ROWS[1]
    inputs, positions = Batch([row]).inputs, walked([int(token == IMAGE) for token in row], delta)[0]
    assert positions != list(range(len(row)))
    with foveate.attach(model, V2PE(delta)) as run, torch.no_grad():
        found = model(**inputs).logits[0]
    assert run.last.layouts[0].position[0].tolist() == positions
    torch.testing.assert_close(found.double(), decode(model, embedded(model, inputs), positions), rtol=1e-3, atol=1e-4)


def test_a_whole_step_is_ordinary_to_the_bit() -> None:
    model, batch = llava(), Batch(ROWS, "left")
    with torch.no_grad():
        bare = model(**batch.inputs).logits
        with foveate.attach(model, "v2pe:delta=1.0", shortcuts=False):
            assert torch.equal(model(**batch.inputs).logits, bare)


def test_dropped_tokens_take_their_part_of_the_span() -> None:
    """Of 16 tokens 8 stay where they were, a quarter of a step for each of the 16."""
    model, row = llava(), ROWS[0]
    with foveate.attach(model, "random:keep=0.5+v2pe:delta=0.25") as run, torch.no_grad():
        model(**Batch([row]).inputs)
    kept = [slot for slot in run.last.maps[0].representative[0].tolist() if row[slot] == IMAGE]
    assert run.last.layouts[0].position[0].tolist() == [0, 1, 2, *(2 + (slot - 2) / 4 for slot in kept), 7, 8, 9, 10]


@pytest.mark.parametrize("option", ["delta=0.0", "delta=1.5", "delta=1", "delta=x", "positions=renumber"])
def test_impossible_options(option: str) -> None:
    with pytest.raises(FoveateError, match=f"v2pe: {option.partition('=')[0]}=.* (is not possible|does nothing)"):
        parse(f"v2pe:{option}")
