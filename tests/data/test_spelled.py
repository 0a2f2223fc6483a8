"""Texts in answers that are tokenised letter by letter: where they stand, which tokens they are, and who refuses them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from foveate.data.chat import Renderer
from foveate.data.collate import Fit
from foveate.data.conversations import Conversation, Conversations, check_row
from foveate.data.library import LibraryCollator
from foveate.data.spelled import BEGIN, END, marked
from foveate.errors import FoveateError
from foveate.tokens import ImagePlan
from foveate.world.text import build_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
TEXT = st.text(st.characters(codec="utf-8", exclude_characters=BEGIN + END, exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)


def row(*turns: tuple[str, str, Any]) -> dict[str, Any]:
    return {
        "conversations": [
            turn
            for asked, told, spelled in turns
            for turn in (
                {"from": "human", "value": asked},
                {"from": "gpt", "value": told} | ({} if spelled is None else {"spelled": spelled}),
            )
        ]
    }


def turns(made: dict[str, Any]) -> list[tuple[str, str]]:
    return [("user" if turn["from"] == "human" else "assistant", turn["value"]) for turn in made["conversations"]]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(build_tokenizer(documents=1000))


def test_what_is_listed_is_spelled_and_the_rest_is_as_before(renderer: Renderer) -> None:
    made = row(("is there a red circle?", "a red circle says red circle", ["red circle"]), ("is it red?", "red", None))
    whole, plain = (renderer.tokenise(one) for one in (marked(turns(made), made), turns(made)))
    pieces = [renderer.tokenizer.convert_ids_to_tokens(one.ids[one.supervised].tolist()) for one in (whole, plain)]
    assert pieces[1] == ["a", "Ġred", "Ġcircle", *pieces[1][3:-5], "Ġred", "Ġcircle", "</s>", "red", "</s>"]
    assert pieces[0][:12] == ["a", "Ġ", "r", "e", "d", "Ġ", "c", "i", "r", "c", "l", "e"]
    assert pieces[0][12:] == pieces[1][3:]
    assert renderer.tokenizer.decode(whole.ids) == renderer.tokenizer.decode(plain.ids)


@given(TEXT, TEXT, TEXT)
def test_the_text_stays_and_so_does_what_is_supervised(renderer: Renderer, before: str, spelled: str, behind: str) -> None:
    """What is spelled has as many tokens as bytes."""
    made = row(("is there a ring?", before + spelled + behind, [spelled]))
    if not (before + spelled + behind).strip() or check_row(made, 0):
        return
    plain = renderer.tokenise(turns(made))
    whole = renderer.tokenise(marked(turns(made), made))
    assert renderer.tokenizer.decode(whole.ids) == renderer.tokenizer.decode(plain.ids)
    shown = [renderer.tokenizer.decode(one.ids[one.supervised]) for one in (whole, plain)]
    assert shown[0] == shown[1]
    assert whole.supervised.sum() >= len(spelled.encode())


def test_each_of_several_stands_behind_the_one_before() -> None:
    made = row(("a", "to be or not to be", ["to", "be", "be"]))
    assert marked(turns(made), made)[1] == ("assistant", f"{BEGIN}to{END} {BEGIN}be{END} or not to {BEGIN}be{END}")
    assert check_row(made, 0) == ""


def test_models_of_the_library_refuse_it() -> None:
    processor = LlavaProcessor(CLIPImageProcessorPil(), build_tokenizer(documents=100), patch_size=14, chat_template=TEMPLATE)
    made = row(("<image>\nis it red?", "red", ["red"]))
    sample = Conversation(0, "s7", marked(turns(made), made), [Image.new("RGB", (30, 30))])
    with pytest.raises(FoveateError, match="s7: answers are `spelled` for Foveate's own models alone; LlavaProcessor tokenises by itself"):
        LibraryCollator(processor, 4096)([sample])


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("Thus", "`spelled` is a list of texts in an answer, found 'Thus'"),
        ([""], "`spelled` is a list of texts in an answer"),
        ([12], "`spelled` is a list of texts in an answer"),
        (["12", "Thus"], "`spelled` names 'Thus', which does not stand in the answer 'Thus 12' .behind those named before"),
    ],
)
def test_what_cannot_be_spelled_is_a_bad_sample(spelled: Any, message: str) -> None:
    assert re.match(message, check_row(row(("What does it say?", "Thus 12", spelled)), 0))
    asked = row(("What does it say?", "Thus 12", None))
    asked["conversations"][0]["spelled"] = ["What"]
    assert "is a list of texts in an answer" in check_row(asked, 0)
    assert "not to be had there" in check_row(row(("a", f"Thus{END} 12", ["Thus"])), 0)


def test_data_on_disk_have_it_and_questions_do_not(tmp_path: Path, renderer: Renderer) -> None:
    (tmp_path / "data.json").write_text(json.dumps([row(("<image>\nis it red?", "red", ["red"])) | {"image": "a.png"}]))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    sample = Conversations.open(tmp_path / "data.json", tmp_path)[0]
    assert sample.turns[1] == ("assistant", f"{BEGIN}red{END}")
    found = renderer.tokenise(sample.turns)
    assert renderer.tokenizer.convert_ids_to_tokens(found.ids[found.supervised].tolist()) == ["r", "e", "d", "</s>"]


def test_the_check_before_training_finds_it(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = row(("is it red?", "red", ["red"]))
    turned = marked(turns(made), made)
    assert Fit(renderer, ImagePlan.whole, 4096)(turned, []) == ""
    assert "has `spelled` answers" in Fit(renderer, ImagePlan.whole, 4096, spells=False)(turned, [])
    assert Fit(renderer, ImagePlan.whole, 4096, spells=False)(turns(made), []) == ""
    monkeypatch.setattr(renderer, "_letters", lambda text, spans: renderer._encode(f" {text}", spans, special=False))
    assert "cannot write 'red' letter by letter" in Fit(renderer, ImagePlan.whole, 4096)(turned, [])


def test_a_tokenizer_that_puts_a_space_in_front_of_letters_is_refused() -> None:
    """As sentencepiece's do with whatever they are given by itself."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 3, "▁": 4, **{letter: 5 + i for i, letter in enumerate("abcdeqz:")}}
    inner = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        chat_template="{% for m in messages %}q:{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}q:{% endif %}",
    )
    made = row(("q", "abc de", ["de"]))
    with pytest.raises(FoveateError, match="cannot write 'de' letter by letter: leave `spelled` out of the data"):
        Renderer(tokenizer).tokenise(marked(turns(made), made))
