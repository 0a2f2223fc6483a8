"""Cost from configurations: the papers' tables, and torch's own flop counter on small real models."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPTNeoXConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
)

import foveate
from foveate import accounting as cost
from foveate.accounting import Trained, observed, predict
from foveate.accounting.conventions import compression_ratio, schedule_tokens
from foveate.accounting.counter import Counter
from foveate.contract import ImageSize, Workload
from foveate.errors import FoveateError
from foveate.reducers import parse, visual_tokens
from tests import tiny
from tests.test_conventions import TERA
from tests.test_learned import with_weights

VICUNA = LlamaConfig()  # the 7B shape: 32 layers, 4096, 11008, 32 heads of 128
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "patch_size": 14}
MiB = 2**20


def spelled(layer: int, stride: int) -> str:
    return f"vcc:layer={layer},stride={stride}"


# ---- LLaVolta (arXiv 2406.20092): counts, ratios, memory


@pytest.mark.parametrize(
    ("reducer", "tokens", "ratio", "mib"),
    [
        ("none", 18432, 100.0, 288),
        (spelled(2, 2), 9792, 188.2, 153),
        (spelled(2, 4), 5472, 336.8, 85.5),
        (spelled(2, 8), 3312, 556.5, 51.8),
        (spelled(2, 16), 2232, 825.8, 34.9),
        (spelled(8, 4), 8064, 228.6, 126),
        (spelled(8, 8), 6336, 290.9, 99),
        (spelled(16, 2), 13824, 133.3, 216),
        (spelled(16, 4), 11520, 160.0, 180),
        (spelled(16, 8), 10368, 177.8, 162),
        (spelled(16, 16), 9792, 188.2, 153),
        (spelled(1, 64), 855, 2155.8, 13.4),
    ],
)
def test_llavolta_counts_ratios_and_kv(reducer: str, tokens: int, ratio: float, mib: float) -> None:
    counts = visual_tokens(parse(reducer), 576, 32)
    assert sum(counts) == tokens
    assert float(100 * compression_ratio(counts, 576, 32)) == pytest.approx(ratio, abs=0.05)
    ledger = predict(VICUNA, per_image=576, reducers=parse(reducer))
    assert sum(ledger.visual_tokens) == tokens
    assert sum(ledger.visual_kv_bytes) / MiB == pytest.approx(mib, abs=0.051)
    assert ledger.kv_bytes == ledger.visual_kv_bytes  # no text


def test_nested_pooling() -> None:
    nested = parse("vcc:layer=4,stride=2+vcc:layer=12,stride=2+vcc:layer=24,stride=2")
    counts = visual_tokens(nested, 576, 32)
    assert counts == [576] * 4 + [288] * 8 + [144] * 12 + [72] * 8
    assert compression_ratio(counts, 576, 32) == Fraction(32, 12)
    assert float(compression_ratio(counts, 576, 32)) == pytest.approx(2.667, abs=5e-4)
    assert float(compression_ratio(visual_tokens(parse(spelled(8, 8)), 576, 32), 576, 32)) == pytest.approx(2.909, abs=5e-4)


TWO, DEEP, WIDE, LIGHT = (visual_tokens(parse(r), 576, 32) for r in (spelled(2, 8), spelled(16, 8), spelled(2, 2), spelled(16, 2)))
FULL = [576] * 32
LAST = [visual_tokens(parse(spelled(k, s)), 576, 32) for k, s in ((2, 16), (16, 16), (16, 4))]


@pytest.mark.parametrize(
    ("parts", "mean", "ratio"),
    [
        ([FULL], 18432, 100.0),
        ([TWO, FULL], 10872, 169.5),
        ([TWO, DEEP, FULL], 10704, 172.2),
        ([TWO, WIDE, FULL], 10512, 175.3),
        ([TWO, WIDE, LIGHT, FULL], 11340, 162.5),
        ([TWO, DEEP, LIGHT, FULL], 11484, 160.5),
        (LAST, 7848, 234.9),
    ],
)
def test_llavolta_schedule_means(parts: list[list[int]], mean: int, ratio: float) -> None:
    """The epoch-weighted means. The paper's own Table 2 agrees for the last row only; the other five do not follow its definition."""
    tokens = schedule_tokens((Fraction(1, len(parts)), part) for part in parts)
    assert tokens == mean
    assert float(100 * compression_ratio(tokens, 576, 32)) == pytest.approx(ratio, abs=0.05)


@pytest.mark.parametrize(("share", "mean"), [(0, 18432), (25, 14652), (50, 10872), (75, 7092), (90, 4824), (100, 3312)])
def test_llavolta_share_of_the_first_stage(share: int, mean: int) -> None:
    assert schedule_tokens([(Fraction(share, 100), TWO), (Fraction(100 - share, 100), FULL)]) == mean


# ---- the cost formula of the pruning papers


@pytest.mark.parametrize(("tokens", "tera_macs"), TERA)
def test_published_multiply_adds_of_visual_tokens(tokens: int, tera_macs: float) -> None:
    flops = predict(VICUNA, per_image=tokens).flops
    assert (flops["lm_linear"] + flops["lm_attention"]) / 2e12 == pytest.approx(tera_macs, abs=5e-4)


def test_fastv_counts_one_layer_with_a_plain_mlp() -> None:
    for hidden, inner, heads, giga in ((4096, 11008, 32, 99.3), (5120, 13824, 40, 154.6)):
        config = GPTNeoXConfig(hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_hidden_layers=2, vocab_size=100)
        assert predict(config, per_image=576, text_tokens=36).layer_flops[0] / 2e9 == pytest.approx(giga, abs=0.05)


def test_aim_counts_two_flops_and_text_and_grouped_queries() -> None:
    assert sum(predict(VICUNA, per_image=576, text_tokens=41).layer_flops) / 1e12 == pytest.approx(8.19, abs=0.005)
    qwen2 = Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)
    assert sum(predict(qwen2, per_image=32 * 196, text_tokens=110).layer_flops) / 1e12 == pytest.approx(99.6, abs=0.05)


def test_kv_bytes_per_token() -> None:
    assert sum(predict(VICUNA, per_image=1).kv_bytes) == 512 * 1024
    grouped = Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)
    assert predict(grouped, per_image=1).kv_bytes[0] == 2 * 4 * 128 * 2
    assert predict(grouped, per_image=1, dtype_bytes=4).kv_bytes[0] == 2 * 4 * 128 * 4


# ---- Chain-of-Sight's tower (arXiv 2407.15819): 23 blocks of CLIP-L


@pytest.mark.parametrize(("side", "giga"), [(16, 155), (32, 693)])
def test_clip_tower_flops(side: int, giga: int) -> None:
    config = LlavaConfig(vision_config=CLIPVisionConfig(**CLIP_L, image_size=14 * side), text_config=VICUNA, vision_feature_layer=-1)
    assert round(predict(config).flops["tower"] / 1e9) == giga


# ---- torch's own counter


def counted(run: object) -> int:
    with FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return counter.get_total_flops()


TINY = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 64}
LMS = [
    LlamaConfig(**TINY, num_key_value_heads=2, head_dim=8),
    LlamaConfig(**TINY, num_key_value_heads=6, head_dim=8, tie_word_embeddings=True),
    Qwen3Config(**TINY, num_key_value_heads=3, head_dim=16),
]


@pytest.mark.parametrize("config", LMS)
def test_prefill_and_decode_equal_torchs_counter(config: LlamaConfig) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(11)[None]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        prefill = counted(lambda: model(ids, logits_to_keep=1))

        def decode() -> None:
            for token in range(4):
                model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)

        decoding = counted(decode)
    assert predict(config, text_tokens=11).total_flops == prefill
    assert predict(config, text_tokens=11, mode="decode", new_tokens=4).total_flops == decoding


def test_decoding_a_batch_equals_torchs_counter() -> None:
    """Four tokens of each of three rows."""
    config = LMS[0]
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(33).view(3, 11)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values

        def decode() -> None:
            for token in range(4):
                model(torch.full((3, 1), token), past_key_values=cache, use_cache=True)

        decoding = counted(decode)
    predicted = predict(config, inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, mode="decode", new_tokens=4)
    assert predicted == observed(config, [[0] * 3] * 3, [[11] * 3] * 3, mode="decode", new_tokens=4)
    assert predicted.total_flops == decoding
    assert predicted.total_tokens == (3 * 15,) * 3


@pytest.mark.parametrize(("factor", "trained"), [(2, Trained(bridge=True)), (3, Trained(bridge=True, lm=True))])
def test_training_step_equals_torchs_counter(factor: int, trained: Trained) -> None:
    """Behind a trained bridge: a frozen LM needs no gradients of its weights, but both operands of attention's products need theirs."""
    config = LMS[0]
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(trained.lm)
    embeds = torch.randn(1, 11, config.hidden_size, requires_grad=True)
    measured = counted(lambda: model(inputs_embeds=embeds).logits.sum().backward())
    train, forward = (predict(config, text_tokens=11, mode=mode, trained=trained, head_tokens=11) for mode in ("train", "prefill"))
    assert train.total_flops == measured
    assert train.flops["lm_linear"] == factor * forward.flops["lm_linear"]
    assert train.flops["lm_attention"] == 3 * forward.flops["lm_attention"]
    assert train.flops["head"] == factor * forward.flops["head"]


def test_lora_step_equals_torchs_counter() -> None:
    peft = pytest.importorskip("peft")
    config, targets = LMS[0], ("q_proj", "down_proj")
    lora = peft.LoraConfig(r=4, target_modules=list(targets), lora_dropout=0.0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), lora)
    embeds = torch.randn(1, 11, config.hidden_size, requires_grad=True)
    measured = counted(lambda: model(inputs_embeds=embeds).logits.sum().backward())
    trained = Trained(bridge=True, lora_rank=4, lora_targets=targets)
    assert predict(config, text_tokens=11, mode="train", trained=trained).total_flops == measured
    assert cost.trainable(config, trained)["lora"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_tower_and_llava_equal_torchs_counter() -> None:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4, image_size=20, patch_size=4, projection_dim=16
    )
    config = LlavaConfig(vision_config=vision, text_config=LMS[0], image_token_index=63)
    config._attn_implementation = "eager"
    pixels = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        tower = CLIPVisionModel._from_config(vision, attn_implementation="eager")
        assert predict(config, images=2).flops["tower"] == counted(lambda: tower(pixels))
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
        ids = torch.tensor([[1] + [63] * 25 + [2, 3] + [63] * 25 + [4]])
        measured = counted(lambda: model(input_ids=ids, pixel_values=pixels, logits_to_keep=1))
    ledger = predict(config, images=2, text_tokens=4)
    assert ledger.total_flops == measured
    assert ledger.total_tokens == (54,) * 3
    assert ledger.visual_tokens == (50,) * 3
    assert cost.parameters(config)["bridge"] == sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    assert sum(cost.parameters(config).values()) == model.num_parameters()


def test_trained_tower_parameters_are_those_that_get_a_gradient() -> None:
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4, image_size=20, patch_size=4)
    config = LlavaConfig(vision_config=vision, text_config=LMS[0], vision_feature_layer=-2)
    model = CLIPVisionModel(vision)
    model(torch.randn(1, 3, 20, 20), output_hidden_states=True).hidden_states[-2].sum().backward()
    reached = sum(p.numel() for p in model.parameters() if p.grad is not None)
    assert cost.trainable(config, Trained(tower=True, bridge=False)) == {"tower": reached, "bridge": 0, "lm": 0, "lora": 0}


# ---- laws


@settings(max_examples=50)
@given(
    st.integers(0, 600), st.integers(1, 50), st.integers(0, 40), st.integers(0, 4), st.integers(1, 9), st.sampled_from(["prefill", "train"])
)
def test_monotone_in_tokens_and_additive_over_layers(tokens: int, more: int, text: int, layer: int, stride: int, mode: str) -> None:
    reducers = parse(spelled(layer, stride))
    few, many = (predict(LMS[0], per_image=n, text_tokens=text, reducers=reducers, mode=mode) for n in (tokens, tokens + more))  # type: ignore[arg-type]
    assert all(a <= b for a, b in zip(few.layer_flops, many.layer_flops, strict=True))
    assert few.total_flops <= many.total_flops
    assert few.total_flops <= predict(LMS[0], per_image=tokens, text_tokens=text, mode=mode).total_flops  # type: ignore[arg-type]
    assert sum(few.layer_flops) == few.flops["lm_linear"] + few.flops["lm_attention"]
    assert sum(few.flops.values()) == few.total_flops
    singles = [predict(LMS[0], per_image=n, text_tokens=text, mode=mode).layer_flops[0] for n in few.visual_tokens]  # type: ignore[arg-type]
    assert list(few.layer_flops) == singles


@given(st.integers(0, 700), st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=3))
def test_reducers_compose_to_falling_counts(per_image: int, pools: list[tuple[int, int]]) -> None:
    counts = visual_tokens([r for k, s in pools for r in parse(spelled(k, s))], per_image, 32)
    assert len(counts) == 32
    assert counts == sorted(counts, reverse=True)
    product = 1
    for layer, n in enumerate(counts):
        product = 1
        for k, s in pools:
            product *= s if k <= layer else 1
        assert n == per_image // product


# ---- observed


def test_observed_equals_predicted_and_takes_rows_apart() -> None:
    predicted = predict(LMS[0], per_image=16, text_tokens=5, reducers=parse(spelled(1, 4)))
    assert observed(LMS[0], [16, 4, 4], [21, 9, 9]) == predicted
    step = observed(LMS[0], [16, 4, 4], [21, 9, 9], mode="train")
    assert step == predict(LMS[0], per_image=16, text_tokens=5, reducers=parse(spelled(1, 4)), mode="train")
    both = observed(LMS[0], [[16, 0], [4, 0], [4, 0]], [[21, 7], [9, 7], [9, 7]])
    text = predict(LMS[0], text_tokens=7)
    assert both.total_flops == predicted.total_flops + text.total_flops
    assert both.kv_bytes == tuple(a + b for a, b in zip(predicted.kv_bytes, text.kv_bytes, strict=True))


@given(st.lists(st.tuples(st.integers(0, 16), st.integers(1, 20)), min_size=1, max_size=4), st.integers(0, 5))
def test_decoding_a_batch_is_decoding_its_rows(rows: list[tuple[int, int]], new: int) -> None:
    """Of other lengths, with fewer and fewer visual tokens layer by layer."""
    visual = [[n >> layer for n, _ in rows] for layer in range(3)]
    total = [[n + text for n, (_, text) in zip(left, rows, strict=True)] for left in visual]
    each = zip(zip(*visual, strict=True), zip(*total, strict=True), strict=True)
    alone = [observed(LMS[0], own, tokens, mode="decode", new_tokens=new) for own, tokens in each]
    assert observed(LMS[0], visual, total, mode="decode", new_tokens=new) == cost.together(alone)


@pytest.mark.parametrize("spelling", ["none", "vcc:layer=1,stride=4", "vcc:layer=0,stride=2+vcc:layer=2,stride=4", "random:keep=0.5"])
def test_predicted_equals_what_an_attached_model_did(spelling: str) -> None:
    """Tokens as recorded, and FLOPs as torch counts them (one row, so that nothing is padding)."""
    model, images = tiny.llava(attn="eager"), 2
    ids = torch.tensor([tiny.prompt(images, [4, 5])])
    text = ids.shape[1] - images * tiny.PATCHES
    predicted = predict(model.config, images=images, text_tokens=text, reducers=parse(spelling), head_tokens=ids.shape[1])
    with torch.no_grad(), foveate.attach(model, spelling, shortcuts=False) as run:
        measured = counted(lambda: model(input_ids=ids, pixel_values=torch.randn(images, 3, 32, 32)))
        layouts = run.last.layouts
    seen = observed(
        model.config,
        [layout.visual.sum(1).tolist() for layout in layouts],
        [layout.valid.sum(1).tolist() for layout in layouts],
        images=images,
        head_tokens=ids.shape[1],
    )
    assert seen == predicted
    assert predicted.total_flops == measured


# ---- errors


@pytest.mark.parametrize("config", [Qwen2Config, LlamaConfig])
def test_activations_are_those_that_autograd_keeps_to_their_order(config: type) -> None:
    small = config(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        attn_implementation="sdpa",
    )
    model = AutoModelForCausalLM.from_config(small)
    states = torch.randn(1, 40, 64, requires_grad=True)
    rotary = model.model.rotary_emb(states, torch.arange(40)[None])
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        if not isinstance(tensor, torch.nn.Parameter) and tensor.shape[0] == 1:  # a weight's transposed view has no batch
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.model.layers[0](states, position_embeddings=rotary)
    (told, *_) = predict(small, per_image=30, text_tokens=10, mode="train", dtype_bytes=4).activation_bytes
    assert 0.5 < sum(kept.values()) / told < 2


def test_errors_name_the_thing() -> None:
    with pytest.raises(FoveateError, match=r"add up to 5/6"):
        schedule_tokens([(Fraction(1, 2), TWO), (Fraction(1, 3), FULL)])
    with pytest.raises(FoveateError, match=r"counts of 2 layers.*has 3"):
        observed(LMS[0], [1, 1], [1, 1])
    with pytest.raises(FoveateError, match=r"counts of 0 layers.*has 3"):
        observed(LMS[0], [], [], mode="decode", new_tokens=1)
    with pytest.raises(FoveateError, match=r"q_prj are not in.*q_proj"):
        cost.lora_per_layer(LMS[0], 4, ["q_prj"])
    with pytest.raises(FoveateError, match="size 10 is smaller than one patch of 14"):
        predict(LlavaConfig(vision_config=CLIPVisionConfig(**CLIP_L, image_size=336), text_config=VICUNA), image_size=10)
    with pytest.raises(FoveateError, match="text_tokens=-1"):
        predict(LMS[0], text_tokens=-1)
    with pytest.raises(FoveateError, match="at least one"):
        compression_ratio(0, 576, 32)


# ---- scores


SEVEN_B = {"width": 4096, "heads": 32, "query_width": 4096, "tower_width": 64}


@pytest.mark.parametrize(
    ("reducer", "macs"),
    [
        ("random:keep=0.25", 0),
        ("fastervlm:keep=0.25", 0),  # its one row is the tower's
        ("fastv", 640 * 4096),  # the last token's queries with every key
        ("fastv:rows=all", 640 * 640 * 4096),
        ("pyramiddrop", 640 * 4096),
        ("divprune:keep=0.25", 576 * 576 * 4096),
        ("divprune:keep=1.0", 0),
        ("cdpruner:keep=64", 576 * 576 * 4096 + 576 * (64 * 63 // 2)),  # pick k subtracts what the k - 1 before it explain
        ("dart", (4 + 4) * 576 * 4096),
        ("visionzip:dominant=54,contextual=10", (522 - 10) * 10 * 64),
        ("tome:keep=288", 288 * 288 * 4096 + 288 * 576 * 4096),  # one pass: A with B, and the groups' means
        ("tome:keep=0.25", 288 * 288 * 4096 + 288 * 576 * 4096 + 144 * 144 * 4096 + 144 * 288 * 4096),
        ("sparsevlm", 576 * 64 * 4096 + 64 * 640 * 4096),  # if all 64 text tokens rate
        ("aim:keep=1.0,steps=1", 0),  # its only drop is of all
    ],
)
def test_scores_of_one_image_in_a_7b_model(reducer: str, macs: int) -> None:
    (method,) = parse(reducer)
    sizes = Workload((ImageSize.whole(576),), (576,), text=64, keys=640, **SEVEN_B)
    assert method.score_flops(sizes) == 2 * macs


def test_scores_compete_within_their_scope() -> None:
    tiles = ImageSize(crops=(100, 60, 40), frames=(200,))
    at_once = Workload((tiles, tiles), (200, 200), width=8)
    assert [at_once.groups(scope) for scope in ("crop", "frame", "image", "sample")] == [[100, 60, 40] * 2, [200] * 2, [200] * 2, [400]]
    halved = Workload((tiles,), (100,), width=8)
    assert halved.groups("crop") == [50, 30, 20]
    assert parse("divprune:keep=0.5,scope=crop")[0].score_flops(halved) == 2 * 8 * (50**2 + 30**2 + 20**2)


def test_predicted_scores_are_counted_wherever_they_are_computed() -> None:
    """Tower, in front of the language model, and inside it; of two images with text between."""
    model = tiny.llava(attn="eager")
    ids = torch.tensor([tiny.prompt(2, [4, 5])])
    for reducer in ("fastervlm", "divprune:keep=0.5", "fastv:layer=1", "fopru+fastv:layer=1"):
        with torch.no_grad(), foveate.attach(model, reducer) as run, Counter(model) as seen:
            model(input_ids=ids, pixel_values=torch.randn(2, 3, 32, 32))
        predicted = predict(model.config, images=2, text_tokens=ids.shape[1] - 2 * tiny.PATCHES, reducers=parse(reducer))
        assert predicted.flops["scores"] == run.ledger.flops["scores"] == seen.flops["scores"] > 0
        assert predict(model.config, text_tokens=5, images=0, reducers=parse(reducer)).flops["scores"] == 0


@pytest.mark.parametrize("reducers", ["atpllava:layers=1-2-3", "atpllava:layers=1+fastv:layer=2", "atpllava:layers=1+pmod"])
def test_scores_are_those_of_the_tokens_that_were_there(reducers: str) -> None:
    """Where content decides, what is predicted is the most that may be; what is observed is what a counter sees."""
    model = with_weights(tiny.llava(attn="eager"), reducers)
    ids = torch.tensor([tiny.prompt(2, [4, 5])])
    with torch.no_grad(), foveate.attach(model, reducers) as run, Counter(model) as seen:
        model(input_ids=ids, pixel_values=torch.randn(2, 3, 32, 32))
    predicted = predict(model.config, images=2, text_tokens=ids.shape[1] - 2 * tiny.PATCHES, reducers=parse(reducers))
    assert sum(run.last.visual_tokens) < sum(predicted.visual_tokens)
    assert 0 < run.ledger.flops["scores"] == seen.flops["scores"] < predicted.flops["scores"]


@pytest.mark.parametrize(
    "policy", ["snapkv:keep=0.5,window=4", "lookm:keep=0.5,window=4,merge=pivot", "prefixkv:keep=0.5", "random:keep=0.5"]
)
def test_what_a_cache_policy_multiplies_is_counted_as_its_scores(policy: str) -> None:
    model = tiny.llava()
    ids = torch.tensor([tiny.prompt(1, [4, 5])])
    with torch.no_grad(), foveate.attach(model, None, cache=policy) as run, Counter(model) as seen:
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), use_cache=True)
    for part in ("scores", "lm_attention", "lm_linear"):
        assert run.ledger.flops[part] == seen.flops[part]
    assert (seen.flops["scores"] > 0) is (policy != "random:keep=0.5")


def test_recorded_maps_score_nothing() -> None:
    model = tiny.llava(attn="eager")
    given = {"input_ids": torch.tensor([tiny.prompt(1, [4])]), "pixel_values": torch.randn(1, 3, 32, 32)}
    with torch.no_grad(), foveate.attach(model, "fastv:layer=1") as run:
        model(**given)
    with torch.no_grad(), foveate.attach(model, maps=run.maps) as again, Counter(model) as seen:
        model(**given)
    assert run.ledger.flops["scores"] > 0
    assert again.ledger.flops["scores"] == seen.flops["scores"] == 0
