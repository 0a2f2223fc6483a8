"""PPE: positions of merged tokens by hand, and in a rotary embedding against plain loops."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import foveate
from foveate.contract import View
from foveate.engine.several import nth_member, turned
from foveate.errors import FoveateError, NotApplicable
from foveate.reducers import PPE, parse
from foveate.reducers.common import into
from foveate.tokens import Layout
from tests.reducers.plain_decoder import decode, embedded
from tests.situations.models import inputs, qwen
from tests.tiny import IMAGE, PATCHES, ROWS, Batch, llava


def test_members_from_the_last_one_backwards_and_round_again() -> None:
    layout, label = Layout.sequence(torch.ones(1, 6, dtype=torch.bool)), torch.tensor([1, 0, 1, 0, 1, 2])
    token_map = into(layout, torch.tensor([[4, 3, 4, 3, 4, 5]]))
    places = torch.stack([nth_member(token_map, n)[0] for n in range(5)], 1).tolist()
    assert token_map.representative[0].tolist() == [int((label == cluster).nonzero()[-1, 0]) for cluster in (0, 1, 2)]
    assert places == [[3, 1, 3, 1, 3], [4, 2, 0, 4, 2], [5] * 5]


def plain(run: Any, row: list[int], k: int, frequencies: int) -> torch.Tensor:
    """(M, frequencies) the position of each frequency of each token that is left."""
    left, places = run.last.maps[0], []
    for slot in range(left.target.shape[1]):
        members = left.sources(0, slot)
        places.append([members[::-1][f * k // frequencies % len(members)] for f in range(frequencies)])
    return torch.tensor(places)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_it_is_what_the_equations_say(k: int) -> None:
    """Of 16 tokens 7 clusters, in a model of 4 frequencies; each stands behind those of higher rank and sees them."""
    model, row = llava(), ROWS[0]
    given, reducer = Batch([row]).inputs, PPE(keep=0.4, k=k)
    with foveate.attach(model, reducer) as run, torch.no_grad():
        found = model(**given).logits[0]
    left = run.last.maps[0]
    assert int(left.target.visual.sum()) == 7 == reducer._left(PATCHES)
    x = left.apply(embedded(model, given).float()[None])[0].double()
    expected = decode(model, x, plain(run, row, k, 4))
    there = [slot for slot in range(len(row)) if row[slot] != IMAGE]
    torch.testing.assert_close(found[there].double(), expected[~left.target.visual[0]], rtol=1e-3, atol=1e-4)


def test_without_merging_it_is_ordinary_to_the_bit() -> None:
    model, batch = llava(), Batch(ROWS, "left")
    with torch.no_grad():
        bare = model(**batch.inputs).logits
        with foveate.attach(model, "ppe:keep=1.0,k=4", shortcuts=False):
            assert torch.equal(model(**batch.inputs).logits, bare)


def grid_model() -> Any:
    """A Qwen2.5-VL with 8 frequencies for each of the three rows of a token's positions that two can share."""
    config = qwen().config.to_dict()
    config["text_config"] |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 4, 8]}
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config)).eval()


def test_each_section_of_a_grid_is_shared_out() -> None:
    """The cosines that the layers get: in each section the first half by the last member, the second by the one before."""
    model, row = grid_model(), [5, 92] + [IMAGE] * PATCHES + [93, 4]
    given, seen = inputs("qwen2_5_vl", [row]), []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_embeddings"][0])

    hook = model.model.language_model.layers[0].self_attn.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**given)
        with foveate.attach(model, "ppe:keep=0.4,k=2") as run:
            model(**given)
    hook.remove()
    whole, found = (cos[0] for cos in seen)  # (N, h), (M, h)
    for slot in range(run.last.maps[0].target.shape[1]):
        members = run.last.maps[0].sources(0, slot)[::-1]
        for f in range(32):
            part = [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1][f % 16]
            assert found[slot, f] == whole[members[part % len(members)], f]


def test_clusters_are_counted_and_ranked() -> None:
    tokens = torch.tensor([0.0, 1, 2, 4, 5]).view(1, 5, 1)
    decided = PPE(keep=0.4, k=1).reduce(View.of(tokens))  # one neighbour: all are equally dense, so the first is the densest
    assert decided.map.target.shape[1] == ceil(0.4 * 5)
    sources = [decided.map.sources(0, slot) for slot in range(2)]
    assert sources == [[0, 1, 2], [3, 4]]
    assert decided.map.apply(tokens)[0, :, 0].tolist() == [1.0, 4.5]
    assert decided.map.representative[0].tolist() == [2, 4]


def test_what_cannot_be() -> None:
    uneven = r"3 positions a token cannot share the rotary embedding's 4 frequencies evenly"
    with foveate.attach(llava(), "ppe:keep=0.5,k=3") as run, pytest.raises(NotApplicable, match=uneven):
        run.anatomy.core(**Batch([ROWS[0]]).inputs)
    with pytest.raises(NotApplicable, match="the model's rotary module does not give one row"):
        turned(lambda positions: torch.zeros(1, 2, 4), [torch.zeros(1, 2)])
    with pytest.raises(NotApplicable, match="the model's rotary module does not give its frequencies twice"):
        turned(lambda positions: (torch.arange(8.0).view(1, 2, 4),) * 2, [torch.zeros(1, 2)])
    for option in ("keep=0.0", "keep=3", "k=0", "k=4096", "positions=renumber"):
        with pytest.raises(FoveateError, match=f"ppe: {option.partition('=')[0]}=.* is not possible"):
            parse(f"ppe:{option}")
