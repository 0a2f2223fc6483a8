"""Chat templates in the manner of well-known families, and a processor that has one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.model.tiny_backbones import byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# An empty thought in front of the last answer; those of earlier answers are dropped.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role != 'assistant' %}{{ m.content }}{% else %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# The same without the switch: a question leaves the thought to the model, an answer of the data has none.
THINKER = QWEN3.replace("{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}", "")
# The generation prompt opens a thought, and answers of the data have none at all.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (  # without any end, as LLaVA-1.5's in transformers
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + ' ' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
BARE = (  # neither an end nor a generation prompt
    "{% for m in messages %}{{ {'user': 'Q: ', 'assistant': 'A: '}[m.role] + m.content + '\n' }}{% endfor %}"
)
BETWEEN = (  # an end between turns only
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
LAST = (  # a mark in front of the last answer only
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if loop.last and m.role == 'assistant' %}{{ '[final] ' }}{% endif %}"
    "{{ m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# template, the token that ends a turn, what is put behind answers by us
ENDS = {
    "chatml": (CHATML, "<|im_end|>", ""),
    "qwen3": (QWEN3, "<|im_end|>", ""),
    "thinker": (THINKER, "<|im_end|>", ""),
    "r1": (R1, "</s>", ""),
    "phi3": (PHI3, "<|end|>", ""),
    "gemma2": (GEMMA2, "<end_of_turn>", ""),
    "llama3": (LLAMA3, "<|eot_id|>", ""),
    "mistral": (MISTRAL, "</s>", ""),
    "vicuna": (VICUNA, "</s>", "</s>"),
    "bare": (BARE, "</s>", "</s>"),
    "between": (BETWEEN, "</s>", "</s>"),
    "last": (LAST, "<|end|>", ""),
}

_SPECIAL = """<|im_start|> <|im_end|> <start_of_turn> <end_of_turn> <|start_header_id|> <|end_header_id|> <|eot_id|> <|user|> <|assistant|>
    <|User|> <|Assistant|>""".split()  # noqa: SIM905


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Bytes, with the tokens of all templates; Phi-3's end is, as its own, no special one."""
    made = byte_tokenizer(template=template)
    made.add_tokens(_SPECIAL, special_tokens=True)
    made.add_tokens(["<|end|>", "<think>", "</think>"])
    return made


def processor(template: str) -> Any:
    """What a Renderer needs of a processor."""
    return SimpleNamespace(tokenizer=tokenizer(template), chat_template=template, image_token="<image>")


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
