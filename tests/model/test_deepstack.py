"""DeepStack in the assembled model: the order of the mosaic, nothing added is nothing changed, and cuts that take the stacks with them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.situations.test_tiled_models import MLP, POOL, inputs, recipe, samples, weights
from tests.train.tiny_training import save_backbones, save_samples
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

import foveate
from foveate.anatomy import read
from foveate.batch.encode import _stop
from foveate.errors import FoveateError
from foveate.inference import Broken
from foveate.model.assembly import from_backbones
from foveate.model.entering import watch
from foveate.tilings import DeepStack, Sight, parse
from foveate.tokens import stacks
from foveate.train.plan import plan
from foveate.train.run import main
from foveate.train.trainer import FoveateTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("doors")
    save_backbones(found, layers=5)
    return found


def assembled(folder: Path, tiling: str | None, bridge: dict[str, Any] = POOL) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return from_backbones(folder / "tower", folder / "lm", bridge, tiling=tiling)


@pytest.fixture(scope="module")
def made(folder: Path) -> tuple[Any, Any]:
    return assembled(folder, "deepstack")


# ---- the order -------------------------------------------------------------------------------------------------------------------------


def test_the_mosaic_order() -> None:
    """The paper's example: an overview of 2 x 2 tokens, 2 x 2 tiles, the tiles' map numbered 0 to 15 row after row."""
    found = DeepStack().plan(1000, 1000, sight=Sight(28))
    numbers = torch.arange(16).view(4, 4)
    tiles = torch.cat([numbers[r : r + 2, c : c + 2].flatten() for r in (0, 2) for c in (0, 2)])  # as the tower makes them
    tokens = torch.cat([torch.full((4,), -1), tiles])
    assert tokens[stacks(found)].tolist() == [[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]]


@pytest.mark.parametrize(("size", "grid"), [((900, 300), (1, 3)), ((500, 1000), (2, 1)), ((1000, 1000), (2, 2)), ((2000, 500), (1, 4))])
def test_stacks_are_a_permutation_of_the_mosaic_and_lie_where_they_show(size: tuple[int, int], grid: tuple[int, int]) -> None:
    found = DeepStack().plan(*size, sight=Sight(42))
    assert found.mosaic is not None
    assert (found.mosaic.rows, found.mosaic.columns) == grid
    places = stacks(found)
    assert sorted(places.flatten().tolist()) == list(range(9, 9 + places.numel()))
    for stack in places:  # by boxes in shares of the image: a tile's token lies within that of the overview
        for slot, token in enumerate(stack.tolist()):
            crop, cell = found.crops[token // 9], token % 9
            left, top, right, bottom = crop.box
            x, y = left + (right - left) * (cell % 3 + 0.5) / 3, top + (bottom - top) * (cell // 3 + 0.5) / 3
            assert slot == int(y * 3) * 3 + int(x * 3)


def test_the_published_setting() -> None:
    found = parse("deepstack").plan(1000, 1000)
    assert (len(found.crops), found.visual, found.tokens, stacks(found).shape) == (5, 576, 576, (4, 576))
    assert DeepStack().layers == (1, 2, 3, 4)
    assert DeepStack(tiles=3, start=2, interval=4).layers == (2, 6, 10)
    assert [len(DeepStack().plan(1000, 500, most).crops) for most in (None, 3, 2, 1)] == [3, 3, 1, 1]


# ---- the model -------------------------------------------------------------------------------------------------------------------------


def test_without_stacks_it_is_the_base_bit_for_bit(folder: Path, made: tuple[Any, Any]) -> None:
    """No tiles, stacks of nothing but zeros, and text alone."""
    model, processor = made
    base, plain = assembled(folder, "whole")
    none, bare = assembled(folder, "deepstack:tiles=0")
    with torch.no_grad():
        expected = base(**inputs(plain, samples())).logits
        assert torch.equal(none(**inputs(bare, samples())).logits, expected)
        shown = {of: of(images=[samples()[0].images[0]], text="<image>a", return_tensors="pt", budget=1) for of in (plain, processor)}
        assert torch.equal(shown[processor]["input_ids"], shown[plain]["input_ids"])
        assert torch.equal(model(**shown[processor]).logits, base(**shown[plain]).logits)
        text = inputs(processor, samples()[2:3])
        assert torch.equal(model(**text).logits, base(**text).logits)
        assert not torch.equal(model(**inputs(processor, samples())).logits, expected)


def by_hand(model: Any, batch: dict[str, Any], slots: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of one image of four views: the embeddings, and the stacks as (1, N, width)."""
    core = model.model
    with torch.no_grad():
        views = core.bridge([core.encode_crops(batch["pixel_values"])[:, 0]], (4, 4))  # (views, tokens, width), tokens 2 x 2 or 4 x 4
        side = round(views.shape[1] ** 0.5)
        embeds = core.get_input_embeddings()(batch["input_ids"]).masked_scatter(slots[..., None], views[0])
        (rows, columns), found = (2, 2), []
        for i in range(rows):
            for j in range(columns):
                stack = torch.zeros_like(embeds)
                at = slots[0].nonzero()[:, 0]
                for row in range(side):
                    for column in range(side):
                        y, x = row * rows + i, column * columns + j
                        tile = (y // side) * columns + x // side
                        stack[0, at[row * side + column]] = views[1 + tile, (y % side) * side + x % side]
                found.append(stack)
    return embeds, found


@pytest.mark.parametrize("reducer", ["none", "random:keep=0.5", "fastv:keep=0.5,layer=1", "vcc:layer=2,stride=2", "fastv:keep=0.5,layer=4"])
def test_stacks_are_cut_with_the_states(made: tuple[Any, Any], reducer: str) -> None:
    """A cut before, at, between and behind the layers 1 to 4 that stacks enter at. By hand: layer by layer, all gathered alike."""
    model, processor = made
    picture = samples()[0].images[0].resize((80, 80))
    batch = processor(images=[picture], text="a<image>What is this?", return_tensors="pt")
    slots = batch["input_ids"] == processor.image_token_id
    hidden, features = by_hand(model, batch, slots)
    decoder: Any = read(model).decoder
    with foveate.attach(model, reducer) as run, torch.no_grad():
        found = model(**batch, use_cache=False).logits[0]
        maps = run.last.maps
    position, groups = torch.arange(hidden.shape[1])[None], [[slot] for slot in range(hidden.shape[1])]
    with torch.no_grad():
        for index, layer in enumerate(decoder.layers):
            if index in maps:
                groups = [maps[index].sources(0, slot) for slot in range(maps[index].representative.shape[1])]
                hidden, *features = (torch.stack([of[:, group].mean(1) for group in groups], 1) for of in (hidden, *features))
                position = maps[index].positions(position)
            if index in DeepStack().layers:
                hidden = hidden + features[index - 1]
            rotary = decoder.rotary_emb(hidden, position)
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=None)
        logits = model.lm_head(decoder.norm(hidden))[0]
    assert (len(maps) == 0) == (reducer == "none")
    for slot, group in enumerate(groups):
        torch.testing.assert_close(found[group[0]], logits[slot], rtol=1e-4, atol=1e-5)


def test_only_layers_from_the_first_stack_on_see_it(folder: Path) -> None:
    model, processor = assembled(folder, "deepstack:tiles=2,start=2,interval=2")
    with torch.no_grad():
        whole = inputs(processor, samples()[:1])
        found = model(**whole, output_hidden_states=True).hidden_states
        model.set_tiling("deepstack:tiles=2,start=0")
        model.set_tiling(None)
        assert not any(layer._forward_pre_hooks for layer in read(model).layers)
        base = model(input_ids=whole["input_ids"], pixel_values=whole["pixel_values"][:1], output_hidden_states=True).hidden_states
    assert [torch.equal(a, b) for a, b in zip(found, base, strict=True)] == [True, True, True, False, False, False]


def test_training_copies_and_errors_leave_nothing_behind(folder: Path, made: tuple[Any, Any]) -> None:
    model, processor = copy.deepcopy(made[0]), made[1]
    batch = dict(inputs(processor, samples()))
    with torch.no_grad():
        expected = made[0](**batch).logits
        assert torch.equal(pickle.loads(pickle.dumps(assembled(folder, "deepstack")[0]))(**batch).logits, expected)
    gradients = []
    for checkpointed in (False, True):
        model.train()
        model.gradient_checkpointing_enable() if checkpointed else None
        model.zero_grad()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(gradients[1][name], of) for name, of in gradients[0].items())
    with pytest.raises(AttributeError, match="get_seq_length"):
        model(**batch, past_key_values="no cache")
    assert model.model.entering.layers == {}
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, expected)


def test_images_encoded_before(made: tuple[Any, Any]) -> None:
    model, processor = made
    batch = dict(inputs(processor, samples()))
    with torch.no_grad():
        expected = model(**batch).logits
        encoded = model.get_image_features(batch.pop("pixel_values"), image_sizes=batch.pop("image_sizes"), return_dict=True)
        assert torch.equal(model(**batch, mm_encoder_outputs={"image": encoded}).logits, expected)
        options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
        whole = model.generate(**dict(inputs(processor, samples()[:2], "left")), **options)
        parts = model.generate(**dict(inputs(processor, samples()[:2], "left")), **options, prefill_chunk_size=5)
        assert torch.equal(whole, parts)
        poor = BaseModelOutputWithPooling(pooler_output=encoded.pooler_output)
        with pytest.raises(FoveateError, match="have 0 deepstack_features, and with deepstack 4 enter"):
            model(**batch, mm_encoder_outputs={"image": poor})


@pytest.mark.parametrize("reducer", ["none", "divprune:keep=0.5"])
def test_a_second_turn_with_an_image_of_its_own(made: tuple[Any, Any], reducer: str) -> None:
    """On a kept cache, cut or not, the later image has its stacks too: equals both turns at once."""
    model, processor = made
    pictures, texts = samples()[1].images, ["<image>What is this?", "And <image>this?"]
    one = processor(images=pictures[:1], text=texts[0], return_tensors="pt")
    two = processor(images=pictures[1:], text=texts[1], return_tensors="pt", add_special_tokens=False)
    both = processor(images=pictures, text="".join(texts), return_tensors="pt")
    assert torch.equal(both["input_ids"], torch.cat([one["input_ids"], two["input_ids"]], 1))
    two.pop("attention_mask")
    with torch.no_grad(), foveate.attach(model, reducer):
        cache = model(**one, use_cache=True).past_key_values
        found = model(**two, past_key_values=cache, use_cache=True).logits
        whole = model(**both, use_cache=False).logits
    torch.testing.assert_close(found, whole[:, -found.shape[1] :], rtol=1e-4, atol=1e-5)


def test_a_job_of_embeddings_refuses(made: tuple[Any, Any]) -> None:
    model, processor = made
    anatomy = read(model)

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        _stop(anatomy, module, args, kwargs)

    hook = anatomy.decoder.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(Broken, match="DeepStack"), torch.no_grad():
        model(**inputs(processor, samples()))
    hook.remove()


@pytest.mark.parametrize(
    ("tiling", "bridge", "said"),
    [
        ("deepstack:start=2", MLP, "in front of decoder layers 2, 3, 4, 5, but the last one is 4"),
        ("deepstack:tiles=3,interval=2", MLP, "decoder layers 1, 3, 5, but the last one is 4"),
        ("deepstack:tiles=1", MLP, "tiles=1 is not possible"),
        ("deepstack:interval=0", MLP, "interval=0 is not possible"),
        ("deepstack", {"kind": "resampler", "queries": 4, "width": 32, "head_dim": 16}, "have to be a raster"),
    ],
)
def test_what_cannot_be(folder: Path, tiling: str, bridge: dict[str, Any], said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        assembled(folder, tiling, bridge)
    model, processor = assembled(folder, None, bridge)

    def change() -> None:
        model.set_tiling(tiling)
        processor.set_tiling(tiling)
        processor.plan_image(64, 64)

    with pytest.raises(FoveateError, match=said):
        change()


def test_a_language_model_without_layers_by_that_name() -> None:
    with torch.device("meta"):
        other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8))
    with pytest.raises(FoveateError, match="GPT2LMHeadModel has no decoder layers named `layers`"):
        watch(None, other, (0,))  # type: ignore[arg-type]


# ---- training --------------------------------------------------------------------------------------------------------------------------


def test_a_recipe_is_planned_trained_and_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage has stacks and a reducer that cuts between them; the tower and the bridge cost what five views do."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    step, found = FoveateTrainer.training_step, []
    for name in ("straight", "stopped"):
        out = tmp_path / name
        out.mkdir()
        save_samples(out, samples())
        path = recipe(folder, out, "deepstack", gradient_checkpointing="true")
        path.write_text(path.read_text().replace("divprune:keep=0.5", "fastv:keep=0.5,layer=3"))
        if name == "stopped":

            def stopping(self: FoveateTrainer, *given: Any) -> torch.Tensor:
                if self.state.global_step == 2:
                    raise KeyboardInterrupt
                return step(self, *given)

            with monkeypatch.context() as patch:
                patch.setattr(FoveateTrainer, "training_step", stopping)
                with pytest.raises(KeyboardInterrupt):
                    main(path)
        main(path)
        found.append(weights(out))
    assert all(torch.equal(found[1][name], of) for name, of in found[0].items())
    whole, stacked = plan(path, image=(64, 64)).stages
    assert (whole.tokens_per_image, stacked.tokens_per_image) == (4, 4)
    assert stacked.forward_flops["tower"] == 5 * whole.forward_flops["tower"]
    assert stacked.forward_flops["bridge"] == 5 * whole.forward_flops["bridge"]
    assert stacked.forward_flops["lm_linear"] < whole.forward_flops["lm_linear"]
