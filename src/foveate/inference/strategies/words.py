"""How a search puts its questions to a model. The wording is ours: the papers' prompts are not free to copy.

Fields in braces are filled in. An empty prompt is one that a model need not be asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from foveate.errors import FoveateError, nearest


@dataclass(frozen=True)
class Words:
    """One set of prompts.

    cues        {question}: what must be seen to answer it, as a list; "": the question itself is the only one
    part        {cue}: what is asked of one of several cues
    exists      {cue}, answered by yes or no: it is here
    latent      {cue}, answered by yes or no: a closer look might show it; "": as likely as that it is here
    answerable  {question}, answered by yes or no
    describe    what is here, as a list
    combine     {parts}: what is here, as a list, after its parts have been described
    about       {question}: what is seen here that bears on it
    hint        {said} of closer looks, {question}: the last question of all
    """

    name: str
    cues: str
    part: str
    exists: str
    latent: str
    answerable: str
    describe: str
    combine: str
    about: str
    hint: str

    def __str__(self) -> str:
        return self.name


PLAIN = Words(
    "plain",
    cues="Which things does one have to see to answer this question: {question}\nName them, separated by commas, and nothing else. Where "
    "it is about every one of a kind, write for example: all dogs.",
    part="Where exactly is {cue}, and what does it look like?",
    exists="Is {cue} visible in this picture? Answer with yes or no.",
    latent="Would a closer look at some part of this picture be likely to show {cue}? Answer with yes or no.",
    answerable="Is what can be seen here enough to answer this question: {question}\nAnswer with yes or no.",
    describe="Name the things in this picture, separated by commas.",
    combine="The parts of this picture show: {parts}\nName the things in the whole picture, separated by commas.",
    about="What is seen here that bears on this question: {question}",
    hint="Closer looks at this picture have shown: {said}\n{question}",
)
"""For models that follow instructions."""

WORLD = Words(
    "world",
    cues="",
    part="{cue}",
    exists="is there: {cue}",
    latent="",
    answerable="is it large: {question}",
    describe="describe the image.",
    combine="{parts}\ndescribe the image.",
    about="{question}",
    hint="{said}\n{question}",
)
"""For models of the embedded world, which know few words; they learn the two questions of yes and no where they are trained for it."""

WORDS = {words.name: words for words in (PLAIN, WORLD)}


def words_of(name: str | Words) -> Words:
    """A set of prompts by its name. FoveateError for one that there is not."""
    if isinstance(name, Words):
        return name
    if name not in WORDS:
        raise FoveateError(f"words={name!r} is no set of prompts{nearest(str(name), WORDS)}; there are {', '.join(WORDS)}")
    return WORDS[name]
