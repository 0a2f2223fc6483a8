"""Visibility: rules of who sees whom, laid over every mask that a layer may get. Small reducers of the tests' own do it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import foveate
from foveate import FoveateError, NotApplicable
from foveate.contract import Site, View, Visibility, Visible, Workload
from foveate.engine.rulings import laid_over
from foveate.errors import Reason
from foveate.reducers import YOPO, Reducer, parse
from foveate.tokens import Layout
from tests.reducers.plain_decoder import causal, decode, embedded
from tests.situations.models import GREEDY, inputs, mistral, qwen, text_backend
from tests.test_attach import check_decoding, everything, state_of
from tests.tiny import IMAGE, LAYERS, PATCHES, ROWS, Batch, llava, prompt

ONE = prompt(1, [1, 2, 3])


@dataclass(frozen=True)
class Every:
    """(B, M, K) bool: text that follows sees every `n`-th token of an image alone, the first among them."""

    n: int

    def __call__(self, query: Layout, key: Layout) -> Tensor:
        far = key.visual & (key.rank_in_image % self.n > 0)
        return ~(~query.visual[..., None] & far[:, None])


@dataclass(frozen=True)
class Later:
    """(B, M or 1, K) float32: tokens of an image count the more the later they stand in it."""

    def __call__(self, query: Layout, key: Layout) -> Tensor:
        return (key.rank_in_image * key.visual / 4)[:, None]


EVERY_THIRD = Visible(Every(3))


@dataclass(frozen=True)
class Glance(Reducer):
    """Text sees a part of the image, in some layers."""

    name: ClassVar[str] = "glance"
    paper: ClassVar[str] = "-"
    layer: int = 0
    end: int | None = None
    decision: Visible = EVERY_THIRD

    def sites(self, layers: int) -> list[Site]:
        return [Visibility(self.layer, self.end)]

    def reduce(self, view: View, stage: int = 0) -> Visible:
        return self.decision

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return list(work.arriving)


def glances(layer: int = 0, end: int | None = None, **decision: Any) -> Glance:
    return Glance(layer, end, Visible(**decision))


COMBINATIONS: dict[str, list[Reducer]] = {
    "all layers": [glances(sees=Every(3))],
    "some layers": [glances(1, 3, sees=Every(3))],
    "two rules": [glances(sees=Every(2)), glances(2, bias=Later())],
    "after a cut": [*parse("tome:keep=0.5"), glances(1, sees=Every(2), bias=Later())],
    "around cuts": [*parse("random:keep=0.7,layer=2,positions=renumber"), glances(sees=Every(2)), *parse("vcc:layer=3,stride=2")],
    "a bypass within": [*parse("pmod:untrained=true,shift=0.0"), glances(sees=Every(2), holds=True)],
}
every_combination = pytest.mark.parametrize("reducers", COMBINATIONS.values(), ids=COMBINATIONS.keys())


def rule_of(row: list[int], first: int, end: int) -> Any:
    """What "some layers" says of a row, pair by pair."""
    ranks = [row[:at].count(IMAGE) % PATCHES if token == IMAGE else None for at, token in enumerate(row)]

    def added(layer: int, i: int, j: int) -> float:
        rank = ranks[j]
        hidden = first <= layer < end and ranks[i] is None and rank is not None and rank % 3 > 0
        return float("-inf") if hidden else causal(layer, i, j)

    return added


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("first", "end"), [(0, LAYERS), (1, 3), (3, LAYERS)])
def test_a_rule_hides_what_it_says_in_the_layers_that_it_names(attn: str, first: int, end: int) -> None:
    model, row = llava(attn), ROWS[1]
    given = Batch([row]).inputs
    expected = decode(model, embedded(model, given), range(len(row)), rule_of(row, first, end))
    with foveate.attach(model, glances(first, None if end == LAYERS else end, sees=Every(3))), torch.no_grad():
        torch.testing.assert_close(model(**given).logits[0].double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("attn", "dtype"), [("sdpa", torch.float32), ("eager", torch.bfloat16)])
def test_rules_that_show_everything_are_bit_identical(attn: str, dtype: torch.dtype) -> None:
    model, whole = llava(attn, dtype), [glances(sees=Every(1)), glances(2, sees=Every(1))]
    for batch in (Batch(ROWS, "right", dtype), Batch(ROWS, "left", dtype)):
        bare = everything(model, batch)
        before = state_of(model)
        for shortcuts in (True, False):
            with foveate.attach(model, whole, shortcuts=shortcuts):
                kept = everything(model, batch)
            assert kept.keys() == bare.keys()
            for name, value in bare.items():
                assert torch.equal(kept[name], value), name
        assert state_of(model) == before


@every_combination
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_does_not_depend_on_its_batch_and_decoding_is_the_whole_run_again(side: str, reducers: list[Reducer]) -> None:
    model, batch = llava(), Batch(ROWS, side)
    with foveate.attach(model, reducers), torch.no_grad():
        together = model(**batch.inputs).logits
        for i, single in enumerate(batch.singles):
            torch.testing.assert_close(batch.own(together, i), model(**single).logits[0], rtol=1e-4, atol=1e-5)
    check_decoding(model, reducers, side)


def test_the_answer_goes_by_the_rule_of_the_prompt() -> None:
    """Step by step what the prompt and the answer are in one go: here against the bare model under a mask of the whole."""
    model, row = llava("eager"), [*ONE, 11, 12, 13]
    given = Batch([ONE]).inputs
    with foveate.attach(model, glances(sees=Every(3))), torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
        steps = [model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1] for token in row[len(ONE) :]]
    whole = {**given, "input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.int64)}
    expected = decode(model, embedded(model, whole), range(len(row)), rule_of(row, 0, LAYERS))
    torch.testing.assert_close(torch.stack(steps).double(), expected[len(ONE) :], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "reducers", [[glances(sees=Every(3))], [*parse("tome:keep=0.5"), glances(1, bias=Later())]], ids=["rule", "merged"]
)
def test_second_turns_other_attachments_and_copies_of_a_cache(reducers: list[Reducer]) -> None:
    """A turn of text, then one with a picture, whose tokens are counted on behind those of the first."""
    model, second, third = llava(), [3, 4], [IMAGE] * PATCHES + [5, 6]
    batch = Batch([ONE + second + third])
    with foveate.attach(model, reducers) as run, torch.no_grad():
        cache = model(input_ids=torch.tensor([ONE]), pixel_values=batch.pixels[:1], use_cache=True).past_key_values
        maps, copied = run.maps, copy.deepcopy(cache)
        cropped = copy.deepcopy(cache)
        turn = model(input_ids=torch.tensor([second]), past_key_values=cache, use_cache=True).logits
        model(input_ids=torch.tensor([[9, 9, 9]]), past_key_values=cropped, use_cache=True)
        cropped.crop(-3)
        assert torch.equal(model(input_ids=torch.tensor([second]), past_key_values=cropped, use_cache=True).logits, turn)
        last = model(input_ids=torch.tensor([third]), pixel_values=batch.pixels[1:], past_key_values=cache, use_cache=True).logits
    both = {"input_ids": torch.tensor([ONE + second]), "pixel_values": batch.pixels[:1]}
    with foveate.attach(model, maps=maps), torch.no_grad():
        torch.testing.assert_close(turn, model(**both, use_cache=False).logits[:, -2:], rtol=1e-4, atol=1e-5)
    with foveate.attach(model, None), torch.no_grad():  # the rule lives on the cache
        torch.testing.assert_close(turn, model(input_ids=torch.tensor([second]), past_key_values=copied, use_cache=True).logits)
    with pytest.raises(FoveateError, match="nothing is attached"):
        model(input_ids=torch.tensor([second]), past_key_values=copied, use_cache=True)
    if len(reducers) == 1:  # else the third turn's own merging belongs to the maps
        with foveate.attach(model, reducers), torch.no_grad():
            whole = model(**batch.singles[0], use_cache=False).logits
        torch.testing.assert_close(last[:, -2:], whole[:, -2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["beams", "static"])
def test_beams_and_static_caches(name: str) -> None:
    model, batch = llava(), Batch(ROWS[:2], "left")
    more: dict[str, Any] = {"num_beams": 3} if name == "beams" else {"cache_implementation": "static"}
    how = {**GREEDY, "max_new_tokens": 4}
    with foveate.attach(model, [glances(sees=Every(3)), glances(2, bias=Later())]), torch.no_grad():
        together = model.generate(**batch.inputs, **how, **more)
        for i, single in enumerate(batch.singles):
            alone = model.generate(**single, **how, **(more if name == "beams" else {}))
            assert together[i, -4:].tolist() == alone[0, -4:].tolist()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_windows_stay_as_they_are(attn: str) -> None:
    """Layers that reach back 8 tokens, and caches that hold no more: a step at a time is the whole in one go."""
    model, row = mistral(attn), [*ONE, 11, 12, 13]
    given, reducers = inputs("llava", [ONE]), [glances(sees=Every(3)), glances(2, bias=Later())]
    with foveate.attach(model, reducers) as run, torch.no_grad():
        cache = DynamicCache(config=model.config.text_config)
        model(**given, past_key_values=cache, use_cache=True)
        maps = run.maps
        steps = [model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1] for token in row[len(ONE) :]]
    with foveate.attach(model, maps=maps), torch.no_grad():
        whole = model(**{**given, "input_ids": torch.tensor([row])}, use_cache=False).logits[0]
    torch.testing.assert_close(torch.stack(steps), whole[len(ONE) :], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert (model(**{**given, "input_ids": torch.tensor([row])}, use_cache=False).logits[0, -1] - whole[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["eemllm", "yopo:window=3", "tome:keep=0.5+restore", "v2pe:delta=0.25"])
def test_samples_packed_into_one_row_do_not_mix(method: str) -> None:
    model, row = llava(), ROWS[0]
    pixels = Batch([row, row]).pixels
    with foveate.attach(model, method), torch.no_grad():
        positions = torch.arange(len(row)).repeat(2)[None]
        packed = model(input_ids=torch.tensor([row + row]), position_ids=positions, pixel_values=pixels, use_cache=False).logits[0]
        for i in range(2):
            alone = model(input_ids=torch.tensor([row]), pixel_values=pixels[i : i + 1], use_cache=False).logits[0]
            torch.testing.assert_close(packed[i * len(row) : (i + 1) * len(row)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("additive", [False, True])
def test_masks_that_are_given_are_kept_to(additive: bool) -> None:
    """4-D masks of the caller's own: what is hidden there stays hidden, and what a rule opens is seen."""
    query = key = View.of(torch.zeros(1, 5, 1), grid=(2, 2), text=1).layout
    mask: Any = torch.ones(1, 2, 5, 5, dtype=torch.bool).tril()
    mask[0, 1, :, 0] = False
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    rules = (Visible(Every(2)), Visible(opens=YOPO(window=0).reduce(View(key)).opens))
    found = laid_over(given, rules, query, key, lambda: mask, 5, torch.float32)
    seen = found > -1 if additive else found
    assert seen[0, 0, :4, :4].all()
    assert seen[0, :, :4, :4].all()  # opened in the second head too
    assert seen[0, :, 4].tolist() == [[True, False, True, False, True], [False, False, True, False, True]]
    raised = laid_over(given, (Visible(bias=Later()),), query, key, lambda: mask, 5, torch.float32)
    assert raised[0, 0, 4].tolist() == [0, 0.25, 0.5, 0.75, 0]
    assert bool((raised[~mask] == torch.finfo(torch.float32).min).all())


def test_in_mixed_precision() -> None:
    model, batch = llava(), Batch(ROWS, "left")
    with foveate.attach(model, [*parse("tome:keep=0.5"), glances(sees=Every(2), bias=Later())]), torch.no_grad():
        exact = model(**batch.inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(**batch.inputs).logits
    there = batch.inputs["attention_mask"].bool()
    assert (mixed.float() - exact)[there].abs().mean() < 0.05 * exact[there].abs().mean()


# ---- what cannot be


def test_images_that_are_held_are_not_forgotten_by_another_method() -> None:
    model, third = llava(), [IMAGE] * PATCHES + [5, 6]
    batch = Batch([ONE + third])
    with foveate.attach(model, "eemllm:visual_update=none"), torch.no_grad():
        cache = model(input_ids=torch.tensor([ONE]), pixel_values=batch.pixels[:1], use_cache=True).past_key_values
    with foveate.attach(model, "none"), pytest.raises(FoveateError, match="while that method is attached"), torch.no_grad():
        model(input_ids=torch.tensor([third]), pixel_values=batch.pixels[1:], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("backend", ["flash_stand_in", "flex_attention"])
@pytest.mark.parametrize("method", ["eemllm", "yopo:window=0,causal=true", "restore"])
def test_backends_that_take_no_such_mask_are_refused(backend: str, method: str) -> None:
    model = text_backend(llava(), backend)
    before = state_of(model)
    with pytest.raises(FoveateError, match=f"says which token sees which, and {backend} takes no such mask: load the model with sdpa"):
        foveate.attach(model, method)
    assert state_of(model) == before


def test_layers_that_do_not_attend_are_refused_where_the_rule_holds() -> None:
    model = llava()

    class Recurring(nn.Module):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return hidden_states

    model.model.language_model.layers[1] = Recurring()
    with pytest.raises(NotApplicable, match=r"decoder layer 1 \(Recurring\) does not attend") as refused:
        foveate.attach(model, "eemllm")
    assert refused.value.reason == Reason.RECURRENT
    foveate.attach(model, "eemllm:layer=2").detach()


def test_layers_without_a_mask_are_refused() -> None:
    model = llava()

    def without(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {name: value for name, value in kwargs.items() if name != "attention_mask"}

    hook = model.model.language_model.layers[0].register_forward_pre_hook(without, with_kwargs=True)
    with foveate.attach(model, "eemllm"), pytest.raises(NotApplicable, match="decoder layer 0 is given no mask"):
        model(**Batch([ONE]).inputs)
    hook.remove()


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(FoveateError, match="there is no decoder layer 9 to act at; choose one from 0 to 3"):
        foveate.attach(llava(), "yopo:layer=9")


def test_positions_in_a_grid_are_not_made_steps_of() -> None:
    with foveate.attach(qwen(), "v2pe") as run, pytest.raises(NotApplicable, match="are places in a grid") as refused:
        run.anatomy.core(**inputs("qwen2_5_vl", [[5, 92] + [IMAGE] * PATCHES + [93, 4]]))
    assert refused.value.reason == Reason.POSITIONS


def test_flash_attention_is_given_positions_that_are_no_steps() -> None:
    """Else it would take the rows for packed samples."""
    found = []
    for backend in ("sdpa", "flash_stand_in"):
        model = text_backend(llava(), backend)
        with foveate.attach(model, "v2pe:delta=0.25"), torch.no_grad():
            found.append(model(**inputs("llava", [ONE])).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_policy_for_the_cache_is_refused_beside_a_rule() -> None:
    """Neither of them is attached."""
    model = llava()
    before = state_of(model)
    with pytest.raises(FoveateError, match=r"says which token sees which of all that came, and .* lets some go"):
        foveate.attach(model, "yopo:window=3", cache="random:keep=0.5")
    assert state_of(model) == before
