"""VLoRA in the assembled model: images that are weights of the decoder, row by row, and no tokens."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.model.tiny_backbones import llama_config
from tests.situations.test_tiled_models import inputs, samples, weights
from tests.train.tiny_training import save_backbones, save_samples, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, GPT2Config, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

import foveate
from foveate.accounting import predict
from foveate.accounting.counter import Counter
from foveate.batch.answering import Job
from foveate.batch.encode import Encoder
from foveate.data.collate import Collator
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.inference.asking import ask, prompts
from foveate.model.assembly import from_backbones
from foveate.model.export import to_llava
from foveate.model.weighing import Weighing, by_prompt, completed
from foveate.reducers import parse
from foveate.train.plan import plan
from foveate.train.run import main
from foveate.train.trainer import FoveateTrainer

SMALL: dict[str, Any] = {"kind": "vlora", "layers": [1, 3], "rank": 3, "depth": 1, "channels": 16, "heads": 2}
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower and a Llama of five layers; `few` has half as many heads of keys and values, each wider than the state over the heads."""
    found = tmp_path_factory.mktemp("weighed")
    save_backbones(found, layers=5)
    words = tokenizer()
    LlamaForCausalLM(llama_config(len(words), head_dim=24, num_hidden_layers=4)).save_pretrained(found / "few")
    words.save_pretrained(found / "few")
    return found


def assembled(folder: Path, lm: str = "lm", awake: bool = True, **changes: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, processor = from_backbones(folder / "tower", folder / lm, {**SMALL, **changes})
    if awake:
        nn.init.normal_(model.model.bridge.outputs)
    return model, processor


@pytest.fixture(scope="module")
def made(folder: Path) -> tuple[Any, Any]:
    return assembled(folder)


@pytest.fixture(scope="module", params=["lm", "few"])
def either(request: pytest.FixtureRequest, folder: Path, made: tuple[Any, Any]) -> tuple[Any, Any]:
    return made if request.param == "lm" else assembled(folder, "few", layers=None)


def text_of(batch: Any) -> dict[str, Any]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


# ---- one map ---------------------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer of one map."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.q_proj(x)
        return found


def opened(a: Tensor, b: Tensor, width: int = 2) -> tuple[Any, Weighing]:
    decoder = nn.Module()
    decoder.layers = nn.ModuleList([Layer(a.shape[1], b.shape[0])])
    bridge = type("Bridge", (), {"layers": [0], "targets": {"q_proj": [a.shape[1], b.shape[0]]}})
    weighing = Weighing(bridge)
    weighing.open(decoder, width)
    weighing.begin(a[:, None], b[None])
    return decoder.layers[0], weighing


def test_the_example_by_hand() -> None:
    a, b = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[3.0], [0.0]])
    layer, _ = opened(a, b)
    nn.init.zeros_(layer.q_proj.weight)
    assert layer(torch.ones(1, 1, 2)).tolist() == [[[9.0, 0.0]]]
    assert (b @ a[0].T).tolist() == [[3.0, 6.0], [0.0, 0.0]]


def test_a_branch_is_the_weights_added() -> None:
    """Each row its own, B Aᵀ of rank 3, and nothing once the pass has ended."""
    torch.manual_seed(0)
    a, b, x = torch.randn(4, 9, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64), torch.randn(4, 5, 9, dtype=torch.float64)
    layer, weighing = opened(a, b)
    layer.q_proj.double()
    found, weight = layer(x), layer.q_proj.weight
    for row in range(4):
        assert int(torch.linalg.matrix_rank(b @ a[row].T)) == 3
        torch.testing.assert_close(found[row], x[row] @ (weight + b @ a[row].T).T)
    weighing.end()
    assert torch.equal(layer(x), x @ weight.T)


# ---- the model -------------------------------------------------------------------------------------------------------------------------


def test_at_first_it_is_the_language_model(folder: Path) -> None:
    model, processor = assembled(folder, awake=False)
    batch = inputs(processor, samples())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model.model.causal_lm(**text_of(batch)).logits)


def test_no_token_stands_for_an_image(either: tuple[Any, Any]) -> None:
    model, processor = either
    batch, own = Collator(processor, 999)(samples()), inputs(processor, samples())
    assert set(own) == set(batch) - {"labels"}
    assert all(torch.equal(own[name], batch[name]) for name in own)
    assert not (own["input_ids"] == processor.image_token_id).any()
    assert own["prompt_images"].tolist() == [1, 2, 0, 1]
    assert "prompt_images" not in inputs(processor, samples()[2:3])
    assert processor.num_image_tokens == 0
    encoded = model.get_image_features(own["pixel_values"])
    assert [tuple(image.shape) for image in encoded.pooler_output] == [(0, 32)] * 4
    assert encoded.image_weights.shape == (
        4,
        len(model.config.bridge["layers"]),
        model.model.bridge([torch.zeros(1, 16, 32)], (4, 4)).shape[2],
        3,
    )


def merged(model: Any, images: Tensor) -> Any:
    """The language model with the weights of a prompt's images in its matrices, and beside its MLPs; by the paper's equations alone."""
    bridge, language = model.model.bridge, copy.deepcopy(model.model.causal_lm)
    for layer in language.model.layers:
        for part in layer.modules():
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
    made = model.get_image_features(images).image_weights
    for at, number in enumerate(bridge.layers):
        layer, start, end = language.model.layers[number], 0, 0
        for name, (wide, high) in bridge.targets.items():
            delta = torch.zeros(high, wide)
            for image in made:
                for rank in range(bridge.rank):
                    delta += torch.outer(bridge.outputs[at, end : end + high, rank], image[at, start : start + wide, rank])
            start, end = start + wide, end + high
            if name == "mlp":
                whole = layer.mlp.forward
                layer.mlp.forward = lambda x, whole=whole, delta=delta: whole(x) + x @ delta.T
            else:
                getattr(layer.self_attn, name).weight += delta
    return language


def test_it_is_the_language_model_with_the_weights_in_it(either: tuple[Any, Any]) -> None:
    """Prompt by prompt, with one image and with two; for square maps, and for those of fewer and wider heads."""
    model, processor = either
    with torch.no_grad():
        for one in samples()[:2]:
            alone = inputs(processor, [one])
            expected = merged(model, alone["pixel_values"])(**text_of(alone)).logits
            bare = model.model.causal_lm(**text_of(alone)).logits
            torch.testing.assert_close(model(**alone).logits, expected, rtol=1e-4, atol=1e-5)
            assert float((bare - expected).abs().max()) > 0.05


def test_a_sample_is_the_same_alone_and_in_a_batch(either: tuple[Any, Any]) -> None:
    """Padded on either side; the one without an image is the bare language model's to the last bit, whatever the others show."""
    model, processor = either
    with torch.no_grad():
        for side in ("right", "left"):
            batch = inputs(processor, samples(), side)
            together, bare = model(**batch).logits, model.model.causal_lm(**text_of(batch)).logits
            assert torch.equal(together[2], bare[2])
            other = {**batch, "pixel_values": torch.randn_like(batch["pixel_values"])}
            assert torch.equal(model(**other).logits[2], bare[2])
            for row, one in enumerate(samples()):
                alone = model(**inputs(processor, [one])).logits[0]
                there = batch["attention_mask"][row].bool()
                torch.testing.assert_close(together[row, there], alone, rtol=1e-4, atol=1e-5)


def test_decoding_is_running_it_again(either: tuple[Any, Any]) -> None:
    model, processor = either
    batch = inputs(processor, samples(), "left")
    cached = model.generate(**batch, **GREEDY)
    assert torch.equal(cached, model.generate(**batch, **GREEDY, use_cache=False))
    bare = model.generate(**text_of(batch), **GREEDY)
    assert torch.equal(cached[2], bare[2])
    assert not torch.equal(cached, bare)
    beams = model.generate(**batch, **GREEDY, num_beams=3, num_return_sequences=3)
    each = torch.cat(
        [model.generate(**inputs(processor, [one]), **GREEDY, num_beams=3, num_return_sequences=3)[:, -4:] for one in samples()]
    )
    assert torch.equal(beams[:, -4:], each)
    with foveate.attach(model, []):
        assert torch.equal(model.generate(**batch, **GREEDY), cached)


def test_a_second_turn_on_a_kept_cache(made: tuple[Any, Any]) -> None:
    """Goes on with the weights of the first; a copy of the cache too. A new prompt in an old cache begins anew."""
    model, processor = made
    batch = inputs(processor, samples()[:1])
    more = processor.tokenizer("And this?", return_tensors="pt", add_special_tokens=False)["input_ids"]
    both = {**batch, "input_ids": torch.cat([batch["input_ids"], more], 1)}
    both.pop("attention_mask")
    with torch.no_grad():
        whole = model(**both).logits
        cache = model(**batch, use_cache=True).past_key_values
        for held in (copy.deepcopy(cache), cache):
            found = model(input_ids=more, past_key_values=held, use_cache=True).logits
            torch.testing.assert_close(found, whole[:, -more.shape[1] :], rtol=1e-4, atol=1e-5)
        with pytest.raises(FoveateError, match="of which 23 tokens are cached already"):
            model(**inputs(processor, samples()[1:2]), past_key_values=cache)
        with pytest.raises(FoveateError, match="was filled by 1 rows and is now used for 2"):
            model(input_ids=more.expand(2, -1), past_key_values=cache)
        cache.reset()
        text = inputs(processor, samples()[2:3])
        again = model(**text, past_key_values=cache, use_cache=True)
        assert torch.equal(again.logits, model(**text).logits)
        found = model(input_ids=more, past_key_values=again.past_key_values).logits
        plain = model.model.causal_lm(input_ids=torch.cat([text["input_ids"], more], 1)).logits
        torch.testing.assert_close(found, plain[:, -more.shape[1] :], rtol=1e-4, atol=1e-5)


def test_images_of_a_prompt_add_up() -> None:
    given = torch.arange(4.0)[:, None] + 1
    assert by_prompt(given, torch.tensor([2, 0, 1, 1]), 4, False).tolist() == [[3.0], [0.0], [3.0], [4.0]]
    assert torch.equal(by_prompt(given, None, 4, False), given)
    assert by_prompt(given, torch.tensor([3, 3, 1, 1]), 4, True).tolist() == [[6.0], [6.0], [4.0], [4.0]]
    assert by_prompt(given[:1], None, 3, True).tolist() == [[1.0]] * 3


@pytest.mark.parametrize(
    ("counts", "rows", "repeated"),
    [([2, 1], 2, False), ([1, 1, 1, 1], 3, False), (None, 3, False), ([3, 1, 3, 1], 4, True), ([4, 4], 2, False), ([0, 0], 2, True)],
)
def test_images_that_are_of_no_prompt(counts: list[int] | None, rows: int, repeated: bool) -> None:
    with pytest.raises(FoveateError, match="4 images came with"):
        by_prompt(torch.ones(4, 1), None if counts is None else torch.tensor(counts), rows, repeated)


def test_a_saved_model_is_the_same(either: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = either
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, read = AutoModelForImageTextToText.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    twins = copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))
    assert loaded.config.bridge == model.config.bridge
    before, after = inputs(processor, samples()), inputs(read, samples())
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        expected = model(**before).logits
        assert torch.equal(loaded(**after).logits, expected)
        for twin in twins:
            assert torch.equal(twin(**after).logits, expected)


def test_images_encoded_before(made: tuple[Any, Any]) -> None:
    model, processor = made
    batch = dict(inputs(processor, samples()))
    with torch.no_grad():
        expected = model(**batch).logits
        encoded = model.get_image_features(batch["pixel_values"])
        given = {name: value for name, value in batch.items() if name != "pixel_values"}
        assert torch.equal(model(**given, mm_encoder_outputs={"image": encoded}).logits, expected)
        poor = BaseModelOutputWithPooling(pooler_output=encoded.pooler_output)
        with pytest.raises(FoveateError, match="have no image_weights"):
            model(**given, mm_encoder_outputs={"image": poor})
        features = model.model.encode_crops(batch["pixel_values"])
        torch.testing.assert_close(model(**given, tower_features=features).logits, expected)
    shown = samples()[1].images
    answers = ask(model, processor, shown, [[0], [1, 0], [0]], prompts(processor, ["a", "b", "c"], [1, 2, 1]), 3)
    assert answers.placeholders == [0, 0, 0]


def test_lora_stands_beside(folder: Path) -> None:
    """At first it changes nothing, the maps still meet the images' weights, and merging it into the model leaves them."""
    from peft import LoraConfig, get_peft_model

    model, processor = assembled(folder)
    batch = inputs(processor, samples())
    with torch.no_grad():
        expected = model(**batch).logits
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
        assert torch.equal(adapted(**batch).logits, expected)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name and "causal_lm" in name:
                nn.init.normal_(parameter, std=0.1)
        changed = adapted(**batch).logits
        assert float((changed - expected).abs().max()) > 1e-3
        torch.testing.assert_close(adapted.merge_and_unload()(**batch).logits, changed, rtol=1e-4, atol=1e-5)


def test_maps_that_were_exchanged_are_told(folder: Path) -> None:
    """Quantisation that replaces modules takes the hooks with them: an answer without the image would be fluent."""
    model, processor = assembled(folder)
    batch = inputs(processor, samples())
    with torch.no_grad():
        expected = model(**batch).logits
        attention = model.model.causal_lm.model.layers[1].self_attn
        attention.q_proj, old = nn.Linear(32, 32, bias=False), attention.q_proj
        attention.q_proj.load_state_dict(old.state_dict())
        with pytest.raises(FoveateError, match=r"only 9 of 10 maps .* `open_doors\(\)` once more"):
            model(**batch)
        model.model.open_doors()
        assert torch.equal(model(**batch).logits, expected)


# ---- cost ------------------------------------------------------------------------------------------------------------------------------


def test_the_cost_is_what_a_counter_sees(either: tuple[Any, Any]) -> None:
    model, processor = either
    model.set_attn_implementation("eager")
    try:
        for one in samples()[:3]:
            alone = inputs(processor, [one])
            told = predict(model.config, inputs=alone)
            with foveate.attach(model, []) as run, Counter(model) as counted, torch.no_grad():
                model(**alone, logits_to_keep=1)
            language = [of["lm_linear"] + of["lm_attention"] for of in (told.flops, counted.flops)]
            assert language[0] == language[1]
            assert all(told.flops[part] == counted.flops[part] for part in ("bridge", "head"))
            if one.images:
                assert told == run.last.ledger(model.config)
            assert (set(told.visual_tokens), told.total_tokens[0]) == ({0}, alone["input_ids"].shape[1])
            planned = predict(model.config, images=[processor.plan_image(32, 32)] * len(one.images), text_tokens=told.total_tokens[0])
            assert planned.flops == told.flops
        given: dict[str, Any] = {"text_tokens": 9, "mode": "decode", "new_tokens": 5}
        shown, plain = (predict(model.config, images=count, **given).flops["lm_linear"] for count in (1, 0))
        bridge = model.model.bridge
        assert shown - plain == 2 * 5 * len(bridge.layers) * bridge.rank * sum(map(sum, bridge.targets.values()))
    finally:
        model.set_attn_implementation("sdpa")


def test_the_published_setting() -> None:
    """No visual token, and with 64 tokens of text 0.83 TFLOP in the language model."""
    papers = Path(__file__).parents[2] / "recipes" / "papers"
    generator, instruct = plan(papers / "vlora-7b.yaml", text_tokens=64).stages
    for stage in (generator, instruct):
        assert stage.tokens_per_image == 0
        assert stage.parts[0].visual_tokens == [0] * 32
        assert stage.visual_kv_bytes == 0
        spent = {part: float(flops) / 1e12 for part, flops in stage.forward_flops.items()}
        assert spent["lm_linear"] + spent["lm_attention"] == pytest.approx(0.83, abs=0.01)
        assert "10,485,760 numbers: weights of rank 64" in stage.notes[-1]
    assert (generator.trainable["lm"], instruct.trainable["lm"]) == (0, 6_738_415_616)


# ---- training --------------------------------------------------------------------------------------------------------------------------


def test_gradients_come_to_the_generator(folder: Path) -> None:
    """At first to B alone, then to all of it; gradient checkpointing of either kind changes none; a step without images has zeros."""
    model, processor = assembled(folder, awake=False)
    batch = {**inputs(processor, samples()), "use_cache": False}
    model.train().requires_grad_(False)
    model.model.bridge.requires_grad_(True)
    model.config.always_run_vision = True

    def gradients(given: dict[str, Any], reentrant: bool | None = None) -> dict[str, Tensor]:
        model.zero_grad()
        model.gradient_checkpointing_disable()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**given, labels=given["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.model.bridge.named_parameters() if p.grad is not None}

    first = gradients(batch)
    assert {name for name, gradient in first.items() if gradient.any()} == {"outputs"}
    nn.init.normal_(model.model.bridge.outputs)
    plain = gradients(batch)
    assert all(gradient.any() for gradient in plain.values())
    assert plain.keys() == dict(model.model.bridge.named_parameters()).keys()
    for reentrant in (False, True):
        assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients(batch, reentrant).items())
    blank = gradients(text_of(inputs(processor, samples()[2:3])))
    assert blank.keys() == plain.keys()
    assert not any(gradient.any() for gradient in blank.values())
    with pytest.raises(AttributeError, match="get_seq_length"):
        model(**{**batch, "past_key_values": "no cache"})
    model.eval()
    with torch.no_grad():
        text = text_of(batch)
        assert torch.equal(model(**text).logits, model.model.causal_lm(**text).logits)


def recipe(folder: Path, out: Path, more: str = "", train: str = "{bridge: true, lm: {lora: {rank: 2}}}") -> Path:
    out.mkdir(exist_ok=True)
    save_samples(out, samples())
    path = out / "recipe.yaml"
    path.write_text(f"""
name: t
output: {out}/out
model: {{vision: {folder}/tower, text: {folder}/lm, bridge: {SMALL}}}
log_steps: 1
workers: 0
stages:
  - &stage
    name: first
    data: {{conversations: {out}/data.json, images: {out}/images}}
    train: {{bridge: true}}
    steps: 2
    batch_size: 2
    learning_rate: 1.0e-2
    max_length: 400
    save_steps: 1
  - <<: *stage
    name: second
    gradient_checkpointing: true
    train: {train}
    {more}
""")
    return path


def test_training_is_resumed_and_reads_features(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bridge, then LoRA beside it: a run that was stopped, and one that reads the tower from a cache, come to the same."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    step, found = FoveateTrainer.training_step, {}
    cached = f"features: {{cache: {tmp_path}/cache, at_most: 100MB}}"
    for name, more in {"straight": "", "stopped": "", "cached": cached}.items():
        path = recipe(folder, tmp_path / name, more)
        if name == "stopped":

            def stopping(self: FoveateTrainer, *given: Any) -> Tensor:
                if self.state.global_step == 1:
                    raise KeyboardInterrupt
                return step(self, *given)

            with monkeypatch.context() as patch:
                patch.setattr(FoveateTrainer, "training_step", stopping)
                with pytest.raises(KeyboardInterrupt):
                    main(path)
        main(path)
        found[name] = weights(tmp_path / name)
    assert found["straight"]["model.bridge.outputs"].any()
    for name, tensor in found["straight"].items():
        assert torch.equal(found["stopped"][name], tensor), name
        torch.testing.assert_close(found["cached"][name], tensor, msg=name)


@pytest.mark.parametrize(
    ("more", "train", "said"),
    [
        ("kind: align", "{bridge: true}", "kind align is for visual tokens"),
        ("pack: true", "{bridge: true}", "does not take packed samples .*prompt_images"),
        ('reducers: [{share: 1, reducer: "divprune:keep=0.5"}]', "{bridge: true}", "has nothing to reduce"),
        ("tiling: anyres", "{bridge: true}", "no tokens that the tiling anyres could lay out"),
        ("image_size: 64", "{bridge: true}", "made for a grid of 4 x 4 patches"),
        ("view_tokens: 4", "{bridge: true}", "makes 0 tokens of a view"),
    ],
)
def test_what_a_stage_cannot_ask_for(folder: Path, tmp_path: Path, more: str, train: str, said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        main(recipe(folder, tmp_path / "r", more, train))


# ---- what is refused -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reducer", ["random:keep=0.5", "fastv:keep=0.5,layer=2", "tome:keep=0.5,site=tower", "pmod:untrained=true", "eemllm"]
)
def test_reducers_have_nothing_to_reduce(made: tuple[Any, Any], reducer: str) -> None:
    with pytest.raises(NotApplicable, match="images become weights of this model's decoder") as refused:
        foveate.attach(made[0], reducer)
    assert refused.value.reason is Reason.NO_TOKENS


def test_what_a_call_cannot_be(made: tuple[Any, Any]) -> None:
    model, processor = made
    batch = dict(inputs(processor, samples()))
    without = {name: value for name, value in batch.items() if name != "prompt_images"}
    with pytest.raises(FoveateError, match=r"4 images came with 4 prompts \(prompt_images \[1, 1, 1, 2\]\)"):
        model(**without, prompt_images=torch.tensor([1, 1, 1, 2]))
    with pytest.raises(FoveateError, match="but no image came"):
        model(**text_of(batch), prompt_images=batch["prompt_images"])
    with pytest.raises(FoveateError, match=r"but no image came: .*prefill_chunk_size"):
        model.generate(**inputs(processor, samples()[:2], "left"), **GREEDY, prefill_chunk_size=5)
    with pytest.raises(FoveateError, match=r"image_crops \[2, 2\]"):
        model(**batch, image_crops=torch.tensor([2, 2]))
    marked = torch.full((1, 3), processor.image_token_id)
    with pytest.raises(FoveateError, match="the prompts hold 3 image placeholders but the images give 0"):
        model(input_ids=marked, pixel_values=batch["pixel_values"][:1])
    with torch.no_grad():  # one image for each prompt need not be said
        given = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}
        assert torch.equal(model(**given).logits, model(**given, prompt_images=torch.ones(4, dtype=torch.int64)).logits)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": ["q_porj"]}, r"has no map called 'q_porj' .*did you mean 'q_proj'.*it has down_proj, gate_proj"),
        ({"layers": [1, 5]}, "decoder layer 5, but the layers are 0 to 4"),
        ({"targets": {"q_proj": [32, 16]}}, r"q_proj of decoder layer 1 has \[inputs, outputs\] \[32, 32\], the bridge \[32, 16\]"),
    ],
)
def test_what_a_model_cannot_be(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        assembled(folder, **changes)


def test_language_models_without_such_layers(folder: Path, made: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="has no decoder layers named `layers`"):
        completed(SMALL, GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8))
    shallow = llama_config(9, num_hidden_layers=3)
    with pytest.raises(FoveateError, match=r"weights of every 4th decoder layer, and the language model has 3 layers: say which"):
        completed({"kind": "vlora"}, shallow)
    assert completed({"kind": "mlp"}, shallow) == {"kind": "mlp"}
    model, processor = made
    with pytest.raises(FoveateError, match="no tokens that the tiling internvl"):
        from_backbones(folder / "tower", folder / "lm", SMALL, tiling="internvl:tiles=3")
    with pytest.raises(FoveateError, match="a vlora bridge cannot be exported"):
        to_llava(model, processor)


def test_a_job_of_embeddings_refuses(made: tuple[Any, Any], tmp_path: Path) -> None:
    for part in made:
        part.save_pretrained(tmp_path / "model")
    job = Job(str(save_samples(tmp_path, samples())), str(tmp_path / "model"))
    with pytest.raises(FoveateError, match="which embeddings do not hold; use foveate generate"):
        Encoder(job, parse("random:keep=0.5")[0])
