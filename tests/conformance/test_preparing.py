"""Reducers in front of the processor, on the real processors of the families: as if every picture had been made smaller by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from foveate.errors import FoveateError
from foveate.reducers import Preparing, parse, prepare
from tests.conformance.checks import load
from tests.conformance.family import Family, Row, families
from tests.conformance.test_conformance import REPRESENTATIVE

REDUCERS = parse("downsample:keep=0.25")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    whole = metafunc.config.getoption("--whole", False)
    metafunc.parametrize("name", [name for name in families() if whole or name in (*REPRESENTATIVE, "qwen2_vl")])


def test_the_processor_is_given_smaller_pictures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(name)
    processor, (width, height) = loaded.processor, loaded.family.size
    family = replace(loaded.family, size=(4 * width, 4 * height))
    rows = [row for row in family.rows() if row.pictures]
    bare = family.inputs(processor, rows)
    if name in ("foveate", "foveate:mlp"):  # makes all images one size, and is resized instead, unless its bridge is bound to its grid
        if name == "foveate":
            with pytest.raises(FoveateError, match="made for a grid of 4 x 4 patches"):
                Preparing(processor, REDUCERS).install()
        else:
            with Preparing(processor, REDUCERS):
                assert family.inputs(processor, rows)["input_ids"].shape[1] < bare["input_ids"].shape[1]
    elif family.frames:
        with Preparing(processor, REDUCERS), pytest.raises(FoveateError, match="downsample prepares images and no videos"):
            family.inputs(processor, rows)
    else:
        with Preparing(processor, REDUCERS):
            found = family.inputs(processor, rows)
            text = family.inputs(processor, [Row(0, "tell me a story now", "no")])
        medium = Family._medium
        with monkeypatch.context() as patch:
            patch.setattr(Family, "_medium", lambda self, seed: prepare(REDUCERS, medium(self, seed)))
            _same(found, family.inputs(processor, rows))
        _same(text, family.inputs(processor, [Row(0, "tell me a story now", "no")]))
        pixels = [key for key in found if key.startswith("pixel_values")]
        assert any(found[key].shape != bare[key].shape or not torch.equal(found[key], bare[key]) for key in pixels)
    _same(family.inputs(processor, rows), bare)


def _same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
