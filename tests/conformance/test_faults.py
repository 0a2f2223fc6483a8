"""The checks themselves: each of them sees a planted fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.contract import AttentionRows
from foveate.engine.chunk import Chunk
from foveate.engine.questions import Asked
from foveate.engine.record import Record
from foveate.errors import NotApplicable, Reason
from foveate.probes.tower import TowerProbes
from foveate.reducers.divprune import DivPrune
from foveate.reducers.random import Random
from foveate.tokens import TokenMap
from tests.conformance import test_cost
from tests.conformance.checks import CHECKS
from tests.conformance.expected import differs, differs_scores
from tests.conformance.test_conformance import SETTINGS, outcome
from tests.conformance.test_cost import scored
from tests.conformance.test_scores import attention_is_the_models, tower_attention_is_the_towers

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

    def wrong(self: Chunk, mask: Any, columns: Tensor, recurrent: bool) -> Any:
        made = cut(self, mask, columns, recurrent)
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
    patch.setattr(TokenMap, "expand", lambda self, *args: expand(self, *args).roll(1, 1))


def counted_wrong(patch: Patch) -> None:
    """The ledger counts a token more than there is."""
    whole = Record.tokens.fget  # type: ignore[attr-defined]
    patch.setattr(Record, "tokens", property(lambda self: [n + 1 for n in whole(self)]))


def predicted_wrong(patch: Patch) -> None:
    """The method predicts one token more than it keeps."""
    count = Random.count
    patch.setattr(Random, "count", lambda self, *args: [n + 1 for n in count(self, *args)])


def answer_seen(patch: Patch) -> None:
    """The question does not end where the answer begins."""
    of = Asked.of.__func__  # type: ignore[attr-defined]
    patch.setattr(Asked, "of", classmethod(lambda cls, layout, answers, samples, *_: of(cls, layout, None, samples)))


def masks_dropped(patch: Patch) -> None:
    """Behind a cut the layers get no mask."""
    patch.setattr(Chunk, "_cut_mask", lambda self, mask, columns, recurrent: None)


def positions_shifted(patch: Patch) -> None:
    """Behind a cut every token turns by the position of the one in front of it, as if it stood there."""
    side = Chunk._cut_side

    def shifted(self: Chunk, value: Any) -> Any:
        made = side(self, value)
        rotary = self.cut and isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value)
        return tuple(torch.cat([part[..., :2, :], part[..., 1:-1, :]], -2) for part in made) if rotary else made

    patch.setattr(Chunk, "_cut_side", shifted)


def scores_refused(patch: Patch) -> None:
    """No tower's scores can be read any more."""

    def refuse(self: TowerProbes, segments: int | None = None) -> Any:
        raise NotApplicable(Reason.NO_TOWER_ATTENTION, "planted")

    patch.setattr(TowerProbes, "read", refuse)


def refused_no_more(patch: Patch) -> None:
    """A tower's windows are read as if they were whole images."""
    read = TowerProbes.read

    def anyhow(self: TowerProbes, segments: int | None = None) -> Any:
        found = read(self)
        return {s: list(torch.cat(crops).split(torch.cat(crops).shape[0] // (segments or 1))) for s, crops in found.items()}

    patch.setattr(TowerProbes, "read", anyhow)


def half_the_heads(patch: Patch) -> None:
    """Scores are those of some heads only, as if of one rank of several."""
    rows = AttentionRows.rows
    patch.setattr(AttentionRows, "rows", lambda self, index: rows(self, index)[:, : max(1, self.query.shape[1] // 2)])


def flops_forgotten(patch: Patch) -> None:
    """A method multiplies, and does not say so."""
    patch.setattr(DivPrune, "score_flops", Random.score_flops)


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
    ("batch", "random", masks_dropped),
    ("batch", "vcc", masks_dropped),
    ("masking", "random", masks_dropped),
    ("masking", "random", positions_shifted),
    ("masking", "fastv", positions_shifted),
]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
@pytest.mark.parametrize(("check", "method", "fault"), FAULTS)
def test_a_planted_fault_is_seen(name: str, check: str, method: str, fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    setting, whole = SETTINGS[method]
    CHECKS[check](name, setting, whole)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[check](name, setting, whole)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl"])
@pytest.mark.parametrize("method", ["hired", "fastervlm", "visionzip", "fopru"])
def test_a_refusal_where_a_method_serves_is_seen(name: str, method: str, monkeypatch: Patch) -> None:
    assert not differs(name, method, "ledger", outcome(name, method, "ledger"))
    scores_refused(monkeypatch)
    word = outcome(name, method, "ledger")
    assert differs(name, method, "ledger", word).startswith(f"{name}, {method}, ledger: NO_TOWER_ATTENTION, where ok is committed")


def test_an_answer_where_a_method_cannot_act_is_seen(monkeypatch: Patch) -> None:
    assert outcome("qwen2_5_vl", "hired", "ledger") == "WINDOWED"
    refused_no_more(monkeypatch)
    assert "ledger: ok, where WINDOWED is committed" in differs("qwen2_5_vl", "hired", "ledger", outcome("qwen2_5_vl", "hired", "ledger"))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_heads_that_are_left_out_are_seen(name: str, monkeypatch: Patch) -> None:
    checks = [attention_is_the_models] + [tower_attention_is_the_towers] * (name != "qwen3_vl")
    for check in checks:
        check(name)
    half_the_heads(monkeypatch)
    for check in checks:
        with pytest.raises(AssertionError):
            check(name)


def test_flops_that_are_forgotten_are_seen(monkeypatch: Patch) -> None:
    assert scored("llava", "divprune:keep=0.5") == "ok"
    flops_forgotten(monkeypatch)
    with pytest.raises(AssertionError):
        scored("llava", "divprune:keep=0.5")
    monkeypatch.setattr(test_cost, "MULTIPLY", ())  # nor does it help not to be listed
    with pytest.raises(AssertionError):
        scored("llava", "divprune:keep=0.5")


def test_a_cell_that_nobody_has_committed_is_seen() -> None:
    assert "random: ok, where no outcome is committed" in differs("llava", "another:random", "batch", "ok").replace(", batch", "")
    assert "no outcome is committed" in differs_scores("llava", "another:keep=0.5", "ok")
