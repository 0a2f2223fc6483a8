"""[CLS], distillation and register tokens: they stay in front of the patches, block after block, and nothing is merged with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    LlamaConfig,
    PixioConfig,
    SiglipVisionConfig,
)
from transformers.models.llama4.configuration_llama4 import Llama4VisionConfig
from transformers.models.llama4.modeling_llama4 import Llama4VisionModel

import foveate
from foveate.anatomy import blocks, extras_of
from foveate.contract import ClsAttention, ReceivedAttention, TowerKeys
from foveate.model import FoveateConfig, FoveateForConditionalGeneration
from foveate.probes.tower import TowerProbes
from foveate.reducers import ToMe
from foveate.reducers.tome import bipartite
from foveate.tokens import Kind
from tests.reducers.test_tome import Token, one_pass
from tests.tiny import IMAGE, PATCHES, ROWS, Batch

BLOCKS = 4
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TOWERS: dict[str, tuple[int, bool, Any]] = {  # tokens in front of the patches, whether [CLS] is the first, the configuration
    "siglip": (0, False, SiglipVisionConfig(**SIZES, vision_use_head=False)),
    "clip": (1, True, CLIPVisionConfig(**SIZES)),
    "deit": (2, True, DeiTConfig(**SIZES)),
    "dinov2 with registers": (5, True, Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=4)),
    "dinov2 with 3 registers": (4, True, Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3)),
}
every_tower = pytest.mark.parametrize("name", TOWERS)


def make(name: str) -> Any:
    torch.manual_seed(0)
    text = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=99)
    config = FoveateConfig(
        vision_config=TOWERS[name][2], text_config=text, bridge={"kind": "mlp"}, vision_feature_layer=-1, image_token_id=IMAGE
    )
    model = FoveateForConditionalGeneration(config).eval()
    with torch.no_grad():  # states that differ, so that who merges with whom is clear
        for parameter in model.model.vision_tower.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5])
def test_passes_leave_the_protected_in_front(prefix: int) -> None:
    torch.manual_seed(prefix)
    states = torch.randn(3, 16 + prefix, 4)
    states[:, :prefix] = states[:, prefix : 2 * prefix]  # twins of patches, which would merge at once
    names = torch.arange(16 + prefix).expand(3, -1)
    while states.shape[1] > prefix + 1:
        matching = bipartite(states, 3, protect_first=prefix)
        assert torch.equal(matching.group[:, :prefix], torch.arange(prefix).expand(3, -1))
        assert bool((matching.group[:, prefix:] >= prefix).all())
        states, names = (x.gather(1, i) for x, i in ((states, matching.keeper[..., None].expand(-1, -1, 4)), (names, matching.keeper)))
        assert torch.equal(names[:, :prefix], torch.arange(prefix).expand(3, -1))


@every_tower
@torch.no_grad()
def test_in_a_tower_every_block_merges_patches_alone_and_as_the_loop_does(name: str) -> None:
    prefix, has_cls, _ = TOWERS[name]
    model, batch = make(name), Batch([ROWS[1]])
    tower = model.model.vision_tower
    assert extras_of(tower) == (has_cls, prefix, False)
    entered: list[Tensor] = []
    left: list[Tensor] = []
    keys: list[Tensor] = []
    hooks: list[Any] = []
    for block in blocks(tower):
        projection = next(m for n, m in block.named_modules() if n.rpartition(".")[2] in ("key", "k_proj"))
        hooks.append(projection.register_forward_hook(lambda m, a, out: keys.append(out.unflatten(-1, (2, 16)).mean(-2))))
        norm = next(m for n, m in block.named_modules() if isinstance(m, nn.LayerNorm))
        hooks.append(norm.register_forward_pre_hook(lambda m, a: entered.append(a[0])))
        hooks.append(block.register_forward_hook(lambda m, a, out: left.append(out[0] if isinstance(out, tuple) else out)))
    reducer = ToMe(0.2, r=5, site="tower", blocks=3)
    with foveate.attach(model, reducer) as run:
        model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    (call,) = run.last.tower
    assert [x.shape[1] for x in entered] == [prefix + n for n in (16, 11, 6, 3)]
    kinds = [Kind.CLS] * has_cls + [Kind.REGISTER] * (prefix - has_cls)
    place = torch.arange(prefix + PATCHES).expand(2, -1)  # of each token in the tower; a block has those that are left in this order
    for at, token_map in call.maps.items():
        assert torch.equal(entered[at][:, :prefix], left[at - 1][:, :prefix]), "what stands in front has been changed"
        assert token_map.target.kind[:, :prefix].tolist() == [kinds, kinds]
        merged = token_map.source.shape[1] - token_map.target.shape[1]
        for crop in range(2):
            own = keys[at - 1][crop, place[crop].argsort().argsort()]
            tokens = [Token(k, {i: 1.0}, 1.0, i) for i, k in enumerate(own.double().numpy())]
            expected = one_pass(tokens, merged, protect=prefix)
            assert [token_map.sources(crop, m) for m in range(len(expected))] == [sorted(t.sources) for t in expected]
            assert [token_map.sources(crop, m) for m in range(prefix)] == [[p] for p in range(prefix)]
        place = place.gather(1, token_map.representative)
    whole = call.whole
    assert whole.target.size[:, :prefix].sum() == 0
    assert whole.target.size.sum(1).tolist() == [PATCHES, PATCHES]
    # What enters the language model is made of patches alone, each of them once.
    entering = run.last.maps[0]
    slots = [m for m in range(entering.target.shape[1]) if entering.target.kind[0, m] == Kind.PATCH]
    assert sorted(s for m in slots for s in entering.sources(0, m)) == (entering.source.kind[0] == Kind.PATCH).nonzero()[:, 0].tolist()
    groups = [[s - prefix for s in whole.sources(0, m)] for m in range(prefix, whole.target.shape[1])]
    first = [[s - 3 for s in entering.sources(0, m)] for m in slots[: len(groups)]]  # image 1 begins at slot 3
    assert sorted(first) == sorted(groups)


@every_tower
@torch.no_grad()
def test_a_crop_does_not_depend_on_its_batch(name: str) -> None:
    model, batch = make(name), Batch(ROWS)
    with foveate.attach(model, ToMe(0.3, site="tower", blocks=3)):
        together = model(**batch.inputs).logits
        for i, single in enumerate(batch.singles):
            torch.testing.assert_close(batch.own(together, i), model(**single).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (Dinov2WithRegistersConfig(**SIZES, num_register_tokens=0), (True, 1)),
        (DINOv3ViTConfig(**SIZES, num_register_tokens=2), (True, 3)),
        (PixioConfig(**SIZES, n_cls_tokens=3), (True, 3)),
    ],
)
def test_tokens_beside_the_patches_are_counted(config: Any, found: tuple[bool, int]) -> None:
    from transformers import AutoModel

    tower = AutoModel.from_config(config)
    assert extras_of(tower) == (*found, False)
    assert tower(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape[1] == 16 + found[1]


@torch.no_grad()
def test_a_class_token_behind_the_patches_is_found_there() -> None:
    """Llama 4 puts it last: scores are those of its row, and no patch is taken for it."""
    torch.manual_seed(0)
    config = Llama4VisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=16, patch_size=4, vision_output_dim=32
    )
    config._attn_implementation = "eager"
    tower = Llama4VisionModel(config).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.3)
    assert extras_of(tower) == (True, 1, True)
    maps: list[Tensor] = []
    tower.model.layers[-1].self_attn.register_forward_hook(lambda m, a, out: maps.append(out[1]))
    signals = [ClsAttention(-1), ReceivedAttention(-1), TowerKeys(-1)]
    probes = TowerProbes(tower, signals)
    tower(torch.randn(2, 3, 16, 16))
    found = probes.read()
    probes.remove()
    weights = maps[0].mean(1)
    assert weights.shape == (2, 17, 17)
    torch.testing.assert_close(torch.stack(found[signals[0]]), weights[:, -1, :-1])
    torch.testing.assert_close(torch.stack(found[signals[1]]), weights[:, :, :-1].mean(1))
    assert [tuple(k.shape) for k in found[signals[2]]] == [(16, 16)] * 2
