"""The search for schedules: the algorithms on evaluators whose best answer is known, then whole searches on a tiny model."""

import json
import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.command import refused
from transformers import LlamaConfig

from foveate.accounting import predict
from foveate.cli import main
from foveate.engine.attach import attach
from foveate.errors import FoveateError
from foveate.evaluation.asking import answered
from foveate.evaluation.samples import Metric, Sample, Task
from foveate.evaluation.tasks import load_task
from foveate.reducers import load_reducers, parse, spell
from foveate.reducers.schedule import Schedule
from foveate.search import run
from foveate.search.costs import Prompt, flops_share, most_even, tokens_share
from foveate.search.gsearch import gsearch, most_trials, within
from foveate.search.psigmoid import STEEPNESS, curve, psigmoid, spend
from foveate.search.run import SEARCH, Found

quick = settings(max_examples=60)
LM = {layers: LlamaConfig(hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, vocab_size=50) for layers in range(2, 13)}
HALF = Fraction(1, 2)


def falls(counts: tuple[int, ...]) -> bool:
    return all(a >= b for a, b in pairwise(counts))


# ---- G-Search


@st.composite
def needs(draw: st.DrawFn) -> tuple[int, int, tuple[int, ...]]:
    """Tokens of an image, the first layer that may have fewer, and how many each layer needs, which does not rise."""
    per_image, layers = draw(st.integers(1, 600)), draw(st.integers(1, 12))
    free = draw(st.integers(0, layers))
    least = sorted(draw(st.lists(st.integers(1, per_image), min_size=layers, max_size=layers)), reverse=True)
    return per_image, free, tuple([per_image] * free + least[free:])


@quick
@given(needs())
def test_gsearch_finds_what_every_layer_needs(drawn: tuple[int, int, tuple[int, ...]]) -> None:
    per_image, free, least = drawn
    asked: list[tuple[int, ...]] = []

    def good(counts: tuple[int, ...]) -> bool:
        asked.append(counts)
        return all(count >= need for count, need in zip(counts, least, strict=True))

    assert gsearch(good, per_image, len(least), free) == least
    assert len(asked) <= most_trials(per_image, len(least), free)
    assert len(set(asked)) == len(asked)
    assert all(falls(counts) and counts[:free] == (per_image,) * free for counts in asked)


def test_gsearch_by_hand() -> None:
    """Two layers of four tokens; the second needs one. Halving asks for 2, then for 3 (too few: 2), then in the second for 2 and 1."""
    asked = []

    def good(counts: tuple[int, ...]) -> bool:
        asked.append(counts)
        return counts[0] >= 3

    assert gsearch(good, 4, 2) == (3, 1)
    assert asked == [(2, 2), (3, 3), (3, 2), (3, 1)]
    assert most_trials(4, 2) == 4
    assert [most_trials(n, 1) for n in (1, 2, 3, 64, 65, 576)] == [0, 1, 2, 6, 7, 10]


def test_gsearch_without_any_need_keeps_one_token() -> None:
    assert gsearch(lambda counts: True, 64, 4, 1) == (64, 1, 1, 1)
    assert gsearch(lambda counts: False, 64, 4, 1) == (64,) * 4


# ---- the sigmoid and its budget


def test_the_curve_by_hand() -> None:
    """The fall is one half at the offset, 0.2 + 0.8 / 2 = 0.6 of 10; with steepness ln 3 three quarters a layer before, one behind."""
    assert curve(1.0986122886681098, 0.2, 1.0, 10, 3) == (8, 6, 4)
    assert curve(1.0986122886681098, 0.2, 1.0, 10, 3, 2) == (10, 10, 4)
    assert curve(10.0, 0.25, 1.5, 64, 4) == (64, 64, 16, 16)  # nearly a step: 63.7 and 16.3


@st.composite
def settings_of_curves(draw: st.DrawFn) -> tuple[Prompt, int, float]:
    """A prompt, the first layer that may have fewer tokens, and a steepness."""
    layers = draw(st.integers(2, 12))
    prompt = Prompt(layers, draw(st.integers(2, 600)), draw(st.integers(1, 3)), draw(st.integers(0, 50)))
    return prompt, draw(st.integers(0, 1)), draw(st.floats(*STEEPNESS))


@quick
@given(settings_of_curves(), st.floats(0.05, 0.95), st.floats(0, 1), st.sampled_from(["tokens", "flops"]))
def test_the_budget_is_met_within_one_token(drawn: tuple[Prompt, int, float], share: float, floor: float, kind: str) -> None:
    """Never more than the budget; one more token in each layer that has not all of them would be."""
    prompt, free, steepness = drawn
    cost = tokens_share(prompt) if kind == "tokens" else flops_share(LM[prompt.layers], prompt)
    limit = Fraction(share)
    how = (prompt.per_image, prompt.layers, free)
    if cost((prompt.per_image,) * free + (1,) * (prompt.layers - free)) > limit:
        with pytest.raises(FoveateError, match=r"is too small: one visual token in each layer.* give at least that"):
            most_even(cost, limit, *how)
        return
    most = most_even(cost, limit, *how)
    lowest = 1 + round(floor * (most - 1))
    counts = spend(cost, limit, steepness, lowest, *how)
    more = tuple(min(prompt.per_image, count + 1) for count in counts)
    assert cost(counts) <= limit < cost(more)
    assert falls(counts)
    assert counts[:free] == (prompt.per_image,) * free
    assert min(counts) >= lowest
    if kind == "tokens":
        assert 0 <= limit * prompt.per_image - Fraction(sum(counts), prompt.layers) < 1
    reducer = Schedule.of_counts(counts, prompt.per_image, signal="cls")
    assert reducer.visual_tokens(prompt.per_image, prompt.layers) == list(counts)


def test_the_most_even_by_hand() -> None:
    """A quarter of 64 in 6 layers is 96 in all: 16 each, or behind a full first layer 32 for five, 6 each."""
    cost = tokens_share(Prompt(6, 64, 1, 10))
    assert most_even(cost, Fraction(1, 4), 64, 6) == 16
    assert most_even(cost, Fraction(1, 4), 64, 6, 1) == 6
    with pytest.raises(FoveateError, match=r"budget 0.1 is too small: .*and all 64 in the first 1, is a share of 0.18 already"):
        most_even(cost, Fraction(1, 10), 64, 6, 1)  # 69 of 384 = 0.1797


def test_flops_are_those_that_are_predicted() -> None:
    prompt = Prompt(5, 16, 2, 7)
    parts = ("lm_linear", "lm_attention")
    schedule = [Schedule("1:0.5/3:0.25")]
    bare, cut = (predict(LM[5], per_image=16, images=2, text_tokens=7, reducers=reducers) for reducers in ([], schedule))
    expected = Fraction(sum(cut.flops[part] for part in parts), sum(bare.flops[part] for part in parts))
    assert flops_share(LM[5], prompt)((16, 8, 8, 4, 4)) == expected
    assert tokens_share(prompt)((16, 8, 8, 4, 4)) == HALF


# ---- G-Search within a budget


class Least:
    """Scores a schedule by the layer that lacks most of what it needs, in percent."""

    def __init__(self, need: tuple[int, ...]) -> None:
        self.need = need

    def __call__(self, counts: tuple[int, ...]) -> float:
        return 100 * min(1.0, *(count / need for count, need in zip(counts, self.need, strict=True)))


@quick
@given(needs(), st.floats(0.05, 0.95))
def test_within_loses_as_little_as_the_budget_allows(drawn: tuple[int, int, tuple[int, ...]], share: float) -> None:
    """To a 128th of the score: with so much less to lose, G-Search is over the budget."""
    per_image, free, need = drawn
    shape = per_image, len(need), free
    score, limit, cost = Least(need), Fraction(share), tokens_share(Prompt(len(need), per_image, 1, 0))
    if cost((per_image,) * free + (1,) * (len(need) - free)) > limit:
        with pytest.raises(FoveateError, match="is too small"):
            within(score, 100.0, cost, limit, *shape)
        return
    found = within(score, 100.0, cost, limit, *shape)
    assert cost(found) <= limit
    assert falls(found)
    loss = 100 - score(found) - 100 / 128
    if loss > 0:
        assert cost(gsearch(lambda counts: score(counts) >= 100 - loss, *shape)) > limit


# ---- P-Sigmoid

PROMPT = Prompt(6, 64, 1, 10)
SHAPE = (64, 6, 1)  # tokens of an image, layers, the first that may have fewer


class Towards:
    """Scores a schedule by how near it is to one, token by token, and remembers what was asked."""

    def __init__(self, best: tuple[int, ...]) -> None:
        self.best, self.asked = best, list[tuple[int, ...]]()

    def __call__(self, counts: tuple[int, ...]) -> float:
        self.asked.append(counts)
        return -sum(abs(a - b) for a, b in zip(counts, self.best, strict=True))


def test_psigmoid_returns_the_best_of_what_it_tried() -> None:
    cost = tokens_share(PROMPT)
    score = Towards(spend(cost, HALF, 1.0, 8, *SHAPE))
    found = psigmoid(score, cost, HALF, *SHAPE, trials=40)
    tried = list(score.asked)
    assert len(tried) == 40
    assert found == max(tried, key=score)  # the first of equals
    assert all(falls(counts) and 31 < sum(counts) / 6 <= 32 for counts in tried)
    even = (64,) + (most_even(cost, HALF, *SHAPE),) * 5
    steps = [spend(cost, HALF, STEEPNESS[1], floor, *SHAPE) for floor in range(1, 26)]
    assert all(score(found) > score(other) for other in [even, *steps])


def test_trials_follow_from_the_seed() -> None:
    cost = tokens_share(PROMPT)
    asked = []
    for seed in (0, 0, 1):
        score = Towards((64, 64, 40, 12, 6, 6))
        psigmoid(score, cost, HALF, *SHAPE, trials=15, seed=seed)
        asked.append(score.asked)
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]


def test_no_trials_is_an_error() -> None:
    with pytest.raises(FoveateError, match="trials=0 is not possible"):
        psigmoid(Towards((64,) * 6), tokens_share(PROMPT), HALF, *SHAPE, trials=0)


# ---- whole searches

LEAVES_SOME = {"signal": "random", "samples": None, "batch_size": 8, "progress": False}


class Watched:
    """Stands in for what answers the questions, notes the reducers, and stops the search in front of call `stop`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> None:
        self.reducers, self.stop, self.answered = list[str](), stop, answered
        monkeypatch.setattr(run, "answered", self)

    def __call__(self, model: Any, processor: Any, asked: Any, reducers: Any, *rest: Any) -> Any:
        if len(self.reducers) == self.stop:
            raise KeyboardInterrupt
        self.reducers.append(spell(reducers))
        return self.answered(model, processor, asked, reducers, *rest)


@dataclass(frozen=True)
class Sensitive(Metric):
    """A metric of no sense that many tokens are good for: how many different answers there are, in percent of the questions."""

    name = "sensitive"

    def score(self, prediction: str, sample: Sample) -> float:
        return float(bool(prediction))

    def summary(self, samples: Any, predictions: Any, scores: Any) -> dict[str, float]:
        return {"different": 100 * len(set(predictions)) / len(predictions)}


@pytest.fixture
def asked(world: Path) -> Task:
    """15 questions about 3 images."""
    return replace(load_task(str(world), progress=False), metric=Sensitive())


def found_by(model: Any, processor: Any, task: Task, out: Path, **options: Any) -> Found:
    return run.search(model, [task], out, processor=processor, **{**LEAVES_SOME, **options})


@pytest.mark.parametrize("options", [{"tokens": 0.5, "trials": 8}, {"loss": 10.0}, {"flops": 0.7, "method": "gsearch"}])
def test_a_stopped_search_goes_on_and_asks_nothing_twice(
    model: Any, processor: Any, asked: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    whole = Watched(monkeypatch)
    expected = found_by(model, processor, asked, tmp_path / "whole", **options)
    assert len(set(whole.reducers)) == len(whole.reducers) == expected.trials + 1
    monkeypatch.undo()

    out = tmp_path / "stopped"
    first = Watched(monkeypatch, stop=3)
    with pytest.raises(KeyboardInterrupt):
        found_by(model, processor, asked, out, **options)
    assert not (out / "foveate.json").exists()
    with (out / "trials.jsonl").open("a") as file:
        file.write('{"reducer": "schedule:ke')  # the line under way when the machine went
    monkeypatch.undo()
    second = Watched(monkeypatch)
    assert found_by(model, processor, asked, out, **options) == expected
    assert first.reducers + second.reducers == whole.reducers
    for name in ("search.json", "trials.jsonl", "foveate.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    monkeypatch.undo()
    third = Watched(monkeypatch)
    assert found_by(model, processor, asked, out, **options) == expected
    assert third.reducers == []


def test_what_is_found_is_what_a_model_can_be_attached_to(model: Any, processor: Any, asked: Task, tmp_path: Path) -> None:
    """16 tokens in two layers, three eighths of them: 12 in all, or not a token a layer less."""
    found = found_by(model, processor, asked, tmp_path, tokens=0.375, trials=6)
    assert 10 < sum(found.counts) <= 12
    assert falls(found.counts)
    assert (found.tokens, found.questions) == (sum(found.counts) / 32, 15)
    assert load_reducers(tmp_path) == [found.reducer] == parse(str(found.reducer))
    inputs = processor(images=[Image.new("RGB", (20, 20))], text="<s><user><image>\nwhat?<assistant>", return_tensors="pt")
    with attach(model, load_reducers(tmp_path)) as attached, torch.no_grad():
        model(**inputs)
    assert tuple(attached.last.visual_tokens) == found.counts
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert lines[0]["reducer"] == "none"
    assert {line["reducer"]: line["score"] for line in lines}[str(found.reducer)] == found.score == max(line["score"] for line in lines[1:])
    assert lines[0]["score"] == found.bare
    texts = [f"<s><user><image>\n{sample.question}<assistant>" for sample in asked.samples]
    lengths = [len(processor.tokenizer(text, add_special_tokens=False).input_ids) - 1 for text in texts]
    assert lines[0]["prompt"] == {"layers": 2, "per_image": 16, "images": 1, "text": round(sum(lengths) / len(lengths))}


def test_no_more_is_lost_than_may_be(model: Any, processor: Any, asked: Task, tmp_path: Path) -> None:
    exact = found_by(model, processor, asked, tmp_path / "exact", loss=0)
    assert exact.score >= exact.bare
    rough = found_by(model, processor, asked, tmp_path / "rough", loss=30)
    assert rough.bare > rough.score >= rough.bare - 30
    assert rough.tokens < 1
    assert found_by(model, processor, asked, tmp_path / "anything", loss=100).counts == (1, 1)


def test_attention_leaves_the_first_layer_whole(model: Any, processor: Any, asked: Task, tmp_path: Path) -> None:
    found = found_by(model, processor, asked, tmp_path, tokens=0.75, trials=3, signal="attention", positions="renumber")
    assert found.counts == (16, 8)
    assert str(found.reducer) == "schedule:positions=renumber,keeps=1:0.5"


def test_pictures_of_another_size(tmp_path: Path) -> None:
    """64 tokens are of 64 px."""
    ask = partial(run.search, "asset:vlm", ["scenes:count=1"], tmp_path, tokens=0.5, trials=1, progress=False)
    assert ask(image_size=32).prompt.per_image == 16
    with pytest.raises(FoveateError, match=r"another image_size \(there 32, now None\)"):
        ask()


def test_another_search_needs_another_folder(model: Any, processor: Any, asked: Task, tmp_path: Path) -> None:
    found_by(model, processor, asked, tmp_path, tokens=0.5, trials=1)
    found_by(model, processor, asked, tmp_path, tokens=0.5, trials=2)  # more of the same is no other search
    with pytest.raises(FoveateError, match=r"holds a search with another tokens \(there 0.5, now 0.25\). Choose another folder"):
        found_by(model, processor, asked, tmp_path, tokens=0.25, trials=1)
    told = json.loads((tmp_path / SEARCH).read_text())
    assert told.pop("dtype") == "float32"
    (tmp_path / SEARCH).write_text(json.dumps(told))  # as before there was a choice
    found_by(model, processor, asked, tmp_path, tokens=0.5, trials=1)
    (tmp_path / SEARCH).write_text(json.dumps({**told, "dtype": "bfloat16"}))
    with pytest.raises(FoveateError, match=r"another dtype \(there bfloat16, now float32\)"):
        found_by(model, processor, asked, tmp_path, tokens=0.5, trials=1)
    (tmp_path / SEARCH).write_text(json.dumps(told))
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    with pytest.raises(FoveateError, match="another model_hash"):
        found_by(model, processor, asked, tmp_path, tokens=0.5, trials=1)


def test_questions_without_images_are_an_error(model: Any, processor: Any, asked: Task, tmp_path: Path) -> None:
    blind = replace(asked, samples=tuple(replace(sample, images=()) for sample in asked.samples))
    with pytest.raises(FoveateError, match="none of the questions has an image"):
        found_by(model, processor, blind, tmp_path, tokens=0.5, trials=1)


def test_a_broken_file_of_trials_is_named(model: Any, processor: Any, asked: Task, tmp_path: Path) -> None:
    found_by(model, processor, asked, tmp_path, tokens=0.5, trials=1)
    (tmp_path / "trials.jsonl").write_text("[]\n")
    with pytest.raises(FoveateError, match=r"trials.jsonl cannot be read: .*; remove it"):
        found_by(model, processor, asked, tmp_path, tokens=0.5, trials=1)


def test_without_optuna_only_gsearch_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(FoveateError, match=r"psigmoid needs the package optuna: pip install 'foveate\[search\]'; gsearch does without"):
        run.search("asset:vlm", ["scenes"], tmp_path / "out", tokens=0.5)
    assert not (tmp_path / "out").exists()


# ---- the command


def test_the_command_on_the_shipped_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three trials on two scenes: 64 tokens in six layers, half of them in all, so 64 + 128."""
    out = tmp_path / "found"
    with pytest.raises(SystemExit) as stop:
        main(["search", "asset:vlm", "--tasks", "scenes:count=2,seed=7", "--tokens", "0.5", "--trials", "3", "--out", str(out)])
    assert stop.value.code == 0
    (reducer,) = load_reducers(out)
    counts = reducer.visual_tokens(64, 6)
    assert counts[0] == 64
    assert 31 < sum(counts) / 6 <= 32
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(reducer)
    assert "20 questions, " in printed[1]
    assert printed[1].endswith("schedules tried")
    assert f"written to {out}/foveate.json" in printed[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "a search needs one aim: tokens or flops, a share that may be spent, or loss"),
        (["--tokens", "0.5", "--flops", "0.5"], "a search needs one aim"),
        (["--tokens", "0.5", "--loss", "1"], "a search needs one aim"),
        (["--tokens", "1"], "tokens=1 is not possible; give a share between 0 and 1"),
        (["--flops", "nan"], "flops=nan is not possible"),
        (["--loss", "-1"], "loss=-1 is not possible; give points >= 0"),
        (["--loss", "nan"], "loss=nan is not possible"),
        (["--tokens", "0.5", "--method", "grid"], "method='grid' is not possible; choose gsearch or psigmoid"),
        (["--loss", "1", "--method", "psigmoid"], "psigmoid spends a budget: give tokens or flops in place of loss"),
        (["--tokens", "0.5", "--signal", "text"], "signal='text' is not possible"),
        (["--tokens", "0.5", "--positions", "gap"], "positions='gap' is not possible"),
        (["--tokens", "0.5", "--tasks", "nowhere"], "no such task: nowhere"),
        (["--tokens", "0.1"], "the budget 0.1 is too small: one visual token in each layer, and all 64 in the first 1, is a share of 0.18"),
    ],
)
def test_what_cannot_be_searched_is_one_message(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [] if "--tasks" in options else ["--tasks", "scenes:count=1"]
    assert message in refused(["search", "asset:vlm", *tasks, "--out", str(tmp_path / "out"), *options], capsys)
