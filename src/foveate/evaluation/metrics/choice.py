"""Multiple choice: which letter an answer names. Benchmarks read it differently, and it moves scores, so the rule is named."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from foveate.errors import FoveateError
from foveate.evaluation.metrics.common import normalise, one_of
from foveate.evaluation.samples import Metric, Sample

LETTERS = string.ascii_uppercase
UNLISTED = dict.fromkeys(LETTERS[:8], "")  # the letters looked for where the options are not known
_LISTED = re.compile(r"^\s*\(?([A-Z])[.):]\s+(\S.*?)\s*$", re.MULTILINE)


def options_of(sample: Sample) -> dict[str, str]:
    """The options by letter: those of the data set's columns, else the lines "A. text" or "(A) text" of the question; {} if none."""
    if "options" in sample.extra:
        return dict(zip(LETTERS, sample.extra["options"], strict=False))
    found: dict[str, str] = {}
    for letter, text in _LISTED.findall(sample.question):
        if letter == LETTERS[len(found)]:
            found[letter] = text
    return found


# ---- rules: (answer, options by letter) -> the letter, or None --------------------------------------------------------------------------


def generic(text: str, options: Mapping[str, str]) -> str | None:
    """The letter in the most telling place: at the start, at the end, behind "answer is", in brackets, before a period, a colon, a
    bracket, a space; of several such places the last."""
    text = text.strip().strip(",.!?;:'\"").strip()
    letter = f"(?<![A-Za-z])([{''.join(options)}])(?![A-Za-z])"
    places = (
        (10, rf"\A{letter}"),
        (9, rf"{letter}\Z"),
        (7, rf"(?i:answer|option|choice)(?i: is):?\s*\(?{letter}"),
        (6, rf"\({letter}\)"),
        (5, rf"{letter}\."),
        (4, rf"{letter}:"),
        (3, rf"{letter}\)"),
        (2, rf"{letter}\s"),
    )
    found = [(weight, match.start(1), match[1]) for weight, pattern in places for match in re.finditer(pattern, text)]
    return max(found)[2] if found else None


def leading(text: str, options: Mapping[str, str]) -> str | None:
    """ScienceQA, AI2D: the letter alone, in either case, or "B." before anything else."""
    match = re.match(r"([A-Z])\.", text.strip())
    letter = match[1] if match else text.strip().upper()
    return letter if letter in options else None


def first(text: str, options: Mapping[str, str]) -> str | None:
    """SEED-Bench as lmms-eval asks it: the first character."""
    letter = text.strip()[:1]
    return letter if letter in options else None


def mmstar(text: str, options: Mapping[str, str]) -> str | None:
    """MMStar (arXiv 2403.20330): the first character, in either case, or that behind "(", "option " or "the answer is "."""
    match = re.match(r"(?:\(|option |the answer is )?([a-z])", text.strip().lower())
    letter = match[1].upper() if match else ""
    return letter if letter in options else None


def mmbench(text: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit's order without a judge: the only letter among the words, if it is among the last four; the letter behind "answer is";
    the only option whose text the answer holds, unless the answer is longer than all options twice over."""
    tokens = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    named = [letter for letter in options if letter in tokens]
    if len(named) == 1 and tokens.index(named[0]) >= len(tokens) - 4:
        return named[0]
    match = re.search(rf"(?i:answer is)\W*([{''.join(options)}])(?!\w)", text)
    if match:
        return match[1]
    if len(text) <= 2 * sum(len(option) for option in options.values()):
        held = [letter for letter, option in options.items() if option and option.lower() in text.lower()]
        if len(held) == 1:
            return held[0]
    return None


RULES: dict[str, Callable[[str, Mapping[str, str]], str | None]] = {
    "generic": generic,
    "leading": leading,
    "first": first,
    "mmstar": mmstar,
    "mmbench": mmbench,
}


@dataclass(frozen=True)
class Choice(Metric):
    """One letter. What names no letter is wrong; none is ever drawn by chance.

    answer_is=letter  references are letters, texts of options, or numbers (not texts of digits), which count options from 0
    answer_is=index   texts of digits count options from 0, too
    """

    rule: str = "generic"
    answer_is: str = "letter"
    name = "choice"
    multiple_choice = True

    def __post_init__(self) -> None:
        one_of(self.name, "rule", self.rule, RULES)
        one_of(self.name, "answer_is", self.answer_is, ("letter", "index"))

    def references(self, value: Any) -> tuple[str, ...]:
        if self.answer_is == "index" and isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < len(LETTERS):
                raise FoveateError(f"its answer is {value}, which counts no option")
            return (LETTERS[value],)
        return super().references(value)

    def complete(self, sample: Sample) -> Sample:
        """The reference becomes a letter."""
        options, answer = options_of(sample), sample.answers[0].strip()
        letter = answer.strip("().: ")
        if letter in (options or LETTERS) and len(letter) == 1:
            return replace(sample, answers=(letter,))
        same = [letter for letter, text in options.items() if normalise(text) == normalise(answer)]
        if len(same) != 1:
            known = f"nor one of {', '.join(options.values())}" if options else "and its options are not known (options=COLUMN names them)"
            hint = "; if it counts the options from 0, say answer_is=index" if answer.isdecimal() else ""
            raise FoveateError(f"its answer {answer!r} is neither one of the letters {known}{hint}")
        return replace(sample, answers=(same[0],))

    def score(self, prediction: str, sample: Sample) -> float:
        return float(RULES[self.rule](prediction, options_of(sample) or UNLISTED) == sample.answers[0])
