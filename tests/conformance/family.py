"""What the conformance tests know of a family of models: how to make a tiny checkpoint of it, and how its prompts are written.

A family's file builds a random model of a few thousand weights and the model's real processor class, with a tokenizer made on the spot,
and saves both. The tests load them with the Auto classes, as a user loads a checkpoint of the hub, and the processor makes all inputs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

WORDS = """a the is it what which one red green blue big small cat dog sat on mat tell me story now and this that of or in two three
    yes no""".split()  # noqa: SIM905
LAYERS = 4  # decoder layers of a tiny model; hybrids have five, the fourth of them the one that does not attend


@dataclass(frozen=True)
class Row:
    """One prompt: some pictures (or videos), then words, then the answer of a training step."""

    pictures: int
    words: str
    answer: str
    seed: int = 0


ROWS = (Row(1, "what is this", "a red cat", 1), Row(2, "which one is big and red", "the dog", 2), Row(0, "tell me a story now", "no", 3))


@dataclass(frozen=True)
class Family:
    """name      as in the table of results, the `model_type` of its configuration, with ":video" behind it for videos
    build     writes checkpoint and processor into an empty folder
    prompt    (pictures, words) -> the text that the processor is given, placeholders and all
    size      (width, height) of a picture in pixels
    frames    pictures of a video; 0: the family is tested on images
    nested    whether the processor wants its pictures as one list a prompt, rather than one flat list
    most      pictures that one prompt may have
    plain     whether the processor takes prompts without any picture; where not, they go to its tokenizer alone
    options   further arguments of the processor
    attention the implementation, where the library lets the family have no other
    """

    name: str
    build: Callable[[Path], None]
    prompt: Callable[[int, str], str]
    size: tuple[int, int] = (32, 32)
    frames: int = 0
    nested: bool = False
    most: int = 2
    plain: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    attention: str = ""

    def rows(self) -> list[Row]:
        return [Row(min(row.pictures, self.most), row.words, row.answer, row.seed) for row in ROWS]

    def load(self, folder: Path, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
        """(model, processor) as a user loads them; the checkpoint is written at the first call."""
        if not (folder / "config.json").is_file():
            torch.manual_seed(0)
            self.build(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation=self.attention or attn)
        return model.eval(), AutoProcessor.from_pretrained(folder)

    def inputs(self, processor: Any, rows: Sequence[Row], side: str = "right", *, answers: bool = False) -> dict[str, Tensor]:
        """What the processor makes of some prompts, padded on one side; with the answers behind them where asked for."""
        texts = [self.prompt(row.pictures, row.words) + (" " + row.answer if answers else "") for row in rows]
        media = [[self._medium(row.seed * 10 + i) for i in range(row.pictures)] for row in rows]
        given: Any = media if self.nested else [medium for row in media for medium in row]
        how: dict[str, Any] = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        if not any(media) and not self.plain:
            made = processor.tokenizer(texts, **how)
        else:
            named = {("videos" if self.frames else "images"): given} if any(media) else {}
            made = processor(text=texts, **named, **how, **self.options)
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    def _medium(self, seed: int) -> Any:
        if self.frames:
            return np.stack([np.asarray(picture(self.size, seed * 100 + i)) for i in range(self.frames)])
        return picture(self.size, seed)


@functools.cache
def alone(name: str, attn: str | None = None) -> Any:
    """The tiny model of a family without its processor, which is saved last and may want packages that only the whole table installs."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(ImportError):
            torch.manual_seed(0)
            families()[name].build(Path(folder))
        return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attn).eval()


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Coarse coloured noise: every patch looks different, and no two pictures are alike."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.NEAREST)


def tokenizer(special: Sequence[str] = (), **named: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of WORDS and `special` tokens; `named` become attributes (image_token="<image>") that are saved with it."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=named
    )
    made.add_tokens([token for token in (*special, *named.values()) if token not in vocabulary], special_tokens=True)
    return made


def decoder(words: PreTrainedTokenizerFast, **own: Any) -> dict[str, Any]:
    """Arguments of a tiny decoder's configuration; `own` are added or put in their place."""
    return {
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": len(words),
        "initializer_range": 0.2,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": None,
        **own,
    }


def families() -> dict[str, Family]:
    """Every family of the folder `families`, by name."""
    found: dict[str, Family] = {}
    folder = Path(__file__).parent / "families"
    for module in sorted(m.name for m in pkgutil.iter_modules([str(folder)])):
        listed = importlib.import_module(f"tests.conformance.families.{module}").FAMILIES
        found |= {family.name: family for family in listed}
    return found
