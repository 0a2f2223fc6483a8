"""What holds for every bridge. A new bridge joins by a line in SMALL; one that is registered and not listed fails."""

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foveate.bridges import BRIDGES, Bridge, build_bridge, complete_config
from foveate.errors import FoveateError

SMALL: dict[str, dict[str, Any]] = {  # every bridge takes 4 x 4 patches and two levels
    "mlp": {"norm": True, "places": True},
    "avg_pool2d": {"pool": 2},
    "pixel_shuffle": {"ratio": 2},
    "resampler": {"queries": 3, "width": 16, "head_dim": 8},
    "chain_of_sight": {"scales": [[4, 3], [2, 2]], "grid": 4, "width": 16, "head_dim": 8},
    "mqt": {"queries": 9, "width": 16, "head_dim": 8},
    "resa": {"grid": 4, "reads": [1, 0], "head_dim": 6},
    "c_abstractor": {"side": 2, "depth": 2, "grid": 4, "width": 16},
    "d_abstractor": {"side": 2, "depth": 2, "grid": 4, "width": 16, "head_dim": 8},
    "ldpv2": {"side": 2},
    "wide_windows": {"window": 2, "ratios": [2, 1], "grid": 4, "width": 16, "head_dim": 8},
    "comm": {"towers": [[1, 12], [2, 6]], "channels": 8},
    "mg_gate": {"towers": [[1, 8], [1, 16]]},
    "vlora": {
        "targets": {"q_proj": [10, 10], "k_proj": [10, 4], "mlp": [7, 5]},
        "layers": [0, 2],
        "grid": 4,
        "rank": 3,
        "depth": 2,
        "channels": 16,
        "heads": 2,
    },
}
LOOK_AROUND = {
    "resa",
    "c_abstractor",
    "d_abstractor",
    "ldpv2",
    "wide_windows",
    "mg_gate",
}  # whose tokens also see patches outside of their boxes
BEGINS_AT_ZERO = {"mg_gate", "mlp"}
NO_TOKENS = {"vlora": (2, 10 + 10 + 7, 3)}  # but weights, of this shape
GRID = (4, 4)
kinds = pytest.mark.parametrize("kind", BRIDGES)
of_tokens = pytest.mark.parametrize("kind", [kind for kind in BRIDGES if kind not in NO_TOKENS])


def small(kind: str) -> Bridge:
    return woken(as_it_begins(kind))


def as_it_begins(kind: str) -> Bridge:
    return build_bridge({"kind": kind, "levels": 2, "vision_width": 12, "text_width": 10, **SMALL[kind]})


def woken(bridge: Bridge) -> Bridge:
    """The bridge with values in what begins at zero, and adds nothing before it is trained."""
    for parameter in bridge.parameters() if bridge.kind in BEGINS_AT_ZERO else ():
        if not parameter.is_meta and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return bridge


def features(dtype: torch.dtype = torch.float32, device: str = "cpu", images: int = 3) -> list[torch.Tensor]:
    return [torch.randn(images, 16, 12, dtype=dtype, device=device) for _ in range(2)]


def made_of(bridge: Bridge) -> tuple[int, ...]:
    """The shape of what an image becomes."""
    return NO_TOKENS.get(bridge.kind, (bridge.tokens(GRID), 10))


def test_every_registered_bridge_is_listed() -> None:
    assert set(SMALL) == set(BRIDGES)
    assert all(cls.kind == kind for kind, cls in BRIDGES.items())


@kinds
def test_count_equals_forward(kind: str) -> None:
    bridge = small(kind)
    assert bridge(features(), GRID).shape == (3, *made_of(bridge))


@kinds
def test_config_round_trip(kind: str) -> None:
    bridge = small(kind)
    config = json.loads(json.dumps(bridge.config()))
    assert config == bridge.config()
    twin = build_bridge(config)
    assert twin.config() == config
    assert type(twin) is type(bridge)
    twin.load_state_dict(bridge.state_dict())
    x = features()
    assert torch.equal(twin(x, GRID), bridge(x, GRID))


@kinds
def test_config_holds_every_argument(kind: str) -> None:
    taken = complete_config({"kind": kind}, **dict.fromkeys(small(kind).config(), 0))
    assert set(taken) == set(small(kind).config())


@kinds
def test_meta_device_costs_nothing(kind: str) -> None:
    with torch.device("meta"):
        bridge = small(kind)
    assert all(p.is_meta for p in bridge.parameters())
    real = small(kind)
    assert (bridge.tokens(GRID), bridge.boxes(GRID), bridge.flops(GRID), bridge.config()) == (
        real.tokens(GRID),
        real.boxes(GRID),
        real.flops(GRID),
        real.config(),
    )
    assert bridge(features(device="meta"), GRID).shape == (3, *made_of(real))


@of_tokens
def test_boxes_lie_in_the_grid_and_cover_it(kind: str) -> None:
    bridge = small(kind)
    boxes = bridge.boxes(GRID)
    assert len(boxes) == bridge.tokens(GRID)
    assert all(0 <= r0 < r1 <= 4 and 0 <= c0 < c1 <= 4 for r0, c0, r1, c1 in boxes)
    covered = {(r, c) for r0, c0, r1, c1 in boxes for r in range(r0, r1) for c in range(c0, c1)}
    assert covered == {(r, c) for r in range(4) for c in range(4)}


@of_tokens
def test_a_token_depends_on_exactly_the_patches_of_its_box(kind: str) -> None:
    bridge = small(kind).double()
    bridge.reset_parameters()
    woken(bridge)
    x = [f.requires_grad_() for f in features(torch.float64, images=1)]
    out = bridge(x, GRID)
    direction = torch.randn(10, dtype=torch.float64)
    for token, (r0, c0, r1, c1) in enumerate(bridge.boxes(GRID)):
        inside = torch.zeros(4, 4, dtype=torch.bool)
        inside[r0:r1, c0:c1] = True
        for gradient in torch.autograd.grad(out[0, token] @ direction, x, retain_graph=True):
            found = gradient[0].abs().sum(-1).view(4, 4) > 0
            assert bool(found[inside].all()) if kind in LOOK_AROUND else torch.equal(found, inside)


@of_tokens
def test_gradient_reaches_every_parameter(kind: str) -> None:
    bridge = small(kind).double()
    (bridge(features(torch.float64), GRID) * torch.randn(10, dtype=torch.float64)).sum().backward()
    assert [name for name, p in bridge.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@kinds
def test_bf16_follows_fp32(kind: str) -> None:
    bridge = small(kind)
    x = features()
    expected = bridge(x, GRID)
    got = bridge.to(torch.bfloat16)([f.bfloat16() for f in x], GRID)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.05)


@kinds
def test_an_image_does_not_depend_on_its_batch(kind: str) -> None:
    bridge = small(kind).double()
    x = features(torch.float64)
    torch.testing.assert_close(bridge([f[1:2] for f in x], GRID), bridge(x, GRID)[1:2], atol=1e-12, rtol=0)


@kinds
def test_flops_agree_with_torch(kind: str) -> None:
    with torch.device("meta"):
        bridge = small(kind)
    with FlopCounterMode(display=False) as counter:
        bridge(features(device="meta", images=1), GRID)
    assert bridge.flops(GRID) == counter.get_total_flops()


@kinds
def test_both_levels_count_and_not_alike(kind: str) -> None:
    bridge = small(kind)
    shallow, deep = features()
    assert not torch.allclose(bridge([shallow, deep], GRID), bridge([deep, shallow], GRID))


@kinds
def test_initial_weights_can_be_drawn_again(kind: str) -> None:
    torch.manual_seed(7)
    bridge = as_it_begins(kind)
    first = {name: x.clone() for name, x in bridge.state_dict().items()}
    for p in bridge.parameters():
        torch.nn.init.constant_(p, float("nan"))
    torch.manual_seed(7)
    bridge.reset_parameters()
    assert all(x.isfinite().all() for x in bridge.state_dict().values())
    drawn, again = ({name for name, x in of.items() if x.std(correction=0) > 0} for of in (first, bridge.state_dict()))
    assert drawn == again


@kinds
def test_wrong_features_are_named(kind: str) -> None:
    bridge = small(kind)
    with pytest.raises(FoveateError, match="2 feature levels, got 1"):
        bridge(features()[:1], GRID)
    with pytest.raises(FoveateError, match=r"level 1 has shape \(3, 17, 12\).*16, 12.*without CLS"):
        bridge([features()[0], torch.randn(3, 17, 12)], GRID)
    with pytest.raises(FoveateError, match=r"level 0 has shape \(3, 16, 11\)"):
        bridge([torch.randn(3, 16, 11), features()[0]], GRID)


@kinds
def test_an_empty_grid_is_an_error(kind: str) -> None:
    for method in (small(kind).tokens, small(kind).boxes, small(kind).flops):
        with pytest.raises(FoveateError, match="0 x 4"):
            method((0, 4))


@kinds
def test_numbers_below_one_are_errors(kind: str) -> None:
    config = small(kind).config()
    for name in [name for name, value in config.items() if isinstance(value, int) and not isinstance(value, bool)]:
        with pytest.raises(FoveateError, match=rf"{name} must be a whole number of at least 1, got 0"):
            build_bridge({**config, name: 0})


def test_a_word_is_no_yes_or_no() -> None:
    for name in ("norm", "places"):
        with pytest.raises(FoveateError, match=f"{name} must be true or false, got 'layer'"):
            build_bridge({"kind": "mlp", name: "layer"})


@pytest.mark.parametrize("kind", sorted(set(BRIDGES) - {"chain_of_sight"}))
def test_only_chain_of_sight_is_scaled(kind: str) -> None:
    with pytest.raises(FoveateError, match=rf"a {kind} bridge has no scales .*chain_of_sight"):
        small(kind).scaled(scales=[(4, 3)], grid=8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "chain_of_sigth", "scales": [[4, 1]]}, "'chain_of_sigth'; did you mean 'chain_of_sight'"),
        ({"kind": "zzz"}, f"'zzz'; choose from {', '.join(BRIDGES)}"),
        ({"scales": [[4, 1]]}, "unknown bridge kind None"),
        ({"kind": "mlp", "text_wdith": 3}, "mlp bridge has no argument 'text_wdith'; did you mean 'text_width'"),
        ({"kind": "resampler"}, "resampler bridge needs 'queries'"),
        ({"kind": "chain_of_sight"}, "chain_of_sight bridge needs 'scales'"),
        ({"kind": "avg_pool2d", "pool": 2.0}, "pool must be a whole number of at least 1, got 2.0"),
        ({"kind": "resampler", "queries": 4, "width": 100}, "head_dim 64 does not divide the bridge width 100"),
    ],
)
def test_build_bridge_errors(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        build_bridge(config)


def test_complete_config_fills_only_what_is_open() -> None:
    facts = {"vision_width": 1152, "width": 1152, "text_width": 896, "levels": 1, "grid": 27}
    own: dict[str, Any] = {"kind": "mlp", "text_width": 5}
    assert complete_config(own, **facts) == {"kind": "mlp", "vision_width": 1152, "text_width": 5, "levels": 1}
    own = {"kind": "chain_of_sight", "scales": [[9, 1]]}
    assert complete_config(own, **facts) == {**own, **facts}


def test_widths_default_to_clip_l_and_7b() -> None:
    with torch.device("meta"):
        bridges = [build_bridge({"kind": "mlp"}), build_bridge({"kind": "chain_of_sight", "scales": [[16, 16], [4, 4]]})]
    assert all((bridge.vision_width, bridge.text_width) == (1024, 4096) for bridge in bridges)
