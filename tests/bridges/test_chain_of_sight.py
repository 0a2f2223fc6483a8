"""Chain-of-Sight: counts, the numbered properties of the reference, and the module against its equations."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.bridges.bridge_oracle import chain_of_sight as oracle
from tests.bridges.bridge_oracle import weights_of, window_merge
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from foveate.bridges import ChainOfSight, Resampler
from foveate.bridges.windows import window_partition
from foveate.errors import FoveateError

Scales = list[tuple[int, int]]
GLOBAL, LOCAL = (16, 16), (4, 4)
EIGHTY: Scales = [GLOBAL, LOCAL]

# resolution, windows, queries per window, tokens per scale, total
TOKENS = [
    (224, [16, 4], [16, 4], [16, 64], 80),
    (448, [32, 8], [16, 4], [16, 64], 80),
    (224, [16, 8, 4], [16, 16, 4], [16, 64, 64], 144),
    (224, [16, 2], [16, 4], [16, 256], 272),
    (224, [16, 8, 2], [16, 16, 4], [16, 64, 256], 336),
    (448, [32, 16, 8], [16, 16, 4], [16, 64, 64], 144),
    (448, [32, 4], [16, 4], [16, 256], 272),
    (448, [32, 16, 4], [16, 16, 4], [16, 64, 256], 336),
    (448, [32, 8, 4], [16, 16, 4], [16, 256, 256], 528),
    (448, [32, 16, 2], [16, 16, 4], [16, 64, 1024], 1104),
    (448, [32, 8, 2], [16, 16, 4], [16, 256, 1024], 1296),
    (336, [24, 6], [16, 4], [16, 64], 80),
]


def on_meta(scales: Scales, grid: int, **arguments: Any) -> ChainOfSight:
    with torch.device("meta"):
        return ChainOfSight(scales, grid=grid, **arguments)


def tiny(scales: Scales, grid: int, levels: int = 2) -> ChainOfSight:
    """In float64, with weights large enough that attention is far from uniform."""
    bridge = ChainOfSight(scales, grid=grid, levels=levels, vision_width=6, width=8, text_width=5, head_dim=4).double()
    for p in bridge.parameters():
        nn.init.normal_(p, std=0.5)
    return bridge


def features(grid: int, levels: int = 2, images: int = 1) -> list[Tensor]:
    return [torch.randn(images, grid * grid, 6, dtype=torch.float64) for _ in range(levels)]


def parts(bridge: ChainOfSight) -> list[Any]:
    """The resampler of each scale; torch does not type what a module list holds."""
    return list(bridge.resamplers)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------------------------------------------------- property 1: counts


@pytest.mark.parametrize(("pixels", "windows", "queries", "per_scale", "total"), TOKENS)
def test_property_1_token_counts(pixels: int, windows: list[int], queries: list[int], per_scale: list[int], total: int) -> None:
    side = pixels // 14
    bridge = on_meta(list(zip(windows, queries, strict=True)), side)
    assert bridge.tokens((side, side)) == len(bridge.boxes((side, side))) == total
    assert [part.queries.shape[:2].numel() for part in parts(bridge)] == per_scale
    assert bridge([torch.empty(1, side * side, 1024, device="meta")] * 2, (side, side)).shape == (1, total, 4096)


@pytest.mark.parametrize(
    ("scales", "grid", "count"),
    [
        ([(16, 16), (4, 4)], 16, 54_663_168),
        ([(16, 16), (8, 16), (2, 4)], 16, 80_115_712),
        ([(32, 16), (16, 16), (4, 4)], 32, 80_115_712),
        ([(32, 16), (8, 16), (2, 4)], 32, 81_098_752),
    ],
)
def test_property_1_parameter_counts(scales: Scales, grid: int, count: int) -> None:
    assert parameters(on_meta(scales, grid)) == count


def test_property_1_parameters_of_one_unit() -> None:
    unit = parts(on_meta([(16, 16)], 16, levels=1))[0].blocks[0]
    assert parameters(unit) == 12_595_200
    shapes = {name: p.numel() for name, p in unit.named_parameters()}
    assert (shapes["to_q.weight"], shapes["to_kv.weight"]) == (1_048_576, 2_097_152)
    assert shapes["proj.weight"] + shapes["proj.bias"] == 1_049_600
    assert sum(n for name, n in shapes.items() if name.startswith(("norm_query", "norm_context"))) == 4_096
    assert sum(n for name, n in shapes.items() if name.startswith("linear")) == 8_393_728
    assert sum(n for name, n in shapes.items() if name.startswith("norm_mlp")) == 2_048


def test_the_published_532m() -> None:
    """CLIP-L/14 with 23 blocks at 448 px + bridge of 1296 tokens + LoRA of rank 64 on all seven linear maps of Llama-7B."""
    clip_l = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(**clip_l, num_hidden_layers=23, image_size=448))
        llama = LlamaForCausalLM(LlamaConfig())  # its defaults are the 7B shape
        maps = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        adapted = get_peft_model(llama, LoraConfig(r=64, target_modules=maps))
    positions = [p for name, p in tower.named_parameters() if name.endswith("position_embedding.weight")]
    assert [tuple(p.shape) for p in positions] == [(1025, 1024)]
    absent = sum(p.numel() for name, p in tower.named_parameters() if ".post_layernorm." in f".{name}")  # the output LayerNorm is not kept
    assert absent == 2 * 1024
    vision = parameters(tower) - absent
    bridge = parameters(on_meta([(32, 16), (8, 16), (2, 4)], 32))
    lora = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert (vision, bridge, lora) == (291_367_936, 81_098_752, 159_907_840)
    assert vision + bridge + lora == 532_374_528


@pytest.mark.parametrize(
    ("scales", "grid", "gigaflops"),
    [
        ([(16, 16), (4, 1)], 16, 5.9),
        ([(16, 16), (4, 2)], 16, 6.7),
        ([(16, 16), (4, 4)], 16, 8.4),
        ([(16, 16), (8, 16), (2, 4)], 16, 23.4),
        ([(32, 16), (16, 16), (4, 4)], 32, 43.0),
        ([(32, 16), (8, 16), (2, 4)], 32, 91.3),
    ],
)
def test_bridge_flops_of_the_cost_table(scales: Scales, grid: int, gigaflops: float) -> None:
    assert round(on_meta(scales, grid).flops((grid, grid)) / 1e9, 1) == gigaflops


# ---------------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize(
    ("scales", "grid", "levels"),
    [([(4, 3), (2, 2)], 4, 2), ([(6, 2), (3, 3), (1, 1)], 6, 1), ([(2, 2), (2, 1)], 4, 3)],
)
def test_module_equals_the_equations(scales: Scales, grid: int, levels: int) -> None:
    bridge, x = tiny(scales, grid, levels), features(grid, levels, images=2)
    expected = oracle([level.numpy() for level in x], grid, scales, weights_of(bridge), head_dim=4)
    np.testing.assert_allclose(bridge(x, (grid, grid)).detach().numpy(), expected, atol=1e-11, rtol=1e-11)


def test_initial_weights() -> None:
    bridge = ChainOfSight([(4, 4), (2, 16)], grid=8, vision_width=128, width=128, text_width=256)
    for name, p in bridge.named_parameters():
        if "norm" in name:
            assert torch.equal(p, torch.ones_like(p) if name.endswith("weight") else torch.zeros_like(p))
        elif name.endswith("bias"):
            assert not p.any()
        else:
            assert p.mean().abs() < 0.001
            assert p.std().item() == pytest.approx(0.02, rel=0.05)


def test_property_2_partition_of_a_4_x_4_grid() -> None:
    patches = torch.arange(16).view(1, 16, 1)
    windows = window_partition(patches, (4, 4), 2)
    assert windows[..., 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(window_merge(windows, (4, 4), 2), patches)


@pytest.mark.parametrize("patch", [(0, 0), (3, 4), (7, 7)])
@pytest.mark.parametrize("level", [0, 1])
def test_property_3_locality(patch: tuple[int, int], level: int) -> None:
    scales = [(8, 3), (4, 2), (2, 2)]
    bridge, x = tiny(scales, 8), features(8)
    changed = [f.clone() for f in x]
    changed[level][0, patch[0] * 8 + patch[1]] = torch.randn(6, dtype=torch.float64)
    differs = (bridge(x, (8, 8)) != bridge(changed, (8, 8)))[0].any(-1)
    expected, offset = torch.zeros(bridge.tokens((8, 8)), dtype=torch.bool), 0
    for window, queries in scales:
        first = offset + ((patch[0] // window) * (8 // window) + patch[1] // window) * queries
        expected[first : first + queries] = True
        offset += (8 // window) ** 2 * queries
    assert torch.equal(differs, expected)


def test_property_4_token_to_box() -> None:
    scales = [(32, 16), (8, 16), (2, 4)]
    boxes = on_meta(scales, 32).boxes((32, 32))
    offsets = [(0, 16), (16, 272), (272, 1296)]
    for (window, queries), (start, end) in zip(scales, offsets, strict=True):
        for token in range(end - start):
            row, column = divmod(token // queries, 32 // window)
            assert boxes[start + token] == (row * window, column * window, (row + 1) * window, (column + 1) * window)
    assert [14 * edge for edge in boxes[1295]] == [420, 420, 448, 448]  # in pixels


def test_property_5_order_inside_a_window_does_not_count() -> None:
    bridge, x = tiny([(4, 3), (2, 2)], 4), features(4)
    patches = list(range(16))
    patches[0], patches[5] = 5, 0  # both in window 0 of the fine scale
    patches[2], patches[3], patches[6] = 6, 2, 3  # a cycle in window 1
    torch.testing.assert_close(bridge([f[:, patches] for f in x], (4, 4)), bridge(x, (4, 4)), atol=1e-12, rtol=0)


def test_property_5_order_across_windows_counts() -> None:
    bridge, x = tiny([(2, 2)], 4), features(4)
    swapped = [window_merge(window_partition(f, (4, 4), 2)[[1, 0, 2, 3]], (4, 4), 2) for f in x]
    before, after = bridge(x, (4, 4))[0], bridge(swapped, (4, 4))[0]
    assert torch.equal(after[4:], before[4:])
    assert not torch.isclose(after[:4, None], before[None, :4]).all(-1).any()  # new tokens, not the old ones elsewhere


def test_property_6_one_global_window_is_the_plain_resampler() -> None:
    bridge, x = tiny([(4, 3)], 4, levels=1), features(4, levels=1, images=2)
    plain = Resampler(queries=3, vision_width=6, width=8, text_width=5, head_dim=4).double()
    plain.load_state_dict({name.replace("resamplers.0.", "resampler."): value for name, value in bridge.state_dict().items()})
    assert torch.equal(bridge(x, (4, 4)), plain(x, (4, 4)))


def test_property_6_one_global_window_is_torchs_cross_attention() -> None:
    """The same block out of torch.nn.MultiheadAttention and a two-layer MLP."""
    bridge, x = tiny([(4, 3)], 4, levels=1), features(4, levels=1, images=2)
    (part,) = parts(bridge)
    block = part.blocks[0]
    attention = nn.MultiheadAttention(8, 2, bias=True, kdim=6, vdim=6, batch_first=True, dtype=torch.float64)
    key, value = block.to_kv.weight.chunk(2)
    attention.load_state_dict(
        {
            "q_proj_weight": block.to_q.weight,
            "k_proj_weight": key,
            "v_proj_weight": value,
            "in_proj_bias": torch.zeros(24),
            "out_proj.weight": block.proj.weight,
            "out_proj.bias": block.proj.bias,
        }
    )
    q, context = part.queries.expand(2, -1, -1), block.norm_context(x[0])
    q = q + attention(block.norm_query(q), context, context, need_weights=False)[0]
    q = q + block.linear_2(F.gelu(block.linear_1(block.norm_mlp(q))))
    torch.testing.assert_close(bridge(x, (4, 4)), bridge.proj(bridge.norm(q)), atol=1e-12, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- inflation


# source scales of 224 px; target resolution, windows and queries; source of each; growth in windows; tokens per scale; total
CORRESPONDENCE = [
    (448, [(32, 16), (8, 4)], [0, 1], [1, 1], [16, 64], 80),
    (448, [(32, 16), (16, 16), (4, 4)], [0, 0, 1], [1, 4, 4], [16, 64, 256], 336),
    (448, [(32, 16), (8, 4), (2, 4)], [0, 1, 1], [1, 1, 16], [16, 64, 1024], 1104),
    (448, [(32, 16), (8, 16), (2, 4)], [0, 0, 1], [1, 16, 16], [16, 256, 1024], 1296),
    (448, [(32, 16), (4, 4), (2, 4)], [0, 1, 1], [1, 4, 16], [16, 256, 1024], 1296),
]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(("pixels", "scales", "sources", "repeats", "per_scale", "total"), CORRESPONDENCE)
def test_inflation_correspondence(
    pixels: int, scales: Scales, sources: list[int], repeats: list[int], per_scale: list[int], total: int, explicit: bool
) -> None:
    bridge = ChainOfSight(EIGHTY, grid=16, vision_width=4, width=8, text_width=4, head_dim=4)
    side = pixels // 14
    scaled = bridge.scaled(scales=scales, grid=side, sources=sources if explicit else None)
    assert scaled.tokens((side, side)) == total
    for target, source, repeat, tokens in zip(parts(scaled), sources, repeats, per_scale, strict=True):
        origin = parts(bridge)[source]
        assert target.queries.shape[:2].numel() == tokens == origin.queries.shape[:2].numel() * repeat
        assert all(torch.equal(target.blocks.state_dict()[name], value) for name, value in origin.blocks.state_dict().items())
        assert torch.equal(target.queries.unique(dim=0), origin.queries.unique(dim=0))


@pytest.mark.parametrize(
    ("pixels", "windows", "sources"),
    [  # the token-scaling ablation: G adds a finer scale that derives from the global one, L replaces the local window
        (448, [32, 8], [0, 1]),
        (224, [16, 8, 4], [0, 0, 1]),
        (224, [16, 2], [0, 1]),
        (224, [16, 8, 2], [0, 0, 1]),
        (448, [32, 16, 8], [0, 0, 1]),
        (448, [32, 4], [0, 1]),
        (448, [32, 16, 4], [0, 0, 1]),
        (448, [32, 8, 4], [0, 0, 1]),
        (448, [32, 16, 2], [0, 0, 1]),
        (448, [32, 8, 2], [0, 0, 1]),
    ],
)
@pytest.mark.parametrize("local", [4, 2, 1])  # the 80, 48 and 32 token bridges
def test_default_sources_are_the_papers(pixels: int, windows: list[int], sources: list[int], local: int) -> None:
    with torch.device("meta"):
        bridge = ChainOfSight([(16, 16), (4, local)], levels=1, width=64, vision_width=8, text_width=8)
    for n, scale in enumerate(parts(bridge)):  # ids in place of queries tell where a scale comes from
        scale.queries = nn.Parameter(torch.full(scale.queries.shape, float(n)))
    queries = [16, 16, local][-len(windows) :] if len(windows) == 3 else [16, local]
    scaled = bridge.scaled(scales=list(zip(windows, queries, strict=True)), grid=pixels // 14)
    assert [int(scale.queries.unique().item()) for scale in parts(scaled)] == sources


@pytest.mark.parametrize(("local", "pretrain", "finetune"), [(4, 80, 1296), (2, 48, 784), (1, 32, 528)])
def test_property_11_up_to_16_times(local: int, pretrain: int, finetune: int) -> None:
    bridge = on_meta([(16, 16), (4, local)], 16)
    scaled = bridge.scaled(scales=[(32, 16), (8, 16), (2, local)], grid=32)
    assert (bridge.tokens((16, 16)), scaled.tokens((32, 32))) == (pretrain, finetune)
    assert finetune / pretrain == pytest.approx({80: 16.2, 48: 16.33, 32: 16.5}[pretrain], abs=0.004)


@pytest.mark.parametrize(
    ("grid", "scales"),
    [(4, [(4, 3), (1, 2)]), (8, [(8, 3), (4, 3), (2, 2)]), (8, [(4, 3), (1, 2)]), (12, [(6, 3), (2, 2)])],
)
def test_property_7_constant_features_give_the_parents_token(grid: int, scales: Scales) -> None:
    """All patches equal: each new window's token is that of its parent window, at any window side."""
    bridge = tiny([(4, 3), (2, 2)], 4)
    scaled = bridge.scaled(scales=scales, grid=grid)
    patch = [torch.randn(6, dtype=torch.float64) for _ in range(2)]
    before = bridge([p.expand(1, 16, 6) for p in patch], (4, 4))[0]
    after = scaled([p.expand(1, grid * grid, 6) for p in patch], (grid, grid))[0]
    offset = 0
    for window, queries in scales:
        start, old = {3: (0, 1), 2: (3, 2)}[queries]  # where the source scale begins, and its windows a side
        side = grid // window
        for row in range(side):
            for column in range(side):
                parent = start + ((row * old // side) * old + column * old // side) * queries
                torch.testing.assert_close(after[offset : offset + queries], before[parent : parent + queries], atol=1e-12, rtol=0)
                offset += queries
    assert offset == len(after)
    assert len(before.unique(dim=0)) == len(before)  # the parents can be told apart


def test_property_8_inflation_example() -> None:
    bridge = tiny([(4, 2), (2, 2)], 4)
    whole, (a, b, c, d) = parts(bridge)[0].queries[0], parts(bridge)[1].queries
    scaled = bridge.scaled(scales=[(4, 2), (2, 2), (1, 2)], grid=4, sources=[0, 0, 1])
    rows = [[a, a, b, b], [a, a, b, b], [c, c, d, d], [c, c, d, d]]
    assert torch.equal(parts(scaled)[2].queries, torch.stack([block for row in rows for block in row]))
    assert torch.equal(parts(scaled)[1].queries, torch.stack([whole] * 4))


def test_property_9_window_of_one_patch_differs_by_its_queries_only() -> None:
    bridge, x = tiny([(1, 3)], 2), features(2)
    attended: list[Tensor] = []
    for block in parts(bridge)[0].blocks:
        block.proj.register_forward_hook(lambda _, args, out: attended.append(out))
    out = bridge(x, (2, 2))
    assert len(attended) == 2
    for level in attended:
        assert level.shape == (4, 3, 8)
        torch.testing.assert_close(level, level[:, :1].expand(-1, 3, -1), atol=1e-12, rtol=0)
    assert len(out[0].unique(dim=0)) == 12
    with torch.no_grad():
        parts(bridge)[0].queries[:] = parts(bridge)[0].queries[:, :1]
    same = bridge(x, (2, 2)).unflatten(1, (4, 3))
    torch.testing.assert_close(same, same[:, :, :1].expand_as(same), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [[(4, 3), (2, 2)], [(4, 3), (2, 3)], [(2, 2), (2, 2)], [(4, 1), (4, 1), (1, 1)]])
def test_property_10_unchanged_windows_round_trip_bit_exactly(scales: Scales, dtype: torch.dtype) -> None:
    bridge = tiny(scales, 4).to(dtype)
    copy = bridge.scaled(scales=scales, grid=4)
    assert copy.config() == bridge.config()
    assert {n: (v.dtype, v.shape) for n, v in copy.state_dict().items()} == {n: (v.dtype, v.shape) for n, v in bridge.state_dict().items()}
    assert all(torch.equal(v, bridge.state_dict()[n]) for n, v in copy.state_dict().items())
    x = [f.to(dtype) for f in features(4)]
    assert torch.equal(copy(x, (4, 4)), bridge(x, (4, 4)))


def test_property_10_80_to_80_at_448() -> None:
    bridge = ChainOfSight(EIGHTY, vision_width=8, width=64, text_width=4)
    copy = bridge.scaled(scales=[(32, 16), (8, 4)], grid=32)
    assert copy.tokens((32, 32)) == 80
    assert all(torch.equal(v, bridge.state_dict()[n]) for n, v in copy.state_dict().items())


def test_property_12_coarse_comes_first() -> None:
    bridge, x = tiny([(4, 3), (2, 2)], 4), features(4)
    out = bridge(x, (4, 4))
    coarse, fine = ([window_partition(f, (4, 4), window) for f in x] for window in (4, 2))
    for part, contexts, rows in zip(bridge.resamplers, (coarse, fine), (slice(0, 3), slice(3, 11)), strict=True):
        torch.testing.assert_close(out[:, rows], bridge.proj(bridge.norm(part(contexts))), atol=1e-12, rtol=0)
    with pytest.raises(FoveateError, match=r"coarsest to the finest, got windows \[2, 4\]; order: \[4, 2\]"):
        ChainOfSight([(2, 2), (4, 3)], grid=4)
    with pytest.raises(FoveateError, match="coarsest to the finest"):
        bridge.scaled(scales=[(2, 2), (4, 3)], grid=4)


def test_property_13_gradient_stays_in_the_window() -> None:
    bridge = tiny([(4, 3), (2, 2)], 4)
    for token, (r0, c0, r1, c1) in enumerate(bridge.boxes((4, 4))):
        x = [f.requires_grad_() for f in features(4)]
        (bridge(x, (4, 4))[0, token] @ torch.randn(5, dtype=torch.float64)).backward()
        inside = torch.zeros(4, 4, dtype=torch.bool)
        inside[r0:r1, c0:c1] = True
        for f in x:
            assert f.grad is not None
            assert torch.equal(f.grad.abs().sum(-1).view(4, 4) > 0, inside)


# ---------------------------------------------------------------------------------------------------------------- scaled: the rest


def test_scaling_leaves_the_original_alone() -> None:
    bridge = tiny([(4, 3), (2, 2)], 4).eval()
    before, random = {n: v.clone() for n, v in bridge.state_dict().items()}, torch.get_rng_state()
    scaled = bridge.scaled(scales=[(4, 3), (1, 2)], grid=4)
    assert torch.equal(torch.get_rng_state(), random)
    assert not scaled.training
    assert all(p.requires_grad for p in scaled.parameters())
    with torch.no_grad():
        for p in scaled.parameters():
            p.add_(1)
    assert all(torch.equal(v, before[n]) for n, v in bridge.state_dict().items())


def test_output_norm_and_projection_are_carried_over() -> None:
    bridge = tiny([(4, 3), (2, 2)], 4)
    scaled = bridge.scaled(scales=[(8, 3), (4, 3), (1, 2)], grid=8)
    for name in ("norm.weight", "norm.bias", "proj.weight", "proj.bias"):
        assert torch.equal(scaled.state_dict()[name], bridge.state_dict()[name])


def test_scaling_on_the_meta_device() -> None:
    scaled = on_meta(EIGHTY, 16).scaled(scales=[(32, 16), (8, 16), (2, 4)], grid=32)
    assert all(p.is_meta for p in scaled.parameters())
    assert parameters(scaled) == 81_098_752


def test_scaling_twice_is_scaling_once() -> None:
    bridge = tiny([(4, 3), (2, 2)], 4)
    once = bridge.scaled(scales=[(16, 3), (4, 3), (1, 2)], grid=16)
    twice = bridge.scaled(scales=[(8, 3), (4, 3), (2, 2)], grid=8).scaled(scales=[(16, 3), (4, 3), (1, 2)], grid=16)
    assert all(torch.equal(v, once.state_dict()[n]) for n, v in twice.state_dict().items())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"scales": [(32, 16), (8, 2)], "grid": 32}, r"\(8, 2\) has 2 queries per window, but .* have 16 and 4"),
        ({"scales": [(32, 16), (2, 4)], "grid": 32, "sources": [0, 0]}, r"\(2, 4\) has 4 queries .* source \(16, 16\) has 16"),
        ({"scales": [(16, 16), (8, 4)], "grid": 16}, r"\(8, 4\) has 2 x 2 windows on a grid of 16, .*\(4, 4\) has 4 x 4 .*only scales up"),
        ({"scales": [(24, 16), (4, 4)], "grid": 24}, r"\(4, 4\) has 6 x 6 windows on a grid of 24, .*\(4, 4\) has 4 x 4 .*multiple of 4"),
        ({"scales": [(32, 16), (6, 4)], "grid": 32}, "window 6 does not divide the grid of 32 x 32"),
        ({"scales": [(32, 16), (2, 4)], "grid": 32, "sources": [0]}, r"sources \[0\] must .*\(0 to 1\) for each of 2 scales"),
        ({"scales": [(32, 16), (2, 4)], "grid": 32, "sources": [0, 2]}, r"sources \[0, 2\] must name a source scale \(0 to 1\)"),
        ({"scales": [(32, 16), (2, 4)], "grid": 0}, "grid must be a whole number of at least 1, got 0"),
    ],
)
def test_impossible_scaling_names_the_numbers(target: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        on_meta(EIGHTY, 16).scaled(**target)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ([], r"scales must be a list of \(window, queries per window\)"),
        ([16, 4], r"scales must be a list of \(window, queries per window\)"),
        ([(16, 16), (4, 4, 4)], r"scales must be a list of \(window, queries per window\)"),
        ([(16, 16), (6, 4)], "window 6 does not divide the grid of 16 x 16 patches"),
        ([(32, 16)], "window 32 does not divide the grid of 16 x 16 patches"),
        ([(16, 0)], "queries per window must be a whole number of at least 1, got 0"),
        ([(0, 4)], "window must be a whole number of at least 1, got 0"),
    ],
)
def test_impossible_scales_are_named(scales: Any, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        ChainOfSight(scales, grid=16)


@pytest.mark.parametrize("grid", [(24, 24), (16, 8), (8, 32)])
def test_another_grid_is_an_error_that_tells_the_way_out(grid: tuple[int, int]) -> None:
    bridge = on_meta(EIGHTY, 16)
    for method in (bridge.tokens, bridge.boxes, bridge.flops):
        with pytest.raises(FoveateError, match=rf"grid of 16 x 16 patches, got {grid[0]} x {grid[1]}; .*\.scaled\("):
            method(grid)
