"""The recipes on real parts: every stage is what it says, by the configurations of the parts, without any weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.pretraining.sets import FIRST, SETS
from transformers import LlamaConfig

from foveate.real.efficientnet import EfficientNetLiteConfig
from foveate.real.lcnet import LCNetConfig
from foveate.train.recipe import load_recipe
from foveate.train.stages import Setup, walk

RECIPES = Path(__file__).parents[2] / "recipes"
REAL = sorted((RECIPES / "real").glob("*.yaml"))
ARMS = sorted((RECIPES / "pretraining" / "real").glob("*.yaml"))


def config(name: str, key: str) -> Any:
    """What `foveate real prepare` makes, as far as shapes go."""
    if name == "real:smollm2":
        return LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    return {
        "real:efficientnet": lambda: EfficientNetLiteConfig(patch_size=32),
        "real:efficientnet-places": lambda: EfficientNetLiteConfig(patch_size=32, places=True),
        "real:ppocr-32": lambda: LCNetConfig(patch_size=32, hidden_size=6144),
    }[name]()


def setups(path: Path) -> list[Setup]:
    return list(walk(load_recipe(path), config))


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_few_tokens_first_and_many_after(path: Path) -> None:
    found = setups(path)
    assert load_recipe(path).name == path.stem
    assert [setup.stage.name for setup in found] == ["words", "few", "many"]
    assert [setup.image.tokens for setup in found] == [144, 144, 576]
    assert [setup.stage.kind for setup in found] == ["align", "generate", "generate"]
    assert [bool(setup.stage.boxes) for setup in found] == [True, False, False]
    assert not any(setup.stage.train.tower for setup in found)
    assert not any(setup.cautions for setup in found)


@pytest.mark.parametrize("path", ARMS, ids=lambda path: path.stem)
def test_arms_of_the_benchmark(path: Path) -> None:
    """Same samples, order and language model; what differs is the bridge, its tokens, and whether it begins with words."""
    found, recipe = setups(path), load_recipe(path)
    aligned = path.stem.startswith("aligned-")
    assert [setup.stage.name for setup in found] == [*(["words"] if aligned else []), "pretrain", "finetune"]
    few, many = {"chain-of-sight-32": (32, 224), "32": (32, 224), "mlp": (144, 144), "resampler": (224, 224)}[
        path.stem.removeprefix("aligned-")
    ]
    assert [setup.image.tokens for setup in found] == [*([few] if aligned else []), few, many]
    other = load_recipe(RECIPES / "pretraining" / "real" / f"{FIRST}.yaml")
    assert recipe.name == path.stem
    assert recipe.model.model_copy(update={"bridge": None}) == other.model.model_copy(update={"bridge": None})
    free = {"bridge": None}
    for stage, its in zip(recipe.stages[-2:], other.stages, strict=True):
        assert stage.model_copy(update=free) == its.model_copy(update=free)
    plain = RECIPES / "pretraining" / "real" / ("chain-of-sight-32" if path.stem == "aligned-32" else path.stem.removeprefix("aligned-"))
    assert recipe.model.bridge == load_recipe(plain.with_suffix(".yaml")).model.bridge


def test_the_sets_have_their_arms() -> None:
    assert SETS["real"].names() == [FIRST, *sorted(path.stem for path in ARMS if path.stem != FIRST)]
    assert len(SETS["real"].names()) == 6
    for results in (SETS["world"].output, SETS["world"].output / "tokens"):  # no table of what nobody can run
        assert {one["arm"] for one in json.loads((results / "runs.json").read_text(encoding="utf-8"))} <= set(SETS["world"].names())
    assert not set(SETS["world"].names()) & {"words"}
