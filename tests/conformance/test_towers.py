"""Merging inside the vision tower, on a family of each kind: what keeps all changes nothing, a batch is its prompts alone, decoding goes
on, gradient checkpoints change nothing. (What drops there is a method of the table, PixelPrune; costs on all families are among the
scores.)"""

from __future__ import annotations

import pytest

from foveate.errors import NotApplicable
from tests.conformance.checks import CHECKS
from tests.conformance.test_conformance import REPRESENTATIVE

MERGING, WHOLE = "tome:keep=0.5,site=tower,blocks=1", "tome:keep=1.0,site=tower,blocks=2"
REFUSED = {"lfm2_vl": "NOT_BY_PATCH", "foveate": "NOT_BY_PATCH"}  # padded pictures of several sizes; windows of a resampler


@pytest.mark.parametrize("check", ["keep-all", "batch", "decoding", "training"])
@pytest.mark.parametrize("name", [name for name in REPRESENTATIVE if name not in REFUSED])
def test_merging_in_the_tower(name: str, check: str) -> None:
    CHECKS[check](name, MERGING, WHOLE)


@pytest.mark.parametrize("name", REFUSED)
def test_towers_that_cannot_be_cut_say_why(name: str) -> None:
    with pytest.raises(NotApplicable) as error:
        CHECKS["batch"](name, MERGING, WHOLE)
    assert error.value.reason.name == REFUSED[name]
