"""Stages of kind `align` whose rows say what is where: each word is sought in the tokens of its box."""

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
from tests.train.test_align import ALIGN, rows
from torch.nn.functional import normalize

from foveate.bridges import build_bridge
from foveate.data.boxes import boxes_of
from foveate.data.collate import Collator
from foveate.data.conversations import Conversations
from foveate.data.rows import Unusable
from foveate.errors import FoveateError
from foveate.inference import load_model
from foveate.train.align import TEMPERATURE, Align, loss, members
from foveate.train.recipe import load_recipe
from foveate.train.run import main

Write = Callable[..., Path]
BOXED = ALIGN.replace("    kind: align\n", "    kind: align\n    boxes: true\n")


# ---- which tokens


QUARTERS = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]])
WHOLE = torch.tensor([[0, 0, 1, 1.0]])


@pytest.mark.parametrize(
    ("box", "found"),
    [
        ([0, 0, 0.5, 0.5], [0]),
        ([0, 0, 1, 0.5], [0, 1]),
        ([0, 0, 0.75, 0.5], [0, 1]),  # half of the second one's patches
        ([0, 0, 0.7, 0.5], [0]),
        ([0.6, 0.6, 0.7, 0.7], [3]),  # all of the box
        ([0.4, 0.1, 0.6, 0.2], [0, 1]),  # half of the box each
        ([0.45, 0.1, 0.6, 0.2], [1]),
        ([0.25, 0.25, 0.75, 0.75], [0, 1, 2, 3]),  # a quarter each, which is the most
        ([0.375, 0.25, 0.75, 0.75], [0, 1, 2, 3]),  # a third each, which is the most, and half of that
        ([0.4, 0.25, 0.75, 0.75], [1, 3]),  # the others have less than half of the most
        ([0, 0, 1, 1], [0, 1, 2, 3]),
    ],
)
def test_tokens_of_a_box(box: list[float], found: list[int]) -> None:
    wanted = torch.tensor(box)
    assert members(QUARTERS, wanted).nonzero()[:, 0].tolist() == found
    most = box[1:] == [0.25, 0.75, 0.75]  # no quarter has half of these, but the whole has all
    assert members(torch.cat([WHOLE, QUARTERS]), wanted).nonzero()[:, 0].tolist() == [0, *([] if most else [token + 1 for token in found])]


def test_a_line_of_small_writing_is_of_all_tokens_that_it_runs_through() -> None:
    areas = torch.tensor([[column, row, column + 1, row + 1] for row in range(4) for column in range(4)]) / 4
    assert members(areas, torch.tensor([0.3, 0.3, 0.9, 0.35])).nonzero()[:, 0].tolist() == [5, 6, 7]
    assert members(areas, torch.tensor([0.4, 0.3, 0.9, 0.35])).nonzero()[:, 0].tolist() == [6], "half of it"


@given(st.integers(1, 6), st.lists(st.integers(0, 24), min_size=4, max_size=4))
def test_no_box_is_without_a_token(side: int, edges: list[int]) -> None:
    left, top, right, bottom = edges[0], edges[1], edges[0] + edges[2] + 1, edges[1] + edges[3] + 1
    box = torch.tensor([left, top, right, bottom]) / 50
    areas = torch.tensor([[c, r, c + 1, r + 1] for r in range(side) for c in range(side)]) / side
    found = members(areas, box)
    assert found.any()
    for area, taken in zip(areas.tolist(), found.tolist(), strict=True):
        across, down = (min(area[i + 2], float(box[i + 2])) - max(area[i], float(box[i])) for i in (0, 1))
        common = max(0.0, across) * max(0.0, down)
        whole = float((box[2] - box[0]) * (box[3] - box[1]))
        if 2 * common >= 1.01 * min(1 / side**2, whole):
            assert taken
        if common == 0:
            assert not taken


def test_areas_are_those_of_the_bridge() -> None:
    """Of a bridge of two scales: the whole picture first, then its quarters; 14 patches a side."""
    bridge = build_bridge(
        {"kind": "chain_of_sight", "scales": [[14, 2], [7, 1]], "grid": 14, "levels": 1, "vision_width": 8, "width": 8, "text_width": 4}
        | {"head_dim": 4}
    )

    class Parts:
        model = Parts_ = None
        config: Any = None

    stub: Any = Parts()
    stub.config, stub.model = Parts(), Parts()
    stub.config.grid, stub.config.image_token_id, stub.model.bridge = (14, 14), 0, bridge
    boxes = [(torch.tensor([5, 7]), torch.tensor([0.5, 0.0, 1.0, 0.5])), (torch.tensor([6]), torch.tensor([0.0, 0.0, 1.0, 1.0]))]
    words, where = Align(stub, []).placed(boxes, 6)
    assert words.tolist() == [5, 7, 6]
    upper_right, everywhere = [True, True, False, True, False, False], [True] * 6
    assert where.tolist() == [upper_right, upper_right, everywhere]
    assert Align(stub, []).placed(boxes, 2)[1].tolist() == [[True] * 2] * 3  # of a smaller budget the first ones


# ---- the formula


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(3, 9), st.integers(1, 3), st.integers(0, 2**16))
def test_the_loss_is_its_formula(count: int, vocabulary: int, words: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    tokens, table = torch.randn(count, 4, generator=random, dtype=torch.float64), torch.randn(vocabulary, 4, generator=random).double()
    wanted, length = torch.randint(vocabulary, (words,), generator=random), 1.7
    where = torch.rand(words, count, generator=random) < 0.5
    where[:, 0] |= ~where.any(1)
    expected = 0.0
    for word, own in zip(wanted.tolist(), where, strict=True):
        share = 0.0
        for v in tokens[own]:
            cosines = [float(v @ e / v.norm() / e.norm()) / TEMPERATURE for e in table]
            share += math.exp(cosines[word]) / sum(map(math.exp, cosines)) / int(own.sum())
        expected -= math.log(share) / words
    expected += sum(math.log(float(v.norm()) / length) ** 2 for v in tokens) / count
    found = loss(tokens.requires_grad_(), normalize(table, dim=-1), wanted, length, where)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()
    everywhere = torch.ones_like(where)
    tokens = tokens.detach()
    plain = loss(tokens, normalize(table, dim=-1), wanted, length)
    assert float(loss(tokens, normalize(table, dim=-1), wanted, length, everywhere)) == pytest.approx(float(plain), rel=1e-6)


# ---- rows


def test_boxes_of_a_row() -> None:
    assert boxes_of({}, 3) == []
    assert boxes_of({"boxes": []}, 2) == []
    assert boxes_of({"boxes": [["a dog", [0, 0.5, 1, 1]]]}, 1) == [("a dog", (0.0, 0.5, 1.0, 1.0))]


@pytest.mark.parametrize(
    ("given", "images", "reason"),
    [
        ("dog", 1, "are no list"),
        ([["dog", [0, 0, 1, 1]]], 2, "has boxes and 2 images"),
        ([["dog", [0, 0, 1, 1]]], 0, "has boxes and 0 images"),
        ([["dog", [0, 0, 1]]], 1, "is not \\[name"),
        ([["dog", ["x", 0, 1, 1]]], 1, "is not \\[name"),
        ([[" ", [0, 0, 1, 1]]], 1, "has no name"),
        ([[7, [0, 0, 1, 1]]], 1, "has no name"),
        ([["dog", [0, 0, 40, 40]]], 1, "in shares of the picture"),
        ([["dog", [0.5, 0, 0.5, 1]]], 1, "in shares of the picture"),
        ([["dog", [0, float("nan"), 1, 1]]], 1, "in shares of the picture"),
    ],
)
def test_what_are_no_boxes_is_told(given: Any, images: int, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        boxes_of({"boxes": given}, images)


# ---- stages


def write_halves(folder: Path) -> None:
    """Pictures whose halves have two colours, each called by a letter; the caption has both, and the boxes say which is where."""
    colours = {"r": (220, 30, 30), "g": (30, 200, 40), "b": (40, 60, 230)}
    data = []
    for left, right in (("r", "g"), ("g", "b"), ("b", "r"), ("g", "r")):
        picture = Image.new("RGB", (32, 32), colours[left])
        picture.paste(colours[right], (16, 0, 32, 32))
        picture.save(folder / f"{left}{right}.png")
        talk = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": f"{left}{right}"}]
        boxes = [[left, [0, 0, 0.5, 1]], [right, [0.5, 0, 1, 1]]]
        data.append({"id": left + right, "image": f"{left}{right}.png", "conversations": talk, "boxes": boxes})
    (folder / "data.json").write_text(json.dumps(data))


def test_tokens_come_to_be_the_words_of_their_boxes(recipe_file: Write, tmp_path: Path) -> None:
    write_halves(tmp_path)
    text = BOXED.replace("{root}/data.json", f"{tmp_path}/data.json").replace("{root}/images", str(tmp_path))
    overrides = ["stages.0.steps=60", "model.bridge={kind: mlp}", "stages.0.train={bridge: true, tower: true}"]
    final = main(recipe_file("boxes-halves", text), overrides)
    logged = [row["loss"] for row in rows(final)]
    assert logged[-1] < 0.5 * logged[0]
    model, processor = load_model(final)
    samples = Conversations.open(tmp_path / "data.json", tmp_path, boxes=True)
    batch = Collator(processor, 512)([samples[i] for i in range(len(samples))])
    table, _ = Align(model, []).table()
    with torch.no_grad():
        images = model.get_image_features(batch["pixel_values"]).pooler_output
    right = []
    for tokens, sample in zip(images, [samples[i] for i in range(len(samples))], strict=True):
        said = (normalize(tokens, dim=-1) @ table.T).argmax(-1).view(4, 4)
        for letter, half in zip(sample.id, (said[:, :2], said[:, 2:]), strict=True):
            right.append((half == processor.tokenizer.convert_tokens_to_ids(letter)).float())
    assert torch.stack(right).mean() > 0.9


def test_rows_without_boxes_are_as_they_were(recipe_file: Write) -> None:
    plain, boxed = (
        [row["loss"] for row in rows(main(recipe_file(name, text)))] for name, text in (("boxes-no", ALIGN), ("boxes-none", BOXED))
    )
    assert plain == boxed


def test_bad_boxes_stop_before_the_first_step(recipe_file: Write, tmp_path: Path) -> None:
    write_halves(tmp_path)
    data = json.loads((tmp_path / "data.json").read_text())
    data[2]["boxes"][0][1] = [0, 0, 16, 32]
    (tmp_path / "data.json").write_text(json.dumps(data))
    text = BOXED.replace("{root}/data.json", f"{tmp_path}/data.json").replace("{root}/images", str(tmp_path))
    with pytest.raises(FoveateError, match=r"(?s)1 of 4 samples cannot be trained on.*br: the box of 'b', .* is not \(left, top"):
        main(recipe_file("boxes-bad", text))
    logged = rows(main(recipe_file("boxes-skip", text.replace("images: ", "on_bad_sample: skip, images: "))))
    assert len(logged) == 3
    main(recipe_file("boxes-unread", text.replace("    boxes: true\n", "")))  # whoever does not read them is not told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOXED.replace("    kind: align\n", ""), "`boxes` say which tokens are to say which word, in a stage of kind align alone"),
        (BOXED.replace("log_steps", "  tiling: internvl:tiles=2\nlog_steps"), "the tiling internvl:tiles=2.* cuts them; leave them out"),
    ],
)
def test_refused(recipe_file: Write, text: str, message: str) -> None:
    overrides = ["model.bridge={kind: mlp}"] if "tiling" in text else []
    path = recipe_file("boxes-refused", text)
    load_recipe(path, overrides)
    with pytest.raises(FoveateError, match=f"(?s){message}"):
        main(path, overrides)
