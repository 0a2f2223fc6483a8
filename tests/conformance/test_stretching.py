"""Giraffe's stretched rotary embedding on every family whose tokens have a time, a row and a column; all others refuse it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import foveate
from foveate.anatomy import read
from foveate.errors import NotApplicable, Reason
from tests.conformance.checks import CHECKS, TOLERANCE, bare_failure, load
from tests.conformance.family import families
from tests.conformance.test_conformance import REPRESENTATIVE
from tests.reducers.test_giraffe import scaled

STRETCHED = "giraffe:ratio=1.0,s=2.0"
CHECKED = ("batch", "decoding", "training", "ledger")  # masking is held against the bare model, which turns otherwise
# Of the families, without ":video": those that turn by time, height and width.
SERVED = {
    "cosmos3_omni",
    "ernie4_5_vl_moe",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glmga",
    "minicpmv4_6",
    "minicpmv4_7",
    "paddleocr_vl",
    "qwen2_5_omni_thinker",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_vl",
    "qwen3_vl_moe",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "check" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole", False)
        chosen = [name for name in families() if whole or name in REPRESENTATIVE]
        metafunc.parametrize(("name", "check"), [(n, check) for n in chosen for check in (CHECKED if served(n) else CHECKED[-1:])])


def served(name: str) -> bool:
    return name.partition(":")[0] in SERVED


def test_stretched(name: str, check: str) -> None:
    if bare_failure(check, name) is not None:
        pytest.skip("the bare model fails this check")
    if served(name):
        CHECKS[check](name, STRETCHED, STRETCHED)
        return
    with pytest.raises(NotApplicable) as refused:
        CHECKS[check](name, STRETCHED, STRETCHED)
    assert refused.value.reason in (Reason.ONE_AXIS, Reason.SHARED_KEYS)


@pytest.mark.parametrize("name", ["qwen2_vl", "glm4v", "ernie4_5_vl_moe"])
def test_the_model_with_frequencies_scaled_by_hand(name: str) -> None:
    """Wherever a family puts its axes: Ernie's module has first those of height, then of width, and lays them out in turns."""
    loaded = load(name)
    model, rotary, single = loaded.model, read(loaded.model).rotary, loaded.singles[0]
    assert rotary is not None
    sections = read(model).text_config.rope_parameters["mrope_section"]
    order = (1, 2, 0) if name.startswith("ernie") else (0, 1, 2)
    axes = [axis for axis, length in zip(order, sections, strict=True) for _ in range(length)]
    with foveate.attach(model, STRETCHED), torch.no_grad():
        found = model(**single).logits
    before: Any = rotary.inv_freq
    rotary.inv_freq = (before.double() * torch.tensor(scaled(axes, 2.0), dtype=torch.float64)).float()
    try:
        with torch.no_grad():
            expected = model(**single).logits
    finally:
        rotary.inv_freq = before
    with torch.no_grad():
        assert (found - model(**single).logits).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, **TOLERANCE)
