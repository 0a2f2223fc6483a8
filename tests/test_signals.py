"""Scores read in live models equal those of eager attention maps; and the rows of an attention map computed alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate import FoveateError
from foveate.contract import (
    Attention,
    AttentionRows,
    BeforeLM,
    ClsAttention,
    Cut,
    FromLayer,
    Keys,
    ReceivedAttention,
    Signal,
    Site,
    TowerKeys,
    View,
    Workload,
)
from foveate.reducers.base import Reducer
from foveate.tokens import TokenMap, top
from tests.tiny import IMAGE, MODELS, PATCHES, ROWS, Batch, assembled, llava


@dataclass(frozen=True)
class Asking(Reducer):
    """Notes what its signals say and keeps four tokens by the first of them, unless that is an attention map."""

    name = "asking"
    paper = "-"
    needs: tuple[Signal, ...] = ()
    layer: int = 0
    seen: list[View] = field(default_factory=list, compare=False)

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(self.layer, self.needs) if self.layer else BeforeLM(self.needs)]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        for signal in self.needs:
            view.signal(signal)
        self.seen.append(view)
        score = view.signal(self.needs[0])
        if isinstance(score, AttentionRows):
            assert view.questions is not None
            score = score.row(view.questions[0].asking)
        return Cut(TokenMap.keep(view.layout, top(view.layout, score if score.ndim == 2 else score.sum(-1), 4)))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return [min(4, arriving) for arriving in work.arriving]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_tower_scores_are_those_of_the_eager_map(attn: str, side: str) -> None:
    batch = Batch(ROWS, side)
    reducer = Asking((ClsAttention(-1), ReceivedAttention(0), TowerKeys(-2), ClsAttention(-2), ClsAttention(-2, joint=True)))
    model = llava(attn)
    with foveate.attach(model, reducer), torch.no_grad():
        model(**batch.inputs)
    tower = llava("eager").model.vision_tower
    keys, queries = list[Tensor](), list[Tensor]()
    tower.encoder.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, output: keys.append(output))
    tower.encoder.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: queries.append(output))
    with torch.no_grad():
        maps = tower(batch.pixels, output_attentions=True).attentions
    (view,) = reducer.seen
    visual = batch.inputs["input_ids"] == IMAGE
    expected = {
        ClsAttention(-1): maps[1][:, :, 0, 1:].mean(1).flatten(),
        ClsAttention(-2): maps[0][:, :, 0, 1:].mean(1).flatten(),
        ReceivedAttention(0): maps[0].mean((1, 2))[:, 1:].flatten(),
        TowerKeys(-2): keys[0].unflatten(-1, (2, -1)).mean(2)[:, 1:].flatten(0, 1),
        ClsAttention(-2, joint=True): (queries[0] @ keys[0].transpose(1, 2) / 32**0.5).softmax(-1)[:, 0, 1:].flatten(),
    }
    for signal, values in expected.items():
        torch.testing.assert_close(view.signal(signal)[visual], values, rtol=1e-5, atol=1e-7)


def test_heads_that_are_taken_as_one() -> None:
    """Two queries of four heads that share two heads of keys; a finished map has neither."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 2, 3, generator=generator), torch.randn(1, 2, 5, 3, generator=generator)
    one = AttentionRows(query, key, 3**-0.5, causal=False).as_one_head().rows(torch.tensor([[0, 1]]))
    products = torch.einsum("bhnc,bhkc->bnk", query, key[:, [0, 0, 1, 1]])
    torch.testing.assert_close(one[:, 0], (products / 12**0.5).softmax(-1))
    with pytest.raises(FoveateError, match="heads cannot be taken as one of a finished attention map"):
        AttentionRows.of(one).as_one_head()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_rows_are_those_of_the_eager_map(make: Callable[..., Any], attn: str, side: str) -> None:
    batch, reducer = Batch(ROWS, side), Asking((Attention(1), Keys(1)), layer=2)
    model = make(attn)
    with foveate.attach(model, reducer), torch.no_grad():
        model(**batch.inputs)
        whole = make("eager")(**batch.inputs, output_attentions=True).attentions[1]
    (view,) = reducer.seen
    real = batch.inputs["attention_mask"].bool()
    every = torch.arange(real.shape[1]).expand(len(ROWS), -1)
    torch.testing.assert_close(
        view.signal(Attention(1)).rows(every).transpose(1, 2)[real], whole.transpose(1, 2)[real], rtol=1e-4, atol=1e-6
    )
    assert view.signal(Keys(1)).shape == (len(ROWS), real.shape[1], 2 * 8)
    last = real.to(torch.int64).cumsum(1).argmax(1)
    assert view.questions is not None
    assert torch.equal(view.questions[0].asking, last)


def test_the_map_does_not_depend_on_the_answer() -> None:
    """The asking row is the one before the first supervised token, and the text shown to a reducer ends there."""
    model, row = llava(), ROWS[0]
    seen, maps = [], []
    for answer in ([11, 12, 13], [14, 15, 16]):
        ids = torch.tensor([row + answer])
        labels = torch.tensor([[-100] * len(row) + answer])
        reducer = Asking((Attention(1),), layer=2)
        with foveate.attach(model, reducer) as run, torch.no_grad():
            model(input_ids=ids, pixel_values=Batch([row]).pixels, labels=labels)
            maps.append(run.last.maps[2].representative)
        seen.append(reducer.seen[0])
    assert seen[0].questions is not None
    (question,) = seen[0].questions
    assert question.asking.tolist() == [len(row) - 1]
    assert not question.text[0, len(row) :].any()
    assert torch.equal(maps[0][:, : maps[0].shape[1] - 3], maps[1][:, : maps[1].shape[1] - 3])
    prompt = Asking((Attention(1),), layer=2)
    with foveate.attach(model, prompt) as run, torch.no_grad():
        model(input_ids=torch.tensor([row]), pixel_values=Batch([row]).pixels)
        alone = run.last.maps[2].representative
    assert torch.equal(maps[0][:, : alone.shape[1]], alone)


def test_rows_of_a_second_chunk_leave_the_cache_out() -> None:
    """Columns are those of the slots that arrive, though the softmax goes over everything that was cached."""
    model, row, reducer = llava(), ROWS[0], Asking((Attention(1), Keys(1)), layer=2)
    pixels, N = Batch([row, row]).pixels, len(row)
    ids = torch.tensor([row])
    with foveate.attach(model, reducer), torch.no_grad():
        cache = model(input_ids=ids, pixel_values=pixels[:1], use_cache=True).past_key_values
        model(input_ids=ids, pixel_values=pixels[1:], past_key_values=cache, use_cache=True)
    whole = llava("eager")(input_ids=torch.cat([ids, ids], 1), pixel_values=pixels, output_attentions=True).attentions[1]
    second = reducer.seen[1]
    every = torch.arange(N)[None]
    torch.testing.assert_close(second.signal(Attention(1)).rows(every), whole[:, :, N:, N:], rtol=1e-4, atol=1e-6)
    assert second.signal(Keys(1)).shape == (1, N, 16)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reducer", ["vcc:layer=1,stride=2,positions=renumber+random:keep=3,layer=2", "random:keep=0.5"])
def test_recorded_maps_are_done_again(side: str, reducer: str) -> None:
    model, batch = llava(), Batch(ROWS, side)
    with foveate.attach(model, reducer) as run, torch.no_grad():
        first = model(**batch.inputs).logits
        recorded = run.maps
    with foveate.attach(model, maps=recorded) as run, torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, first)
        longer = {**batch.inputs, "input_ids": torch.nn.functional.pad(batch.inputs["input_ids"], (0, 3), value=8)}
        longer["attention_mask"] = torch.nn.functional.pad(batch.inputs["attention_mask"], (0, 3), value=1)
        N = first.shape[1]
        real = batch.inputs["attention_mask"].bool()
        torch.testing.assert_close(model(**longer).logits[:, :N][real], first[real], rtol=1e-4, atol=1e-5)
        other = Batch([ROWS[0]]).inputs
        with pytest.raises(FoveateError, match="belongs to another batch"):
            model(**other)
    with pytest.raises(FoveateError, match="either reducers or maps"):
        foveate.attach(model, reducer, maps=recorded)


def test_generate_hands_scores_to_every_beam() -> None:
    """`generate` encodes the images before the first forward pass and repeats their features for the beams."""
    model, reducer = llava(), Asking((ClsAttention(-1),))
    with foveate.attach(model, reducer):
        model.generate(**Batch(ROWS, "left").inputs, max_new_tokens=2, do_sample=False, num_beams=2, pad_token_id=0)
    scores = reducer.seen[0].signal(ClsAttention(-1))
    assert scores.shape[0] == 2 * len(ROWS)
    assert torch.equal(scores[0::2], scores[1::2])
    assert scores.sum() > 0


def test_features_without_scores_are_refused() -> None:
    model, batch = llava(), Batch(ROWS)
    encoded = model.model.get_image_features(batch.pixels, return_dict=True)
    inputs = {key: value for key, value in batch.inputs.items() if key != "pixel_values"}
    with foveate.attach(model, Asking((ClsAttention(-1),))), pytest.raises(FoveateError, match="no tower scores"):
        model(**inputs, mm_encoder_outputs={"image": encoded})


def test_a_bridge_carries_scores_by_its_boxes() -> None:
    """Chain-of-Sight: four global queries get the mean of the image, three per window the mean of theirs."""
    model, reducer, batch = assembled(), Asking((ReceivedAttention(-1),)), Batch([ROWS[0]])
    with foveate.attach(model, reducer), torch.no_grad():
        model(**batch.inputs)
    scores = reducer.seen[0].signal(ReceivedAttention(-1))[0][reducer.seen[0].layout.visual[0]]
    assert scores.shape == (PATCHES,)
    assert torch.equal(scores[:4], scores[:1].expand(4))
    windows = scores[4:].view(4, 3)
    assert torch.equal(windows, windows[:, :1].expand(4, 3))
    torch.testing.assert_close(windows[:, 0].mean(), scores[0])


def test_nothing_stays_on_the_model() -> None:
    model = llava()
    model(**Batch(ROWS).inputs)  # the library puts hooks of its own on a model that is first asked for hidden states
    before = {id(m): (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()}
    names = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    for failing in (False, True):
        reducer, inputs = Asking((ClsAttention(-1), Attention(1)), layer=2), Batch(ROWS).inputs
        if failing:
            inputs["pixel_values"] = inputs["pixel_values"][:1]
        with pytest.raises((RuntimeError, ValueError, FoveateError)) if failing else torch.no_grad(), foveate.attach(model, reducer):
            model(**inputs)
        assert before == {id(m): (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()}
        assert names == [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
        assert "get_image_features" not in vars(model.model)


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(FoveateError, match="the tower has 2 blocks; choose a layer from -2 to 1"):
        foveate.attach(llava(), Asking((ClsAttention(-3),)))


# ---- without a model -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", ["causal", "bool", "additive"])
def test_rows_against_the_whole_softmax(kind: str, softcap: float | None) -> None:
    torch.manual_seed(0)
    B, H, G, N, K, h = 2, 4, 2, 5, 7, 8
    q, k = torch.randn(B, H, N, h), torch.randn(B, G, K, h)
    allowed = torch.ones(N, K, dtype=torch.bool).tril(K - N)
    mask: Tensor | None = None
    if kind != "causal":
        allowed = allowed & (torch.rand(B, 1, N, K) > 0.3)
        allowed[..., 0] = True
        mask = allowed if kind == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    whole = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
    attention = AttentionRows(q, k, 0.3, mask, softcap)
    index = torch.tensor([[4, 0], [2, 3]])
    expected = torch.stack([whole[b][:, index[b]] for b in range(B)])
    torch.testing.assert_close(attention.rows(index), expected)
    torch.testing.assert_close(attention.row(torch.tensor([3, 1])), torch.stack([whole[0, :, 3], whole[1, :, 1]]).mean(1))
    chosen = torch.tensor([[True, False, True, True, False], [False] * 5])
    received = attention.received(chosen)
    torch.testing.assert_close(received[0], whole[0][:, chosen[0]].mean((0, 1)))
    assert not received[1].any()
    torch.testing.assert_close(AttentionRows.of(whole).received(chosen), received)
