"""Towers of timm in our own model: blocks of attention, of convolutions, and of both. Needs the environment that `make timm` builds."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TimmWrapperConfig

import foveate
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.model.assembly import from_backbones
from foveate.model.towers import patch_states, told
from foveate.train.plan import plan
from foveate.train.run import main
from tests.situations.test_tiled_models import inputs, samples
from tests.train.tiny_training import save_backbones, save_samples

pytestmark = pytest.mark.skipif(
    find_spec("timm") is None, reason="timm is not installed in this environment; `make timm` builds one that has it"
)

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "vitamin": ("vitamin_small_224", {"img_size": 64, "depth": 2}),
    "inception": ("inception_next_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}),
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}),
}
MADE = {  # what is read; rows, width, pixels of a patch and of an image
    "vitamin": ([-2], (4, 384, 16, 64)),
    "inception": ([-1], (7, 24, 32, 224)),
    "vit": ([0, -1], (4, 32, 8, 32)),
}
POOL = {"kind": "mlp"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import TimmWrapperModel

    found = tmp_path_factory.mktemp("timm")
    save_backbones(found)
    torch.manual_seed(0)
    for name, (architecture, given) in ARCHITECTURES.items():
        TimmWrapperModel(TimmWrapperConfig(architecture=architecture, model_args=given)).save_pretrained(found / name)
    return found


def assembled(folder: Path, name: Any, levels: Any = None, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    vision: Any = [folder / one for one in name] if isinstance(name, list) else folder / name
    return from_backbones(vision, folder / "lm", options.pop("bridge", POOL), vision_feature_layer=levels, **options)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_tower_of_timm(folder: Path, tmp_path: Path, name: str) -> None:
    """Its sizes are found out; levels are what its blocks give; batches, decoding and a saved model are as ever."""
    levels, (rows, width, patch, side) = MADE[name]
    model, processor = assembled(folder, name, levels)
    config = model.config
    assert (config.grid, config.bridge["vision_width"], config.patch_size, config.image_size) == ((rows, rows), width, patch, side)
    assert processor.num_image_tokens == rows**2
    tower, batch = model.model.vision_tower, inputs(processor, samples())
    assert batch["pixel_values"].shape[-2:] == (side, side)
    assert tuple(processor.image_processor.image_mean) == tower.timm_model.pretrained_cfg["mean"]
    seen: list[Any] = []
    hook = model.model.bridge.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        together = model(**batch).logits
        hook.remove()
        states = tower.timm_model.forward_intermediates(batch["pixel_values"], intermediates_only=True)
        for level, number in zip(seen[0], levels, strict=True):
            assert torch.equal(level, patch_states(states, number, (rows, rows)))
        for row, one in enumerate(samples()):
            alone = model(**inputs(processor, [one])).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)
        left = inputs(processor, samples()[:2], "left")
        cached = model.generate(**left, max_new_tokens=3, do_sample=False)
        assert torch.equal(cached, model.generate(**left, max_new_tokens=3, do_sample=False, use_cache=False))
        with foveate.attach(model, "random:keep=0.5") as run:
            model(**batch)
        assert run.last.ledger(model.config).flops["tower"] > 0
        with pytest.raises(NotApplicable) as refused, foveate.attach(model, "fastervlm:keep=0.5"):
            model(**batch)
        assert refused.value.reason is Reason.NO_TOWER_ATTENTION
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, read = AutoModelForImageTextToText.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    assert read.image_processor.image_mean == processor.image_processor.image_mean
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, together)


def test_it_stands_beside_another(folder: Path) -> None:
    """A tower of timm as the second of two, normalised as it is used to."""
    model, processor = assembled(folder, ["tower", "vit"], [[-1], [-2, -1]], bridge={"kind": "comm"})
    assert model.config.vision_config.shapes == [[1, 32], [2, 32]]
    assert model.config.vision_config.normal is not None
    with torch.no_grad():
        assert model(**inputs(processor, samples())).logits.isfinite().all()


def test_a_recipe_trains_it(folder: Path, tmp_path: Path) -> None:
    save_samples(tmp_path, samples())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
name: t
output: {tmp_path}/out
model: {{vision: {folder}/vitamin, text: {folder}/lm, bridge: {json.dumps({"kind": "avg_pool2d", "pool": 2})}}}
workers: 0
stages:
  - name: s
    data: {{conversations: {tmp_path}/data.json, images: {tmp_path}/images}}
    train: {{bridge: true, tower: true, lm: true}}
    steps: 2
    batch_size: 2
    learning_rate: 1.0e-3
    max_length: 400
    gradient_checkpointing: true
""")
    (planned,) = plan(recipe).stages
    assert (planned.tokens_per_image, planned.grid) == (4, (4, 4))
    main(recipe)
    before = from_backbones(folder / "vitamin", folder / "lm", POOL)[0].model.vision_tower.state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "final").model.vision_tower.state_dict()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("name", "levels", "options", "said"),
    [
        ("inception", [-2, -1], {}, "states of .pixels a patch, width."),
        ("vitamin", [7], {}, "vision_feature_layer 7 is not there: the tower has hidden states 0 to 1"),
        ("vit", [-1], {"image_size": 64}, "was made for images of 32 x 32 pixels and does not take 64 x 64"),
    ],
)
def test_what_a_tower_cannot_do(folder: Path, name: str, levels: list[int], options: dict[str, Any], said: str) -> None:
    def tried() -> None:
        model, processor = assembled(folder, name, levels, **options)
        model(**inputs(processor, samples()))

    with pytest.raises(FoveateError, match=said):
        tried()


def test_an_architecture_that_timm_has_not() -> None:
    with pytest.raises(FoveateError, match=r"the tower 'vitamin_of_none' of timm cannot be the vision tower: .*not supported"):
        told(TimmWrapperConfig(architecture="vitamin_of_none"), [-1])
