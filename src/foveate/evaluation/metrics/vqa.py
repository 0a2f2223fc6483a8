"""VQA soft accuracy (arXiv 1505.00468): agreement with ten people, by VQAv2's official rules and what became of them.

What looks odd in the normalisation is the official script's, and kept, since scores are compared with published ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from foveate.errors import FoveateError
from foveate.evaluation.metrics.common import one_of
from foveate.evaluation.samples import Metric, Sample

PEOPLE = 10
VARIANTS = ("official", "both", "evalai")

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
# The official pattern begins with (?!<=\d), a mistyped look-behind that always holds, so that the period of "3." goes as well.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # a flag of that value stands where the count belongs
_ARTICLES = ("a", "an", "the")
_ZERO_TO_TEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_ZERO_TO_TEN)} | {"none": "0"}

# The table lists every contraction with exactly one of its apostrophes left out: dont, couldnt've, couldn'tve (but not couldntve).
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
    how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {word[:at] + word[at + 1 :]: word for word in _CONTRACTIONS.split() for at, letter in enumerate(word) if letter == "'"} | {
    "somebody'd": "somebodyd"
}  # the official table has this one the wrong way round


def normalise(text: str) -> str:
    """All of the official steps: punctuation, periods, lower case, number words, articles, contractions."""
    text = _flat(text)
    delete_all = _DIGIT_COMMA.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        touches_space = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if touches_space or delete_all else " ")
    out = _PERIOD.sub("", out, count=_MOST_PERIODS)
    words = [_NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def evalai(text: str) -> str:
    """The processor of TextVQA and VizWiz: `normalise` after commas and question marks are dropped and "'s" is split off."""
    return normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def soft(prediction: str, answers: tuple[str, ...]) -> float:
    """Mean over the people of min(1, how many of the others said `prediction` / 3): with ten, 0, 0.3, 0.6, 0.9 and then 1."""
    n, matches = len(answers), answers.count(prediction)
    # In whole numbers, so that three matches are 0.9 and not nearly so.
    return (matches * min(3, matches - 1) + (n - matches) * min(3, matches)) / (3 * n) if matches else 0.0


@dataclass(frozen=True)
class Vqa(Metric):
    """Needs ten references. `variant`:

    official  prediction and references are normalised where the ten differ, and neither where all ten are the same
    both      always, as lmms-eval does; VLMEvalKit's own rule is none of these: it keeps a period behind a digit ("3.", "v2.0.")
    evalai    always, with the processor of TextVQA and VizWiz
    """

    variant: str = "official"
    name = "vqa"

    def __post_init__(self) -> None:
        one_of(self.name, "variant", self.variant, VARIANTS)

    def complete(self, sample: Sample) -> Sample:
        if len(sample.answers) != PEOPLE:
            raise FoveateError(f"has {len(sample.answers)} answers, and metric vqa needs those of {PEOPLE} people; metric=exact takes any")
        return sample

    def score(self, prediction: str, sample: Sample) -> float:
        clean = evalai if self.variant == "evalai" else normalise
        if self.variant == "official" and len(set(sample.answers)) == 1:
            clean = _flat
        return soft(clean(prediction), tuple(clean(answer) for answer in sample.answers))


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
