"""Texts in answers that are tokenised letter by letter: {"from": "gpt", "value": "the sign says Thus 12", "spelled": ["Thus 12"]}.

A word piece of print is one of tens of thousands, and whoever reads it has to put it together of letters that stand in several visual
tokens. Letters can be copied one by one. It is what BPE-dropout (arXiv 1910.13267) does where it drops all merges, of the texts that are
named alone. The text is the same, so nothing else has to know of it: an answer that is generated so decodes to the plain word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FIELD = "spelled"
BEGIN, END = "\ue004", "\ue005"  # around such texts, on their way to the tokenizer


def marked(turns: Sequence[tuple[str, str]], row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The turns of a row that `wrong_with` has found good, with marks around what is spelled."""
    return [(role, _marked(text, turn.get(FIELD) or ())) for (role, text), turn in zip(turns, row["conversations"], strict=True)]


def _marked(text: str, spelled: Sequence[str]) -> str:
    written = ""
    for part in spelled:
        before, _, text = text.partition(part)
        written += before + BEGIN + part + END
    return written + text


def wrong_with(turn: Mapping[str, Any], answer: bool) -> str:
    """What is wrong with the texts that a turn says are spelled, "" if nothing is: they stand in its answer, one after the other."""
    spelled, rest = turn.get(FIELD), turn["value"]
    if spelled is None:
        return ""
    if not answer or not isinstance(spelled, list) or not all(isinstance(part, str) and part for part in spelled):
        return f"`{FIELD}` is a list of texts in an answer, found {str(spelled)[:80]!r}"
    if BEGIN in rest or END in rest:
        return f"a turn with `{FIELD}` holds one of the characters {BEGIN!r} and {END!r}, which are not to be had there"
    for part in spelled:
        _, found, rest = rest.partition(part)
        if not found:
            return f"`{FIELD}` names {part[:80]!r}, which does not stand in the answer {turn['value'][:80]!r} (behind those named before)"
    return ""
