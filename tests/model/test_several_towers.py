"""Several towers and levels in one model: what each sees, COMM's sum, MG-LLaVA's gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.situations.test_tiled_models import inputs, samples, weights
from tests.train.tiny_training import save_backbones, save_samples
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitImageProcessorPil,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
)

import foveate
from foveate.anatomy import read
from foveate.bridges import COMM, MLP, MGGate
from foveate.errors import FoveateError
from foveate.model import FoveateForConditionalGeneration
from foveate.model.assembly import from_backbones
from foveate.model.export import to_llava
from foveate.model.towers import Towers, TowersConfig
from foveate.train.plan import plan
from foveate.train.run import main
from foveate.train.trainer import FoveateTrainer

LEVELS = [[1, 2], [-1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tower` (CLIP, 32 px, patches of 8), `dino` (28 px, patches of 7, normalised otherwise) and `large` (convolutions, 4 x 4 cells of
    16 px)."""
    found = tmp_path_factory.mktemp("towers")
    save_backbones(found)
    torch.manual_seed(1)
    dino = Dinov2Config(hidden_size=24, mlp_ratio=2, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=7)
    Dinov2Model(dino).save_pretrained(found / "dino")
    BitImageProcessorPil(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(found / "dino")
    large = ConvNextConfig(hidden_sizes=[8, 20], depths=[1, 1], num_stages=2, patch_size=8, image_size=64)
    ConvNextModel(large).save_pretrained(found / "large")
    ConvNextImageProcessorPil().save_pretrained(found / "large")
    return found


def assembled(folder: Path, names: list[str], bridge: dict[str, Any], levels: Any = None, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return from_backbones([folder / name for name in names], folder / "lm", bridge, vision_feature_layer=levels, **options)


@pytest.fixture(scope="module")
def comm(folder: Path) -> tuple[Any, Any]:
    return assembled(folder, ["tower", "dino"], {"kind": "comm", "ratio": 2}, LEVELS)


# ---- bridges ---------------------------------------------------------------------------------------------------------------------------


def identity(bridge: COMM) -> COMM:
    """Linear maps in front of the sum that change nothing."""
    with torch.no_grad():
        for level in bridge.maps.modules():
            if isinstance(level, nn.Linear):
                level.weight.copy_(torch.eye(*level.weight.shape))
                level.bias.zero_()
    return bridge


def merged(bridge: COMM, features: list[torch.Tensor]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = bridge.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    bridge(features, (1, features[0].shape[1]))
    hook.remove()
    return seen[0]


def test_comms_sum_of_two_levels() -> None:
    """The reference's example: normed features (1, -1) and (-1, 1), weights .75 and .25; a second tower of width 2 makes the width 4."""
    bridge = identity(COMM(towers=[[2, 2], [1, 2]], levels=1, vision_width=6, text_width=5))
    bridge.weights[0].data = torch.tensor([0.75, 0.25])
    found = merged(bridge, [torch.tensor([[[1.0, -1.0, -1.0, 1.0, 3.0, 1.0]]])])
    torch.testing.assert_close(found[..., :2], torch.tensor([[[0.5, -0.5]]]), atol=1e-4, rtol=0)
    assert found.shape == (1, 1, 4)
    torch.testing.assert_close(found[..., 2:], bridge.mlps[0](torch.tensor([[[1.0, -1.0]]])), atol=1e-4, rtol=0)


def test_comms_last_level_alone() -> None:
    bridge = identity(COMM(levels=3, vision_width=4, text_width=5))
    bridge.weights[0].data = torch.tensor([0.0, 0.0, 1.0])
    levels = list(torch.randn(3, 2, 6, 4))
    torch.testing.assert_close(merged(bridge, levels), F.layer_norm(levels[-1], (4,)))
    assert COMM(levels=4, vision_width=2).weights[0].tolist() == [0.25] * 4


def test_the_gate_begins_as_llava_bit_for_bit() -> None:
    bridge = MGGate(towers=[[1, 8], [1, 12]], levels=1, vision_width=20, text_width=6)
    low, high = torch.randn(2, 16, 8), torch.randn(2, 16, 12)
    plain = MLP(vision_width=8, text_width=6)
    plain.load_state_dict(bridge.mlp.state_dict())
    assert torch.equal(bridge([torch.cat([low, high], -1)], (4, 4)), plain([low], (4, 4)))
    nn.init.eye_(bridge.high_2.weight)
    bridge.gate_2.weight.data.zero_()
    bridge.gate_2.bias.data.fill_(0.5)
    added = F.gelu(bridge.high_1(high))
    torch.testing.assert_close(bridge([torch.cat([low, high], -1)], (4, 4)), plain([low + torch.tanh(torch.tensor(0.5)) * added], (4, 4)))


# ---- models ----------------------------------------------------------------------------------------------------------------------------


def test_each_tower_sees_the_image_as_it_is_used_to(folder: Path, comm: tuple[Any, Any]) -> None:
    model, processor = comm
    assert (model.grid, model.config.image_size, model.config.vision_config.shapes) == ((4, 4), 32, [[2, 32], [1, 24]])
    picture = samples()[0].images[0]
    given = processor(images=[picture], text="<image>", return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (processor.image_processor.image_mean, processor.image_processor.image_std))
    small = F.interpolate(given, size=(28, 28), mode="bilinear") * std + mean
    small = (small - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    clip, dino = (AutoModel.from_pretrained(folder / name).eval() for name in ("tower", "dino"))
    with torch.no_grad():
        found = model.model.encode_crops(given)[0, 0]
        first = clip.vision_model(given, output_hidden_states=True).hidden_states if hasattr(clip, "vision_model") else None
        first = first or clip(given, output_hidden_states=True).hidden_states
        second = dino(small, output_hidden_states=True).hidden_states
    assert found.shape == (16, 2 * 32 + 24)
    assert torch.equal(found[:, :64], torch.cat([first[1][0, 1:], first[2][0, 1:]], -1))
    torch.testing.assert_close(found[:, 64:], second[-1][0, 1:])


def test_a_large_and_a_small_look(folder: Path) -> None:
    """The gate in a model: the low tower sees half the pixels, and at first the model is the one with the low tower alone."""
    model, processor = assembled(folder, ["tower", "large"], {"kind": "mg_gate"}, [-2, -1])
    assert (model.config.image_size, model.config.patch_size, model.grid) == (64, 16, (4, 4))
    alone, _ = from_backbones(folder / "tower", folder / "lm", {"kind": "mlp"})
    alone.model.bridge.load_state_dict(model.model.bridge.mlp.state_dict())
    batch = dict(inputs(processor, samples()))
    low = F.interpolate(batch["pixel_values"], size=(32, 32), mode="bilinear")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, alone(**{**batch, "pixel_values": low}).logits)
    with torch.no_grad():
        nn.init.normal_(model.model.bridge.high_2.weight)
        assert not torch.equal(model(**batch).logits, alone(**{**batch, "pixel_values": low}).logits)


def test_channels_side_by_side_go_through_any_bridge(folder: Path) -> None:
    """Of three towers, of two, and of one whose states are maps, which no other model takes alone."""
    square = AutoImageProcessor.from_pretrained(folder / "tower", backend="pil")
    queries = {"kind": "resampler", "queries": 3, "head_dim": 8, "width": 32}
    for names, bridge, size in (
        (["tower", "dino", "large"], {"kind": "avg_pool2d", "pool": 2}, 96),
        (["dino", "tower"], queries, 48),
        (["large"], {"kind": "mlp"}, 96),
    ):
        model, processor = assembled(folder, names, bridge, -1, image_size=size, image_processor=square)
        batch = inputs(processor, samples())
        assert model.grid == (6, 6)
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()


def test_no_llava_has_two(folder: Path) -> None:
    with pytest.raises(FoveateError, match="several vision towers, and LLaVA has one"):
        to_llava(*assembled(folder, ["tower", "dino"], {"kind": "mlp"}))


def test_saved_attached_and_decoded(comm: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = comm
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, FoveateForConditionalGeneration)
    for name in ("shapes", "layers", "normal", "patches", "image_size", "hidden_size"):
        assert getattr(loaded.config.vision_config, name) == getattr(model.config.vision_config, name)
    batch = inputs(again, samples()[:2], "left")
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**inputs(processor, samples()[:2], "left")).logits)
        plain = loaded.generate(**batch, **options)
        assert torch.equal(plain, loaded.generate(**batch, **options, use_cache=False))
        for reducer in ("divprune:keep=1.0", "fastervlm:keep=1.0"):
            with foveate.attach(loaded, reducer):
                assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        with foveate.attach(loaded, "fastervlm:keep=4") as run:
            loaded(**batch)
        kept = run.last.maps[0].target
        picture = batch["pixel_values"][:1]
        first = loaded.model.vision_tower.towers[0]
        first.set_attn_implementation("eager")
        scores = first(picture, output_attentions=True).attentions[-2].mean(1)[0, 0, 1:]
    own = kept.place[0][kept.visual[0]]
    assert sorted((own[:, -2] * 4 + own[:, -1]).tolist()) == sorted(scores.topk(4).indices.tolist())
    assert read(loaded).tower is first or read(loaded).tower_of("image") is first


@pytest.mark.parametrize(
    ("names", "bridge", "levels", "said"),
    [
        (["tower", "dino"], {"kind": "mlp"}, [-1], "has 1 entries, but there are 2 vision towers"),
        (["tower", "dino"], {"kind": "mlp"}, [-1, 9], "vision_feature_layer 9 is not there: the tower has hidden states 0 to 2"),
        (["tower", "large"], {"kind": "mlp"}, [-1, [-2, -1]], "give states of .pixels a patch, width."),
        (["tower"], {"kind": "mg_gate"}, None, "joins two towers, the low one first, and there are 1"),
        (["tower", "dino"], {"kind": "comm", "towers": [[1, 32]]}, None, "have 32 channels, but the bridge reads 1 x 56"),
        (["tower", "dino"], {"kind": "comm", "towers": "two"}, None, "give .levels, width. of each"),
        ([], {"kind": "mlp"}, None, "names no tower"),
    ],
)
def test_what_cannot_be(folder: Path, names: list[str], bridge: dict[str, Any], levels: Any, said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        assembled(folder, names, bridge, levels)


def test_scales_and_levels_do_not_go_together_and_processors_are_counted(folder: Path) -> None:
    with pytest.raises(FoveateError, match="a tiling that joins scales"):
        assembled(folder, ["tower", "dino"], {"kind": "comm"}, LEVELS, tiling="s2:sizes=2")
    with pytest.raises(FoveateError, match="3 image processors were given for 2 vision towers"):
        assembled(folder, ["tower", "dino"], {"kind": "mlp"}, image_processor=[1, 2, 3])


def test_a_grid_that_a_tower_does_not_give() -> None:
    towers = Towers(
        TowersConfig(towers=[ConvNextConfig(hidden_sizes=[8], depths=[1], num_stages=1, image_size=32).to_dict()], layers=[[0]])
    )
    assert towers(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 64, 8)
    towers.config.patch_size = towers.config.patches[0] = 5
    with pytest.raises(FoveateError, match="lacks one entry for each of 6 x 6 patches"):
        towers(torch.zeros(1, 3, 32, 32))


# ---- training --------------------------------------------------------------------------------------------------------------------------


def recipe(folder: Path, out: Path, model: str, stage: str = "") -> Path:
    path = out / "recipe.yaml"
    path.write_text(f"""
name: t
output: {out}/out
model: {{vision: [{folder}/tower, {folder}/dino], text: {folder}/lm, {model}}}
log_steps: 1
workers: 0
stages:
  - &stage
    name: bridge
    data: {{conversations: {out}/data.json, images: {out}/images}}
    train: {{bridge: true, lm: false}}
    steps: 2
    batch_size: 2
    learning_rate: 1.0e-3
    max_length: 400
    save_steps: 1
{stage}""")
    return path


def test_a_recipe_is_planned_trained_resumed_and_reads_features(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    step, found = FoveateTrainer.training_step, {}
    tuned = "  - {<<: *stage, name: all, train: {bridge: true, lm: true, tower: true}, tiling: 'internvl:tiles=2', steps: 2}\n"
    for name, more in {"straight": "", "stopped": "", "cached": f"    features: {{cache: {tmp_path}/cache, at_most: 100MB}}\n"}.items():
        out = tmp_path / name
        out.mkdir()
        save_samples(out, samples())
        path = recipe(folder, out, f"bridge: {{kind: comm, ratio: 2}}, vision_feature_layer: {LEVELS}", more + ("" if more else tuned))
        if name == "stopped":

            def stopping(self: FoveateTrainer, *given: Any) -> torch.Tensor:
                if self.state.global_step == 1 and self.args.output_dir.endswith("all"):
                    raise KeyboardInterrupt
                return step(self, *given)

            with monkeypatch.context() as patch:
                patch.setattr(FoveateTrainer, "training_step", stopping)
                with pytest.raises(KeyboardInterrupt):
                    main(path)
        main(path)
        found[name] = weights(out)
    assert all(torch.equal(found["stopped"][name], of) for name, of in found["straight"].items())
    assert not torch.equal(found["straight"]["model.bridge.weights.0"], torch.tensor([0.5, 0.5]))
    bridge, whole = plan(tmp_path / "straight" / "recipe.yaml").stages
    assert (bridge.tokens_per_image, bridge.grid, bridge.image_size) == (16, (4, 4), 32)
    alone = tmp_path / "alone.yaml"
    alone.write_text((tmp_path / "straight" / "recipe.yaml").read_text().replace(f"[{folder}/tower, {folder}/dino]", f"{folder}/tower"))
    with pytest.raises(FoveateError, match="levels of several towers"):
        plan(alone)
    assert whole.trainable["tower"] > 0
    assert bridge.forward_flops["tower"] > 0
