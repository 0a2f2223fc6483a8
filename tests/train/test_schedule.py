from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.train.schedule import Part, boundaries, part_at, reducer_at, spread, stage_steps, steps_by_reducer


@st.composite
def shares(draw: st.DrawFn) -> list[Fraction]:
    weights = draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    return [Fraction(w, sum(weights)) for w in weights]


def test_four_equal_parts_of_llavoltas_fine_tuning() -> None:
    """The paper's stage B: 5197 steps in four stages. Its script rounds to 1300, 2600, 3900."""
    assert boundaries([Fraction(1, 4)] * 4, 5197) == [1299, 2598, 3897]
    assert boundaries([Fraction(1, 3)] * 3, 5197) == [1732, 3464]
    assert boundaries([Fraction(1)], 5197) == []


@given(total=st.integers(1, 10_000), m=st.integers(1, 12))
def test_equal_parts_begin_at_the_floor(total: int, m: int) -> None:
    assert boundaries([Fraction(1, m)] * m, total) == [i * total // m for i in range(1, m)]


@given(shares=shares(), total=st.integers(1, 500))
def test_parts_follow_each_other_and_have_their_share(shares: list[Fraction], total: int) -> None:
    parts = [Part(share, (f"r{i}",)) for i, share in enumerate(shares)]
    names = [reducer_at(parts, step, total) for step in range(total)]
    order = [int(name[1:]) for name in names]
    assert order == sorted(order)
    for i, share in enumerate(shares):
        assert abs(order.count(i) - share * total) < 1
    assert order[-1] == len(parts) - 1 or sum(shares[:-1]) * total > total - 1  # the last part has the last step if it has any


@given(shares=shares(), total=st.integers(1, 200), length=st.integers(1, 4))
def test_a_cycle_takes_turns_from_the_start_of_its_part(shares: list[Fraction], total: int, length: int) -> None:
    parts = [Part(share, tuple(f"{i}.{k}" for k in range(length))) for i, share in enumerate(shares)]
    count: dict[str, int] = {}
    for step in range(total):
        index, turn = reducer_at(parts, step, total).split(".")
        assert int(turn) == count.get(index, 0) % length
        assert (int(index), count.get(index, 0)) == part_at(parts, step, total)
        count[index] = count.get(index, 0) + 1


@given(shares=shares(), total=st.integers(1, 200), length=st.integers(1, 4))
def test_steps_by_reducer_are_those_that_have_it(shares: list[Fraction], total: int, length: int) -> None:
    parts = [Part(share, tuple(f"{i}.{k}" for k in range(length))) for i, share in enumerate(shares)]
    found = dict(zip((name for part in parts for name in part.cycle), steps_by_reducer(parts, total), strict=True))
    assert sorted(step for steps in found.values() for step in steps) == list(range(total))
    assert all(reducer_at(parts, step, total) == name for name, steps in found.items() for step in steps)


def test_no_schedule_is_no_reducer() -> None:
    assert reducer_at([], 3, 5) == "none"
    assert steps_by_reducer([], 5) == [range(5)]


@given(count=st.integers(0, 300), most=st.integers(1, 20))
def test_what_is_spread_is_in_order_and_alike_from_both_ends(count: int, most: int) -> None:
    found = list(spread(range(count), most))
    assert len(found) == min(count, most)
    assert found == sorted(found)
    assert all(abs(a + b - (count - 1)) <= 1 for a, b in zip(found, reversed(found), strict=True))


@pytest.mark.parametrize("step", [-1, 5])
def test_a_step_outside_of_the_stage(step: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        reducer_at([Part(Fraction(1))], step, 5)


def test_steps_of_the_papers_epochs() -> None:
    """LLaVA-1.5: 558,128 pairs in batches of 256, 2181 steps."""
    assert stage_steps(558_128, 256, epochs=1, steps=None) == 2181
    assert stage_steps(100, 32, epochs=0.1, steps=None) == 1
    assert stage_steps(100, 10, epochs=0.3, steps=None) == 3  # 0.3 * 100 / 10 is 3.0000000000000004 for floats that add up otherwise
    assert stage_steps(100, 32, epochs=None, steps=7) == 7
    assert stage_steps(64, 32, epochs=None, steps=None) == 2
