"""What every strategy is: a frozen dataclass that searches a picture for the answer to a question, pass by pass, within budgets."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from PIL import Image

from foveate.accounting import Ledger
from foveate.data import pixels
from foveate.errors import FoveateError
from foveate.inference.contrast import Contrast
from foveate.inference.strategies.boxes import Box
from foveate.inference.strategies.eyes import Eyes, Pass
from foveate.inference.strategies.session import Limits, Seen, Session, Spent
from foveate.inference.strategies.words import Words, words_of
from foveate.reducers.spelling import Spelled


@dataclass(frozen=True)
class Found:
    """The answer to a question, and how it was come by.

    boxes    what it was read off, in pixels of the picture; (): the picture as it is
    seen     what the model was asked about, in this order
    passes   every call of the model, the last one being the answer
    ended    why the search was over: "found", "given up", "searched" (all there was), or the budget that was used up
    ledger   the cost of all passes; None where that of one is not known
    seconds  from the beginning to the answer, what is done beside the model included
    """

    answer: str
    boxes: tuple[Box, ...]
    seen: tuple[Seen, ...]
    passes: tuple[Pass, ...]
    ended: str
    ledger: Ledger | None
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens that entered the language model in all passes, and those that it made."""
        return sum(one.prompt + one.new for one in self.passes)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens that entered the first layer, in all passes."""
        return sum(one.visual for one in self.passes)


@dataclass(frozen=True)
class Strategy(Spelled, ABC):
    """One method. Its fields are the method's options, among them:

    side    pixels that count as one look; 0: as many as the model sees at once
    words   how the model is asked: "plain", "world" for models of the embedded world, or `Words` of one's own
    nodes, flops, seconds  budgets, see `Limits`

    name, paper: its spelling, and its arXiv number.
    """

    paper: ClassVar[str]
    side: int = field(default=0, kw_only=True)
    words: str | Words = field(default="plain", kw_only=True)
    nodes: int | None = field(default=None, kw_only=True)
    flops: float | None = field(default=None, kw_only=True)
    seconds: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        words_of(self.words)
        self.least(0, "side")
        if self.nodes is not None:
            self.least(1, "nodes")
        for option in ("flops", "seconds"):
            value = getattr(self, option)
            if value is not None and (type(value) not in (int, float) or not value > 0):
                raise FoveateError(f"{self.name}: {option}={value!r} is not possible; give a number above 0")
        self.check()

    def check(self) -> None:
        """Raises FoveateError where an option is not possible."""

    def between(self, low: float, high: float, *options: str) -> None:
        """FoveateError unless the options are numbers of these bounds."""
        for option in options:
            value = getattr(self, option)
            if type(value) not in (int, float) or not low <= value <= high:
                raise FoveateError(f"{self.name}: {option}={value!r} is not possible; give a number between {low:g} and {high:g}")

    @property
    def contrast(self) -> Contrast | None:
        """What the answer is contrasted with, token by token; None: with nothing."""
        return None

    @abstractmethod
    def search(self, session: Session) -> str:
        """Looks about, leaves the parts of the picture to answer by in `session.chosen`, and says why it is over. A budget that is used up
        ends it by an exception, so that they are to stand there at any time."""

    def last(self, session: Session) -> tuple[Sequence[Image.Image], str]:
        """The views and the text by which the question is answered, after the search."""
        views = [session.view(box) for box in session.chosen]
        return views or [session.picture], session.question

    def run(
        self,
        eyes: Eyes,
        images: Sequence[Image.Image],
        question: str,
        *,
        new_tokens: int = 32,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Found:
        """Search the one image for the answer, of at most `new_tokens` tokens. `clock`: what tells the seconds.

        FoveateError for a question without an image or about several, and for a budget of FLOPs below one answer."""
        if len(images) != 1:
            told = "this question has none, so there is nothing to look at" if not images else f"this question is about {len(images)}"
            raise FoveateError(f"{self.name} searches one image: {told}; ask the model without a strategy")
        if not question.strip():
            raise FoveateError(f"{self.name}: the question is empty, so there is nothing to search for")
        picture = pixels.open_image(images[0])
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        limits = Limits(self.nodes, self.flops, self.seconds)
        start = clock()
        session = Session(eyes, picture, question, words_of(self.words), limits, new_tokens, self.side, clock, self.contrast)
        try:
            ended = self.search(session)
        except Spent as budget:
            ended = str(budget)
        views, text = self.last(session)
        answer, fits = session.answer(views, text)
        boxes = tuple(session.chosen) if fits else ()
        seen = tuple(session.seen.values())
        return Found(answer, boxes, seen, tuple(session.passes), ended, session.ledger, clock() - start)
