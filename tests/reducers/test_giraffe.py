"""Giraffe: counts and means of frames by hand, and a stretched rotary embedding against a model whose frequencies are scaled by hand."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import foveate
from foveate.contract import Cut, FromLayer, Site, View
from foveate.engine.stretching import with_images
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.reducers import Giraffe, parse
from foveate.reducers.giraffe import Stretched, parts
from foveate.reducers.plain import reduce
from foveate.reducers.uniform import subgrid
from tests.reducers.moving import Clips, alone, batches, check, count, film, make
from tests.reducers.ragged import mapped
from tests.situations.models import GREEDY, inputs, qwen
from tests.tiny import IMAGE, PATCHES, ROWS, Batch, llava

CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}

# ---- frames


@pytest.mark.parametrize("spelling", ["giraffe", "giraffe:high=240", "giraffe:group=4,high=240,ratio=3"])
def test_giraffe_960_tokens_for_8_frames(spelling: str) -> None:
    """The default of the paper, (4, 240, 3): 2 (240 + 3 · 80), 120 a frame."""
    (reducer,) = parse(spelling)
    assert count(reducer, 8, 240) == 2 * (240 + 3 * 80) == 960 == 8 * 120
    left = mapped(reducer.reduce(make([[(8, 12, 20)]], [[film((8, 12, 20), width=2)]]).view)).target
    assert [int((left.place[..., 2] == frame).sum()) for frame in range(8)] == [240, 80, 80, 80] * 2


def test_giraffe_960_tokens_for_8_frames_in_a_model() -> None:
    """Of a clip of 8 frames of 12 x 20 tokens in a Qwen2.5-VL; text and marks stay."""
    row = [5, 92] + [91] * 1920 + [93, 4]
    given_ = {
        "input_ids": torch.tensor([row]),
        "mm_token_type_ids": torch.tensor([[2 * (token == 91) for token in row]]),
        "pixel_values_videos": torch.randn(8 * 24 * 40, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([[8, 24, 40]]),
    }
    with foveate.attach(model := qwen(), "giraffe") as run, torch.no_grad():
        model(**given_)
    assert run.last.visual_tokens == [960] * 4
    assert run.last.tokens == [964] * 4
    assert list(run.ledger.visual_tokens) == [960] * 4


@pytest.mark.parametrize(("group", "high", "ratio"), [(4, 240, 3), (2, 100, 4), (5, 60, 2), (1, 7, 9)])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_papers_count(group: int, high: int, ratio: int, groups: int) -> None:
    N = groups * group
    assert count(Giraffe(group, high, ratio), N, 240) == Fraction(N, group) * (1 + Fraction(group - 1, ratio)) * high


def test_halves_round_up_and_one_stays() -> None:
    assert [Giraffe(ratio=ratio)._left(1, 7) for ratio in (1, 2, 3, 4, 100)] == [7, 4, 2, 2, 1]
    assert [Giraffe(high=high)._left(0, 7) for high in (0.5, 0.01, 5, 99)] == [4, 1, 5, 7]
    assert count(Giraffe(), 1, 240) == 240  # a picture is the first frame of its group


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_parts_are_as_equal_as_whole_tokens_allow(rows: int, columns: int, data: st.DataObject) -> None:
    """A token lies in the part that its middle lies in, when the raster is cut into rows of equal height, each into equal widths."""
    tokens = data.draw(st.integers(1, rows * columns))
    cells = torch.cartesian_prod(torch.arange(rows) + 3, torch.arange(columns))
    home, middle = parts(cells, tokens)
    places = subgrid(rows, columns, tokens)
    lengths = [sum(row == at for row, _ in places) for at in dict.fromkeys(row for row, _ in places)]
    expected = []
    for row in range(rows):
        band = (row + Fraction(1, 2)) / rows * len(lengths) // 1
        for column in range(columns):
            across = (column + Fraction(1, 2)) / columns * lengths[band] // 1
            expected.append(sum(lengths[:band]) + across)
    assert home.tolist() == expected
    assert home[middle].tolist() == list(range(tokens))
    assert [divmod(int(at), columns) for at in middle] == places


def test_without_a_raster_parts_are_of_the_sequence() -> None:
    home, middle = parts(torch.full((7, 2), -1), 3)
    assert (home.tolist(), middle.tolist()) == ([0, 0, 1, 1, 1, 2, 2], [1, 3, 5])
    lacking = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]])
    assert parts(lacking, 2)[0].tolist() == [0, 0, 1, 1, 1]


def test_frames_are_means_by_plain_loops() -> None:
    x = film((6, 3, 4), seed=3)
    batch = make([[(6, 3, 4)]], [[x]])
    found = mapped(Giraffe(group=3, high=0.5, ratio=2).reduce(batch.view))
    state, target = found.apply(batch.view.tokens), found.target  # type: ignore[arg-type]
    for frame, tokens in enumerate([6, 3, 3, 6, 3, 3]):
        cells = torch.cartesian_prod(torch.arange(3), torch.arange(4))
        home, middle = parts(cells, tokens)
        own = (target.place[0, :, 2] == frame).nonzero()[:, 0].tolist()
        assert target.place[0, own, 3:].tolist() == cells[middle].tolist()
        for part, slot in enumerate(own):
            members = [x[frame, cell] for cell in range(12) if home[cell] == part]
            torch.testing.assert_close(state[0, slot], sum(members, torch.zeros(x.shape[-1])) / len(members))
            assert target.size[0, slot] == len(members)


def test_sharp_frames_are_left_alone() -> None:
    x = film((5, 2, 2))
    kept, found = alone(Giraffe(group=2), x)
    assert [at // 4 for at in kept] == [0] * 4 + [1] + [2] * 4 + [3] + [4] * 4
    assert torch.equal(found.apply(x.reshape(1, 20, -1))[0, :4], x[0])
    assert alone(Giraffe(ratio=1.0), x)[1].is_identity


@settings(max_examples=20)
@given(batches())
def test_rows_are_what_they_are_alone(batch: Clips) -> None:
    for reducer in (Giraffe(group=2), Giraffe(group=3, high=0.6, ratio=1.5, scope="sample")):
        check(reducer, batch)


@pytest.mark.parametrize("keep", [0.05, 0.25, 0.5, 0.6, 0.9, 1.0])
def test_at_a_budget(keep: float) -> None:
    for reducer in (Giraffe(), Giraffe(group=1), Giraffe(group=8, ratio=2, s=2)):
        found = reducer.at(keep)
        assert count(found, 24, 400) == pytest.approx(keep * 24 * 400, abs=12)
        assert (found.group, found.s) == (reducer.group, reducer.s)


@pytest.mark.parametrize(
    "option", ["group=0", "high=0", "high=1.5", "high=x", "ratio=0.5", "ratio=true", "s=0.99", "s=inf", "s=nan", "s=-2"]
)
def test_impossible_options(option: str) -> None:
    with pytest.raises(FoveateError, match=f"giraffe: {option.partition('=')[0]}=.* is not possible; give "):
        parse(f"giraffe:{option}")


# ---- frequencies


def scaled(axes: list[int], s: float) -> list[float]:
    """The factor of each frequency by the card."""
    factors, rank = [], 0
    for axis in axes:
        n = axes.count(1)
        factors.append((1.0, 1 / s + (1 - 1 / s) * (n - rank) / n, 1 / s)[axis])
        rank += axis == 1
    return factors


@pytest.mark.parametrize("s", [1.0, 2.0, 4.0, 7.5])
def test_the_papers_factors_with_one_axis_behind_the_other(s: float) -> None:
    """Head size 128, x = 8: time 0 … 2x - 1, height 2x … 5x - 1, width 5x … 8x - 1; the height's ramp has 1 at 2x and 1 / s at 5x."""
    x = 8
    axes = [0] * 2 * x + [1] * 3 * x + [2] * 3 * x
    found = Stretched(s)(torch.tensor(axes)).tolist()

    def height(d: int) -> float:
        return 1 / s + (1 - 1 / s) * (d - 5 * x) / (2 * x - 5 * x)

    assert found == pytest.approx([1.0] * 2 * x + [height(d) for d in range(2 * x, 5 * x)] + [1 / s] * 3 * x, abs=1e-15)
    assert found[2 * x] == height(2 * x) == 1.0
    assert height(5 * x) == pytest.approx(found[5 * x])
    assert found == pytest.approx(scaled(axes, s))
    assert s > 1 or found == [1.0] * 64


def test_factors_where_axes_take_turns() -> None:
    assert Stretched(4.0)(torch.tensor([0, 1, 2, 0, 1, 2, 0])).tolist() == [1, 1, 0.25, 1, 0.625, 0.25, 1]
    assert Stretched(4.0)(torch.tensor([0, 2])).tolist() == [1, 0.25]


ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 100.0}
ONE_AFTER_THE_OTHER = [0] * 4 + [1] * 6 + [2] * 6
IN_TURNS = [0, 1, 2] * 5 + [0]
WIDE = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}


def contiguous(**rope: Any) -> Any:
    """A Qwen2.5-VL with 16 frequencies: 4 of time, 6 of height, 6 of width."""
    config = qwen().config.to_dict()
    config["text_config"] |= WIDE | {"rope_parameters": {**ROPE, "mrope_section": [4, 6, 6], **rope}}
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config)).eval()


def interleaved() -> Any:
    """A Qwen3-VL with 16 frequencies, of time, height and width in turns."""
    given_ = qwen().config.to_dict()
    text = {name: given_["text_config"][name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")}
    text |= WIDE | {"rope_parameters": {**ROPE, "mrope_section": [6, 5, 5]}, "initializer_range": 0.2}
    text |= {"bos_token_id": None, "eos_token_id": None}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4, "depth": 2}
    vision = {**sizes, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    tokens = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **tokens)).eval()


MODELS = {"contiguous": (contiguous, ONE_AFTER_THE_OTHER), "interleaved": (interleaved, IN_TURNS)}
both = pytest.mark.parametrize("kind", MODELS)
PICTURE = [5, 92] + [IMAGE] * PATCHES + [93, 4, 6, 7]
TEXT = [n % 40 + 2 for n in range(len(PICTURE))]


def by_hand(kind: str, s: float) -> Any:
    """The same model with other frequencies in its decoder."""
    make_, axes = MODELS[kind]
    model = make_()
    rotary = model.model.language_model.rotary_emb
    factors = torch.tensor(scaled(axes, s), dtype=torch.float64)
    rotary.inv_freq = (rotary.inv_freq.double() * factors).float()
    return model


def prompts(*rows: list[int]) -> dict[str, Any]:
    found = inputs("qwen2_5_vl", list(rows))
    return found if any(IMAGE in row for row in rows) else {"input_ids": found["input_ids"]}


def said(model: Any, given_: dict[str, Any], new: int = 5, **options: Any) -> Any:
    with torch.no_grad():
        return model.generate(**given_, max_new_tokens=new, return_dict_in_generate=True, output_logits=True, **GREEDY, **options)


@both
@pytest.mark.parametrize("s", [2.0, 4.0])
def test_the_model_with_frequencies_scaled_by_hand(kind: str, s: float) -> None:
    """The prompt, and every decoded token."""
    model, given_ = MODELS[kind][0](), prompts(PICTURE)
    with torch.no_grad():
        bare, expected = model(**given_).logits, by_hand(kind, s)(**given_).logits
        with foveate.attach(model, Giraffe(ratio=1, s=s)):
            found = model(**given_).logits
            mine = said(model, given_)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - bare).abs().max() > 1e-2
    theirs = said(by_hand(kind, s), given_)
    assert torch.equal(mine.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(mine.logits), torch.stack(theirs.logits), **CLOSE)
    with torch.no_grad():
        assert torch.equal(model(**given_).logits, bare)  # detached, it is what it was


class Always(Giraffe):
    """Stretches at s = 1 too, where there is nothing to stretch."""

    def reduce(self, view: View, stage: int = 0) -> Cut:
        return replace(super().reduce(view, stage), stretch=Stretched(self.s))


@both
@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("reducer", [Giraffe(ratio=1, s=1), Always(ratio=1, s=1)], ids=["method", "machinery"])
def test_giraffe_s_1_is_ordinary_to_the_bit(kind: str, shortcuts: bool, reducer: Giraffe) -> None:
    """Logits, loss, gradients and an answer, of a batch with a row of text too; also where every angle is computed anew."""
    model, given_ = MODELS[kind][0](), prompts(PICTURE, TEXT)

    def everything() -> dict[str, Tensor]:
        model.zero_grad()
        out = model(**given_, labels=given_["input_ids"], use_cache=False)
        out.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return grads | {"logits": out.logits, "loss": out.loss, "answer": said(model, given_).sequences}

    bare = everything()
    assert len(bare) > 30
    with foveate.attach(model, reducer, shortcuts=shortcuts) as run:
        found = everything()
    assert any(step.stretch is not None for step in run.last.steps) == isinstance(reducer, Always)  # type: ignore[attr-defined]
    assert found.keys() == bare.keys()
    assert [name for name, value in bare.items() if not torch.equal(found[name], value)] == []


@both
def test_a_row_of_text_turns_as_ever(kind: str) -> None:
    """Alone it is the bare model's; so it is beside a picture, in the prompt, while decoding and in beams."""
    model, given_ = MODELS[kind][0](), prompts(TEXT, PICTURE)
    options: dict[str, Any] = {"num_beams": 3}
    expected = [said(MODELS[kind][0](), prompts(TEXT)), said(by_hand(kind, 4.0), prompts(PICTURE))]
    beams = [said(MODELS[kind][0](), prompts(TEXT), **options), said(by_hand(kind, 4.0), prompts(PICTURE), **options)]
    with foveate.attach(model, "giraffe:ratio=1.0,s=4.0"):
        found, searched = said(model, given_), said(model, given_, **options)
        assert torch.equal(said(model, prompts(TEXT)).sequences, expected[0].sequences)
    for row in range(2):
        assert found.sequences[row].tolist() == expected[row].sequences[0].tolist()
        assert searched.sequences[row].tolist() == beams[row].sequences[0].tolist()
        for mine, theirs in zip(found.logits, expected[row].logits, strict=True):
            torch.testing.assert_close(mine[row], theirs[0], **CLOSE)


def test_packed_samples_and_which_have_images() -> None:
    image = torch.tensor([[-1, 0, -1, -1, -1, 1], [-1, -1, -1, -1, -1, -1]])
    samples = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1]])
    assert with_images(image, None).tolist() == [[True] * 6, [False] * 6]
    assert with_images(image, samples).tolist() == [[True, True, True, False, False, True], [False] * 6]


def grid(model: Any, row: list[int]) -> Tensor:
    """(4, 1, N) positions of a row: what counts tokens, then time, row and column."""
    known = {name: value for name, value in prompts(row).items() if name in ("image_grid_thw", "mm_token_type_ids")}
    number = torch.arange(len(row)).expand(1, 1, -1)
    found = model.model.get_rope_index(torch.tensor([row]), **known)[0] if known else number.expand(3, 1, -1)
    return torch.cat([number, found])


@both
@torch.no_grad()
def test_of_packed_samples_those_with_images(kind: str) -> None:
    """One row of a picture's prompt and a text: each is what it is alone, in front of a cut and behind it."""
    model = MODELS[kind][0]()
    own = {"position_ids": torch.cat([grid(model, row) for row in (PICTURE, TEXT)], 2), "use_cache": False}
    text = model(**prompts(TEXT), position_ids=grid(model, TEXT)).logits[0]
    with foveate.attach(model, "giraffe:high=0.4,s=4.0"):
        found, picture = model(**prompts(PICTURE + TEXT), **own).logits[0], model(**prompts(PICTURE)).logits[0]
    torch.testing.assert_close(found[: len(PICTURE)], picture, **CLOSE)
    torch.testing.assert_close(found[len(PICTURE) :], text, **CLOSE)


@both
@torch.no_grad()
def test_rows_of_a_cache_that_are_chosen_anew(kind: str) -> None:
    model, given_ = MODELS[kind][0](), prompts(TEXT, PICTURE)
    positions = torch.cat([grid(model, row) for row in (TEXT, PICTURE)], 1)
    step = {"input_ids": torch.tensor([[8], [9]]), "position_ids": positions.amax((0, 2))[None, :, None].expand(4, -1, -1) + 1}
    with foveate.attach(model, "giraffe:ratio=1.0,s=4.0"):
        one, other = (model(**given_, position_ids=positions, use_cache=True).past_key_values for _ in range(2))
        expected = model(**step, past_key_values=one, use_cache=True).logits
        other.batch_select_indices(torch.tensor([1, 0]))
        turned = {"input_ids": step["input_ids"].flip(0), "position_ids": step["position_ids"].flip(1)}
        found = model(**turned, past_key_values=other, use_cache=True).logits
    torch.testing.assert_close(found.flip(0), expected, **CLOSE)


@both
def test_decoding_is_the_whole_sequence_again(kind: str) -> None:
    """With the recorded decision, on frames made coarser as well."""
    model, given_ = MODELS[kind][0](), prompts(PICTURE, TEXT)
    with foveate.attach(model, "giraffe:high=0.4,s=2.0") as run:
        out = said(model, given_)
        maps = run.maps
    longer = {**given_, "input_ids": out.sequences[:, :-1]}
    longer["mm_token_type_ids"] = torch.nn.functional.pad(given_["mm_token_type_ids"], (0, 4))
    with foveate.attach(model, maps=maps), torch.no_grad():
        whole = model(**longer, use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, -5:], **CLOSE)


@both
@torch.no_grad()
def test_a_second_turn_goes_on_with_what_the_first_began(kind: str) -> None:
    model, hand, first, second = MODELS[kind][0](), by_hand(kind, 2.0), prompts(PICTURE), {"input_ids": torch.tensor([[8, 9, 10]])}
    cache = hand(**first, use_cache=True).past_key_values
    expected = hand(**second, past_key_values=cache, use_cache=True).logits
    for reducers in ("giraffe:ratio=1.0,s=2.0", None, "random:keep=0.5"):  # whatever is attached then
        with foveate.attach(model, "giraffe:ratio=1.0,s=2.0"):
            cache = model(**first, use_cache=True).past_key_values
        with foveate.attach(model, reducers):
            torch.testing.assert_close(model(**second, past_key_values=cache, use_cache=True).logits, expected, **CLOSE)


@both
@torch.no_grad()
def test_a_new_image_on_a_kept_cache(kind: str) -> None:
    model, hand, first = MODELS[kind][0](), by_hand(kind, 2.0), prompts(PICTURE)
    expected = hand(**prompts(PICTURE), past_key_values=hand(**first, use_cache=True).past_key_values, use_cache=True).logits
    with foveate.attach(model, "giraffe:ratio=1.0,s=2.0"):
        found = model(**first, past_key_values=model(**first, use_cache=True).past_key_values, use_cache=True).logits
        torch.testing.assert_close(found, expected, **CLOSE)
        began = model(input_ids=torch.tensor([TEXT]), use_cache=True).past_key_values
        with pytest.raises(FoveateError, match=r"has begun with other frequencies \(22 tokens of it are cached\): begin anew"):
            model(**first, past_key_values=began, use_cache=True)
        cache = model(**first, use_cache=True).past_key_values
    with foveate.attach(model, "giraffe:ratio=1.0,s=3.0"), pytest.raises(FoveateError, match="has begun with other frequencies"):
        model(**first, past_key_values=cache, use_cache=True)
    with foveate.attach(model, "giraffe:s=2+giraffe:s=3"), pytest.raises(FoveateError, match=r"other frequencies \(0 tokens"):
        model(**first)


@both
def test_training(kind: str) -> None:
    """Loss and gradients are those of the model that was scaled by hand; gradient checkpointing changes nothing."""
    given_ = prompts(PICTURE, TEXT)
    losses: list[Tensor] = []
    grads: list[dict[str, Any]] = []
    for make_, reducer in ((MODELS[kind][0], "giraffe:ratio=1.0,s=2.0"), (MODELS[kind][0], "giraffe:ratio=1.0,s=2.0"), (None, None)):
        model = (by_hand(kind, 2.0) if make_ is None else make_()).train()
        if len(losses) == 1:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        rows = prompts(PICTURE) if make_ is None else given_
        labels = torch.where(rows["input_ids"] == IMAGE, -100, rows["input_ids"])
        labels[1:] = -100
        with foveate.attach(model, reducer):
            loss = model(**rows, labels=labels, use_cache=False).loss
            loss.backward()
        losses.append(loss.detach())
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[1])
    torch.testing.assert_close(losses[0], losses[2], **CLOSE)
    for name, grad in grads[2].items():
        torch.testing.assert_close(grads[0][name], grad, **CLOSE)


def test_merged_tokens_in_several_places_are_stretched_too() -> None:
    model, hand, given_ = contiguous(), by_hand("contiguous", 2.0), prompts(PICTURE)
    with torch.no_grad():
        with foveate.attach(hand, "ppe:keep=0.4,k=2"):
            expected = hand(**given_).logits
        with foveate.attach(model, "ppe:keep=0.4,k=2+giraffe:ratio=1.0,s=2.0"):
            torch.testing.assert_close(model(**given_).logits, expected, **CLOSE)


# ---- what cannot be


def test_a_model_whose_positions_are_one_number_a_token() -> None:
    one_axis = "giraffe stretches the rotary embedding by time, height and width, and this model's does not turn by these three"
    with foveate.attach(llava(), "giraffe:s=2") as run, pytest.raises(NotApplicable, match=one_axis) as refused:
        run.anatomy.core(**Batch([ROWS[0]]).inputs)
    assert refused.value.reason == Reason.ONE_AXIS
    with foveate.attach(llava(), "giraffe:ratio=1.0,s=1.0") as run:
        run.anatomy.core(**Batch([ROWS[0]]).inputs)


def test_a_model_that_changes_its_frequencies_by_itself() -> None:
    model = contiguous(rope_type="dynamic", factor=2.0)
    with foveate.attach(model, "giraffe:s=2"), pytest.raises(NotApplicable, match="or changes its frequencies by itself"):
        model(**prompts(PICTURE))


class Late(Giraffe):
    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(1)]


def test_it_holds_for_all_layers_or_for_none() -> None:
    model = contiguous()
    with foveate.attach(model, Late(s=2)), pytest.raises(FoveateError, match="from layer 1 on; decide that at BeforeLM"):
        model(**prompts(PICTURE))


def test_on_plain_tensors_frames_alone() -> None:
    x = torch.randn(1, 16, 4)
    assert reduce("giraffe:high=4", x, grid=(4, 4)).indices.tolist() == [[5, 7, 13, 15]]
    with pytest.raises(FoveateError, match="giraffe says which token sees which, or where tokens stand"):
        reduce("giraffe:high=4,s=2", x, grid=(4, 4))
