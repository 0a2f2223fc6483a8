"""Whether a layer attends is told by what it does: no name of a layer type, and no name of a class, changes a result."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

import foveate
from foveate.anatomy import attends, blocks, read
from foveate.contract import Cut, FromLayer, Site, View, Workload
from foveate.errors import NotApplicable
from foveate.reducers import Reducer
from foveate.tokens import TokenMap
from tests.conformance.family import alone
from tests.tiny import Batch, llava, prompt

# Names that mean nothing to the library, and one that means the opposite of what the layer does.
RENAMED = {
    "full_attention": ["gated_attention", "indexed_attention", "mamba"],
    "sliding_attention": ["window_attention", "heavily_compressed_attention", "conv"],
    "linear_attention": ["delta_rule", "attention", "full_attention"],
    "conv": ["short_filter", "attention", "full_attention"],
}
RECURS = ("linear_attention", "conv")


def grid(side: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2 * side**2, 96), "image_grid_thw": torch.tensor([[1, side, side]] * 2)}


def inputs_of(name: str) -> dict[str, Any]:
    """Two prompts with a picture of 16 tokens each, padded on the left."""
    model = alone(name, "eager")
    if name == "qwen3_5":
        given: dict[str, Any] = grid(8)
    elif name == "lfm2_vl":
        ones = torch.ones((2, 64), dtype=torch.int64)
        given = {"pixel_values": torch.randn(2, 64, 48), "pixel_attention_mask": ones, "spatial_shapes": torch.tensor([[8, 8]] * 2)}
    else:
        given = {"pixel_values": torch.randn(2, 3, 32, 32)}
    image = model.config.image_token_id
    with torch.no_grad():
        count = len(read(model).core.get_image_features(**given).pooler_output[0])  # type: ignore[operator]
    rows = [[5, *[image] * count, 6, 7, 8], [0, 0, 5, *[image] * count, 6]]
    ids = torch.tensor(rows)
    if name == "qwen3_5":
        given["mm_token_type_ids"] = (ids == image).long()
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **given}


def logits(model: Any, names: list[str], inputs: dict[str, Any], reducer: str) -> tuple[Tensor, list[bool]]:
    """Of a model whose decoder layers are called by `names`; masks come by name, as the library hands them over."""
    anatomy = read(model)
    config, before = anatomy.text_config, list(anatomy.text_config.layer_types)
    what = dict(zip(names, before, strict=True))

    def masks(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        given = kwargs["attention_mask"]
        full = create_causal_mask(config=config, inputs_embeds=kwargs["inputs_embeds"], attention_mask=given, past_key_values=None)
        return args, {**kwargs, "attention_mask": {name: given if old in RECURS else full for name, old in what.items()}}

    hook = anatomy.decoder.register_forward_pre_hook(masks, with_kwargs=True)
    config.layer_types = names
    try:
        with foveate.attach(model, reducer) as run, torch.no_grad():
            out = model(**inputs, use_cache=False).logits
            recurrent = [anatomy.recurrent(i) for i in range(len(anatomy.layers))]
        assert run.last.maps
        return out, recurrent
    finally:
        hook.remove()
        config.layer_types = before


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl", "cohere2_vision"])
def test_a_name_of_a_layer_type_says_nothing(name: str, which: int) -> None:
    model = alone(name, "eager")
    before = list(read(model).text_config.layer_types)
    inputs = inputs_of(name)
    renamed = {old: RENAMED[old][which] for old in set(before)}
    assert len(set(renamed.values())) == len(renamed)
    expected, recurs = logits(model, before, inputs, "fastv:keep=0.25,layer=2+random:keep=0.5")
    found, still = logits(model, [renamed[old] for old in before], inputs, "fastv:keep=0.25,layer=2+random:keep=0.5")
    assert recurs == still == [old in RECURS for old in before]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("called", ["flash_linear", "conv", "moe"])
def test_names_in_a_decoder_that_knows_no_types(called: str) -> None:
    batch = Batch([prompt(1, [1, 2, 3]), prompt(1, [4])], side="left")
    found = []
    for name in (None, called):
        model = llava("eager")
        if name is not None:
            model.config.text_config.layer_types = [name] * 4
        with foveate.attach(model, "pyramiddrop:keep=0.5"), torch.no_grad():
            found.append(model(**batch.inputs, use_cache=False).logits)
    assert torch.equal(*found)


@dataclass(frozen=True)
class Every(Reducer):
    """Row b keeps the first of every `steps[b]` visual tokens."""

    name: ClassVar[str] = "every"
    paper: ClassVar[str] = "-"
    steps: tuple[int, ...] = ()

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(0)]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        return Cut(TokenMap.keep(view.layout, view.layout.rank_in_image % torch.tensor(self.steps)[:, None] == 0))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        raise NotImplementedError


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_layers_of_two_kinds_share_no_mask(name: str, backend: str, cached: bool) -> None:
    """Rows without padding, for which the library gives no layer a mask, and of which different numbers of tokens are left."""
    model, inputs = copy.deepcopy(alone(name, "eager")), inputs_of(name)
    model.set_attn_implementation(backend)
    inputs["input_ids"][1, :2] = 9
    inputs.pop("attention_mask")
    inputs |= {"mm_token_type_ids": (inputs["input_ids"] == model.config.image_token_id).long()} if name == "qwen3_5" else {}
    with torch.no_grad():
        with foveate.attach(model, Every((2, 3))):
            both = model(**inputs, use_cache=cached).logits
        for row, pixels in enumerate(inputs["pixel_values"].chunk(2)):
            one = {key: value[row : row + 1] for key, value in inputs.items()} | {"pixel_values": pixels}
            with foveate.attach(model, Every((2 + row,))):
                torch.testing.assert_close(both[row], model(**one, use_cache=cached).logits[0], atol=1e-5, rtol=1e-5)


# ---- towers: classes by any name


class Mixer(transformers.models.clip.modeling_clip.CLIPAttention):
    """Attention by another name, and a forward of its own that hands on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class NoAttentionAtAll(nn.Module):
    """Pools, whatever it is called, and has a configuration too."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


def test_attention_by_another_name_is_read() -> None:
    scores = []
    for kind in (None, Mixer):
        model = llava()
        tower = read(model).tower
        if kind is not None:
            for block in blocks(tower):
                block.self_attn.__class__ = kind
        with foveate.attach(model, "fastervlm:keep=0.5") as run, torch.no_grad():
            model(**Batch([prompt(1, [1, 2, 3])]).inputs)
        scores.append(run.last.maps[0].representative)
        assert len(blocks(tower)) == 2
    assert torch.equal(*scores)


def test_what_is_only_called_attention_is_not_read() -> None:
    model = llava()
    tower = read(model).tower
    longer = nn.ModuleList(NoAttentionAtAll(tower.config) for _ in range(9))
    tower.add_module("attention_pooling", longer)
    assert len(blocks(tower)) == 2
    assert not attends(longer[0])
    with pytest.raises(NotApplicable, match="no attention that can be read"):
        blocks(longer)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential])
def test_a_layer_attends_also_when_it_is_wrapped(wrap: Any) -> None:
    layers = read(llava()).layers
    assert attends(wrap(layers[0]))
    assert not attends(wrap(layers[0].mlp))
