"""ThroughLayer: some tokens go through one decoder layer, the others pass by on the residual. A small reducer of the tests' own does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import foveate
from foveate import FoveateError
from foveate.contract import Attention, Bypass, Cut, Decision, Noise, Site, ThroughLayer, View, Workload
from foveate.reducers import VCC, FastV, Random, Reducer, parse, visual_tokens
from foveate.reducers.base import Reducer as Base
from foveate.tokens import TokenMap, budget, top
from tests.test_attach import check_decoding, every_model, everything, joined, state_of
from tests.tiny import IMAGE, LAYERS, PATCHES, ROWS, Batch, llava, prompt


@dataclass(frozen=True)
class Deep(Base):
    """A random `keep` of each image goes through decoder layer `layer`."""

    name: ClassVar[str] = "deep"
    paper: ClassVar[str] = "-"
    layer: int = 1
    keep: float | int = 0.5
    seed: int = 0

    def sites(self, layers: int) -> list[Site]:
        return [ThroughLayer(self.layer, (Noise(self.seed),))]

    def reduce(self, view: View, stage: int = 0) -> Decision:
        return Bypass(TokenMap.keep(view.layout, top(view.layout, view.signal(Noise(self.seed)), self.keep)))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return [budget(self.keep, arriving) for arriving in work.arriving]


@dataclass(frozen=True)
class Fixed(Deep):
    """Decides what it is told."""

    decision: Any = None

    def reduce(self, view: View, stage: int = 0) -> Decision:
        return self.decision(view)


COMBINATIONS: dict[str, list[Reducer]] = {
    "first": [Deep(0)],
    "middle": [Deep(1)],
    "last": [Deep(LAYERS - 1)],
    "neighbours": [Deep(1), Deep(2, seed=1)],
    "all": [Deep(i, seed=i) for i in range(LAYERS)],
    "a cut before": [VCC(1, 2), Deep(2)],
    "a cut behind": [Deep(1), VCC(2, 2)],
    "a cut at the same layer": [VCC(2, 2, positions="renumber"), Deep(2)],
    "cuts all around": [
        Random(0.8, positions="renumber"),
        Random(0.7, 1, positions="renumber"),
        Deep(1),
        VCC(2, 2, positions="renumber"),
        Deep(3),
    ],
}
every_combination = pytest.mark.parametrize("reducers", COMBINATIONS.values(), ids=COMBINATIONS.keys())


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("shortcuts", [True, False], ids=["shortcuts", "no-shortcuts"])
def test_all_through_is_bit_identical(make: Any, attn: str, dtype: torch.dtype, shortcuts: bool) -> None:
    model = make(attn, dtype)
    for batch in (Batch(ROWS, "right", dtype), Batch(ROWS, "left", dtype)):
        bare = everything(model, batch)
        with foveate.attach(model, [Deep(0, 1.0), Deep(2, 1.0), Deep(LAYERS - 1, 1.0)], shortcuts=shortcuts):
            kept = everything(model, batch)
        assert kept.keys() == bare.keys()
        for name, value in bare.items():
            assert torch.equal(kept[name], value), name


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_layer_is_what_it_says(attn: str, layer: int) -> None:
    """Against the bare model whose layer's output is undone for those that pass by, and whose keys there are masked out."""
    model, batch = llava(attn), Batch(ROWS, "right")
    with foveate.attach(model, Deep(layer)) as run, torch.no_grad():
        found = model(**batch.inputs, use_cache=False).logits
    chosen = run.last.bypasses[layer].representative
    passing = batch.inputs["attention_mask"].bool()
    for b in range(len(ROWS)):
        passing[b, chosen[b][chosen[b] >= 0]] = False
    assert passing.sum(1).tolist() == [8, 16, 0]

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        N = passing.shape[1]
        mask = torch.ones(N, N).tril().bool()[None, None] & (batch.inputs["attention_mask"].bool() & ~passing)[:, None, None]
        mask = mask | torch.eye(N).bool()  # padding sees itself
        additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": additive}

    def behind(module: Any, args: Any, output: Tensor) -> Tensor:
        return torch.where(passing[..., None], args[0], output)

    module = model.model.language_model.layers[layer]
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(behind)]
    with torch.no_grad():
        expected = model(**batch.inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    there = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(found[there], expected[there], rtol=1e-4, atol=1e-5)


@every_model
@every_combination
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_does_not_depend_on_its_batch(make: Any, side: str, reducers: list[Reducer]) -> None:
    model, batch = make(), Batch(ROWS, side)
    with foveate.attach(model, reducers), torch.no_grad():
        together = model(**batch.inputs).logits
        for i, single in enumerate(batch.singles):
            torch.testing.assert_close(batch.own(together, i), model(**single).logits[0], rtol=1e-4, atol=1e-5)


@every_model
@every_combination
@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_with_the_cache_is_the_whole_run_again(make: Any, side: str, reducers: list[Reducer]) -> None:
    check_decoding(make(), reducers, side)


def test_the_cache_of_the_layer_holds_what_went_through() -> None:
    model, batch = llava(), Batch([ROWS[1]])
    N = len(ROWS[1])
    with foveate.attach(model, [Deep(1), VCC(3, 4)]) as run, torch.no_grad():
        cache = model(**batch.inputs, use_cache=True).past_key_values
        assert [layer.get_seq_length() for layer in cache.layers] == [N, N - 16, N, N - 24]
        model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)
        assert [layer.get_seq_length() for layer in cache.layers] == [N + 1, N - 15, N + 1, N - 23]
        assert run.last.tokens == [N, N - 16, N, N - 24]
        assert run.last.visual_tokens == [32, 16, 32, 8]
        assert run.last.images == 2
        assert run.ledger.visual_tokens == (32, 16, 32, 8)
        for layer, layout in enumerate(run.last.layouts):
            assert run.last.provenance(layer).target.same(layout)


def test_images_that_pass_the_first_layer_by_are_counted() -> None:
    def none(view: View) -> Bypass:
        return Bypass(TokenMap.keep(view.layout, torch.zeros_like(view.layout.visual)))

    with foveate.attach(llava(), Fixed(0, decision=none)) as run, torch.no_grad():
        run.anatomy.core(**Batch(ROWS).inputs)
    assert run.last.images == 3
    assert run.last.visual_tokens == [0, 48, 48, 48]


@every_combination
@pytest.mark.parametrize("images", [0, 1])
def test_a_second_turn_on_a_kept_cache(reducers: list[Reducer], images: int) -> None:
    model = llava()
    first, second = prompt(1, [1, 2]), [IMAGE] * PATCHES * images + [3, 4]
    batch = Batch([first + second])
    new = {"pixel_values": batch.pixels[1:]} if images else {}
    with foveate.attach(model, reducers) as run, torch.no_grad():
        cache = model(input_ids=torch.tensor([first]), pixel_values=batch.pixels[:1], use_cache=True).past_key_values
        maps = before = run.maps
        turn = model(input_ids=torch.tensor([second]), **new, past_key_values=cache, use_cache=True).logits
        if images:
            maps = joined(before, run.maps)
    with foveate.attach(model, maps=maps), torch.no_grad():
        whole = model(**batch.singles[0], use_cache=False).logits
    torch.testing.assert_close(turn[:, -2:], whole[:, -2:], rtol=1e-4, atol=1e-5)


def test_an_identity_on_a_kept_cache_leaves_the_layers_behind_it_their_slots() -> None:
    """The first image all goes through, and what is behind that layer was cut before it: the second turn must still find its keys."""
    model = llava()
    first, second = prompt(1, [1, 2]), [IMAGE] * PATCHES + [3, 4]
    batch = Batch([first + second])
    turns = []
    for reducers in ([Random(0.5, 1), Deep(2, 8)], [Random(0.5, 1)]):
        with foveate.attach(model, reducers), torch.no_grad():
            cache = model(input_ids=torch.tensor([first]), pixel_values=batch.pixels[:1], use_cache=True).past_key_values
            turns.append(model(input_ids=torch.tensor([second]), pixel_values=batch.pixels[1:], past_key_values=cache).logits)
    assert torch.equal(*turns)


@every_combination
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_flow(reducers: list[Reducer], checkpointing: bool | None) -> None:
    """Those that pass by get theirs on the residual; checkpointing changes nothing."""
    found = []
    for again in (None, checkpointing):
        model, batch = llava().train(), Batch(ROWS)
        if again is not None:
            model.gradient_checkpointing_enable({"use_reentrant": again})
        model.get_input_embeddings().requires_grad_(True)
        states: list[Tensor] = []

        def note(module: Any, args: Any, output: Tensor, states: list[Tensor] = states) -> None:
            output.retain_grad()
            states.append(output)

        with foveate.attach(model, reducers):
            hook = model.model.multi_modal_projector.register_forward_hook(note)
            loss = model(**batch.inputs, labels=batch.labels(), use_cache=False).loss
            loss.backward()
            hook.remove()
        assert states[0].grad is not None
        # A token that no layer lets through reaches no label.
        if len(reducers) < LAYERS and not any(isinstance(r, Random) for r in reducers):
            assert bool((states[0].grad != 0).any(-1).all())
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-7)


@every_combination
def test_generate_is_greedy_by_hand(reducers: list[Reducer]) -> None:
    model, batch = llava(), Batch(ROWS, "left")
    with foveate.attach(model, reducers), torch.no_grad():
        found = model.generate(**batch.inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=1000)
    for i, single in enumerate(batch.singles):
        inputs, maps = dict(single), []
        if "pixel_values" in single:
            with foveate.attach(model, reducers) as run, torch.no_grad():
                model(**single)
            maps = run.maps
        with foveate.attach(model, maps=maps), torch.no_grad():
            for _ in range(4):
                token = model(**inputs, use_cache=False).logits[:, -1].argmax(-1)[:, None]
                inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        assert found[i, -4:].tolist() == inputs["input_ids"][0, -4:].tolist()


def test_hidden_states_keep_the_callers_length_and_what_passes_by_keeps_its_state() -> None:
    model, batch = llava(), Batch([ROWS[0]])
    model(**batch.inputs, output_hidden_states=True)  # the library hooks the layers by itself, here before we do
    with foveate.attach(model, Deep(1)) as run, torch.no_grad():
        states = model(**batch.inputs, output_hidden_states=True, use_cache=False).hidden_states
    chosen = run.last.bypasses[1].representative[0]
    by = torch.ones(len(ROWS[0]), dtype=torch.bool)
    by[chosen] = False
    assert int(by.sum()) == 8
    assert torch.equal(states[1][0, by], states[2][0, by])
    assert bool((states[1][0, ~by] != states[2][0, ~by]).any(-1).all())


def pooled(view: View) -> Bypass:
    return Bypass(TokenMap.pool(view.layout, 2))


def twice(view: View) -> Bypass:
    index = torch.arange(view.layout.shape[1]).expand(view.layout.shape).clone()
    index[:, 1] = 0
    return Bypass(TokenMap.merge(view.layout, index[..., None], None, index))


def weighted(view: View) -> Bypass:
    index = torch.arange(view.layout.shape[1]).expand(view.layout.shape)
    return Bypass(TokenMap.merge(view.layout, index[..., None], torch.full_like(index, 2)[..., None], index))


@pytest.mark.parametrize("decision", [pooled, twice, weighted])
def test_only_a_selection_can_go_through(decision: Any) -> None:
    with foveate.attach(llava(), Fixed(1, decision=decision)) as run, pytest.raises(FoveateError, match="must be a selection"):
        run.anatomy.core(**Batch(ROWS).inputs)


def test_what_does_not_fit() -> None:
    model = llava()

    def cut(view: View) -> Cut:
        return Cut(TokenMap.identity(view.layout))

    with foveate.attach(model, Fixed(1, decision=cut)) as run, pytest.raises(FoveateError, match="decides Cut at a site where Bypass"):
        run.anatomy.core(**Batch(ROWS).inputs)
    with pytest.raises(FoveateError, match="two reducers"):
        foveate.attach(model, [Deep(1), Deep(1, seed=1)])
    with pytest.raises(FoveateError, match=str(Attention(1)).replace("(", r"\(").replace(")", r"\)")):
        foveate.attach(model, [Deep(1), FastV(0.5, layer=2)])
    with foveate.attach(model, [Deep(2), FastV(0.5, layer=2)]), torch.no_grad():
        model(**Batch(ROWS).inputs)


def test_nothing_is_left_behind() -> None:
    model, batch = llava(), Batch(ROWS)
    bare = model(**batch.inputs).logits
    before = state_of(model)
    with pytest.raises(ValueError, match="match"), foveate.attach(model, [Deep(1), Deep(3)]):
        model(input_ids=torch.tensor([ROWS[0]]), pixel_values=batch.pixels)
    with foveate.attach(model, [Deep(1), Deep(3)]):
        model(**batch.inputs)
    assert state_of(model) == before
    assert torch.equal(model(**batch.inputs).logits, bare)


def test_what_is_predicted_to_go_through() -> None:
    """One layer has fewer tokens, the next all again; a cut in front of the same layer comes first."""
    assert visual_tokens([Deep(1)], 16, LAYERS) == [16, 8, 16, 16]
    assert visual_tokens([Deep(2), *parse("random:keep=0.5,layer=2")], 16, LAYERS) == [16, 16, 4, 8]
