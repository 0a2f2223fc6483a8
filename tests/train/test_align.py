"""Stages of kind `align`: the bridge learns the words of the answers, and no language model runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.train.test_cached_features import cached
from tests.train.test_resume import Stopped, assert_same, stop_after
from tests.train.test_run import ONE, weights
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.modules.module import register_module_forward_pre_hook

from foveate.data.collate import Collator
from foveate.data.conversations import Conversations
from foveate.errors import FoveateError
from foveate.inference import load_model
from foveate.report.runs import read_log
from foveate.train.align import TEMPERATURE, Align, loss
from foveate.train.opening import open_model
from foveate.train.plan import main as print_plan
from foveate.train.plan import plan
from foveate.train.recipe import load_recipe
from foveate.train.run import main

Write = Callable[..., Path]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "white": (250, 250, 250)}

ALIGN = ONE.replace("  - name: only\n", "  - name: words\n    kind: align\n")
THEN = (
    ALIGN
    + """  - name: speak
    data: {{conversations: {root}/data.json, images: {root}/images}}
    train: {{bridge: true, lm: true}}
    steps: 2
    batch_size: 4
    learning_rate: 1.0e-3
"""
)


def rows(final: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]


# ---- the formula


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(3, 9), st.integers(1, 3), st.integers(0, 2**16))
def test_the_loss_is_its_formula(count: int, vocabulary: int, words: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    tokens, table = torch.randn(count, 4, generator=random, dtype=torch.float64), torch.randn(vocabulary, 4, generator=random).double()
    wanted, length = torch.arange(min(words, vocabulary)), 1.7
    expected = 0.0
    for word in wanted.tolist():
        share = 0.0
        for v in tokens:
            cosines = [float(v @ e / v.norm() / e.norm()) / TEMPERATURE for e in table]
            share += math.exp(cosines[word]) / sum(map(math.exp, cosines)) / count
        expected -= math.log(share) / len(wanted)
    expected += sum(math.log(float(v.norm()) / length) ** 2 for v in tokens) / count
    assert float(loss(tokens, normalize(table, dim=-1), wanted, length)) == pytest.approx(expected, rel=1e-5)


def test_it_is_least_where_tokens_are_the_words() -> None:
    table = torch.eye(6)
    words, tokens = torch.tensor([1, 4]), 2.0 * torch.eye(6)[[1, 4, 4, 1]]
    there = float(loss(tokens, table, words, 2.0))
    assert there == pytest.approx(math.log(2), abs=1e-4)  # half of the tokens say either word
    for other in (1.5 * tokens, 2.0 * torch.eye(6)[[1, 4, 4, 0]], 2.0 * torch.eye(6)[[1, 1, 1, 1]]):
        assert float(loss(other, table, words, 2.0)) > there + 0.05


# ---- stages


def test_only_the_bridge_is_run_and_trained(root: Path, recipe_file: Write) -> None:
    """Also in batches without any image, and while validating."""
    recipe = recipe_file("align-only", ALIGN)
    held = f"stages.0.validation={{conversations: {root}/data.json, images: {root}/images, every: 2}}"
    overrides = [held, "stages.0.batch_size=1", "stages.0.steps=24"]
    begin = open_model(load_recipe(recipe, overrides), 0, None).model
    decoder, head = type(begin.model.language_model), type(begin.model.causal_lm)

    def fail(module: nn.Module, args: Any) -> None:
        assert not isinstance(module, decoder | head), "the language model ran"

    hook = register_module_forward_pre_hook(fail)
    try:
        with pytest.raises(AssertionError, match="the language model ran"):  # the hook would tell
            begin(input_ids=torch.tensor([[1, 2]]))
        final = main(recipe, overrides)
    finally:
        hook.remove()
    before = begin.state_dict()
    moved = {name for name, value in weights(final).items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".bridge." in name for name in moved)
    logged = rows(final)
    assert len({row["images"] for row in logged}) < len(logged)  # there were steps without an image
    assert all(math.isfinite(row["loss"]) for row in logged)
    assert any("validation_loss" in row for row in logged)
    (stage,) = read_log(final.parent)
    assert (stage.name, stage.points[0].layers) == ("words", (0.0, 0.0))


def test_its_cost_leaves_the_language_model_out(recipe_file: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = recipe_file("align-cost", THEN)
    words, speak = plan(recipe).stages
    assert {part for part, count in words.training_flops.items() if count} == {"tower", "bridge", "head"}
    assert words.training_flops["tower"] == speak.training_flops["tower"]
    assert words.training_flops["bridge"] == speak.training_flops["bridge"]
    vocabulary = open_model(load_recipe(recipe), 0, None).model.config.text_config.vocab_size
    assert words.training_flops["head"] == 2 * 2 * 6 * 32 * vocabulary  # 2 + 4 visual tokens of width 32, there and back
    assert words.mean_tokens == words.parts[0].visual_kv_bytes == 0
    assert words.compression is None
    print_plan(recipe)
    assert "no language model runs" in capsys.readouterr().out
    logged = rows(main(recipe, cached(tmp_path)))  # the tower is not run either
    each = words.training_flops["bridge"] + words.training_flops["head"]
    assert [row["flops"] for row in logged if row["stage"] == "words"] == [row["images"] * each for row in logged[:3]]
    assert logged[-1]["flops"] - logged[2]["flops"] > 3 * logged[2]["flops"]


def test_resumed_it_is_the_same(recipe_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["stages.0.save_steps=1", "stages.0.micro_batch=2"]
    whole = main(recipe_file("align-whole", THEN), overrides)
    again = recipe_file("align-again", THEN)
    for calls in (3, 2):
        with monkeypatch.context() as patched:
            stop_after(patched, calls)
            with pytest.raises(Stopped):
                main(again, overrides)
    assert_same(main(again, overrides).parent, whole.parent)


def test_micro_batches_and_a_cache_change_rounding_alone(recipe_file: Write, tmp_path: Path) -> None:
    finals = [
        main(recipe_file("align-a", ALIGN)),
        main(recipe_file("align-b", ALIGN), ["stages.0.micro_batch=1"]),
        main(recipe_file("align-c", ALIGN), cached(tmp_path / "cache")),
    ]
    losses = [[row["loss"] for row in rows(final)] for final in finals]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)
    assert rows(finals[2])[-1]["tower"] == "from cache"
    assert rows(finals[2])[-1]["flops"] < rows(finals[0])[-1]["flops"]


def test_autocast_leaves_the_loss_in_full_precision(recipe_file: Write) -> None:
    exact = rows(main(recipe_file("align-exact", ALIGN)))[0]["loss"]
    for precision in ("bf16", "bf16-copy"):
        assert rows(main(recipe_file(f"align-{precision}", ALIGN), [f"stages.0.precision={precision}"]))[0]["loss"] == pytest.approx(
            exact, rel=0.03
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.0.train={bridge: true, lm: true}"], "kind align runs no language model: it trains the bridge"),
        (["stages.0.train={bridge: true, lm: {lora: {rank: 2}}}"], "kind align runs no language model: it trains the bridge"),
        (['stages.0.reducers=[{share: 1, reducer: "random:keep=0.5"}]'], "kind align runs no language model for reducers"),
        (["stages.0.kind=align-boxes"], "allowed: generate or align"),
    ],
)
def test_refused(recipe_file: Write, overrides: list[str], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        load_recipe(recipe_file("align-refused", ALIGN), overrides)


@pytest.mark.parametrize("bridge", ["{kind: chain_of_sight, scales: [[4, 2], [2, 1]], width: 32, head_dim: 16}", "{kind: mlp}"])
def test_tokens_come_to_be_words_of_the_caption(root: Path, recipe_file: Write, tmp_path: Path, bridge: str) -> None:
    """Pictures of one colour whose caption is its initial and a dot."""
    data = [{"id": name, "image": f"{name}.png", "conversations": [
        {"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": name[0] + "."}]} for name in COLOURS]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(data))
    for name, colour in COLOURS.items():
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
    text = ALIGN.replace("{root}/data.json", f"{tmp_path}/data.json").replace("{root}/images", str(tmp_path))
    recipe = recipe_file("align-words-" + bridge[7:10], text)
    overrides = ["stages.0.steps=60", f"model.bridge={bridge}", "stages.0.train={bridge: true, tower: true}"]
    begin = open_model(load_recipe(recipe, overrides), 0, None)
    final = main(recipe, overrides)
    logged = [row["loss"] for row in rows(final)]
    assert logged[-1] < 0.5 * logged[0]
    model, processor = load_model(final)
    before, after = (named(m, p, tmp_path) for m, p in ((begin.model.eval(), begin.processor), (model, processor)))
    assert before < 0.2
    assert after > 0.8


def named(model: Any, processor: Any, folder: Path) -> float:
    """The share of visual tokens whose nearest embedding is a word of their picture's caption."""
    samples = Conversations.open(folder / "data.json", folder)
    batch = Collator(processor, 512)([samples[i] for i in range(len(samples))])
    aligning = Align(model, processor.tokenizer.all_special_ids)
    table, _ = aligning.table()
    with torch.no_grad():
        images: list[Tensor] = model.get_image_features(batch["pixel_values"]).pooler_output
    right = [
        torch.isin((normalize(tokens, dim=-1) @ table.T).argmax(-1), aligning.words(row))
        for tokens, row in zip(images, batch["labels"], strict=True)
    ]
    return float(torch.cat(right).float().mean())
