"""Stages that mix several sources: which samples are drawn, what each source's loss is, and that the rest is as with one source."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tests.train.processes import killed, train_in_two
from tests.train.test_run import ONE, Write, weights

from foveate.data.collate import Collator
from foveate.data.conversations import Conversations
from foveate.errors import FoveateError
from foveate.train.mixture import SourceLosses
from foveate.train.opening import open_model
from foveate.train.order import Order, ProcessBatches, apportion
from foveate.train.plan import plan, print_plan
from foveate.train.recipe import load_recipe
from foveate.train.run import main
from foveate.train.samples import chosen

FIRST = 10  # samples of the first of the two sources


@pytest.fixture(scope="module")
def halves(root: Path) -> Path:
    """The folder of a.json and b.json, which are data.json one behind the other."""
    rows = json.loads((root / "data.json").read_text())
    (root / "a.json").write_text(json.dumps(rows[:FIRST]))
    (root / "b.json").write_text(json.dumps(rows[FIRST:]))
    return root


def mixed(root: Path, a: str = "", b: str = "", stage: int = 0) -> str:
    sources = [
        f"{{conversations: {root / f'{name}.json'}, images: {root / 'images'}{f', {more}' if more else ''}}}"
        for name, more in (("a", a), ("b", b))
    ]
    return f"stages.{stage}.data=[{', '.join(sources)}]"


def rows(final: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_s")} for row in found]


def without_sources(final: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "sources"} for row in rows(final)]


# ---- which samples are drawn -----------------------------------------------------------------------------------------------------------


@given(shares=st.lists(st.fractions(min_value="1/50", max_value=9), min_size=1, max_size=5), total=st.integers(0, 200))
def test_apportioned_numbers_add_up_and_are_near(shares: list[Fraction], total: int) -> None:
    found = apportion(shares, total)
    assert sum(found) == total
    assert all(abs(count - share * total / sum(shares)) < 1 for count, share in zip(found, shares, strict=True))


@given(
    drawn=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 25)), min_size=1, max_size=4),
    batch=st.integers(1, 7),
    seed=st.integers(0, 3),
    grouped=st.booleans(),
)
def test_an_epoch_has_every_source_by_its_share(drawn: list[tuple[int, int]], batch: int, seed: int, grouped: bool) -> None:
    samples = sum(count for count, _ in drawn)
    source = np.repeat(np.arange(len(drawn)), [count for count, _ in drawn])
    order = Order(samples, batch, seed, "stage", np.arange(samples) % 3 if grouped else None, drawn)
    seen: Counter[int] = Counter()
    for epoch in range(3):
        row = order.epoch(epoch)
        if not grouped:  # else an epoch is whole batches, filled up from its own beginning
            assert np.bincount(source[row], minlength=len(drawn)).tolist() == [count for _, count in drawn]
            seen.update(row.tolist())
            own = [[seen[int(item)] for item in np.flatnonzero(source == number)] for number in range(len(drawn))]
            assert all(max(counts) - min(counts) <= 1 for counts in own)  # none comes again before the others of its source
    again = Order(samples, batch, seed, "stage", order.sizes, drawn)
    assert [order.batch(step).tolist() for step in range(9)] == [again.batch(step).tolist() for step in reversed(range(9))][::-1]


def test_processes_share_a_mixed_batch() -> None:
    order = Order(30, 12, 0, "stage", None, [(10, 20), (20, 10)])
    parts = [list(ProcessBatches(order, 5, process, 2, 3)) for process in (0, 1)]
    for step in range(5):
        assert [i for part in parts for micro in part[3 * step : 3 * step + 3] for i in micro] == order.batch(step).tolist()


def test_seeds_stages_and_sources_draw_differently() -> None:
    drawn = [(50, 50), (50, 50)]
    base = Order(100, 10, 0, "a", None, drawn)
    assert all(
        base.epoch(0).tolist() != other.tolist()
        for other in (base.epoch(1), Order(100, 10, 1, "a", None, drawn).epoch(0), Order(100, 10, 0, "b", None, drawn).epoch(0))
    )
    half = Order(100, 10, 0, "a", None, [(50, 25), (50, 25)]).epoch(0)
    assert sorted(half[half < 50]) != sorted(half[half >= 50] - 50)


def test_the_samples_of_a_smaller_cap_are_among_those_of_a_greater() -> None:
    few, many = chosen(100, 20, 0, "a"), chosen(100, 60, 0, "a")
    assert (len(few), len(many), len(chosen(100, 200, 0, "a"))) == (20, 60, 100)
    assert set(few) < set(many)
    assert set(few) != set(chosen(100, 20, 1, "a")) != set(chosen(100, 20, 1, "b"))


# ---- the same training -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_two_halves_are_the_whole(recipe_file: Write, halves: Path, grouped: bool) -> None:
    """Without shares the order is that of one file with both sources' samples."""
    more = [f"stages.0.group_by_length={str(grouped).lower()}", "stages.0.micro_batch=2", "stages.0.steps=7"]
    plain = main(recipe_file(f"whole-{grouped}", ONE), more)
    both = main(recipe_file(f"halves-{grouped}", ONE), [mixed(halves), *more])
    assert without_sources(both) == rows(plain)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(both).items())
    assert not any("sources" in row for row in rows(plain))


def test_a_list_of_one_is_one_source(recipe_file: Write, halves: Path) -> None:
    one = f"stages.0.data=[{{name: x, conversations: {halves / 'data.json'}, images: {halves / 'images'}}}]"
    assert rows(main(recipe_file("list-of-one", ONE), [one])) == rows(main(recipe_file("no-list", ONE)))


@pytest.mark.parametrize("precision", ["fp32", "bf16-copy"])
def test_the_loss_of_each_source(recipe_file: Write, halves: Path, precision: str) -> None:
    recipe = recipe_file(f"losses-{precision}", ONE)
    more = [
        mixed(halves, "share: 2", "share: 1"),
        f"model.text={halves}/lm-plain",
        "stages.0.micro_batch=2",
        f"stages.0.precision={precision}",
    ]
    found = rows(main(recipe, more))
    for row in found:
        parts = row["sources"].values()
        assert list(row["sources"]) == ["a", "b"]
        assert sum(part["samples"] for part in parts) == 4
        whole = sum(part["loss"] * part["tokens"] for part in parts if part["tokens"]) / sum(part["tokens"] for part in parts)
        assert whole == pytest.approx(row["loss"], abs=1e-6 if precision == "fp32" else 1e-2)
    assert sum(part["tokens"] for row in found for part in row["sources"].values()) == found[-1]["supervised_tokens"]
    if precision != "fp32":
        return
    # the first step's once more, each source by itself
    loaded = load_recipe(recipe, more)
    opened = open_model(loaded, 0, None)
    items = Order(24, 4, 0, "only", None, [(10, 16), (14, 8)]).batch(0)
    assert 0 < (items < FIRST).sum() < 4
    data, collate = Conversations.open(halves / "data.json", halves / "images"), Collator(opened.processor, 2048)
    for name, own in (("a", items[items < FIRST]), ("b", items[items >= FIRST])):
        with torch.no_grad():
            loss = opened.model.eval()(**collate([data[int(item)] for item in own]))["loss"]
        assert found[0]["sources"][name]["loss"] == pytest.approx(float(loss), abs=1e-5)


@pytest.mark.parametrize("laid", ["apart", "supervised", "packed"])
def test_losses_of_sources_however_samples_are_laid_out(laid: str) -> None:
    """Each sample in a row, its supervised rows alone, or all end to end in one row."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (3, 5), generator=draw)
    labels[0, :3] = labels[1, 0] = labels[2, 0] = labels[2, 2] = -100
    logits = torch.randn(3, 5, 7, generator=draw)
    apart = [torch.nn.functional.cross_entropy(logits[i, :-1], labels[i, 1:], reduction="sum") for i in range(3)]
    losses = SourceLosses(2)
    losses.expect(labels, [1, 0, 1])
    kept = labels[:, 1:] != -100
    if laid == "supervised":
        losses.add(logits[:, :-1][kept][None], labels)
    elif laid == "packed":
        losses.add(logits.reshape(1, 15, 7), labels.reshape(1, 15))
    else:
        losses.add(logits, labels)
    expected = [[float(apart[1]), 4, 1], [float(apart[0] + apart[2]), 5, 2]]
    assert kept.sum() == 9
    assert torch.allclose(losses.take(), torch.tensor(expected, dtype=torch.float64), atol=1e-5)
    assert losses.take().sum() == 0


def test_two_processes_log_the_same_sources(recipe_file: Write, halves: Path, tmp_path: Path) -> None:
    overrides = [mixed(halves, "share: 0.5", "share: 0.5"), f"model.text={halves}/lm-plain", "log_steps=2"]
    plain, recipe = rows(main(recipe_file("mixed-one", ONE), overrides)), recipe_file("mixed-two", ONE)
    train_in_two(tmp_path, recipe, overrides)
    for one, two in zip(plain, rows(recipe.parent / "mixed-two" / "final"), strict=True):
        for mine, theirs in zip(one["sources"].values(), two["sources"].values(), strict=True):
            assert (mine["tokens"], mine["samples"]) == (theirs["tokens"], theirs["samples"])
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_features_of_mixed_sources(recipe_file: Write, halves: Path, tmp_path: Path) -> None:
    overrides = [mixed(halves, "share: 3, samples: 6", "share: 1"), "stages.0.steps=5"]
    cache = f"stages.0.features={{cache: {tmp_path / 'cache'}, at_most: 1GB}}"
    plain, read = main(recipe_file("mixed-plain", ONE), overrides), main(recipe_file("mixed-read", ONE), [*overrides, cache])
    assert [(row["loss"], row["sources"]) for row in rows(read)] == [(row["loss"], row["sources"]) for row in rows(plain)]


# ---- bad samples -----------------------------------------------------------------------------------------------------------------------


def with_bad(root: Path, folder: Path) -> None:
    """The first samples of a and b have images that are none."""
    import shutil

    shutil.copytree(root / "images", folder / "images")
    for name in ("a", "b"):
        shutil.copy(root / f"{name}.json", folder)
    for image in ("0-0.png", "10-0.png"):
        (folder / "images" / image).write_bytes(b"no picture")


def test_bad_samples_are_refused_or_skipped_by_source(recipe_file: Write, halves: Path, tmp_path: Path) -> None:
    with_bad(halves, tmp_path)
    recipe = recipe_file("mixed-bad", ONE)
    with pytest.raises(FoveateError, match=r"b\.json: 1 of 14 samples cannot be trained on .*bad-samples-only\+b\.txt"):
        main(recipe, [mixed(tmp_path, "on_bad_sample: skip")])
    assert (recipe.parent / "mixed-bad" / "bad-samples-only+a.txt").read_text().startswith("s0 (0-0.png)")
    main(recipe, [mixed(tmp_path, "on_bad_sample: skip", "on_bad_sample: skip")])
    facts = json.loads((recipe.parent / "mixed-bad" / "recipe.json").read_text())["facts"]["only"]
    assert {name: facts["sources"][name]["samples"] for name in ("a", "b")} == {"a": 9, "b": 13}


def test_a_sample_that_goes_bad_in_training(recipe_file: Write, halves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another of its own source takes its place, or the run stops with its name, by the policy of its source."""
    with_bad(halves, tmp_path)
    monkeypatch.setattr("foveate.train.samples.find_bad", lambda *args: [])
    final = main(recipe_file("gone-skip", ONE), [mixed(tmp_path, "on_bad_sample: skip", "on_bad_sample: skip"), "stages.0.steps=6"])
    skipped = (final.parent / "skipped-only.txt").read_text()
    assert ("sample s0 " in skipped, "sample s10 " in skipped) == (True, True)
    order = Order(24, 4, 0, "only")
    drawn = sum(int((order.batch(step) < FIRST).sum()) for step in range(6))
    assert sum(row["sources"]["a"]["samples"] for row in rows(final)) == drawn
    with pytest.raises(FoveateError, match=r"b\.json: an image of sample s10 cannot be read any more.*on_bad_sample: skip"):
        main(recipe_file("gone-stop", ONE), [mixed(tmp_path, "on_bad_sample: skip"), "stages.0.steps=6"])


def test_a_loss_that_is_not_finite_names_samples_and_sources(recipe_file: Write, halves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "training_step", lambda *args: torch.tensor(float("nan")))
    with pytest.raises(FoveateError, match=r"\(samples s\d+ \([ab]\), s\d+ \([ab]\)"):
        main(recipe_file("mixed-nan", ONE), [mixed(halves)])


# ---- what recipes and plans say --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ("stages.0.data=[]", r"stages\.0\.data: .*at least 1 item"),
        ("stages.0.data.1.name=a", r"two sources of `data` are called a: give each a `name`"),
        ("stages.0.data.1.name=a/b", r"stages\.0\.data\.1\.name"),
        ("stages.0.data.1.share=2", r"a `share` is given to each source of `data` or to none, but a has none"),
        ("stages.0.data.1.share=0", r"stages\.0\.data\.1\.share"),
        ("stages.0.data.1.share=much", r"a share is a number or a fraction"),
        ("stages.0.data.1.samples=0", r"stages\.0\.data\.1\.samples"),
        ("stages.0.data.1.sample=3", r"stages\.0\.data\.1\.sample: unknown key, did you mean samples\?.*allowed: .*share"),
        ("stages.0.data.1.dataset=x", r"either `conversations` \(with `images`\) or `dataset`"),
    ],
)
def test_mixtures_that_are_refused(recipe_file: Write, halves: Path, changed: str, reason: str) -> None:
    with pytest.raises(FoveateError, match=reason):
        load_recipe(recipe_file("refused", ONE), [mixed(halves), changed])


def test_a_share_of_less_than_a_sample(recipe_file: Write, halves: Path) -> None:
    with pytest.raises(FoveateError, match=r"stage only: data: the share of b \(1/1000 of 1001/1000\) is not one sample of an epoch of 24"):
        main(recipe_file("tiny-share", ONE), [mixed(halves, "share: 1", "share: 1/1000")])


def test_the_plan_has_the_sources(recipe_file: Write, halves: Path) -> None:
    overrides = [mixed(halves, "share: 3, samples: 6", "share: 1"), "stages.0.steps=null", "stages.0.epochs=2"]
    found = plan(recipe_file("planned-mix", ONE), overrides, text_tokens=5)
    (stage,) = found.stages
    each = stage.tokens_per_image + 5
    assert [(s.name, s.samples, s.read, s.steps, s.tokens) for s in stage.sources] == [
        ("a", 6, 30, 7.5, 30 * each),
        ("b", 14, 10, 2.5, 10 * each),
    ]
    assert (stage.steps, stage.samples) == (10, 40)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_plan(found, console)
    assert "passes" in console.export_text()
    elsewhere = plan(recipe_file("planned-mix", ONE), [*overrides, "stages.0.data.1.conversations=gone.json", "stages.0.epochs=1"]).stages[
        0
    ]
    assert (elsewhere.steps, elsewhere.sources[1].samples, elsewhere.sources[1].read) == (None, None, None)


def test_one_source_has_no_table(recipe_file: Write) -> None:
    assert plan(recipe_file("planned-one", ONE)).stages[0].sources == []


# ---- kills -----------------------------------------------------------------------------------------------------------------------------


def test_kill_and_resume(recipe_file: Write, halves: Path) -> None:
    more = "stages.0.steps=9", "stages.0.save_steps=2", "stages.0.micro_batch=2", "log_steps=3"
    overrides = [mixed(halves, "share: 1", "share: 2, samples: 5"), *more]
    plain, recipe = main(recipe_file("mixed-alive", ONE), overrides), recipe_file("mixed-killed", ONE)
    output = recipe.parent / "mixed-killed"
    for step in (2, 4):  # each lies within an interval of the log
        killed(recipe, overrides, lambda step=step: (output / "0-only" / f"checkpoint-{step}" / "complete").is_file())  # type: ignore[misc]
    again = main(recipe, overrides)
    assert rows(again) == rows(plain)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(again).items())
