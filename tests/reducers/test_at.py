"""A method at a budget: what `at` sets, and how a method is spelled without it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from foveate.contract import ImageSize, Workload
from foveate.errors import FoveateError
from foveate.reducers import (
    METHODS,
    VTW,
    ATPLLaVA,
    DyCoke,
    FewerFrames,
    Giraffe,
    PruneVid,
    Reducer,
    SparseVLM,
    in_model,
    parse,
    visual_tokens,
)
from foveate.tokens import budget
from tests.reducers.ragged import counted

PER_IMAGE, LAYERS = 576, 32


@pytest.mark.parametrize(
    ("text", "keep", "options"),
    [
        ("fastv:layer=3", 0.25, {"keep": 0.25, "layer": 3}),
        ("fastv:keep=64", 0.11, {"keep": 0.11}),
        ("sparsevlm", 0.5, {"keep": 0.5}),
        ("downsample", 1, {"keep": 1.0}),
        ("vcc:layer=4", 0.25, {"stride": 4, "layer": 4}),
        ("vcc", 0.11, {"stride": 9}),
        ("vcc", 1, {"stride": 1}),
        ("avgpool2d", 0.25, {"stride": 2}),
        ("avgpool2d", 0.11, {"stride": 3}),
        ("avgpool2d", 0.05, {"stride": 4}),
        ("giraffe", 0.25, {"high": 0.5}),
        ("giraffe", 0.75, {"ratio": 1.5, "high": 1.0}),
        ("giraffe:group=8,s=2", 1, {"ratio": 1.0, "high": 1.0}),
        ("visionzip", 64 / 576, {"dominant": round(54 / 576, 6), "contextual": round(10 / 576, 6)}),
    ],
)
def test_what_is_set(text: str, keep: float, options: dict[str, Any]) -> None:
    reducer = parse(text)[0]
    assert reducer.at(keep) == type(reducer).from_dict({**reducer.to_dict(), **options})
    assert type(getattr(reducer.at(keep), next(iter(options)))) is type(next(iter(options.values())))


SETTABLE = [m for m in METHODS.values() if in_model([m()]) and any(option.name in m.amounts for option in dataclasses.fields(m))]


@pytest.mark.parametrize("method", SETTABLE, ids=lambda method: method.name)
@pytest.mark.parametrize("keep", [0.25, 0.11])
def test_every_method_leaves_about_as_many(method: type[Reducer], keep: float) -> None:
    """At its first cut; methods that cut more than once leave fewer further on."""
    if method.video:
        check_clip(method, keep)
        return
    left = counted(method().at(keep), PER_IMAGE, PER_IMAGE)
    if method is SparseVLM:  # and what it recycles
        assert budget(keep, PER_IMAGE) <= left <= budget(keep, PER_IMAGE) + 20
    elif method is VTW:  # on the mean over the layers
        assert sum(visual_tokens([method().at(keep)], PER_IMAGE, 100)) == pytest.approx(100 * keep * PER_IMAGE)
    elif method is ATPLLaVA:  # at most; as many on the mean, once its thresholds are trained
        assert left == PER_IMAGE
    elif method.amounts == ("keep",):
        assert left == pytest.approx(keep * PER_IMAGE, abs=1)
    else:  # strides and the like
        assert left == pytest.approx(keep * PER_IMAGE, rel=0.05)


def check_clip(method: type[Reducer], keep: float) -> None:
    """Of a clip of 24 frames, of which some methods leave fewer, and DyCoke never less than a quarter."""
    if method is DyCoke and keep < 0.25:
        with pytest.raises(FoveateError, match="at least a quarter"):
            method().at(keep)
        return
    size = ImageSize((PER_IMAGE,), (24,) * 24)
    (left,) = method().at(keep).count(Workload((size,), (PER_IMAGE,)))
    if method is PruneVid:  # at most, with as much of a window static as leaves most
        assert keep * PER_IMAGE - 24 <= left <= PER_IMAGE
    else:
        assert left == pytest.approx(keep * PER_IMAGE, abs={FewerFrames: 12, DyCoke: 24, Giraffe: 12}.get(method, 1))


@pytest.mark.parametrize("text", ["avgpool2d", "vcc"])
def test_strides_that_would_leave_everything_are_errors(text: str) -> None:
    with pytest.raises(FoveateError, match=f"{text} keeps at most 1/.* keep=0.9"):
        parse(text)[0].at(0.9)


def test_a_method_without_budget() -> None:
    class Plain(Reducer):
        name = "plain"
        sites = reduce = count = None  # type: ignore[assignment]

    with pytest.raises(FoveateError, match="plain has no option keep"):
        Plain().at(0.5)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("fastv:keep=0.3,layer=3", "fastv:layer=3"),
        ("random:keep=0.3,seed=4", "random"),
        ("vcc:stride=4,layer=1", "vcc:layer=1"),
        ("visionzip:dominant=0.2,contextual=0.1,merge=sum", "visionzip:merge=sum"),
    ],
)
def test_spelled_without_what_is_set(text: str, label: str) -> None:
    reducer = parse(text)[0]
    assert reducer.spelled((*reducer.amounts, "seed")) == label
    assert parse(reducer.spelled()) == [reducer]
