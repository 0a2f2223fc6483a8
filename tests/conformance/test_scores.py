"""What methods are told of attention is what the model's own eager attention says: all of its heads, the right rows, the right patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.anatomy import blocks, extras_of, read
from foveate.contract import Attention, ClsAttention, Cut, FromLayer, ReceivedAttention, Site, View, Workload
from foveate.errors import NotApplicable
from foveate.probes.tower import TowerProbes
from foveate.reducers import Reducer
from foveate.tokens import TokenMap
from tests.conformance.checks import load
from tests.conformance.family import families
from tests.conformance.test_conformance import REPRESENTATIVE

SHARED = ("gemma3n", "gemma4:small")  # served by no method
# Towers of packed patches, whose attention modules give no weights back, and those that have none to read.
PACKED = (
    *("cohere_compass", "cosmos3_omni", "ernie4_5_vl_moe", "exaone4_5", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "hunyuan_vl"),
    *("hyperclovax_vision_v2", "kimi_k25", "minicpmv4_6", "minicpmv4_7", "muse_glimmer", "paddleocr_vl"),
    *("qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl"),
    *("qwen3_vl_moe", "video_llama_3"),
)
UNREADABLE = ("fast_vlm", "got_ocr2", "perception_lm", "pp_chart2table")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}


@dataclass(frozen=True)
class Watch(Reducer):
    """Keeps everything, and remembers what it was shown."""

    name: ClassVar[str] = "watch"
    paper: ClassVar[str] = "-"
    layer: int = 1
    seen: ClassVar[list[View]] = []

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(self.layer + 1, (Attention(self.layer),))]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        view.signal(Attention(self.layer))
        self.seen.append(view)
        return Cut(TokenMap.identity(view.layout))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return list(work.arriving)


@contextmanager
def weights_of(block: nn.Module) -> Iterator[list[Tensor]]:
    """The attention maps (B, H, N, K) that a block's own attention gives back."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            found.extend(part for part in output[1:2] if isinstance(part, Tensor) and part.ndim == 4)

    hooks = [module.register_forward_hook(note) for module in block.modules() if "attention" in type(module).__name__.lower()]
    yield found
    for hook in hooks:
        hook.remove()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole", False)
        metafunc.parametrize("name", [name for name in families() if (whole or name in REPRESENTATIVE) and name not in SHARED])


@torch.no_grad()
def attention_is_the_models(name: str) -> None:
    loaded = load(name, "eager")
    anatomy = read(loaded.model)
    layer = next(i for i in range(len(anatomy.layers)) if not anatomy.recurrent(i))
    inputs = loaded.batch("left")
    Watch.seen.clear()
    with weights_of(anatomy.layers[layer]) as maps, foveate.attach(loaded.model, Watch(layer), shortcuts=False):
        loaded.model(**inputs, use_cache=False)
    (own,), (view,) = maps, Watch.seen
    told = view.signal(Attention(layer))
    B, N = inputs["input_ids"].shape
    every = torch.arange(N).expand(B, N)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(told.rows(every).mean(1)[valid], own.float().mean(1)[valid], **CLOSE)
    last = torch.full((B,), N - 1)
    torch.testing.assert_close(told.row(last), own.float().mean(1)[:, -1], **CLOSE)
    torch.testing.assert_close(told.received(valid), (own.float().mean(1) * valid[..., None]).sum(1) / valid.sum(1, keepdim=True), **CLOSE)


@torch.no_grad()
def tower_attention_is_the_towers(name: str) -> bool:
    """Whether the tower gives weights to compare with; AssertionError where they are others."""
    loaded = load(name, "eager")
    tower = read(loaded.model).tower_of("video" if loaded.family.frames else "image")
    cls, beside, last = extras_of(tower)
    assert last == (name == "llama4")
    signals = [ClsAttention(-1), ReceivedAttention(-1)]
    probes = TowerProbes(tower, signals)
    try:
        with weights_of(blocks(tower)[-1]) as maps:
            loaded.model(**loaded.singles[1], use_cache=False)
        found = probes.read()
    finally:
        probes.remove()
    if not maps:
        return False
    own = [crop.float().mean(0) for call in maps for crop in call]
    assert len(own) == len(found[signals[0]])
    for crop, by_cls, received in zip(own, *found.values(), strict=True):
        patches = slice(0, -beside) if last else slice(beside, None)
        torch.testing.assert_close(received, crop.mean(0)[patches], **CLOSE)
        torch.testing.assert_close(by_cls, crop[-1 if last else 0][patches] if cls else received, **CLOSE)
    return True


def test_attention_of_a_decoder_layer(name: str) -> None:
    attention_is_the_models(name)


def test_attention_of_a_towers_block(name: str) -> None:
    family = name.partition(":")[0]
    if family in UNREADABLE:
        with pytest.raises(NotApplicable, match=r"has no attention that can be (read|watched)"):
            tower_attention_is_the_towers(name)
    else:
        assert tower_attention_is_the_towers(name) == (family not in PACKED)
