"""VLoRA's generator: its equations once more, slowly, and the sizes that the paper's setting has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.bridges.bridge_oracle import Array, Weights, block, layer_norm, linear, weights_of
from tests.bridges.test_every_bridge import GRID, features, small

from foveate.bridges import VLoRA, build_bridge
from foveate.errors import FoveateError

FULL = {name: [4096, 4096] for name in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp")}


def among(queries: list[Array], w: Weights, heads: int) -> list[Array]:
    """Each query and what it reads of all of them."""
    width, read = len(queries[0]), []
    qkv = [linear(layer_norm(q, w, "norm"), w, "to_qkv", bias=False) for q in queries]
    for own in qkv:
        attended = np.zeros(width)
        for head in range(heads):
            part = slice(head * (width // heads), (head + 1) * (width // heads))
            scores = [math.exp(float(own[:width][part] @ other[width : 2 * width][part]) * (width // heads) ** -0.5) for other in qkv]
            for score, other in zip(scores, qkv, strict=True):
                attended[part] += score / sum(scores) * other[2 * width :][part]
        read.append(attended)
    return [q + linear(x, w, "proj") for q, x in zip(queries, read, strict=True)]


def oracle(image: list[Array], bridge: VLoRA) -> Array:
    """(layers, inputs of all targets, rank) of one image, of which each level is (patches, width)."""
    w = weights_of(bridge)
    x = [linear(np.concatenate(patch), w, "to_channels") + place for *patch, place in zip(*image, w["place"], strict=True)]
    found = []
    for name, (inputs, _) in bridge.targets.items():
        own = weights_of(bridge, f"generators.of_{name}.")
        queries = list(own["query"])
        for number in range(bridge.depth):
            inner = {k.removeprefix(f"blocks.{number}."): v for k, v in own.items() if k.startswith(f"blocks.{number}.")}
            cross = {k.removeprefix("cross."): v for k, v in inner.items() if k.startswith("cross.")}
            queries = [block(q, x, cross, bridge.channels // bridge.heads) for q in among(queries, inner, bridge.heads)]
        made = [linear(layer_norm(q, own, "norm"), own, "head", bias=False) for q in queries]
        found.append(np.stack(made).reshape(len(queries), inputs, bridge.rank))
    return np.concatenate(found, axis=1)


def test_the_equations() -> None:
    torch.manual_seed(0)
    bridge: Any = small("vlora").double()
    for parameter in bridge.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    given = features(torch.float64, images=2)
    for image, found in enumerate(bridge(given, GRID).detach().numpy()):
        np.testing.assert_allclose(found, oracle([level[image].numpy() for level in given], bridge), atol=1e-10)


def test_the_published_setting() -> None:
    """Ten million numbers an image, 21 MB in bfloat16, and 671 million parameters where they come out."""
    with torch.device("meta"):
        bridge: Any = build_bridge({"kind": "vlora", "targets": FULL, "layers": list(range(3, 32, 4)), "grid": 24})
        made = bridge([torch.empty(1, 576, 1024)], (24, 24))
    assert made.numel() == 5 * 8 * 4096 * 64 == 10_485_760
    assert made.numel() * 2 / 1e6 == pytest.approx(21, abs=0.05)
    assert sum(generator.head.weight.numel() for generator in bridge.generators.values()) == 671_088_640
    assert (bridge.tokens((24, 24)), bridge.boxes((24, 24))) == (0, [])
    assert bridge.channels // bridge.heads == 32
    assert len(bridge.generators["of_q_proj"].blocks) == 8


def test_it_begins_at_nothing_and_with_loras_spread() -> None:
    torch.manual_seed(0)
    bridge: Any = build_bridge(
        {"kind": "vlora", "targets": {"a": [300, 8], "b": [75, 8]}, "layers": [0], "grid": 4, "channels": 64, "vision_width": 12}
    )
    assert not bridge.outputs.any()
    made = bridge([torch.randn(8, 16, 12)], GRID).detach()
    for part, inputs in ((made[:, :, :300], 300), (made[:, :, 300:], 75)):
        assert float(part.std()) == pytest.approx((3 * inputs) ** -0.5, rel=0.1)


def test_the_order_of_targets_is_that_of_their_names() -> None:
    """A saved configuration comes back in that order."""
    torch.manual_seed(0)
    one = build_bridge({**small("vlora").config(), "targets": {"k_proj": [10, 4], "q_proj": [10, 10]}})
    two = build_bridge({**one.config(), "targets": {"q_proj": [10, 10], "k_proj": [10, 4]}})
    two.load_state_dict(one.state_dict())
    given = features()
    assert torch.equal(one(given, GRID), two(given, GRID))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": ["q_proj"]}, r"targets=\['q_proj'\] is not possible"),
        ({"targets": {}}, "targets={} is not possible"),
        ({"targets": {"q_proj": [10]}}, "is not possible"),
        ({"targets": {"q_proj": [10, 0]}}, "outputs of q_proj must be a whole number of at least 1, got 0"),
        ({"layers": []}, r"layers=\[\] is not possible"),
        ({"layers": [2, 1]}, r"layers=\[2, 1\] is not possible"),
        ({"layers": [-1]}, r"layers=\[-1\] is not possible"),
        ({"heads": 3}, "3 heads do not divide 16 channels"),
    ],
)
def test_what_it_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        build_bridge({**small("vlora").config(), **changes})


def test_other_grids_are_refused() -> None:
    with pytest.raises(FoveateError, match="made for a grid of 4 x 4 patches, got 6 x 6"):
        small("vlora").tokens((6, 6))
