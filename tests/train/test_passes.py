"""Stages with losses over several passes: what is logged, counted, left behind and refused; and that they go on where they were."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.processes import killed, train_in_two
from tests.train.tiny_training import tokenizer
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from foveate.errors import FoveateError
from foveate.train.callbacks import Flow
from foveate.train.recipe import load_recipe
from foveate.train.run import main
from foveate.train.supervised import SupervisedRows

RECIPE = """
name: passes
output: {root}/{output}
model:
  vision: {root}/tower
  text: {root}/lm
  bridge: {{kind: mlp}}
log_steps: 1
workers: 0
stages:
  - name: distil
    data: {{conversations: {root}/data.json, images: {root}/images}}
    train: {{bridge: true, lm: {{lora: {{rank: 4, dropout: 0.1}}}}}}
    steps: 6
    batch_size: 4
    micro_batch: 2
    learning_rate: 1.0e-2
    save_steps: 2
    reducers: [{{share: 1, reducer: "dart:keep=0.5,layer=1"}}]
    losses: [LOSSES]
"""
KINDS = {
    "epic": "epic",
    "dualspeed": '"dualspeed:slow=0.5"',
    "kd": "mdist, {{loss: rdist, weight: 0.5}}",
    "nested": '"matryoshka:budgets=1/0.5/0.25", mdist, rdist',
    "drawn": '"matryoshka:budgets=1/0.5/0.25,draw=one"',
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))
TIMED = ("seconds", "images_per_s")
ROUNDED = ("loss", "losses", "grad_norm")
NO_DROPOUT = ["stages.0.train.lm.lora.dropout=0"]


@pytest.fixture
def written(recipe_file: Callable[..., Path]) -> Callable[[str, str], Path]:
    def write(kind: str, name: str) -> Path:
        return recipe_file(f"{name}-{kind}", RECIPE.replace("LOSSES", KINDS[kind]))

    return write


def rows_of(output: Path) -> list[dict[str, Any]]:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def output_of(path: Path) -> Path:
    return load_recipe(path).output


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(output / "final/model.safetensors") for output in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@every_kind
def test_a_stopped_run_goes_on_to_the_last_bit(written: Callable[[str, str], Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the micro-batches of step 5, which begins again; the terms of every line add up to its loss."""
    whole, parted = written(kind, "whole"), written(kind, "parted")
    main(whole)

    class Stop(Exception):
        pass

    def stop(self: Flow, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Flow, "on_substep_end", stop, raising=False)
        with pytest.raises(Stop):
            main(parted)
    assert not (output_of(parted) / "final").exists()
    main(parted)
    rows = rows_of(output_of(whole))
    assert rows_of(output_of(parted)) == rows
    assert same_weights(output_of(whole), output_of(parted))
    assert len(rows) == 6
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row["losses"].values()), rel=1e-6)
    if kind == "dualspeed":
        assert {tuple(row["teachers"]) for row in rows} == {(), ("dart:keep=0.5,layer=1",)}
        assert all((row["losses"]["dualspeed"] > 0) == (row["reducer"] == "none") for row in rows)
    if kind == "epic":
        assert len({row["reducer"] for row in rows}) == 6


@every_kind
def test_micro_batches_change_rounding_alone(written: Callable[[str, str], Path], kind: str, root: Path) -> None:
    plain = [*NO_DROPOUT, f"model.text={root}/lm-plain", "stages.0.steps=2"]
    logs = []
    for micro in (1, 4):
        path = written(kind, f"micro{micro}")
        main(path, [*plain, f"stages.0.micro_batch={micro}"])
        logs.append(rows_of(output_of(path)))
    for one, other in zip(*logs, strict=True):
        assert [one[key] for key in one if key not in ROUNDED] == [other[key] for key in one if key not in ROUNDED]
        assert one["losses"] == pytest.approx(other["losses"], abs=1e-5)


@pytest.mark.parametrize("kind", ["epic", "nested"])
def test_two_processes_give_the_same_terms(written: Callable[[str, str], Path], kind: str, root: Path) -> None:
    compare(written(kind, "one"), written(kind, "two"), [*NO_DROPOUT, f"model.text={root}/lm-plain", "stages.0.steps=3"], root)


def compare(one: Path, two: Path, overrides: list[str], root: Path) -> None:
    """Trains the first recipe in one process and the second in two, and compares their logs."""
    main(one, overrides)
    train_in_two(root, two, overrides)
    for mine, theirs in zip(rows_of(output_of(one)), rows_of(output_of(two)), strict=True):
        assert [mine[key] for key in mine if key not in ROUNDED] == [theirs[key] for key in mine if key not in ROUNDED]
        assert mine["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_a_model_of_the_library_in_two_processes(recipe_file: Callable[..., Path], root: Path) -> None:
    """LLaVA as transformers has it; one sample a process, so that some have no image where the other has one."""
    words, size = tokenizer(), {"height": 32, "width": 32}
    text = LlamaConfig.from_pretrained(root / "lm-plain")
    vision = CLIPVisionConfig.from_pretrained(root / "tower")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=words.convert_tokens_to_ids("<image>"))
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(root / "llava")
    LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=words.chat_template,
    ).save_pretrained(root / "llava")
    recipe = RECIPE.replace("LOSSES", KINDS["nested"])
    start, end = recipe.index("  vision"), recipe.index("log_steps")
    recipe = f"{recipe[:start]}  checkpoint: {root}/llava\n{recipe[end:]}"
    overrides = [*NO_DROPOUT, "stages.0.steps=6", "stages.0.batch_size=2", "stages.0.micro_batch=1"]
    compare(recipe_file("llava-one", recipe), recipe_file("llava-two", recipe), overrides, root)


def test_killed_runs_end_in_the_same_bits(written: Callable[[str, str], Path]) -> None:
    """kill -9 between checkpoints, twice, of a run whose steps are of two kinds."""
    whole, broken = written("dualspeed", "quiet"), written("dualspeed", "killed")
    overrides = ["stages.0.steps=12", "stages.0.save_steps=2"]
    log = output_of(broken) / "log.jsonl"
    for lines in (3, 7):
        killed(broken, overrides, lambda lines=lines: log.exists() and len(log.read_text().splitlines()) >= lines)  # type: ignore[misc]
        assert not (output_of(broken) / "final" / "complete").exists()
    main(broken, overrides)
    main(whole, overrides)
    assert rows_of(output_of(broken)) == rows_of(output_of(whole))
    assert same_weights(output_of(broken), output_of(whole))


def test_the_passes_of_a_step_are_all_counted(written: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs of the log: three trained passes and one without gradient, all of two micro-batches."""
    monkeypatch.setattr(
        "foveate.train.run.try_rows", lambda *given: SupervisedRows(None)
    )  # several passes have all logits: so have single ones
    nested, kd = written("nested", "flops"), written("kd", "flops")
    found = {}
    for path in (nested, kd):
        main(path, ["stages.0.steps=1"])
        found[path] = rows_of(output_of(path))[0]["flops"]
    plain = written("kd", "plain")
    single = {}
    for reducers in ("none", "dart:keep=0.5,layer=1", "dart:keep=0.25,layer=1"):
        name = f"{plain.parent}/{reducers.replace(':', '-').replace('=', '-').replace(',', '-')}"
        slot = "[{share: 1, reducer: '" + reducers + "'}]"
        main(plain, ["stages.0.steps=1", "stages.0.losses=[]", f"stages.0.reducers={slot}", f"output={name}"])
        single[reducers] = rows_of(Path(name))[0]["flops"]
    trained = sum(single.values())
    teacher = found[kd] - single["dart:keep=0.5,layer=1"]
    assert found[nested] == trained + teacher
    assert 0 < teacher < single["none"]


@pytest.mark.parametrize(("kind", "saved"), [("epic", True), ("kd", True), ("dualspeed", False), ("nested", False)])
def test_a_model_for_any_budget_is_saved_without_the_stages_reducer(written: Callable[[str, str], Path], kind: str, saved: bool) -> None:
    path = written(kind, "saved")
    main(path, ["stages.0.steps=1"])
    assert (output_of(path) / "final" / "foveate.json").exists() == saved


@pytest.mark.parametrize("key", ["stages.0.gradient_checkpointing=true", "stages.0.precision=bf16-copy", "stages.0.precision=bf16"])
def test_with_other_options_of_a_stage(written: Callable[[str, str], Path], key: str, root: Path) -> None:
    plain = [*NO_DROPOUT, f"model.text={root}/lm-plain", "stages.0.steps=2"]
    one, other = written("kd", "as-it-is"), written("kd", key.split(".")[-1].replace("=", "-"))
    main(one, plain)
    main(other, [*plain, key])
    tolerance = 1e-6 if "checkpointing" in key else 0.1
    for mine, theirs in zip(rows_of(output_of(one)), rows_of(output_of(other)), strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], abs=tolerance)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=tolerance)  # no weight was left out of the student's graph


def test_with_features_from_a_cache(written: Callable[[str, str], Path], root: Path) -> None:
    """The teacher reads them too."""
    plain = [*NO_DROPOUT, f"model.text={root}/lm-plain", "stages.0.steps=2"]
    one, other = written("kd", "tower"), written("kd", "cached")
    main(one, plain)
    main(other, [*plain, f"stages.0.features={{cache: {root}/features, at_most: 1GB}}"])
    for mine, theirs in zip(rows_of(output_of(one)), rows_of(output_of(other)), strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
        assert theirs["flops"] < mine["flops"]


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ("[epic, dualspeed]", "each say which passes"),
        ("[mdsit]", "unknown loss 'mdsit' .did you mean 'mdist'"),
        ("[{loss: mdist, wieght: 2}]", "did you mean weight"),
        ("[{loss: matryoshka, weight: 2}]", "has nothing to weigh"),
        ("[{loss: mdist, weight: 0}]", "greater than 0"),
        ("['epic:alpha=2']", "alpha=2 must be above 0"),
    ],
)
def test_what_cannot_be_is_said_with_its_place(written: Callable[[str, str], Path], losses: str, why: str) -> None:
    with pytest.raises(FoveateError, match=why) as caught:
        load_recipe(written("kd", "refused"), [f"stages.0.losses={losses}"])
    assert "stages.0" in str(caught.value)


def test_losses_that_never_compare_anything_are_refused(written: Callable[[str, str], Path]) -> None:
    with pytest.raises(FoveateError, match="in this stage every pass has all"):
        load_recipe(written("kd", "never"), ["stages.0.reducers=[]"])
