"""The embedded world's tokenizer and its text-only documents.

A document describes a scene in words and asks about it in the chat format, so that a language model learns from text alone the grammar of
captions and to answer questions about a described scene. The description stands where a picture will stand later.
"""

import itertools
import random

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from foveate.world.pictures import COLOURS, SHAPES, SIZES, WORDS, Scene, scene
from foveate.world.questions import DESCRIBE, RULER, caption, conversation

SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<user>", "<assistant>")
VOCABULARY = 512
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}{% set ns = namespace(text='') %}{% for part in message['content'] %}"
    "{% set ns.text = ns.text + ('<image>\\n' if part['type'] == 'image' else part['text']) %}"
    "{% endfor %}{% set text = ns.text %}{% endif %}"
    "{% if message['role'] == 'user' %}<user>{{ text }}"
    "{% elif message['role'] == 'assistant' %}<assistant>{% generation %}{{ text }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('roles are user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def document(seed: int | str, most: int = 5) -> str:
    """One training document of the language model, on a scene of at most `most` objects, beginning with `<s>`. Deterministic by seed."""
    scenes = (scene(f"document/{seed}/{attempt}") for attempt in itertools.count())
    return _document(next(item for item in scenes if len(item.shapes) <= most), random.Random(f"document/{seed}"))


def _document(item: Scene, rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.05:
        return f"<s>{caption(item)}</s>"
    if kind < 0.15:  # putting things in order is what a caption of a picture asks for
        return "<s>" + turn(caption(item, rng=rng) + "\n" + DESCRIBE, caption(item))
    if kind < 0.5:  # the same again in another order: nearly every token is a lookup, and looking things up is learnt from these
        return "<s>" + turn(caption(item, rng=rng), caption(item, rng=rng))
    places = kind >= 0.6
    asked = conversation(item)
    if not places:
        asked = [one for one in asked if one.family not in ("relation", "locating")]
    text = caption(item, places, rng if rng.random() < 0.5 else None)
    return "<s>" + "".join(turn(f"{text}\n{one.question}" if i == 0 else one.question, one.answer) for i, one in enumerate(asked))


def turn(question: str, answer: str) -> str:
    """One turn of the chat format."""
    return f"<user>{question}<assistant>{answer}</s>"


def build_tokenizer(documents: int = 4000) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the world's texts: at most 512 entries, digits apart, special tokens first, `<loc0>` to `<loc15>` last.

    The places are not special, so that decoding an answer keeps them. No token is added to a text by itself.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    places = [f"<loc{i}>" for i in range(RULER)]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - RULER,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [document(f"tokenizer/{i}") for i in range(documents)]
    pieces = [piece for text in texts for piece in _between(text, [*SPECIAL, *places])]
    # Answers and captions name the same things with and without a space before them.
    pieces += [name for name in (*COLOURS, *SHAPES, *SIZES, *WORDS) for _ in range(documents // 4)]
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in places])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"},
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def _between(text: str, names: list[str]) -> list[str]:
    """The stretches of a text between added tokens: what BPE ever sees."""
    for name in names:
        text = text.replace(name, "\0")
    return [piece for piece in text.split("\0") if piece]
