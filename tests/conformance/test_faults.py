"""The checks themselves: each of them sees a planted fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.engine.attach import Pass, Run
from foveate.engine.chunk import Chunk
from foveate.reducers.random import Random
from foveate.tokens import TokenMap
from tests.conformance.checks import CHECKS
from tests.conformance.test_conformance import SETTINGS

Patch = pytest.MonkeyPatch


def survivor_shifted(patch: Patch) -> None:
    """One survivor of the first row has its neighbour's state."""
    apply = TokenMap.apply

    def shifted(self: TokenMap, x_BND: Tensor) -> Tensor:
        y = apply(self, x_BND)
        at = self.target.visual[0].nonzero()
        if not len(at) or not y.is_floating_point():
            return y
        slot = int(at[len(at) // 2])
        neighbour = x_BND[:1, int(self.representative[0, slot]) - 1]
        return torch.cat([torch.cat([y[:1, :slot], neighbour[:, None], y[:1, slot + 1 :]], 1), y[1:]])

    patch.setattr(TokenMap, "apply", shifted)


def column_wrong(patch: Patch) -> None:
    """One column of one row's mask says the opposite."""
    cut = Chunk._cut_mask

    def wrong(self: Chunk, mask: Any, columns: Tensor, recurrent: bool, dtype: torch.dtype) -> Any:
        made = cut(self, mask, columns, recurrent, dtype)
        if not isinstance(made, Tensor) or made.ndim != 4:
            return made
        made = made.clone()
        row = columns.shape[0] - 1 if columns.shape[0] > 1 else 0
        at = made[row, :, :, -2]
        made[row, :, :, -2] = ~at if made.dtype == torch.bool else torch.where(at < 0, 0.0, torch.finfo(made.dtype).min)
        return made

    patch.setattr(Chunk, "_cut_mask", wrong)


def states_shifted(patch: Patch) -> None:
    """Behind the last layer every state stands one row too far."""
    expand = TokenMap.expand
    patch.setattr(TokenMap, "expand", lambda self, y: expand(self, y).roll(1, 1))


def counted_wrong(patch: Patch) -> None:
    """The ledger counts a token more than there is."""
    whole = Pass.tokens.fget  # type: ignore[attr-defined]
    patch.setattr(Pass, "tokens", property(lambda self: [n + 1 for n in whole(self)]))


def predicted_wrong(patch: Patch) -> None:
    """The method predicts one token more than it keeps."""
    count = Random.count
    patch.setattr(Random, "count", lambda self, *args: count(self, *args) + 1)


def answer_seen(patch: Patch) -> None:
    """The question does not end where the answer begins."""
    view = Run._view

    def seen(self: Run, index: int, state: Any, hidden: Tensor) -> Any:
        return view(self, index, replace(state, answers=None), hidden)

    patch.setattr(Run, "_view", seen)


FAULTS: list[tuple[str, str, Callable[[Patch], None]]] = [
    ("keep-all", "random", survivor_shifted),
    ("batch", "random", survivor_shifted),
    ("batch", "random", column_wrong),
    ("batch", "vcc", column_wrong),
    ("decoding", "fastv", column_wrong),
    ("decoding", "random", states_shifted),
    ("masking", "random", survivor_shifted),
    ("masking", "random", column_wrong),
    ("masking", "fastv", column_wrong),
    ("ledger", "random", counted_wrong),
    ("ledger", "random", predicted_wrong),
    ("training", "fastv", answer_seen),
]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
@pytest.mark.parametrize(("check", "method", "fault"), FAULTS)
def test_a_planted_fault_is_seen(name: str, check: str, method: str, fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    setting, whole = SETTINGS[method]
    CHECKS[check](name, setting, whole)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[check](name, setting, whole)
