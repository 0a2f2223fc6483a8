"""Properties of the Visual Context Compressor, numbered as in the reference's list for LLaVolta."""

from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate import FoveateError
from foveate.contract import View
from foveate.reducers import VCC
from foveate.tokens import Layout, TokenMap
from tests.reducers.ragged import counted
from tests.tiny import LAYERS, PATCHES, ROWS, Batch, llava


def pooled(layout: Layout, stride: int) -> TokenMap:
    return VCC(0, stride).reduce(View(layout)).map


def toy() -> Layout:
    """t0 t1 v0 v1 v2 v3 t2 t3"""
    return Layout.sequence(torch.tensor([[False, False, True, True, True, True, False, False]]))


def oracle(x_ND: Tensor, start: int, tokens: int, stride: int) -> Tensor:
    """The operator as the paper writes it, on one sequence: left, average pooling of the image block, right."""
    block = torch.nn.functional.avg_pool1d(x_ND[start : start + tokens].T[None], stride, stride)[0].T
    return torch.cat([x_ND[:start], block, x_ND[start + tokens :]])


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 7, 8, 16])
def test_the_operator_is_the_papers(stride: int) -> None:
    x = torch.randn(2, 21, 6, dtype=torch.float64)
    visual = torch.zeros(2, 21, dtype=torch.bool)
    visual[:, 2:18] = True
    y = pooled(Layout.sequence(visual), stride).apply(x)
    for row in range(2):
        torch.testing.assert_close(y[row], oracle(x[row], 2, 16, stride), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "stride", "tokens", "ratio"),
    [
        (2, 1, 18432, 100.0),
        (2, 2, 9792, 188.2),
        (2, 4, 5472, 336.8),
        (2, 8, 3312, 556.5),
        (2, 16, 2232, 825.8),
        (8, 4, 8064, 228.6),
        (8, 8, 6336, 290.9),
        (16, 2, 13824, 133.3),
        (16, 4, 11520, 160.0),
        (16, 8, 10368, 177.8),
        (16, 16, 9792, 188.2),
        (1, 64, 855, 2155.8),
    ],
)
def test_1_counts_and_ratios_of_section_3(layer: int, stride: int, tokens: int, ratio: float) -> None:
    counts = VCC(layer, stride).visual_tokens(576, 32)
    assert sum(counts) == tokens
    assert round(100 * 32 * 576 / sum(counts), 1) == ratio


@pytest.mark.parametrize("reducer", [VCC(0, 1), VCC(2, 1), VCC(LAYERS, 8), VCC(99, 8)])
@pytest.mark.parametrize("shortcuts", [True, False])
def test_2_no_compression_is_the_unmodified_model(reducer: VCC, shortcuts: bool) -> None:
    model, batch = llava(), Batch(ROWS)
    bare = model(**batch.inputs, labels=batch.labels())
    with foveate.attach(model, reducer, shortcuts=shortcuts):
        kept = model(**batch.inputs, labels=batch.labels())
    assert torch.equal(kept.logits, bare.logits)
    assert torch.equal(kept.loss, bare.loss)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("stride", [2, 4, 16])
def test_3_causality_tokens_before_the_image_do_not_change(attn: str, layer: int, stride: int) -> None:
    """Against another image of the same shape to the last bit. Against the unmodified model in float64, since matrix products of
    another length may round their last bit otherwise (and the library's eager attention takes its softmax in float32)."""
    model, batch = llava(attn, torch.float64), Batch([ROWS[0]], dtype=torch.float64)
    inputs, before = batch.inputs, ROWS[0].index(90)
    assert before == 3
    with torch.no_grad():
        bare = model(**inputs, output_hidden_states=True)
        with foveate.attach(model, VCC(layer, stride)):
            cut = model(**inputs, output_hidden_states=True)
            other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}, output_hidden_states=True)
    assert not torch.equal(cut.logits, other.logits)
    states = [(out.logits, *out.hidden_states) for out in (cut, bare, other)]
    for a, b, c in zip(*states, strict=True):
        torch.testing.assert_close(a[:, :before], b[:, :before], rtol=0, atol=1e-12 if attn == "sdpa" else 1e-5)
        assert torch.equal(a[:, :before], c[:, :before])


@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_4_the_first_layers_and_their_cache_are_the_unmodified_models(layer: int) -> None:
    model, inputs = llava(), Batch(ROWS).inputs
    with torch.no_grad():
        bare = model(**inputs, output_hidden_states=True, use_cache=True)
        with foveate.attach(model, VCC(layer, 4)):
            cut = model(**inputs, output_hidden_states=True, use_cache=True)
    for i in range(layer):
        assert torch.equal(cut.hidden_states[i], bare.hidden_states[i])
        assert torch.equal(cut.past_key_values.layers[i].keys, bare.past_key_values.layers[i].keys)
        assert torch.equal(cut.past_key_values.layers[i].values, bare.past_key_values.layers[i].values)
    assert torch.equal(cut.hidden_states[layer], bare.hidden_states[layer])  # what arrives at the layer that pools
    assert cut.past_key_values.layers[layer].keys.shape[2] < bare.past_key_values.layers[layer].keys.shape[2]


def test_5_the_toy_sequence() -> None:
    layout, x = toy(), torch.arange(8, dtype=torch.float64)[None, :, None]
    half = pooled(layout, 2)
    assert half.apply(x).flatten().tolist() == [0, 1, 2.5, 4.5, 6, 7]
    assert half.target.position.tolist() == [[0, 1, 2, 4, 6, 7]]
    assert half.positions(layout.position).tolist() == [[0, 1, 2, 4, 6, 7]]  # the representatives: where labels would be gathered
    assert half.target.shape == (1, 6)
    assert pooled(layout, 4).target.position.tolist() == [[0, 1, 3, 6, 7]]


def test_6_positions_of_576_tokens_that_start_at_35() -> None:
    visual = torch.zeros(1, 35 + 576 + 4, dtype=torch.bool)
    visual[:, 35 : 35 + 576] = True
    target = pooled(Layout.sequence(visual), 8).target
    assert target.position[0, 35 : 35 + 72].tolist() == list(range(38, 607, 8))
    assert target.position[0, 35 + 72] == 611


@pytest.mark.parametrize("start", [1024, 2048, 60000])
def test_6_mean_positions_are_exact_where_float16_is_not(start: int) -> None:
    layout = Layout.sequence(torch.ones(1, 8, dtype=torch.bool), position_BN=torch.arange(start, start + 8)[None])
    assert pooled(layout, 8).target.position.tolist() == [[start + 3]]


def test_7_equal_members_are_lossless() -> None:
    x = torch.randn(1, 2, 5).repeat_interleave(4, 1)
    m = pooled(Layout.sequence(torch.ones(1, 8, dtype=torch.bool)), 4)
    assert torch.equal(m.expand(m.apply(x)), x)


def test_8_linearity_and_mass() -> None:
    layout = toy()
    x, y = torch.randn(2, 1, 8, 3, dtype=torch.float64)
    m = pooled(layout, 2)
    torch.testing.assert_close(m.apply(2.5 * x - 0.5 * y), 2.5 * m.apply(x) - 0.5 * m.apply(y))
    torch.testing.assert_close(2 * m.apply(x)[:, 2:4].sum(1), x[:, 2:6].sum(1))
    assert m.target.size.sum() == layout.size.sum() == 4


def test_9_gradient_of_each_member_is_one_over_the_stride() -> None:
    x = torch.randn(1, 8, 3, requires_grad=True)
    y = pooled(toy(), 4).apply(x)
    (grad,) = torch.autograd.grad(y[0, 2, 1], x)
    expected = torch.zeros(1, 8, 3)
    expected[0, 2:6, 1] = 0.25
    assert torch.equal(grad, expected)


def test_10_images_are_pooled_each_on_its_own() -> None:
    model, seen = llava(), []
    inputs = Batch([ROWS[1]]).inputs
    for permuted in (False, True):
        pixels = inputs["pixel_values"].clone()
        if permuted:
            pixels[0] = pixels[0].flip(-1)
        with foveate.attach(model, VCC(0, 3)) as run, torch.no_grad():
            hook = model.model.language_model.layers[0].register_forward_hook(lambda m, args, out: seen.append(args[0]))
            model(**{**inputs, "pixel_values": pixels})
            hook.remove()
        groups = [run.last.maps[0].sources(0, t) for t in range(seen[-1].shape[1])]
    first, second = range(3, 3 + PATCHES), range(4 + PATCHES, 4 + 2 * PATCHES)
    many = [g for g in groups if len(g) > 1]
    assert [len(g) for g in many] == [3] * 10  # 16 // 3 groups in each of two images, the remainder dropped
    assert all(set(g) <= set(first) or set(g) <= set(second) for g in many)
    assert torch.equal(seen[0][:, 3 + 5 + 1 :], seen[1][:, 3 + 5 + 1 :])  # nothing behind image 1 changed
    assert not torch.equal(seen[0][:, 3:8], seen[1][:, 3:8])


def test_11_the_remainder_is_dropped() -> None:
    m = pooled(Layout.sequence(torch.ones(1, 257, dtype=torch.bool)), 8)
    assert m.target.shape == (1, 32)
    assert counted(VCC(0, 8), 257, 257) == 32
    assert 256 not in {s for t in range(32) for s in m.sources(0, t)}


def test_12_supervised_tokens_do_not_depend_on_the_setting() -> None:
    model, batch = llava(), Batch(ROWS)
    labels = batch.labels()
    counts = set()
    for reducer in (None, VCC(0, 4), VCC(2, 8), VCC(3, 16)):
        with foveate.attach(model, reducer):
            out = model(**batch.inputs, labels=labels)
        summed = model.loss_function(logits=out.logits, labels=labels, vocab_size=99, num_items_in_batch=1)
        counts.add(round((summed / out.loss).item()))
    assert counts == {int((labels[:, 1:] >= 0).sum())}


@pytest.mark.parametrize("stride", [2, 4, 16])
def test_13_cache_lengths(stride: int) -> None:
    model, inputs = llava(), Batch([ROWS[0]]).inputs
    n = len(ROWS[0])
    with foveate.attach(model, VCC(2, stride)), torch.no_grad():
        cache: Any = model(**inputs, use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [n, n, n - PATCHES + PATCHES // stride, n - PATCHES + PATCHES // stride]


def test_14_and_15_schedules_are_tested_with_the_trainer_and_the_cost_model() -> None:
    """Boundaries: tests/train/test_schedule.py; mean tokens: tests/test_cost.py. Here: the last-stage scheme from the method alone."""
    schedule = [VCC(2, 16), VCC(16, 16), VCC(16, 4)]
    mean = sum(sum(r.visual_tokens(576, 32)) for r in schedule) / 3
    assert mean == 7848
    assert round(100 * 18432 / mean, 1) == 234.9


def test_16_nested_pools_are_one_pool_of_the_product_when_no_layer_lies_between() -> None:
    layout = Layout.sequence(torch.ones(1, 16, dtype=torch.bool))
    x = torch.randn(1, 16, 4, dtype=torch.float64)
    halves = TokenMap.identity(layout)
    for _ in range(3):
        halves = halves.then(pooled(halves.target, 2))
    torch.testing.assert_close(halves.apply(x), pooled(layout, 8).apply(x), rtol=0, atol=1e-12)
    model, inputs = llava(), Batch([ROWS[0]]).inputs
    logits = []
    for reducer in ("vcc:layer=1,stride=2+vcc:layer=1,stride=2", "vcc:layer=1,stride=4", "vcc:layer=1,stride=2+vcc:layer=2,stride=2"):
        with foveate.attach(model, reducer), torch.no_grad():
            logits.append(model(**inputs).logits[:, -1])
    # The same but for rounding, and for positions: the mean of truncated means is one less than the truncated mean.
    assert (logits[0] - logits[1]).abs().max() < 0.5 * (logits[2] - logits[1]).abs().max()


def test_an_image_smaller_than_the_stride_is_an_error() -> None:
    with pytest.raises(FoveateError, match="stride 8 is larger than the 4 visual tokens"):
        pooled(toy(), 8)
