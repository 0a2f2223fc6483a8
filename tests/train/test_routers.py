"""Stages that train the weights of their reducers: a run from beginning to end, interrupted, resumed, saved and attached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.test_resume import Stopped, assert_same, rows, stop_after
from transformers import AutoModelForImageTextToText

import foveate
from foveate.anatomy import read
from foveate.errors import FoveateError
from foveate.reducers import parse, saved_reducers, saved_weights
from foveate.reducers.learned import find_weights, new_weights
from foveate.reducers.pmod import PMoD
from foveate.reducers.visionselector import VisionSelector
from foveate.train.plan import plan
from foveate.train.recipe import load_recipe
from foveate.train.run import main
from foveate.train.sharding import DEEPSPEED, FSDP, stage_problem

TRAINED = """
name: routed
output: {root}/{output}
model:
  vision: {root}/tower
  text: {root}/lm
  bridge: {{kind: chain_of_sight, scales: [[4, 2], [2, 3]], width: 32, head_dim: 16}}
log_steps: 1
workers: 0
stages:
  - name: select
    data: &data {{conversations: {root}/data.json, images: {root}/images}}
    train: {{bridge: false, reducers: true}}
    steps: 4
    batch_size: 4
    micro_batch: 2
    learning_rate: 1.0e-2
    save_steps: 2
    reducers: [{{share: 1, reducer: "visionselector:keep=0.5"}}]
  - name: deep
    data: *data
    train: {{bridge: true, lm: {{lora: {{rank: 2, dropout: 0.1}}}}, reducers: true}}
    steps: 4
    batch_size: 4
    learning_rate: {{bridge: 1.0e-3, lm: 1.0e-3, reducers: 1.0e-1}}
    save_steps: 2
    gradient_checkpointing: true
    reducers:
      - {{share: 1/2, cycle: [none, "pmod:dense=1.0"]}}
      - {{share: 1/2, reducer: "pmod:dense=1.0+visionselector:keep=0.8"}}
"""
LAST = "pmod:dense=1.0+visionselector:keep=0.8"


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    path = root / "routed.yaml"
    path.write_text(TRAINED.format(root=root, output="routed"))
    return main(path).parent


def test_the_weights_are_trained_saved_and_carried_on(run: Path) -> None:
    first, last = (saved_weights(folder) or {} for folder in (run / "0-select/model", run / "final"))
    assert {key.partition(".")[0] for key in first} == {"visionselector"}
    assert {key.partition(".")[0] for key in last} == {"visionselector", "pmod"}
    new = {f"{m.name}.{k}": v for m in (VisionSelector, PMoD) for k, v in new_weights(m, 32, 2).state_dict().items()}
    assert not torch.equal(first["visionselector.query.weight"], new["visionselector.query.weight"])
    assert not torch.equal(first["visionselector.query.weight"], last["visionselector.query.weight"])
    assert last["pmod.weight"].any(1).tolist() == [True, False]  # after the last layer nothing looks at visual tokens
    assert not any("foveate_reducers" in name for name in load_file(run / "final/model.safetensors"))
    assert saved_reducers(run / "final") == parse(LAST)


def test_the_log_tells_what_the_reducers_add(run: Path) -> None:
    found = rows(run)
    assert [row["visual_tokens_per_layer"] for row in found] == [[14] * 2] * 4 + [[14, 14], [14, 2], [14, 2], [14, 2]]  # an image has 14
    own: list[Any] = [row["losses"] for row in found]
    assert all(terms["reducers"] > 0.69 * 0.1 * 0.7 for terms in own[:4])  # about log 2, weighed 0.1 and more, a fifth without images
    assert [terms["reducers"] > 0 for terms in own[4:]] == [False, False, True, True]


def test_what_is_saved_is_what_attach_decides_by(run: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(run / "final").eval()
    saved = saved_weights(run / "final") or {}
    before = {name for name, _ in model.named_parameters()}
    with foveate.attach(model) as attached:
        assert attached.reducers == parse(LAST)
        for name, module in find_weights(read(model), attached.reducers, run / "final").items():
            for key, value in module.state_dict().items():
                assert torch.equal(value, saved[f"{name}.{key}"])
                assert not value.requires_grad
    assert {name for name, _ in model.named_parameters()} == before


@pytest.mark.parametrize("stops", [[5, 5], [10]])  # 8 micro-batches in the first stage, 4 in the second
def test_an_interrupted_run_is_the_same_run(
    run: Path, recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, stops: list[int]
) -> None:
    recipe = recipe_file("routed-" + "-".join(map(str, stops)), TRAINED)
    for calls in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, calls)
            with pytest.raises(Stopped):
                main(recipe)
    found = main(recipe).parent
    assert_same(run, found)
    one, other = (saved_weights(folder / "final") or {} for folder in (run, found))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_how_a_step_is_cut_into_micro_batches_changes_rounding_alone(run: Path, recipe_file: Callable[..., Path]) -> None:
    found = main(recipe_file("routed-whole", TRAINED), ["stages.0.micro_batch=4"]).parent
    one, other = (saved_weights(folder / "0-select/model") or {} for folder in (run, found))
    assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in one)


@pytest.mark.parametrize(
    "key", ["stages.0.precision=bf16-copy", "stages.0.losses=[mdist]", "stages.0.evaluate={tasks: scenes:count=4, every: 2}"]
)
def test_with_other_options_of_a_stage(root: Path, recipe_file: Callable[..., Path], key: str) -> None:
    one = TRAINED[: TRAINED.index("  - name: deep")]
    output = "routed-" + key.partition("=")[0].rpartition(".")[2]
    folder = main(recipe_file(output, one), [key])
    found, new = saved_weights(folder) or {}, new_weights(VisionSelector, 32, 2).state_dict()
    assert not torch.equal(found["visionselector.key.bias"], new["key.bias"])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("stages.0.train.reducers=false", "nothing is trained"),
        ("stages.0.reducers=[]", "none of its `reducers` has any"),
        ("stages.0.pack=true", "leave out `pack`"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(recipe_file: Callable[..., Path], changed: str, says: str) -> None:
    with pytest.raises(FoveateError, match=says):
        main(recipe_file("refused", TRAINED), [changed])


def test_weights_that_nothing_trains_are_missed(recipe_file: Callable[..., Path]) -> None:
    text = TRAINED.replace(", reducers: true", "").replace(", reducers: 1.0e-1", "").replace("bridge: false", "bridge: true")
    with pytest.raises(FoveateError, match="stage select: visionselector needs weights that nothing has trained"):
        main(recipe_file("missed", text))


def test_fsdp_does_not_train_them_alone(recipe_file: Callable[..., Path]) -> None:
    select, deep = load_recipe(recipe_file("sharded", TRAINED), []).stages
    assert "train the bridge too" in stage_problem(select, FSDP)
    assert stage_problem(select, DEEPSPEED) == stage_problem(deep, FSDP) == ""


def test_the_plan_counts_all_tokens_while_a_soft_choice_is_trained(recipe_file: Callable[..., Path]) -> None:
    found = plan(recipe_file("planned", TRAINED))
    (part,) = found.stages[0].parts
    assert part.visual_tokens == [7] * 2  # as it will serve
    assert part.training_flops["lm_linear"] > 2 * 1.9 * part.forward_flops["lm_linear"]


DEPTH = (
    TRAINED[: TRAINED.index("stages:")]
    + """stages:
  - name: deep
    data: {{conversations: {root}/data.json, images: {root}/images}}
    train: {{bridge: true, lm: {{lora: {{rank: 2}}}}, reducers: true}}
    steps: 4
    batch_size: 4
    micro_batch: 2
    learning_rate: {{bridge: 1.0e-3, lm: 1.0e-3, reducers: 1.0e-1}}
    save_steps: 2
    gradient_checkpointing: true
    reducers:
      - {{share: 1/2, reducer: "gammamod:keep=0.5,layers=1"}}
      - {{share: 1/2, reducer: "gammamod:keep=0.5,layers=1+atpllava:keep=0.75,layers=1"}}
"""
)


def test_depth_is_trained_saved_and_resumed(root: Path, recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """γ-MoD's router and ATP-LLaVA's thresholds: with their losses in the log, and the same run where it was interrupted."""
    whole = main(recipe_file("depth", DEPTH)).parent
    recipe = recipe_file("depth-stopped", DEPTH)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            main(recipe)
    found = main(recipe).parent
    assert_same(whole, found)
    one, other = (saved_weights(folder / "final") or {} for folder in (whole, found))
    assert one.keys() == other.keys() == {"atpllava.bias", "atpllava.weight", "gammamod.weight"}
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert one["gammamod.weight"].any()
    assert one["atpllava.bias"].any(1).tolist() == [False, True]
    log: list[Any] = rows(whole)
    assert all(row["losses"]["reducers"] > 0.0 for row in log)
    assert [row["visual_tokens_per_layer"][0] for row in log] == [14] * 4
    assert saved_reducers(whole / "final") == parse("gammamod:keep=0.5,layers=1+atpllava:keep=0.75,layers=1")
