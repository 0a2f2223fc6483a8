"""Stages of kind `align` that tell a word apart from those of their data alone: `contrast: data`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.train.test_align import ALIGN, rows
from tests.train.test_align_boxes import BOXED, write_halves
from torch import nn
from torch.nn.functional import normalize

from foveate.data.collate import Collator
from foveate.data.conversations import Conversations
from foveate.errors import FoveateError
from foveate.train.align import TEMPERATURE, Align
from foveate.train.opening import open_model
from foveate.train.plan import plan
from foveate.train.recipe import load_recipe
from foveate.train.run import main
from foveate.train.samples import word_pieces

Write = Callable[..., Path]
IMAGE = 11


class Seeing:
    """Gives the tokens that it was made with, whatever it is called with."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __call__(self, **given: Any) -> Any:
        return SimpleNamespace(hidden_states=(self.tokens,), image_hidden_states=self.tokens)


def aligning(table: torch.Tensor, among: torch.Tensor | None) -> Align:
    embeddings = nn.Embedding.from_pretrained(table)
    return Align(SimpleNamespace(config=SimpleNamespace(image_token_id=IMAGE), get_input_embeddings=lambda: embeddings), [0], among)


def loss_of(align: Align, tokens: torch.Tensor, words: list[int]) -> tuple[float, int]:
    ids = torch.tensor([[IMAGE] * len(tokens) + words])
    labels = torch.tensor([[-100] * len(tokens) + words])
    total, count = align(Seeing(tokens), {"input_ids": ids, "labels": labels})
    return float(total), count


@settings(max_examples=30)
@given(st.sets(st.integers(0, 10), min_size=1, max_size=6), st.sets(st.integers(0, 11), max_size=6), st.integers(0, 2**16))
def test_the_softmax_goes_over_the_words_of_the_data(words: set[int], others: set[int], seed: int) -> None:
    """Word by word: each against all that are given and are words, which 0 and the image's token are not; lengths are of the whole one."""
    generator = torch.Generator().manual_seed(seed)
    table, tokens = torch.randn(12, 5, generator=generator), torch.randn(3, 5, generator=generator)
    among = sorted((words | others) - {0, IMAGE})
    found, count = loss_of(aligning(table, torch.tensor([*words, *others, *words])), tokens, sorted(words))
    sought = sorted(words - {0})
    assert count == bool(sought)
    expected = 0.0
    if sought:
        lengths = (tokens.norm(dim=1) / table.norm(dim=1).mean()).log().square().mean()
        missed = []
        for word in sought:
            chances = []
            for token in tokens:
                likeness = {u: float(normalize(token, dim=0) @ normalize(table[u], dim=0)) / TEMPERATURE for u in among}
                weights = {u: torch.tensor(value).double().exp() for u, value in likeness.items()}
                chances.append(weights[word] / torch.stack(list(weights.values())).sum())
            missed.append(-torch.stack(chances).mean().log())
        expected = float(torch.stack(missed).mean() + lengths)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_over_all_words_it_is_the_whole_vocabulary() -> None:
    """But for what is no word."""
    table, tokens = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.randn(3, 5)
    table[[0, IMAGE]] = -1e6 * tokens.sum(0)  # as good as never said
    own, all_of_them = aligning(table, torch.arange(12)), aligning(table, None)
    assert (own.contrasted, all_of_them.contrasted) == (10, None)
    words = own.table()[0]
    assert torch.equal(words, all_of_them.table()[0][1:IMAGE])


def test_word_pieces_are_those_that_training_meets(root: Path, recipe_file: Write, tmp_path: Path) -> None:
    """Of answers by the labels of the samples' batches, of names where boxes are read, and of both where some rows have none."""
    opened = open_model(load_recipe(recipe_file("contrast-pieces", ALIGN)), 0, None)
    collator = Collator(opened.processor, 2048)
    talks = Conversations.open(root / "data.json", root / "images")
    labels = torch.cat([collator([talks[i]])["labels"].flatten() for i in range(len(talks))])
    answers = set(labels[labels >= 0].tolist())
    assert set(word_pieces([talks], collator).tolist()) == answers
    write_halves(tmp_path)
    halves = Conversations.open(tmp_path / "data.json", tmp_path, boxes=True)
    names = {int(collator.renderer.tokenizer.convert_tokens_to_ids(letter)) for letter in "rgb"}
    assert set(word_pieces([halves], collator).tolist()) == names
    assert not names <= answers
    assert set(word_pieces([talks, halves], collator).tolist()) == answers | names
    talks.index = talks.index[:1]  # what is left out says nothing
    assert set(word_pieces([talks], collator).tolist()) < answers


def test_a_stage_learns_the_words_of_boxes_and_counts_them(recipe_file: Write, tmp_path: Path) -> None:
    """Nothing but three letters is said."""
    write_halves(tmp_path)
    text = BOXED.replace("{root}/data.json", f"{tmp_path}/data.json").replace("{root}/images", str(tmp_path))
    path = recipe_file("contrast-halves", text)
    overrides = ["stages.0.contrast=data", "stages.0.steps=30", "model.bridge={kind: mlp}", "stages.0.train={bridge: true, tower: true}"]
    (whole,) = plan(path, overrides).stages
    assert any("`contrast: data` makes that product smaller" in note for note in whole.notes)
    logged = rows(main(path, overrides))
    assert logged[-1]["loss"] < 0.3 * logged[0]["loss"]
    vocabulary = open_model(load_recipe(path, overrides), 0, None).model.config.text_config.vocab_size
    each = sum(whole.training_flops.values()) - whole.training_flops["head"] * (vocabulary - 3) / vocabulary
    assert logged[0]["flops"] == logged[0]["images"] * each


def test_refused(recipe_file: Write) -> None:
    path = recipe_file("contrast-refused", ALIGN.replace("    kind: align\n", "    contrast: data\n"))
    load_recipe(path)
    with pytest.raises(FoveateError, match="`contrast` is of what a stage of kind align tells a word apart, and no other has it"):
        main(path)
    with pytest.raises(FoveateError, match="allowed: vocabulary or data"):
        load_recipe(path, ["stages.0.contrast=batch"])


def test_words_of_what_is_held_back_count(recipe_file: Write, tmp_path: Path) -> None:
    """Words that validation alone has are words too."""
    write_halves(tmp_path)
    data = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "first.json").write_text(json.dumps(data[:1]))  # red and green
    text = BOXED.replace("{root}/data.json", f"{tmp_path}/first.json").replace("{root}/images", str(tmp_path))
    held = f"stages.0.validation={{conversations: {tmp_path}/data.json, images: {tmp_path}, every: 1}}"
    logged = rows(main(recipe_file("contrast-held", text), ["stages.0.contrast=data", "stages.0.steps=2", held]))
    validated = [row["validation_loss"] for row in logged if "validation_loss" in row]
    assert validated
    assert all(0 < value < 50 for value in validated)
