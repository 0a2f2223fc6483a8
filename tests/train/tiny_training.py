"""Backbones and data small enough that a training step takes milliseconds."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from foveate.data.conversations import Conversation

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<user>' + m['content'] + '<assistant>' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)

RECIPE = """
name: tiny
output: {root}/{output}
model:
  vision: {root}/tower
  text: {root}/lm
  bridge: {{kind: chain_of_sight, scales: [[4, 2], [2, 1]], width: 32, head_dim: 16}}
log_steps: 2
workers: 0
stages:
  - name: pretrain
    data: &data {{conversations: {root}/data.json, images: {root}/images}}
    train: {{bridge: true}}
    epochs: 1
    batch_size: 4
    micro_batch: 2
    learning_rate: 1.0e-2
    save_steps: 2
  - name: grow
    data: *data
    image_size: 64
    bridge: {{scales: [[8, 2], [4, 2], [2, 1]]}}
    train: {{bridge: true, lm: {{lora: {{rank: 4, dropout: 0.1}}}}}}
    steps: 6
    batch_size: 4
    learning_rate: 1.0e-2
    warmup: 0.2
    save_steps: 2
    reducers:
      - {{share: 1/3, reducer: "vcc:layer=1,stride=4"}}
      - {{share: 1/3, cycle: [none, "random:keep=0.5"]}}
      - {{share: 1/3, reducer: none}}
  - name: all
    data: *data
    train: {{bridge: true, lm: true, tower: true}}
    steps: 5
    batch_size: 4
    learning_rate: 1.0e-2
    weight_decay: 0.1
    save_steps: 2
    reducers: [{{share: 1, reducer: "vcc:layer=1,stride=2"}}]
"""


def tokenizer(image_token: bool = True) -> PreTrainedTokenizerFast:
    """Bytes as tokens, with the world's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<image>"] if image_token else []
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[*special, "<user>", "<assistant>"],
        chat_template=TEMPLATE,
    )


def save_backbones(folder: Path, image_token: bool = True, dropout: float = 0.0, layers: int = 2) -> None:
    """`folder`/tower (32 px, patch 8: a 4 x 4 grid) and `folder`/lm."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=16
    )
    CLIPVisionModel(vision).save_pretrained(folder / "tower")
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder / "tower")
    words = tokenizer(image_token)
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, attention_dropout=dropout,
    )  # fmt: skip
    LlamaForCausalLM(text).save_pretrained(folder / "lm")
    words.save_pretrained(folder / "lm")


def save_data(folder: Path, samples: int = 24, size: int = 32) -> None:
    """`folder`/images and `folder`/data.json: one or two turns about an image; every sixth sample has two images, every fifth none."""
    random = np.random.RandomState(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(samples):
        count = 2 if i % 6 == 5 else 0 if i % 5 == 4 else 1
        names = [f"{i}-{k}.png" for k in range(count)]
        for name in names:
            Image.fromarray(random.randint(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / "images" / name)
        turns = [{"from": "human", "value": "<image>\n" * count + f"What is {i}?"}, {"from": "gpt", "value": f"It is {i * i}."}]
        if i % 2:
            turns += [{"from": "human", "value": "And now?"}, {"from": "gpt", "value": "yes" * (1 + i % 3)}]
        row = {"id": f"s{i}", "conversations": turns}
        if count:
            row["image"] = names if count > 1 else names[0]
        rows.append(row)
    (folder / "data.json").write_text(json.dumps(rows))


def save_samples(folder: Path, samples: Sequence[Conversation]) -> Path:
    """`folder`/data.json of these samples, which it returns, and their pictures in `folder`/images."""
    (folder / "images").mkdir()
    rows = []
    for one in samples:
        names = [f"{one.id}-{k}.png" for k in range(len(one.images))]
        for name, image in zip(names, one.images, strict=True):
            image.save(folder / "images" / name)
        said = [{"from": "human" if role == "user" else "gpt", "value": text} for role, text in one.turns]
        rows.append({"id": one.id, "conversations": said} | ({"image": names} if names else {}))
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"
