"""Reading conversations: what is refused before training, and what becomes of the rest."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from foveate.data.chat import Renderer
from foveate.data.collate import Collator, Fit
from foveate.data.conversations import Bad, Checked, Conversations, find_bad, refuse_or_skip
from foveate.data.pixels import shown_size
from foveate.errors import FoveateError
from foveate.tokens import ImagePlan

WORLD = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<user>' + m['content'] + '<assistant>' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as Qwen2-VL's: takes plain text as well, but only of parts does it put an image between its own tokens
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<see><image></see>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# that of llava-hf/llava-1.5-7b-hf: content in parts, images first, no end of sequence
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def words(template: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<image>", "<user>", "<assistant>", "<|im_start|>", "<|im_end|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special,
        chat_template=template,
    )


class Processor:
    """What the collator needs of a processor."""

    def __init__(self, template: str = WORLD, num_image_tokens: int = 3) -> None:
        self.tokenizer = words(template)
        self.chat_template = template
        self.image_token = "<image>"
        self.num_image_tokens = num_image_tokens
        self.plan_image = lambda height, width: ImagePlan.whole(num_image_tokens)
        size = {"height": 8, "width": 8}
        self.image_processor = CLIPImageProcessorPil(size=size, crop_size=size)


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (10, 12), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def write(folder: Path, rows: list[Any]) -> Conversations:
    (folder / "data.json").write_text(json.dumps(rows))
    return Conversations.open(folder / "data.json", folder / "images")


GOOD = [
    {"id": "one", "image": "0.png", "conversations": talk("<image>\nWhat?", "This.")},
    {"id": "two", "image": ["1.png", "2.png"], "conversations": talk("<image><image>\nBoth?", "Yes.", "Sure?", "Quite.")},
    {"id": "text", "conversations": talk("Hello", "Hi")},
]


# ---- labels --------------------------------------------------------------------------------------------------------------------------


def supervised_text(processor: Processor, ids: np.ndarray, supervised: np.ndarray) -> list[str]:
    """The runs of supervised tokens as text."""
    runs: list[list[int]] = []
    for position, (token, flag) in enumerate(zip(ids.tolist(), supervised.tolist(), strict=True)):
        if flag:
            if position == 0 or not supervised[position - 1]:
                runs.append([])
            runs[-1].append(token)
    return [processor.tokenizer.decode(run, skip_special_tokens=False) for run in runs]


TURNS = [("user", "<image>\nA b?"), ("assistant", "c"), ("user", "d"), ("assistant", "é e")]


def test_labels_of_a_conversation_by_hand() -> None:
    """<s> <user> <image> \\n A _ b ? <assistant> [c </s>] <user> d <assistant> [Ã © _ e </s>]"""
    processor = Processor()
    found = Renderer(processor).tokenise(TURNS)
    tokens = processor.tokenizer.convert_ids_to_tokens(found.ids)
    assert tokens == ["<s>", "<user>", "<image>", "Ċ", "A", "Ġ", "b", "?", "<assistant>", "c", "</s>",
                      "<user>", "d", "<assistant>", "Ã", "©", "Ġ", "e", "</s>"]  # fmt: skip
    assert np.flatnonzero(found.supervised).tolist() == [9, 10, 14, 15, 16, 17, 18]


@pytest.mark.parametrize(
    ("template", "text", "answers"),
    [
        (WORLD, "<s><user><image>\nA b?<assistant>c</s><user>d<assistant>é e</s>", ["c</s>", "é e</s>"]),
        (
            CHATML,
            "<|im_start|>user\n<image>\nA b?<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
            "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\né e<|im_end|>\n",
            ["c<|im_end|>", "é e<|im_end|>"],
        ),
        (
            QWEN,
            "<|im_start|>user\n<see><image></see>A b?<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
            "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\né e<|im_end|>\n",
            ["c<|im_end|>", "é e<|im_end|>"],
        ),
        # no end token in the template: the tokenizer's is put behind each answer
        (LLAVA, "USER: <image>\nA b? ASSISTANT: c</s> USER: d ASSISTANT: é e</s> ", [" c</s>", " é e</s>"]),
    ],
)
def test_answers_of_several_templates(template: str, text: str, answers: list[str]) -> None:
    processor = Processor(template)
    renderer = Renderer(processor)
    rendered, spans = renderer.render(TURNS)
    assert rendered == text
    assert [rendered[a:b] for a, b in spans] == answers
    found = renderer.tokenise(TURNS)
    assert supervised_text(processor, found.ids, found.supervised) == answers
    assert [rendered[a:b] for a, b in renderer._search(TURNS, rendered)] == ["c", "é e"]  # the short way is the long way


def test_contents_that_a_template_changes_go_the_long_way() -> None:
    """ChatML here trims contents, so the fixed strings alone would give another text."""
    renderer = Renderer(Processor(CHATML))
    rendered, spans = renderer.render([("user", "  a "), ("assistant", " b  ")])
    assert rendered == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert [rendered[a:b] for a, b in spans] == ["b<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    forgetful = "{% for m in messages %}{{ m['content'] if loop.last else '...' }}{{ eos_token }}{% endfor %}"
    with pytest.raises(FoveateError, match="rewrites earlier turns"):
        Renderer(Processor(forgetful)).render(TURNS)


def test_a_batch(folder: Path) -> None:
    data = write(folder, GOOD)
    processor = Processor()
    collator = Collator(processor, max_length=100)
    batch = collator([data[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 8, 8)  # the images of all rows, in order
    lengths = batch["attention_mask"].sum(1).tolist()
    # <s> <user> 3 visual, \n W h a t ? <assistant> T h i s . </s>
    assert lengths == [2 + 3 + 6 + 1 + 6, 2 + 6 + 6 + 1 + 5 + 1 + 5 + 1 + 7, 2 + 5 + 1 + 3]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image).sum(1).tolist() == [3, 6, 0]
    for row, length in enumerate(lengths):  # padded on the right
        assert batch["attention_mask"][row, :length].all()
        assert (batch["input_ids"][row, length:] == processor.tokenizer.pad_token_id).all()
        assert (batch["labels"][row, length:] == -100).all()
    supervised = batch["labels"] != -100
    assert (batch["labels"][supervised] == batch["input_ids"][supervised]).all()
    assert supervised.sum(1).tolist() == [6, 5 + 7, 3]


def test_tokens_are_remembered(folder: Path) -> None:
    data = write(folder, GOOD)
    collator = Collator(Processor(), max_length=100, remember=True)
    first = collator([data[0]])
    collator.renderer.tokenise = None  # type: ignore[method-assign,assignment]
    assert (collator([data[0]])["labels"] == first["labels"]).all()


def test_cutting_to_length(folder: Path) -> None:
    data = write(folder, GOOD)
    whole = Collator(Processor(), max_length=100)([data[1]])
    cut = Collator(Processor(), max_length=25)([data[1]])
    assert (cut["input_ids"] == whole["input_ids"][:, :25]).all()
    with pytest.raises(
        FoveateError, match=r"sample two has 34 tokens, 2 x 3 of them visual; cutting it to max_length 6 would cut an image"
    ):
        Collator(Processor(), max_length=6)([data[1]])
    with pytest.raises(FoveateError, match="sample text has no token of an answer within max_length 6"):
        Collator(Processor(), max_length=6)([data[2]])


def test_what_does_not_fit_is_found_before_training(folder: Path) -> None:
    late = {"id": "late", "image": "0.png", "conversations": talk("x" * 40, "y", "<image>", "z")}
    long_answer = {"id": "long", "image": "0.png", "conversations": talk("<image>", "y" * 400)}
    data = write(folder, [*GOOD, late, long_answer])
    bad = find_bad(data.source, None, fits=Fit(Renderer(Processor()), Processor().plan_image, max_length=45))
    assert [(b.id, "would cut an image" in b.reason) for b in bad] == [("late", True)]


# ---- bad samples ---------------------------------------------------------------------------------------------------------------------


def bomb(path: Path) -> None:
    """A tiny file that claims to be 20,000 x 20,000 pixels."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    raw = bytearray(buffer.getvalue())
    raw[16:24] = (20_000).to_bytes(4, "big") * 2
    import zlib

    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    path.write_bytes(bytes(raw))


def bad_rows(folder: Path) -> list[tuple[dict[str, Any], str]]:
    images = folder / "images"
    bomb(images / "bomb.png")
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "whole.png")
    raw = (images / "whole.png").read_bytes()
    (images / "torn.png").write_bytes(raw[: len(raw) // 2])
    (images / "text.png").write_text("not an image")
    one = talk("<image>\na", "b")
    return [
        ({"id": "missing", "image": "none.png", "conversations": one}, "image is missing"),
        ({"id": "torn", "image": "torn.png", "conversations": one}, "image cannot be decoded"),
        ({"id": "text", "image": "text.png", "conversations": one}, "image cannot be decoded"),
        ({"id": "bomb", "image": "bomb.png", "conversations": one}, "decompression bomb"),
        ({"id": "second", "image": ["0.png", "none.png"], "conversations": talk("<image><image>", "b")}, "image is missing"),
        ({"id": "no-marker", "image": "0.png", "conversations": talk("a", "b")}, "has 1 image but 0 <image> markers"),
        ({"id": "more", "image": "0.png", "conversations": talk("<image><image>", "b")}, "has 1 image but 2 <image> markers"),
        ({"id": "no-image", "conversations": one}, "has 0 images but 1 <image> marker"),
        ({"id": "in-answer", "image": "0.png", "conversations": talk("a", "<image>")}, "outside of the human turns"),
        ({"id": "order", "conversations": list(reversed(talk("a", "b")))}, "must take turns"),
        ({"id": "double", "conversations": [*talk("a", "b"), *talk("a", "b")[1:]]}, "must take turns"),
        ({"id": "unanswered", "conversations": talk("a", "b", "c")}, "must take turns"),
        ({"id": "empty", "conversations": talk("a", " ")}, "empty answer"),
        ({"id": "nothing", "conversations": []}, "no conversations"),
        ({"id": "role", "conversations": [{"from": "robot", "value": "x"}]}, "a turn must be"),
        ({"id": "absent"}, "no conversations"),
    ]


def test_every_kind_of_bad_sample_is_named(folder: Path) -> None:
    cases = bad_rows(folder)
    data = write(folder, [*GOOD, *(row for row, _ in cases)])
    bad = find_bad(data.source, None)
    assert [sample.id for sample in bad] == [row["id"] for row, _ in cases]
    for sample, (_, reason) in zip(bad, cases, strict=True):
        assert reason in str(sample)

    report = folder / "out" / "bad.txt"
    with pytest.raises(FoveateError, match="16 of 19 samples cannot be trained on") as stopped:
        refuse_or_skip(data, bad, "stop", report)
    assert "missing (none.png): image is missing" in str(stopped.value)
    assert "and 11 more" in str(stopped.value)
    assert str(report) in str(stopped.value)
    assert len(report.read_text().splitlines()) == 16


def test_skipping(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = bad_rows(folder)
    data = write(folder, [cases[0][0], GOOD[0], cases[1][0], GOOD[2]])
    refuse_or_skip(data, find_bad(data.source, None), "skip", folder / "bad.txt")
    assert [data[i].id for i in range(len(data))] == ["one", "text"]
    assert "2 of 4 samples" in caplog.text
    assert "missing (none.png)" in caplog.text
    with pytest.raises(FoveateError, match="no sample is left"):
        data.skip([Bad(i, "", "", "") for i in range(4)])


def test_good_images_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(folder, GOOD)
    cache = folder / "cache" / "checked.tsv"
    decoded: list[str] = []

    def counting(image: Any) -> tuple[int, int]:
        decoded.append(image.name)
        return shown_size(image)

    monkeypatch.setattr("foveate.data.checked.shown_size", counting)
    assert find_bad(data.source, cache) == []
    assert sorted(decoded) == ["0.png", "1.png", "2.png"]
    assert find_bad(data.source, cache) == []
    assert len(decoded) == 3
    (folder / "images" / "1.png").write_bytes(b"changed")  # another size and time: looked at again, and never remembered as good
    for _ in range(2):
        assert [sample.id for sample in find_bad(data.source, cache)] == ["two"]
    assert decoded[3:] == ["1.png", "1.png"]
    assert Checked.key(folder / "images" / "none.png") == ""


def test_an_image_that_disappears_later_is_named(folder: Path) -> None:
    data = write(folder, GOOD)
    (folder / "images" / "0.png").unlink()
    with pytest.raises(FoveateError, match="an image of sample one cannot be read any more"):
        data[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "is not JSON"), ("{}", "must be a JSON list"), ("[]", "at least one conversation")],
)
def test_a_file_that_is_no_conversations(folder: Path, content: str | None, message: str) -> None:
    path = folder / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(FoveateError, match=message):
        Conversations.open(path, folder / "images")


def test_missing_folder_and_no_folder(folder: Path) -> None:
    (folder / "data.json").write_text(json.dumps(GOOD))
    with pytest.raises(FoveateError, match=r"image folder .* does not exist"):
        Conversations.open(folder / "data.json", folder / "nowhere")
    with pytest.raises(FoveateError, match="gives no `images` folder"):
        find_bad(Conversations.open(folder / "data.json").source, None)


def test_limit(folder: Path) -> None:
    (folder / "data.json").write_text(json.dumps(GOOD))
    data = Conversations.open(folder / "data.json", folder / "images", limit=2)
    assert [data[i].id for i in range(len(data))] == ["one", "two"]


# ---- Hugging Face datasets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoded", "paths", "bytes"])
def test_parquet_gives_what_json_gives(folder: Path, kind: str) -> None:
    import datasets

    images = folder / "images"
    names = ["0.png", "1.png", "2.png"]
    rows: dict[str, Any] = {"id": ["a", "b", "c"], "conversations": [talk("<image>", f"{i}") for i in range(3)]}
    if kind == "decoded":
        rows["image"] = [str(images / name) for name in names]
        table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    else:
        rows["image"] = names if kind == "paths" else [(images / name).read_bytes() for name in names]
        table = datasets.Dataset.from_dict(rows)
    table.to_parquet(folder / "table.parquet")
    mine = Conversations.open(dataset=str(folder / "table.parquet"), images=images)
    theirs = write(
        folder, [{"id": i, "image": n, "conversations": c} for i, n, c in zip(rows["id"], names, rows["conversations"], strict=True)]
    )
    assert find_bad(mine.source, None) == []
    for i in range(3):
        a, b = mine[i], theirs[i]
        assert (a.id, a.turns) == (b.id, b.turns)
        assert [x.tobytes() for x in a.images] == [x.tobytes() for x in b.images]
    assert mine.source.sizes().shape == (3,)


def test_dataset_errors(folder: Path) -> None:
    import datasets

    with pytest.raises(FoveateError, match="cannot be loaded"):
        Conversations.open(dataset=str(folder / "none.parquet"))
    datasets.Dataset.from_dict({"x": [1]}).to_parquet(folder / "x.parquet")
    with pytest.raises(FoveateError, match="no column `conversations`; it has x"):
        Conversations.open(dataset=str(folder / "x.parquet"))
    datasets.Dataset.from_dict({"conversations": [talk("a", "b")], "image": [b"torn"]}).to_parquet(folder / "torn.parquet")
    data = Conversations.open(dataset=str(folder / "torn.parquet"))
    assert [sample.reason for sample in find_bad(data.source, None)] == ["has 1 image but 0 <image> markers"]
