"""Ways of generating, and of holding a model, that users of the library know: each gives on an attached model what the plain way gives."""

import copy
import dataclasses
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import foveate
from foveate import FoveateError
from foveate.anatomy import read
from foveate.reducers import parse
from foveate.tokens import Layout, TokenMap
from tests.situations.models import mistral
from tests.test_attach import joined, state_of
from tests.tiny import IMAGE, MODELS, PATCHES, ROWS, Batch, llava, prompt

REDUCERS = ["random:keep=0.5", "vcc:layer=2,stride=4", "fastv:keep=0.5,layer=2", "random:keep=0.3,positions=renumber"]
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 1000, "suppress_tokens": [IMAGE]}

every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
every_reducer = pytest.mark.parametrize("reducer", REDUCERS)


def greedy(model: Any, inputs: dict[str, Any], new: int, **options: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=new, **GREEDY, **options)


def groups_of(reducer: str, ids: list[int], kept: Tensor | None) -> list[list[int]]:
    """Which slots make each slot that is left: runs of four patches, or the slots that a method has kept."""
    if not reducer.startswith("vcc"):
        assert kept is not None
        return [[int(i)] for i in kept]
    groups: list[list[int]] = []
    for i, token in enumerate(ids):
        if token == IMAGE and i and ids[i - 1] == IMAGE and len(groups[-1]) < 4:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def by_hand(model: Any, reducer: str, single: dict[str, Tensor], kept: Tensor | None) -> Tensor:
    """(N, V) logits of one prompt: the decoder's layers called one by one, on shorter states from the cut on."""
    core: Any = model.model
    decoder: Any = read(model).decoder
    ids = single["input_ids"]
    hidden = core.get_input_embeddings()(ids)
    visual = torch.cat(list(core.get_image_features(single["pixel_values"], return_dict=True).pooler_output))
    hidden = hidden.masked_scatter((ids == IMAGE)[..., None], visual)
    position = torch.arange(ids.shape[1])[None]
    at = 2 if "layer=2" in reducer else 0
    groups = groups_of(reducer, ids[0].tolist(), kept)
    for index, layer in enumerate(decoder.layers):
        if index == at:
            hidden = torch.stack([hidden[:, group].mean(1) for group in groups], 1)
            closed = "renumber" in reducer
            position = torch.tensor([[i if closed else sum(group) // len(group) for i, group in enumerate(groups)]])
        turned = decoder.rotary_emb(hidden, position_ids=position)
        hidden = layer(hidden, attention_mask=None, position_embeddings=turned, position_ids=position)
    logits = model.get_output_embeddings()(decoder.norm(hidden))[0]
    owner = [max(g for g, group in enumerate(groups) if min(group) <= i) for i in range(ids.shape[1])]
    return logits[owner]


def kept_by(run: Any) -> Tensor:
    (token_map,) = run.last.maps.values()
    return token_map.representative[0]


# ---- generate


@every_model
@every_reducer
def test_sampling_is_sampling_by_hand(make: Any, reducer: str) -> None:
    """Same seed, same tokens, where each step's logits are those of the whole sequence run without a cache."""
    model = make()
    inputs = Batch(ROWS, "left").inputs
    options: dict[str, Any] = {"temperature": 0.7, "top_k": 5, "pad_token_id": 0, "eos_token_id": 1000}
    with foveate.attach(model, reducer) as run:
        torch.manual_seed(3)
        found = model.generate(**inputs, max_new_tokens=6, do_sample=True, **options)
        maps = run.maps
    torch.manual_seed(3)
    seen = dict(inputs)
    with foveate.attach(model, maps=maps), torch.no_grad():
        for _ in range(6):
            position = (seen["attention_mask"].cumsum(1) - 1).clamp(min=0)
            best = (model(**seen, position_ids=position, use_cache=False).logits[:, -1] / 0.7).topk(5)
            at = torch.zeros(len(ROWS), 99).scatter(1, best.indices, best.values.softmax(-1))
            token = at.multinomial(1)
            seen["input_ids"] = torch.cat([seen["input_ids"], token], 1)
            seen["attention_mask"] = torch.cat([seen["attention_mask"], torch.ones_like(token)], 1)
    assert torch.equal(found, seen["input_ids"])


@every_model
@every_reducer
def test_several_sequences_of_a_prompt_are_the_prompt_several_times(make: Any, reducer: str) -> None:
    model = make()
    rows = ROWS[:2]
    batch, many = Batch(rows, "left"), Batch([row for row in rows for _ in range(3)], "left")
    many.pixels = torch.cat([single["pixel_values"] for single in batch.singles for _ in range(3)])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": True, "pad_token_id": 0, "eos_token_id": 1000}
    found = []
    with foveate.attach(model, reducer):
        for inputs, number in ((batch.inputs, 3), (many.inputs, 1)):
            torch.manual_seed(5)
            found.append(model.generate(**inputs, num_return_sequences=number, **options))
    assert torch.equal(*found)
    assert len({tuple(row) for row in found[0][:3].tolist()}) > 1  # it was sampled


class Counting:
    """How often the decoder ran, and how long its chunks were."""

    def __init__(self, model: Any) -> None:
        self.lengths: list[int] = []
        self.hook = read(model).decoder.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.lengths.append(kwargs["inputs_embeds"].shape[1])


def assisted(model: Any, reducer: str, options: dict[str, Any]) -> list[int]:
    """Lengths of the chunks of assisted decoding, which says what greedy decoding says."""
    row = prompt(1, [1, 2, 3, 4, 1, 2, 3])
    inputs = Batch([row]).singles[0]
    with foveate.attach(model, reducer), torch.no_grad():
        plain = greedy(model, inputs, 12)
        counting = Counting(model)
        found = greedy(model, inputs, 12, **options)
        counting.hook.remove()
    assert counting.lengths[0] == len(row) + 3, "nothing was proposed"
    assert found.tolist() == plain.tolist()
    return counting.lengths


proposing = pytest.mark.parametrize("reducer", REDUCERS)


@every_model
@proposing
def test_prompt_lookup_gives_what_greedy_gives(make: Any, reducer: str) -> None:
    """What is proposed is looked up in the prompt, and stands behind it in the first pass already."""
    assisted(make(), reducer, {"prompt_lookup_num_tokens": 3})


@proposing
def test_an_assistant_gives_what_greedy_gives(reducer: str) -> None:
    """A second model proposes: some is taken, some is not (and cropped from the cache again)."""
    model = llava()
    with torch.no_grad():
        for p in read(model).layers.parameters():  # what a picture says counts for less: the library's assistants do not see any
            p.mul_(0.5 if p.ndim > 1 else 1.0)
        assistant = copy.deepcopy(model)
        for p in read(assistant).layers.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.assistant_confidence_threshold = 0.0
    lengths = assisted(model, reducer, {"assistant_model": assistant})
    assert 12 / 4 < len(lengths) < 12, "all of it was taken, or nothing"


@every_model
@every_reducer
def test_a_streamer_sees_the_tokens_one_by_one(make: Any, reducer: str) -> None:
    class Streamer(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[list[int]] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.seen.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    model, streamer = make(), Streamer()
    inputs = Batch([ROWS[1]]).singles[0]
    with foveate.attach(model, reducer):
        found = greedy(model, inputs, 5, streamer=streamer)
    assert [*streamer.seen[0], *(t for one in streamer.seen[1:] for t in one)] == found[0].tolist()
    assert [len(one) for one in streamer.seen[1:]] == [1] * 5
    assert streamer.ended


@every_model
@every_reducer
def test_a_static_cache_gives_what_a_dynamic_one_gives(make: Any, reducer: str) -> None:
    model = make()
    inputs = Batch(ROWS, "left").inputs
    found = []
    with foveate.attach(model, reducer):
        for kind in ("dynamic", "static"):
            out = greedy(model, inputs, 5, cache_implementation=kind, output_logits=True, return_dict_in_generate=True)
            assert type(out.past_key_values).__name__.lower().startswith(kind)
            found.append(torch.stack(out.logits))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("reducer", "size"),
    [(reducer, size) for reducer in REDUCERS for size in (2, 7, 19, 20, 64)],
)
def test_a_prompt_in_chunks_is_the_prompt_or_an_error(reducer: str, size: int) -> None:
    """Chunks of 19 begin behind an image, others take an image apart; whatever a method cannot do in chunks it must say."""
    model = llava()
    inputs = Batch([prompt(1, [1, 2, 3])]).singles[0]
    options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    with foveate.attach(model, reducer):
        whole = torch.stack(greedy(model, inputs, 4, **options).logits)
        refused = ""
        try:
            chunked = torch.stack(greedy(model, inputs, 4, prefill_chunk_size=size, **options).logits)
        except FoveateError as error:
            refused = str(error)
    if refused:
        assert size < len(inputs["input_ids"][0])
        assert "chunk" in refused
    else:
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)


@every_model
@every_reducer
def test_images_encoded_while_attached_are_the_images(make: Any, reducer: str) -> None:
    """The caller encodes and hands the features in; `random` knows the images' pixels from the encoding."""
    model = make()
    inputs = Batch(ROWS, "left").inputs
    texts = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with foveate.attach(model, reducer), torch.no_grad():
        plain = greedy(model, inputs, 5)
        encoded = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        assert torch.equal(greedy(model, {**texts, "mm_encoder_outputs": {"image": encoded}}, 5), plain)
        logits = model(**texts, mm_encoder_outputs={"image": encoded}).logits
        assert torch.equal(logits, model(**inputs).logits)


@every_model
@every_reducer
def test_images_encoded_beforehand_are_known_by_their_features(make: Any, reducer: str) -> None:
    """Encoded on the bare model: what does not follow the pixels is the same; `random` chooses by the features, the same at every call."""
    model = make()
    batch = Batch(ROWS, "left")
    inputs = batch.inputs
    texts = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        encoded = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    found, kept = [], []
    for _ in range(2):
        with foveate.attach(model, reducer) as run, torch.no_grad():
            found.append(model(**texts, mm_encoder_outputs={"image": encoded}).logits)
            kept.append(run.last.visual_tokens)
    with foveate.attach(model, reducer) as run, torch.no_grad():
        plain = model(**inputs).logits
        kept.append(run.last.visual_tokens)
    assert torch.equal(*found)
    assert kept[0] == kept[1] == kept[2]
    assert torch.equal(found[0], plain) == (not reducer.startswith("random"))


# ---- a second turn


def idle(maps: list[Any], tokens: int) -> list[Any]:
    """The maps of decoding `tokens` tokens."""
    layout = Layout.sequence(torch.zeros(1, tokens, dtype=torch.bool))
    return [dataclasses.replace(one, map=TokenMap.identity(layout)) for one in maps]


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@every_model
@every_reducer
def test_a_second_turn_through_generate(make: Any, reducer: str, image: bool) -> None:
    """The longer prompt with the kept cache generates what the whole conversation generates with the maps of both turns."""
    model = make()
    first, second = prompt(1, [1, 2]), [3, *([IMAGE] * PATCHES if image else []), 4, 5]
    pixels = Batch([first + second]).pixels
    how: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    with foveate.attach(model, reducer) as run, torch.no_grad():
        start = torch.tensor([first])
        one = greedy(model, {"input_ids": start, "attention_mask": torch.ones_like(start), "pixel_values": pixels[:1]}, 4, **how)
        maps, cache = run.maps, one.past_key_values
        assert cache.get_seq_length() == len(first) + 3
        ids = torch.cat([one.sequences, torch.tensor([second])], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        two = greedy(model, turn | ({"pixel_values": pixels[1:]} if image else {}), 4, **how)
        assert cache.get_seq_length() == ids.shape[1] + 3
        if image:
            maps = joined(joined(maps, idle(maps, 3)), run.maps)
    with foveate.attach(model, maps=maps), torch.no_grad():
        whole = model(input_ids=two.sequences[:, :-1], pixel_values=pixels, use_cache=False).logits
    torch.testing.assert_close(torch.stack(two.logits, 1), whole[:, -4:], rtol=1e-4, atol=1e-5)


@every_reducer
def test_a_second_turn_of_a_padded_batch(reducer: str) -> None:
    """Rows padded on the left go on in a second turn as each alone."""
    model = llava()
    batch, second = Batch(ROWS[:2], "left"), torch.tensor([[3, 4, 5], [6, 7, 8]])
    how: dict[str, Any] = {"return_dict_in_generate": True}
    found = []
    with foveate.attach(model, reducer):
        for inputs, more in [(batch.inputs, second), *zip(batch.singles, second.split(1), strict=True)]:
            one = greedy(model, inputs, 2, **how)
            ids = torch.cat([one.sequences, more], 1)
            mask = torch.ones_like(ids)
            if "attention_mask" in inputs:
                mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
            turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": one.past_key_values}
            found.append(greedy(model, turn, 5)[:, -10:])
    assert torch.equal(found[0], torch.cat(found[1:]))


# ---- images at the edge


@every_model
@every_reducer
def test_a_prompt_that_ends_in_its_image(make: Any, reducer: str) -> None:
    """No text behind the image: the first answer follows the last slot that is left, whether that slot was the image's last or not."""
    model = make()
    row = prompt(1, [])[:-1]
    assert row[-1] == IMAGE
    batch = Batch([row, prompt(2, [4])], "left")
    how: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    with foveate.attach(model, reducer) as run, torch.no_grad():
        single = batch.singles[0]
        logits = model(**single, use_cache=False).logits[0]
        out = greedy(model, single, 4, **how)
        expected = by_hand(model_without(model), reducer, single, None if "vcc" in reducer else kept_by(run))
        together = greedy(model, batch.inputs, 4)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.logits[0][0], expected[-1], rtol=1e-4, atol=1e-5)
    assert together[0, -4:].tolist() == out.sequences[0, -4:].tolist()


def model_without(model: Any) -> Any:
    """The same weights, nothing attached."""
    return next(make() for make in MODELS.values() if type(make()) is type(model))


@every_model
@every_reducer
def test_an_answer_directly_behind_the_image_is_supervised(make: Any, reducer: str) -> None:
    """Its loss is that of logits by hand, from the slot that stands for the image's last patch; a row of zeros would give log(99)."""
    model = make()
    row = [*prompt(1, [])[:-1], 11, 12]
    batch = Batch([row])
    labels = torch.tensor([[-100] * (len(row) - 2) + [11, 12]])
    with foveate.attach(model, reducer) as run:
        out = model(**batch.singles[0], labels=labels, use_cache=False)
    with torch.no_grad():
        expected = by_hand(model, reducer, batch.singles[0], None if "vcc" in reducer else kept_by(run))
    loss = torch.nn.functional.cross_entropy(expected[-3:-1], torch.tensor([11, 12]))
    torch.testing.assert_close(out.loss, loss, rtol=1e-4, atol=1e-5)
    first = torch.nn.functional.cross_entropy(out.logits[0, -3:-2].detach(), torch.tensor([11]))
    assert abs(float(first) - math.log(99)) > 1e-2


# ---- compiled models


def small() -> Any:
    """Two decoder layers: compiling takes its time for each."""
    model = llava()
    language = model.model.language_model
    language.layers, language.config.num_hidden_layers = language.layers[:2], 2
    return model


def test_a_compiled_model_that_is_attached_and_detached() -> None:
    """Hooks that come and go are seen by what was compiled before. The wrapper of torch.compile is opened like the model itself."""
    reducer = "random:keep=0.5+fastv:keep=0.5,layer=1"
    inputs, model = {**Batch(ROWS).inputs, "labels": Batch(ROWS).labels()}, small()
    with torch.no_grad():
        bare = model(**inputs, use_cache=False).logits
        with foveate.attach(model, reducer):
            reduced = model(**inputs, use_cache=False)
        compiled: Any = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, bare, rtol=1e-4, atol=1e-5)
        with foveate.attach(compiled, reducer) as run:
            again = compiled(**inputs, use_cache=False)
            assert run.last.visual_tokens == [24, 12]
        torch.testing.assert_close(again.logits, reduced.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again.loss, reduced.loss)
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, bare, rtol=1e-4, atol=1e-5)


def test_a_model_compiled_while_attached() -> None:
    """In place, by its own method `compile`."""
    inputs, model = Batch(ROWS).inputs, small()
    with torch.no_grad():
        bare = model(**inputs, use_cache=False).logits
        with foveate.attach(model, "vcc:layer=1,stride=4"):
            reduced = model(**inputs, use_cache=False).logits
            model.compile(backend="aot_eager")
            torch.testing.assert_close(model(**inputs, use_cache=False).logits, reduced, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, bare, rtol=1e-4, atol=1e-5)


# ---- copies


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_save(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_save])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("reducer", [*REDUCERS[1:3], "fastervlm:keep=0.5"])
def test_a_copy_of_an_attached_model_is_attached_on_its_own(make: Any, duplicate: Callable[[Any], Any], reducer: str) -> None:
    """Before its first pass: after that, hooks of the library's own do not let a model be pickled."""
    model, inputs = make(), Batch(ROWS).inputs
    run = foveate.attach(model, reducer)
    other = duplicate(model)
    with torch.no_grad():
        reduced = model(**inputs).logits
        seen = run.last
        assert torch.equal(other(**inputs).logits, reduced)
        assert run.last is seen, "the copy reports to the first model's run"
        with pytest.raises(FoveateError, match="already has"):
            foveate.attach(other, reducer)
        run.detach()
        assert not torch.equal(model(**inputs).logits, reduced)
        assert torch.equal(other(**inputs).logits, reduced)


@every_model
@every_reducer
def test_a_copy_of_a_model_that_has_run(make: Any, reducer: str) -> None:
    model, inputs = make(), Batch(ROWS).inputs
    with torch.no_grad():
        bare = model(**inputs).logits
        before = state_of(model)
        run = foveate.attach(model, reducer)
        reduced = model(**inputs).logits
        other = copy.deepcopy(model)
        seen = run.last
        assert torch.equal(other(**inputs).logits, reduced)
        assert run.last is seen
        run.detach()
        assert state_of(model) == before
        assert torch.equal(model(**inputs).logits, bare)
        assert torch.equal(other(**inputs).logits, reduced)


def test_a_copy_is_detached_by_its_own_run() -> None:
    model = llava()
    inputs = Batch(ROWS).inputs
    with torch.no_grad():
        bare = model(**inputs).logits
        before = state_of(model)
        with foveate.attach(model, "fastervlm:keep=0.5+fastv:keep=0.5"):
            reduced = model(**inputs).logits
            other = copy.deepcopy(model)
            other.model._foveate_run.detach()
            assert state_of(other) == before
            assert torch.equal(other(**inputs).logits, bare)
            assert torch.equal(model(**inputs).logits, reduced)


# ---- where the weights are


@pytest.mark.parametrize("where", ["cpu", "disk", "layers on disk", "cpu_offload"])
@pytest.mark.parametrize("reducer", [*REDUCERS, "fastervlm:keep=0.5"])
def test_a_model_whose_weights_are_elsewhere(where: str, reducer: str, tmp_path: Any) -> None:
    from accelerate import cpu_offload

    plain = llava()
    batch = Batch(ROWS, "left")
    with foveate.attach(plain, reducer), torch.no_grad():
        expected, said = plain(**batch.inputs).logits, greedy(plain, batch.inputs, 4)
    plain.save_pretrained(tmp_path / "model")
    mapped: dict[str, Any] = {
        "cpu": "cpu",
        "disk": {"": "disk"},
        "layers on disk": {
            "model.vision_tower": "cpu",
            "model.multi_modal_projector": "cpu",
            "model.language_model.embed_tokens": "cpu",
            "model.language_model.layers": "disk",
            "model.language_model.norm": "cpu",
            "model.language_model.rotary_emb": "cpu",
            "lm_head": "cpu",
        },
    }
    options = {"device_map": mapped[where], "offload_folder": tmp_path / "offload"} if where in mapped else {}
    model = type(plain).from_pretrained(tmp_path / "model", **options).eval()
    if where == "cpu_offload":
        cpu_offload(model, torch.device("cpu"))
    if where != "cpu":
        assert any(p.is_meta for p in model.parameters())
    with torch.no_grad():
        bare = model(**batch.inputs).logits
        with foveate.attach(model, reducer):
            assert torch.equal(model(**batch.inputs).logits, expected)
            assert torch.equal(greedy(model, batch.inputs, 4), said)
        assert torch.equal(model(**batch.inputs).logits, bare)


# ---- caches


@every_reducer
def test_a_static_cache_with_sliding_windows_is_refused(reducer: str) -> None:
    model = mistral(window=8)
    inputs = Batch(ROWS, "left").inputs
    greedy(model, inputs, 3, cache_implementation="static")  # the bare model has no trouble with it
    with foveate.attach(model, reducer), pytest.raises(FoveateError, match="static cache with sliding windows"):
        greedy(model, inputs, 3, cache_implementation="static")


@every_reducer
def test_sliding_windows_are_counted_in_original_places(reducer: str) -> None:
    """Decoding with the cache, which keeps the last slots only, is the whole sequence run again with the same maps."""
    model = mistral(window=8)
    inputs = Batch([ROWS[1]]).singles[0]
    how: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    with foveate.attach(model, reducer) as run, torch.no_grad():
        out = greedy(model, inputs, 10, **how)
        maps = run.maps
    with foveate.attach(model, maps=maps), torch.no_grad():
        whole = model(input_ids=out.sequences[:, :-1], pixel_values=inputs["pixel_values"], use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, -10:], rtol=1e-4, atol=1e-5)


def prefilled(model: Any, inputs: dict[str, Tensor], cache: Any = None) -> Any:
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    position = (mask.cumsum(1) - 1).clamp(min=0)
    return model(**inputs, position_ids=position, past_key_values=cache, use_cache=True).past_key_values


def step(model: Any, cache: Any, token: Tensor, prompt_mask: Tensor) -> Tensor:
    past = cache.get_seq_length()
    mask = torch.nn.functional.pad(prompt_mask, (0, past + 1 - prompt_mask.shape[1]), value=1)
    position = mask.sum(1, keepdim=True) - 1
    return model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True).logits


@every_reducer
def test_a_cache_that_is_reset_knows_nothing(reducer: str) -> None:
    """Another prompt on the same cache object is the prompt on a new one."""
    model = llava()
    one, two = Batch(ROWS, "left").inputs, Batch(ROWS[:2], "left").inputs
    token = torch.full((2, 1), 7)
    with foveate.attach(model, reducer), torch.no_grad():
        cache = prefilled(model, one)
        cache.reset()
        assert type(cache) is DynamicCache
        assert cache.get_seq_length() == 0
        for layer in cache.layers:  # the library zeroes the keys of three rows; two come now
            layer.keys = layer.values = torch.tensor([])
        again = step(model, prefilled(model, two, cache), token, two["attention_mask"])
        assert torch.equal(again, step(model, prefilled(model, two), token, two["attention_mask"]))


@every_reducer
def test_rows_of_a_cache_are_chosen_reordered_and_repeated(reducer: str) -> None:
    """Each row of the changed cache goes on as that row alone."""
    model = llava()
    batch = Batch(ROWS, "left")
    mask = batch.inputs["attention_mask"]
    tokens = torch.tensor([[7], [11], [13]])
    with foveate.attach(model, reducer), torch.no_grad():
        cache = prefilled(model, batch.inputs)
        alone = []
        for i in range(3):
            one = copy.deepcopy(cache)
            one.batch_select_indices(torch.tensor([i]))
            alone.append(step(model, one, tokens[i : i + 1], mask[i : i + 1]))
            expected = step(model, prefilled(model, batch.singles[i]), tokens[i : i + 1], torch.ones_like(batch.singles[i]["input_ids"]))
            torch.testing.assert_close(alone[-1], expected, rtol=1e-4, atol=1e-5)
        order = torch.tensor([2, 0, 1])
        for way, rows in [
            (lambda c: c.reorder_cache(order), order),
            (lambda c: c.batch_select_indices(torch.tensor([1, 1])), torch.tensor([1, 1])),
            (lambda c: c.batch_repeat_interleave(2), torch.arange(3).repeat_interleave(2)),
        ]:
            changed = copy.deepcopy(cache)
            way(changed)
            found = step(model, changed, tokens[rows], mask[rows])
            torch.testing.assert_close(found, torch.cat([alone[i] for i in rows]), rtol=1e-4, atol=1e-5)


@every_reducer
def test_a_cache_cropped_by_what_was_decoded_goes_on_from_there(reducer: str) -> None:
    """Three tokens decoded and two of them taken back: as if only one had been decoded."""
    model = llava()
    batch = Batch(ROWS, "left")
    mask, token = batch.inputs["attention_mask"], torch.full((3, 1), 7)
    with foveate.attach(model, reducer), torch.no_grad():
        short, long = prefilled(model, batch.inputs), prefilled(model, batch.inputs)
        step(model, short, token, mask)
        for _ in range(3):
            step(model, long, token, mask)
        long.crop(-2)
        assert long.get_seq_length() == short.get_seq_length()
        assert torch.equal(step(model, long, token + 1, mask), step(model, short, token + 1, mask))


@pytest.mark.parametrize("removed", [12, 16, 20, 30])
def test_what_was_cut_cannot_be_cropped(removed: int) -> None:
    """Some of the 15 slots that are left of 39, and more than there are."""
    model = llava()
    batch = Batch(ROWS, "left")
    with foveate.attach(model, "vcc:layer=2,stride=4"), torch.no_grad():
        cache = prefilled(model, batch.inputs)
        with pytest.raises(FoveateError, match="cannot be cropped"):
            cache.crop(-removed)


@every_reducer
def test_beams_of_a_padded_batch_have_the_scores_of_their_own_text(reducer: str) -> None:
    """A beam's score is the sum of log-probabilities that the whole sequence, run again with the prompt's maps, gives its tokens."""
    model = llava()
    batch = Batch(ROWS, "left")
    new = 4
    how: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    with foveate.attach(model, reducer), torch.no_grad():
        out = model.generate(
            **batch.inputs, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=1000, return_dict_in_generate=True,
            output_scores=True, **how,
        )  # fmt: skip
    for i, single in enumerate(batch.singles):
        maps = []
        if "pixel_values" in single:
            with foveate.attach(model, reducer) as run, torch.no_grad():
                model(**single, use_cache=False)
            maps = run.maps
        for beam in (2 * i, 2 * i + 1):
            said = out.sequences[beam, -new:]
            ids = torch.cat([single["input_ids"], said[None]], 1)
            with foveate.attach(model, maps=maps), torch.no_grad():
                logits = model(**{**single, "input_ids": ids}, use_cache=False).logits[0, -new - 1 : -1]
            score = logits.log_softmax(-1).gather(1, said[:, None]).sum()
            torch.testing.assert_close(out.sequences_scores[beam], score, rtol=1e-4, atol=1e-4)


def test_the_reducers_here_are_what_they_say() -> None:
    """One map each, so that a test may speak of the map."""
    assert all(len(parse(reducer)) == 1 for reducer in REDUCERS)
