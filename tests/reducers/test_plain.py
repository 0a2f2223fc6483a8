"""`foveate.reduce`: what a reducer does to plain tensors is what it does to the same tokens anywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate import FoveateError, Kept, Layout
from foveate.contract import Attention, AttentionRows, ClsAttention, ReceivedAttention, View
from foveate.reducers import VCC, FasterVLM, ToMe, parse
from tests.reducers.ragged import mapped

L, D, T = 12, 8, 4
TOKENS = torch.randn(2, L, D, generator=torch.Generator().manual_seed(0))
WORDS = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1))
SCORES = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5, 0.0, 0.95, 0.05], [0.9, 0.1] * 6])
ROWS = AttentionRows.of(torch.rand(2, 2, L + T, L + T, generator=torch.Generator().manual_seed(2)).softmax(-1))
CALLS: dict[str, dict[str, Any]] = {
    "divprune:keep=0.25": {},
    "random:keep=5": {},
    "uniform:keep=4": {"grid": (3, 4)},
    "tome:keep=0.5": {},
    "vcc:layer=0,stride=5": {},
    "avgpool2d:stride=2": {"grid": (2, 6)},
    "cdpruner:keep=3": {"text": WORDS},
    "fastervlm:keep=0.25": {"signals": {ClsAttention(-2): SCORES}},
    "fopru:keep=0.3,strategy=row": {"grid": (3, 4), "signals": {ReceivedAttention(-2): SCORES}},
    "fastv:keep=3": {"text": T, "signals": {Attention(1): ROWS}},
    "pyramiddrop": {"text": T, "layers": 8, "step": 1, "signals": {Attention(3): ROWS}},
}


@pytest.mark.parametrize(("spelled", "given"), CALLS.items(), ids=CALLS.keys())
def test_what_is_kept_is_what_the_method_decides(spelled: str, given: dict[str, Any]) -> None:
    kept = foveate.reduce(spelled, TOKENS, **given)
    (reducer,) = parse(spelled)
    B, M = kept.indices.shape
    assert kept.mask.sum(1).tolist() == (kept.indices >= 0).sum(1).tolist()
    for b in range(B):
        own = [i for i in kept.indices[b].tolist() if i >= 0]
        assert kept.mask[b].nonzero()[:, 0].tolist() == sorted(own)
        assert kept.positions[b, : len(own)].tolist() == (list(range(len(own))) if reducer.positions == "renumber" else own)
    assert kept.states is not None
    assert kept.states.shape == (B, M, D)
    if kept.map.member.shape[-1] == 1:  # nothing is merged
        assert torch.equal(kept.states, TOKENS.gather(1, kept.indices[..., None].expand(-1, -1, D)))


def test_scores_are_enough_where_nothing_else_is_looked_at() -> None:
    kept = foveate.reduce(FasterVLM(keep=3), signals={ClsAttention(-2): SCORES})
    assert kept.indices.tolist() == [[1, 3, 10], [0, 2, 4]]
    assert kept.states is None
    crops = foveate.reduce(FasterVLM(keep=1), grid=[(2, 2), (2, 4)], signals={ClsAttention(-2): SCORES})
    assert crops.indices.tolist() == [[1, 10], [0, 4]]


def test_special_tokens_stay_and_count_in_no_budget() -> None:
    kept = foveate.reduce("divprune:keep=2", TOKENS, special=3, grid=(3, 3))
    assert kept.indices[:, :3].tolist() == [[0, 1, 2]] * 2
    assert kept.indices.shape == (2, 5)
    alone = foveate.reduce("divprune:keep=2", TOKENS[:, 3:])
    assert torch.equal(kept.indices[:, 3:], alone.indices + 3)
    tower = foveate.reduce(ToMe(0.5, site="tower", blocks=1), signals=_keys(TOKENS), special=2)
    assert tower.indices[:, :2].tolist() == [[0, 1]] * 2
    assert tower.indices.shape == (2, 7)


def _keys(tokens: Tensor) -> dict[Any, Any]:
    (site,) = ToMe(0.5, site="tower", blocks=1).sites(1)
    return {site.needs[0]: tokens}


def test_merged_states_are_the_maps_own() -> None:
    kept = foveate.reduce(VCC(0, 4), TOKENS)
    assert kept.states is not None
    torch.testing.assert_close(kept.states, TOKENS.view(2, 3, 4, D).mean(2))
    assert kept.map.sources(0, 1) == [4, 5, 6, 7]
    assert kept.positions.tolist() == [[1, 5, 9]] * 2  # the truncated mean of each group's


def test_rows_of_different_lengths_end_in_empty_places() -> None:
    visual = torch.zeros(2, 10, dtype=torch.bool)
    visual[0, :8] = visual[1, :4] = True
    valid = torch.ones_like(visual)
    valid[1, 5:] = False
    layout = Layout.sequence(visual, valid_BN=valid)
    tokens = TOKENS[:, :10]
    kept = foveate.reduce("divprune:keep=0.5,positions=keep", tokens, layout=layout)
    assert (kept.indices >= 0).sum(1).tolist() == [6, 3]  # half of the patches, and the text
    assert kept.indices[1, 3:].tolist() == [-1] * 3
    assert kept.states is not None
    assert not kept.states[1, 3:].any()
    by_hand = mapped(parse("divprune:keep=0.5,positions=keep")[0].reduce(View.of(tokens, layout=layout)))
    assert torch.equal(kept.mask[0].nonzero()[:, 0], by_hand.representative[0])


def test_random_tokens_follow_the_content() -> None:
    both = foveate.reduce("random:keep=4", TOKENS)
    for b in (0, 1):
        assert foveate.reduce("random:keep=4", TOKENS[b : b + 1]).indices.tolist() == both.indices[b : b + 1].tolist()


@pytest.mark.parametrize(
    ("spelled", "given", "message"),
    [
        ("divprune+fastv", {"tokens": TOKENS}, "names 2 reducers"),
        ("none", {"tokens": TOKENS}, "names 0 reducers"),
        ("divprune", {"tokens": TOKENS[0]}, r"tokens are of shape \(12, 8\)"),
        ("divprune", {"tokens": TOKENS, "grid": (3, 3)}, "has 9 patches; with 0 special tokens there are 12"),
        ("divprune", {"tokens": TOKENS, "special": 12}, "leaves no patch"),
        ("divprune", {}, "how many tokens there are is not known"),
        ("fastervlm", {"tokens": TOKENS}, "ClsAttention"),
        ("fastervlm", {"tokens": TOKENS, "signals": {ClsAttention(-2): SCORES[:, :5]}}, r"of shape \(2, 5\)"),
        ("cdpruner:keep=3", {"tokens": TOKENS, "text": T}, "looks at the tokens' states"),
        ("divprune", {"signals": {ClsAttention(-2): SCORES}}, "looks at the tokens' states"),
        ("downsample", {"tokens": TOKENS}, "acts on the image"),
        ("pyramiddrop", {"tokens": TOKENS, "signals": {Attention(3): ROWS}}, "depth"),
        ("avgpool2d", {"tokens": TOKENS}, "no full grid"),
    ],
)
def test_what_is_missing_is_named(spelled: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        foveate.reduce(spelled, **given)


def test_it_is_public() -> None:
    assert isinstance(foveate.reduce("uniform:keep=0.5", TOKENS), Kept)
