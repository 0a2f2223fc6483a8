"""The embedded world's tokenizer, chat format and text-only documents."""

import re

import pytest
from transformers import PreTrainedTokenizerFast

from foveate.world.exercises import asked, crossed, exercise
from foveate.world.pictures import scene
from foveate.world.questions import caption, conversation
from foveate.world.text import SPECIAL, build_tokenizer, document, turn


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(documents=1000)


def test_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= 512
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(range(6))
    assert tokenizer.convert_tokens_to_ids([f"<loc{i}>" for i in range(16)]) == list(range(len(tokenizer) - 16, len(tokenizer)))
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
    assert tokenizer.image_token == "<image>"
    assert build_tokenizer(documents=1000).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    "text",
    [
        "a large red circle<loc4><loc5>, the number 73<loc0><loc15>",
        "<s><user><image>\nis there a red circle?<assistant>yes</s>",
        "  two  spaces, Übergröße, 漢字 🙂\n\ttabs 1234567890",
        *(document(i) for i in range(20)),
    ],
)
def test_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_apart_and_places_survive_decoding(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer("9071").input_ids) == 4
    assert len(tokenizer("<loc3><loc12>").input_ids) == 2
    answer = tokenizer("<loc3><loc12><loc5><loc15></s><pad>").input_ids
    assert tokenizer.decode(answer, skip_special_tokens=True) == "<loc3><loc12><loc5><loc15>"


def test_questions_are_short(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = [one for i in range(200) for one in conversation(scene(i))]
    assert max(len(tokenizer(one.question).input_ids) for one in asked) <= 10
    answers = [len(tokenizer(one.answer).input_ids) for one in asked if one.family not in ("locating", "reading")]
    assert max(answers) == 1  # "red" as an answer is as cheap as " red" in a caption


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a red ring?"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "how many?"},
    ]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == "<s><user><image>\nis there a red ring?<assistant>yes</s><user>how many?<assistant>"
    made = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, mine in zip(made["input_ids"], made["assistant_masks"], strict=True) if mine]
    assert tokenizer.decode(answer) == "yes</s>"
    with pytest.raises(Exception, match="roles are user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "be kind"}], tokenize=False)


def test_turns_and_talks_are_the_chat_format(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [{"role": "user", "content": "a small red ring\nwhat color is the ring?"}, {"role": "assistant", "content": "red"}]
    assert "<s>" + turn(talk[0]["content"], "red") == tokenizer.apply_chat_template(talk, tokenize=False)
    for made in (asked(0), exercise(1), crossed(2)):
        text = "".join(piece for piece, _ in made.words())
        said = re.findall(r"<user>(.*?)<assistant>(.*?)</s>", text, re.DOTALL)
        talk = [{"role": role, "content": one} for pair in said for role, one in zip(("user", "assistant"), pair, strict=True)]
        assert len(talk) > 4
        assert text == tokenizer.apply_chat_template(talk, tokenize=False)


def test_documents() -> None:
    assert document(3) == document(3)
    assert all(f"{n}</s>" not in document(i, most=2) for i in range(50) for n in ("objects are there?<assistant>3", "there?<assistant>4"))
    texts = [document(i) for i in range(400)]
    assert len(set(texts)) == 400
    assert all(text.startswith("<s>") and text.endswith("</s>") for text in texts)
    alone = [text for text in texts if "<user>" not in text]
    describing = [text for text in texts if "describe the image." in text]
    bare = [text for text in texts if "<loc" not in text]
    assert min(len(alone), len(describing), len(bare)) > 5
    for text in describing:  # the answer is the same things, put in order
        shuffled, answer = re.fullmatch(r"<s><user>(.*)\ndescribe the image\.<assistant>(.*)</s>", text).groups()  # type: ignore[union-attr]
        assert sorted(shuffled.split(", ")) == sorted(answer.split(", "))
    for text in bare:  # nothing is asked that the description does not tell
        assert "where is" not in text
        assert " left of " not in text
        assert " above " not in text
    assert all(caption(scene(f"document/{i}/0")) in text for i, text in enumerate(texts) if text in alone)
