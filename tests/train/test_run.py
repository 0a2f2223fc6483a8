"""What a stage does beside the ordinary: parts frozen, LoRA, precision, checkpointing, other models, logging."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.tiny_training import save_data, tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from foveate.errors import FoveateError
from foveate.train.opening import Opened, open_model
from foveate.train.recipe import load_recipe
from foveate.train.run import main
from foveate.train.settings import Recipe
from foveate.train.stages import part_modules

Write = Callable[..., Path]

ONE = """
name: one
output: {root}/{output}
model:
  vision: {root}/tower
  text: {root}/lm
  bridge: {{kind: chain_of_sight, scales: [[4, 2], [2, 1]], width: 32, head_dim: 16}}
log_steps: 1
workers: 0
stages:
  - name: only
    data: {{conversations: {root}/data.json, images: {root}/images}}
    train: {{bridge: true}}
    steps: 3
    batch_size: 4
    learning_rate: 1.0e-2
"""


def losses(final: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (final.parent / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(recipe: Path, final: Path, overrides: list[str]) -> set[str]:
    """Names of the weights that training has changed."""
    begin = open_model(load_recipe(recipe, [*overrides, "stages.0.train={bridge: true}"]), 0, None).model.state_dict()
    return {name for name, value in weights(final).items() if not torch.equal(value, begin[name])}


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ("{bridge: true}", {"bridge"}),
        ("{bridge: false, lm: true}", {"causal_lm"}),
        ("{bridge: false, tower: true}", {"vision_tower"}),
        ("{bridge: true, lm: {lora: {rank: 2}}}", {"bridge", "causal_lm"}),
    ],
)
def test_only_what_is_trained_changes(recipe_file: Write, train: str, parts: set[str]) -> None:
    name = "trained-" + "".join(c for c in train if c.isalpha())
    recipe, overrides = recipe_file(name, ONE), [f"stages.0.train={train}"]
    names = changed(recipe, main(recipe, overrides), overrides)
    assert {part for part in ("bridge", "vision_tower", "causal_lm") if any(f".{part}." in n for n in names)} == parts
    if "lora" in train:  # merged into the linear maps of the decoder layers, and nowhere else
        inside = [n for n in names if ".causal_lm." in n]
        assert inside
        assert all(n.rpartition(".weight")[0].rpartition(".")[2].endswith("_proj") for n in inside)


def test_lora_merged_is_the_model_that_was_trained(recipe_file: Write) -> None:
    """The logits of the saved model are those of the model with its adapters at the last step."""
    from foveate.train import run

    recipe = recipe_file("lora-merged", ONE)
    seen = {}
    finish = run.finish

    def looking(recipe_: Recipe, index: int, previous: Path | None, opened: Opened, *rest: Any) -> None:
        assert any("lora_" in name for name, _ in opened.model.named_parameters())
        seen["logits"] = opened.model.eval()(input_ids=torch.arange(20)[None]).logits.detach()
        finish(recipe_, index, previous, opened, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "finish", looking)
        final = main(recipe, ["stages.0.train={bridge: true, lm: {lora: {rank: 4}}}"])
    model = AutoModelForImageTextToText.from_pretrained(final).eval()
    torch.testing.assert_close(model(input_ids=torch.arange(20)[None]).logits, seen["logits"], atol=1e-5, rtol=1e-5)
    assert not model.config.always_run_vision
    assert not hasattr(model.config, "use_cache")  # as before: the Trainer's own setting is not saved


def test_lora_targets_that_are_not_there(recipe_file: Write) -> None:
    with pytest.raises(FoveateError, match="LoRA targets qkv are not in the decoder layers, which have down_proj, gate_proj"):
        main(recipe_file("lora-targets", ONE), ["stages.0.train={bridge: true, lm: {lora: {rank: 4, targets: [qkv]}}}"])


def test_steps_without_any_image(recipe_file: Write, root: Path) -> None:
    """A bridge that is trained on text alone does not change, and nothing breaks."""
    rows = [row for row in json.loads((root / "data.json").read_text()) if "image" not in row]
    (root / "text.json").write_text(json.dumps(rows))
    recipe, overrides = recipe_file("text-only", ONE), [f"stages.0.data={{conversations: {root}/text.json}}"]
    assert changed(recipe, main(recipe, overrides), overrides) == set()


def test_gradient_checkpointing_changes_nothing(recipe_file: Write) -> None:
    more = [
        "stages.0.train={bridge: true, lm: true}",
        'stages.0.reducers=[{share: 1, reducer: "vcc:layer=1,stride=2"}]',
        "stages.0.steps=2",
    ]
    plain = main(recipe_file("plain", ONE), more)
    checkpointed = main(recipe_file("checkpointed", ONE), [*more, "stages.0.gradient_checkpointing=true"])
    assert losses(plain) == losses(checkpointed)
    a, b = weights(plain), weights(checkpointed)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_accumulation_changes_nothing_but_rounding(recipe_file: Write, root: Path) -> None:
    """Answers differ in length, so a mean of the means of micro-batches would be another loss."""
    plain = [f"model.text={root}/lm-plain", "stages.0.train={bridge: true, lm: true}"]
    whole = main(recipe_file("micro4", ONE), plain)
    parts = main(recipe_file("micro1", ONE), [*plain, "stages.0.micro_batch=1"])
    assert losses(whole) == pytest.approx(losses(parts), abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "bf16-copy"])
def test_bfloat16_is_near(recipe_file: Write, precision: str) -> None:
    exact = main(recipe_file("fp32", ONE), ["stages.0.steps=2"])
    near = main(recipe_file(precision, ONE), ["stages.0.steps=2", f"stages.0.precision={precision}"])
    assert losses(exact) == pytest.approx(losses(near), abs=0.05)
    assert losses(exact) != losses(near)
    assert all(value.dtype == torch.float32 for value in weights(near).values())


def test_only_a_lasting_reducer_is_saved_with_the_model(recipe_file: Write) -> None:
    """What takes turns until the end teaches the model to do with any of it, or with none: nothing is to be attached by default."""
    lasting = main(recipe_file("lasting", ONE), ['stages.0.reducers=[{share: 1, reducer: "random:keep=0.5"}]'])
    turns = main(recipe_file("turns", ONE), ['stages.0.reducers=[{share: 1, cycle: [none, "random:keep=0.5"]}]'])
    assert (lasting / "foveate.json").is_file()
    assert not (turns / "foveate.json").exists()


def test_progress_without_a_terminal(recipe_file: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from foveate.train import progress

    monkeypatch.setattr(progress, "QUIET_EVERY", 0.0)
    pooled = 'stages.0.reducers=[{share: 2/3, reducer: none}, {share: 1/3, reducer: "vcc:layer=1,stride=2"}]'
    main(recipe_file("quiet", ONE), [pooled])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stage 1/1 only")]
    assert lines[0] == "stage 1/1 only: 3 steps of 4 samples"
    assert [line.partition(", ")[0] for line in lines[1:]] == [f"stage 1/1 only: step {i}/3" for i in (1, 2, 3)]
    assert "6 tokens/image" in lines[2]
    assert "6→3 tokens/image" in lines[3]
    assert lines[3].endswith(" 0 s left")


def test_tensorboard_gets_the_numbers(recipe_file: Write) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    final = main(recipe_file("board", ONE), ["report_to=[tensorboard]", "stages.0.group_by_length=true"])
    [events] = list(final.parent.rglob("events.out.tfevents*"))
    board = EventAccumulator(str(events.parent))
    board.Reload()
    tags = {tag.rpartition("/")[2] for tag in board.Tags()["scalars"]}
    assert {"loss", "learning_rate", "tokens_per_image", "visual_tokens_per_layer", "flops"} <= tags
    logged = [event.value for tag in board.Tags()["scalars"] if tag.endswith("/loss") for event in board.Scalars(tag)]
    assert logged == pytest.approx(losses(final), rel=1e-6)


def test_a_finished_model_is_a_checkpoint_to_start_from(recipe_file: Write) -> None:
    first = main(recipe_file("first", ONE))
    second = recipe_file("second", ONE.replace(ONE[ONE.index("  vision") : ONE.index("log_steps")], f"  checkpoint: {first}\n"))
    more = ["stages.0.image_size=64", "stages.0.bridge.scales=[[8, 2], [2, 1]]"]
    model = AutoModelForImageTextToText.from_pretrained(main(second, more))
    assert model.config.image_size == 64
    assert model.model.bridge.tokens(model.grid) == 2 + 16
    processor = AutoProcessor.from_pretrained(second.parent / "second" / "final")
    assert processor.num_image_tokens == 18


def test_llava_of_transformers_is_trained_too(recipe_file: Write, tmp_path: Path) -> None:
    """Another family, with its own placement of parts, processor and names of weights; also resumed."""
    torch.manual_seed(0)
    words = tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=16
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=words.pad_token_id,
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    model = LlavaForConditionalGeneration(config)
    assert part_modules(model) == (model.model.vision_tower, model.model.multi_modal_projector)
    folder = tmp_path / "llava"
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    pictures = CLIPImageProcessorPil(size=size, crop_size=size)
    LlavaProcessor(
        pictures,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=words.chat_template,
    ).save_pretrained(folder)
    save_data(tmp_path)
    text = ONE.replace(ONE[ONE.index("  vision") : ONE.index("log_steps")], f"  checkpoint: {folder}\n")
    more = ["stages.0.train={bridge: true, lm: {lora: {rank: 2}}}", 'stages.0.reducers=[{share: 1, reducer: "vcc:layer=1,stride=4"}]']
    final = main(recipe_file("llava", text), more)
    row = json.loads((final.parent / "log.jsonl").read_text().splitlines()[-1])
    assert (row["tokens_per_image"], row["visual_tokens_per_layer"]) == (16, [16, 4])
    trained = LlavaForConditionalGeneration.from_pretrained(final)
    assert not torch.equal(trained.model.multi_modal_projector.linear_1.weight, model.model.multi_modal_projector.linear_1.weight)
    assert torch.equal(
        trained.model.vision_tower.embeddings.patch_embedding.weight, model.model.vision_tower.embeddings.patch_embedding.weight
    )

    from tests.train.test_resume import Stopped, stop_after

    again = recipe_file("llava-again", text)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            main(again, [*more, "stages.0.save_steps=1"])
    other = main(again, [*more, "stages.0.save_steps=1"])
    assert losses(final) == losses(other)
    a, b = weights(final), weights(other)
    assert all(torch.equal(a[name], b[name]) for name in a)

    with pytest.raises(FoveateError, match="a llava model takes images of 32 pixels, not image_size 64"):
        main(recipe_file("llava-size", text), ["stages.0.image_size=64"])
