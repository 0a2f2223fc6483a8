"""Chat templates that refuse conversations, rewrite them, or write more into them than they are told."""

from __future__ import annotations

import contextlib
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.data.chat import Renderer
from foveate.data.collate import Collator, Fit, told
from foveate.data.conversations import Conversations, find_bad
from foveate.errors import FoveateError
from foveate.tokens import ImagePlan
from foveate.train import files
from foveate.train.loading import Loading
from foveate.train.recipe import load_recipe
from foveate.world import resolve
from tests.situations import templates
from tests.situations.templates import ENDS, processor, talk

TURNS = [("user", "<image>\nA b?"), ("assistant", "c"), ("user", "d"), ("assistant", "é e")]
THOUGHTS = [("user", "A?"), ("assistant", "<think>\nhm\n</think>\n\nc"), ("user", "d"), ("assistant", "<think>\nso\n</think>\n\ne")]


def supervised(renderer: Renderer, turns: list[tuple[str, str]]) -> list[str]:
    text, spans = renderer.render(turns)
    return [text[start:end] for start, end in spans]


# ---- where answers are ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENDS)
def test_every_answer_is_supervised_and_nothing_else(name: str) -> None:
    template, end, _ = ENDS[name]
    assert [text.strip() for text in supervised(Renderer(processor(template)), TURNS)] == [f"c{end}", f"é e{end}"]


@pytest.mark.parametrize("name", ENDS)
def test_a_question_is_put_as_training_writes_it(name: str) -> None:
    """What stands in front of the last answer in training is the prompt, to the letter; no thought is left to the model."""
    renderer = Renderer(processor(ENDS[name][0]))
    for turns in (TURNS[:2], TURNS):
        text, spans = renderer.render(turns)
        assert renderer.ask(turns[:-1]) == text[: spans[-1][0]]


ODD = ["b", " c ", "\nd", "<think>\nhm\n</think>\n\ne", "a <image> b", "[final] f", "<|end|>", "\n", "é" * 9]


@given(contents=st.lists(st.sampled_from(ODD), min_size=2, max_size=6), system=st.booleans(), name=st.sampled_from(list(ENDS)))
@settings(max_examples=60, deadline=None)
def test_what_is_known_of_other_conversations_changes_nothing(contents: list[str], system: bool, name: str) -> None:
    """Of a conversation of the same roles as one before the template writes the text alone; where that does not fit it writes all."""
    turns = [(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]
    turns = [("system", "Be brief."), *turns] if system else turns
    fresh, used = (known(name, whole) for whole in (False, True))
    with contextlib.suppress(FoveateError):
        used.render([(role, f"other {number}") for number, (role, _) in enumerate(turns)])
    assert outcome(used, turns) == outcome(fresh, turns)


@cache
def known(name: str, whole: bool) -> Renderer:
    renderer = Renderer(processor(ENDS[name][0]))
    if not whole:
        renderer._fitted = lambda *args: None  # type: ignore[method-assign]
    return renderer


def outcome(renderer: Renderer, turns: list[tuple[str, str]]) -> Any:
    try:
        return renderer.render(turns)
    except FoveateError as error:
        return str(error)


@pytest.mark.parametrize("turns", [2, 6, 20])
def test_the_template_writes_a_conversation_once(turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer, written = Renderer(processor(templates.CHATML)), list[int]()
    render = Renderer._render

    def counting(self: Renderer, messages: list[dict[str, Any]], *args: Any, **options: Any) -> str:
        written.append(len(messages))
        return render(self, messages, *args, **options)

    monkeypatch.setattr(Renderer, "_render", counting)
    for sample in range(3):
        written.clear()
        renderer.render([(("user", "assistant")[number % 2], f"{sample} {number}") for number in range(turns)])
        assert len(written) == 1 or sample == 0
    assert written == [turns]


@pytest.mark.parametrize("name", ["qwen3", "thinker", "last"])
def test_what_a_template_writes_of_itself_is_part_of_the_prompt(name: str) -> None:
    renderer = Renderer(processor(ENDS[name][0]))
    own = "[final] " if name == "last" else "<think>\n\n</think>\n\n"
    assert own in renderer.render(TURNS)[0]
    assert renderer.ask(TURNS[:1]).rstrip(" ").endswith(own.rstrip(" "))


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("qwen3", ["c<|im_end|>", "<think>\nso\n</think>\n\ne<|im_end|>"]),  # earlier thoughts are dropped, the last one is the data's
        ("thinker", ["c<|im_end|>", "<think>\nso\n</think>\n\ne<|im_end|>"]),
        ("r1", ["\n\nc</s>", "\n\ne</s>"]),
        ("phi3", ["<think>\nhm\n</think>\n\nc<|end|>", "<think>\nso\n</think>\n\ne<|end|>"]),
    ],
)
def test_answers_with_thoughts_of_their_own(name: str, answers: list[str]) -> None:
    assert supervised(Renderer(processor(ENDS[name][0])), THOUGHTS) == answers


@pytest.mark.parametrize("name", ["gemma2", "llama3", "chatml"])
def test_space_around_contents(name: str) -> None:
    found = supervised(Renderer(processor(ENDS[name][0])), [("user", " a "), ("assistant", " b \n"), ("user", "c"), ("assistant", "\td")])
    end = ENDS[name][1]
    assert found == ([f" b \n{end}", f"\td{end}"] if name == "chatml" else [f"b{end}", f"d{end}"])


@pytest.mark.parametrize("text", ["<|end|>", "a <|user|> b", "d", "user"])
def test_contents_that_look_like_the_template(text: str) -> None:
    turns = [("user", text), ("assistant", text), ("user", text), ("assistant", text)]
    assert supervised(Renderer(processor(templates.PHI3)), turns) == [f"{text}<|end|>"] * 2


# ---- what cannot be written ----------------------------------------------------------------------------------------------------------

FORGETFUL = "{% for m in messages %}{{ m.content if loop.last else '...' }}{{ eos_token }}{% endfor %}"
SHOUTING = "{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}"
TWICE = "{% for m in messages %}{{ m.content + m.content + eos_token }}{% endfor %}"
BLIND = "{% for m in messages %}{{ m.content | replace('<image>', '') + eos_token }}{% endfor %}"


def one_token(height: int, width: int) -> ImagePlan:
    return ImagePlan.whole(1)


@pytest.mark.parametrize(
    ("template", "odd", "reason"),
    [
        (templates.GEMMA2, [{"from": "system", "value": "Be brief."}, *talk("<image>", "b")], "System role not supported"),
        (templates.BARE, [{"from": "system", "value": "Be brief."}, *talk("<image>", "b")], "cannot write this conversation"),
        (FORGETFUL, talk("<image>", "b", "c", "d"), "rewrites earlier turns"),
        (SHOUTING, talk("a", "b", "c", "d"), "changes answer 1 of 2"),
        (TWICE, talk("a", "b"), "holds more than once answer 1"),
        (BLIND, talk("<image>", "b"), "makes 0 image tokens"),
    ],
)
def test_what_a_template_cannot_write_is_named_before_the_first_step(template: str, odd: list[Any], reason: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": f"s{i}", "conversations": talk("1?", "2")} for i in range(3)]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    image = {"image": "a.png"} if any("<image>" in turn["value"] for turn in odd) else {}
    rows.append({"id": "odd", **image, "conversations": odd})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    data = Conversations.open(tmp_path / "data.json", tmp_path)
    bad = find_bad(data.source, None, fits=Fit(Renderer(processor(template)), one_token, max_length=99))
    assert bad[-1].id == "odd"
    assert reason in bad[-1].reason
    assert len(bad) == (4 if template == TWICE else 1)


def test_a_tokenizer_without_any_end_is_refused() -> None:
    endless = processor(templates.VICUNA)
    endless.tokenizer.eos_token = None
    with pytest.raises(FoveateError, match="no token behind an answer"):
        Renderer(endless).render(TURNS)
    assert Renderer(endless).ask(TURNS[:1]).endswith("ASSISTANT:")  # asking goes


# ---- what max_length cuts ------------------------------------------------------------------------------------------------------------


def test_what_is_cut_is_counted_exactly() -> None:
    """Against the collator's own labels, at every length."""
    one = processor(templates.CHATML)
    renderer = Renderer(one)
    turns = [("user", "a"), ("assistant", "b" * 20), ("user", "c"), ("assistant", "d" * 9)]
    whole = renderer.tokenise(turns)
    total = int(whole.supervised.sum())
    assert total == 21 + 10
    first = int(np.flatnonzero(whole.supervised)[0])
    for length in range(first + 1, len(whole.ids) + 2):
        fit = Fit(renderer, one_token, length)
        assert fit(turns, []) == ""
        kept = int(whole.supervised[:length].sum())
        lost = [(cut.tokens, cut.of, cut.answers) for cut in fit.cut]
        whole_answers = 0 if kept > 21 else 1
        assert lost == ([] if kept == total else [(total - kept, total, whole_answers)])
    assert "no token of an answer within max_length" in Fit(renderer, one_token, first)(turns, [])


def test_what_is_cut_is_told() -> None:
    renderer = Renderer(processor(templates.CHATML))
    fit = Fit(renderer, one_token, 60)
    for answer, last in (("b" * 10, "d"), ("b" * 100, "d"), ("b" * 100, "dd"), ("b", "d" * 100)):
        fit([("user", "a"), ("assistant", answer), ("user", "c"), ("assistant", last)], [])
    line = told(fit.cut, "data", 4, 60)
    assert line.startswith("data: max_length 60 cuts 3 of 4 samples, ")
    assert line.endswith("; 2 of them lose 2 whole answers")
    assert told([], "data", 4, 60) == ""


# ---- what turns out bad in training --------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Conversations:
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [{"id": f"s{i}", "image": f"{i}.png", "conversations": talk("<image>\nis it a star?", "yes" * (1 + i))} for i in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return Conversations.open(tmp_path / "data.json", tmp_path)


@pytest.fixture(scope="module")
def shipped() -> Any:
    from transformers import AutoProcessor

    import foveate.model  # noqa: F401

    return AutoProcessor.from_pretrained(resolve("asset:vlm"))


def spoil(world: Conversations, how: str) -> int:
    """Makes sample 1 bad after the check; returns the max_length to use."""
    (shown,) = world.source.images(world.source.row(1))
    assert isinstance(shown, Path)
    folder = shown.parent
    if how == "gone":
        (folder / "1.png").unlink()
    elif how == "broken":
        (folder / "1.png").write_bytes(b"none")
    else:
        row = world.source.row
        longer = {"conversations": talk("<image>\n" + "x" * 2000, "y")}
        world.source.row = lambda index: row(index) | (longer if index == 1 else {})  # type: ignore[method-assign]
    return 1000


@pytest.mark.parametrize("how", ["gone", "broken", "long"])
def test_bad_in_training_and_skipped(
    world: Conversations, shipped: Any, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    length = spoil(world, how)
    collator = Collator(shipped, length)
    loading = Loading(world, collator, "skip", tmp_path / "skipped.txt")
    with caplog.at_level(logging.WARNING):
        batch = loading([0, 1, 3])
    wanted = collator([world[0], world[2], world[3]])  # the next one in its place
    assert all((batch[name] == wanted[name]).all() for name in wanted)
    assert "s1" in caplog.text
    assert (tmp_path / "skipped.txt").read_text().count("\n") == 1


@pytest.mark.parametrize("how", ["gone", "broken", "long"])
def test_bad_in_training_and_stopped(world: Conversations, shipped: Any, how: str, tmp_path: Path) -> None:
    loading = Loading(world, Collator(shipped, spoil(world, how)), "stop", tmp_path / "skipped.txt")
    assert len(loading([0, 2])["input_ids"]) == 2
    with pytest.raises(FoveateError, match=r"s1.*set on_bad_sample: skip"):
        loading([0, 1])
    assert not (tmp_path / "skipped.txt").exists()


def test_nothing_left_to_train_on(world: Conversations, shipped: Any, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="no sample is left"):
        Loading(world, Collator(shipped, 3), "skip", tmp_path / "skipped.txt")([0, 1])


# ---- recipes -------------------------------------------------------------------------------------------------------------------------

RECIPE = """
name: t
output: out
model: {{checkpoint: asset:vlm{model}}}
stages:
  - {{name: s, data: {{conversations: d.json{data}}}, steps: 1, batch_size: 1, learning_rate: 1.0e-3}}
"""


def written(folder: Path, model: str = "", data: str = "") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, data=data))
    return path


def test_a_recipe_names_a_template(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(templates.CHATML)
    assert load_recipe(written(tmp_path)).model.chat_template is None
    assert load_recipe(written(tmp_path, f", chat_template: {tmp_path}/own.jinja")).model.chat_template == templates.CHATML
    itself = load_recipe(written(tmp_path), [f"model.chat_template={json.dumps(templates.CHATML)}"])
    assert itself.model.chat_template == templates.CHATML
    with pytest.raises(FoveateError, match=r"recipe.yaml:4: model.chat_template: .*neither a template nor a file that can be read"):
        load_recipe(written(tmp_path, ", chat_template: other.jinja"))


@pytest.mark.parametrize(("given", "policy"), [("", "stop"), (", on_bad_sample: skip", "skip"), (", on_bad_image: skip", "skip")])
def test_the_older_name_of_the_policy(given: str, policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_recipe(written(tmp_path, data=given)).stages[0].sources[0].on_bad_sample == policy
    assert ("is now called on_bad_sample" in caplog.text) == ("image" in given)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (", on_bad_image: ignore", "'ignore' is not allowed; allowed: stop or skip"),
        (", on_bad_image: skip, on_bad_sample: stop", "on_bad_image: unknown key"),
        (", on_bad_picture: skip", "on_bad_picture: unknown key"),
    ],
)
def test_wrong_policies(given: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=rf"recipe.yaml:6: stages.0.data.*{reason}"):
        load_recipe(written(tmp_path, data=given))


def test_a_run_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """Its record has the older name of the policy and no template."""
    now = json.loads(load_recipe(written(tmp_path)).model_dump_json())
    before = json.loads(json.dumps(now))
    before["stages"][0]["data"]["on_bad_image"] = before["stages"][0]["data"].pop("on_bad_sample")
    del before["model"]["chat_template"]
    files.claim(tmp_path / "out", {"recipe": before})
    (tmp_path / "out" / "0-s").mkdir()
    files.compare(tmp_path / "out", {"recipe": now})
    now["model"]["chat_template"] = templates.CHATML
    with pytest.raises(FoveateError, match=r"model.chat_template: null before"):
        files.compare(tmp_path / "out", {"recipe": now})
