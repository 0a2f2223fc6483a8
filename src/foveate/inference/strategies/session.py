"""One question about one picture, searched for its answer: what was looked at, what every pass took, and the budgets that end it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from PIL import Image

from foveate.accounting import Ledger, summed, together
from foveate.errors import FoveateError
from foveate.inference.contrast import Contrast
from foveate.inference.strategies.boxes import Box, height, squared, whole, width
from foveate.inference.strategies.eyes import Eyes, Map, Pass
from foveate.inference.strategies.words import Words

T = TypeVar("T")


class Spent(Exception):
    """A budget is used up: the one that it names."""


@dataclass(frozen=True)
class Limits:
    """What a search may take; None: as much as it likes.

    nodes    parts of the picture that the model is asked about, the whole picture among them
    flops    of all passes, the answer to the question among them
    seconds  after which no pass begins but that answer
    """

    nodes: int | None = None
    flops: float | None = None
    seconds: float | None = None


@dataclass
class Seen:
    """A part of the picture that the model was asked about.

    value  how sure it was, -1 to 1, of what the strategy goes by; None where it goes by none
    said   what it said of it
    """

    box: Box
    depth: int
    value: float | None = None
    said: str = ""


class Session:
    """What a strategy searches with. Every pass goes through here, is charged, and raises `Spent` in the place of going over a budget;
    what the answer would take is set aside from the start, so that it can always be given. `contrast`: what the answer is contrasted with.

    FoveateError for a budget of FLOPs that is below one answer about the picture as it is."""

    def __init__(
        self,
        eyes: Eyes,
        picture: Image.Image,
        question: str,
        words: Words,
        limits: Limits,
        new_tokens: int = 32,
        side: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        contrast: Contrast | None = None,
    ) -> None:
        self.eyes, self.picture, self.question, self.words, self.limits = eyes, picture, question, words, limits
        self.new_tokens, self.side, self.contrast = new_tokens, side or eyes.side, contrast
        self.seen: dict[Box, Seen] = {}
        self.passes: list[Pass] = []
        self.chosen: list[Box] = []  # what the answer would be read off if the search ended now; nothing: the picture as it is
        self.hints: list[str] = []  # what closer looks have told, to go before the question
        self._clock, self._began = clock, clock()
        self._spent, self._aside = 0, 0
        if limits.flops is not None:
            self._aside = self._price(eyes.write([picture], question))
            if self._aside > limits.flops:
                raise FoveateError(
                    f"flops={limits.flops:g} is not possible: one answer about this picture takes up to {self._aside:.3g}; raise it"
                )

    @property
    def whole(self) -> Box:
        return whole(self.picture)

    def view(self, box: Box) -> Image.Image:
        """A part of the picture as a view of its own: a square, with grey where the part is none."""
        return self.picture if box == self.whole else squared(self.picture.crop(box))

    # ---- looking

    def visit(self, box: Box, depth: int) -> Seen:
        """The part of the picture, to be asked about from now on. `Spent` where there may be no more of them."""
        if box not in self.seen:
            if self.limits.nodes is not None and len(self.seen) >= self.limits.nodes:
                raise Spent("nodes")
            if not width(box) or not height(box):
                raise FoveateError(f"{box} is no part of the picture: it has no pixels")
            self.seen[box] = Seen(box, depth)
        return self.seen[box]

    def confidence(self, what: str, views: Sequence[Image.Image], text: str) -> float:
        """As `Eyes.confidence`."""
        return self._charged(what, self.eyes.confidence, self._affordable(views, text, 1))

    def say(self, what: str, views: Sequence[Image.Image], text: str) -> str:
        """As `Eyes.say`, of at most as many tokens as the answer may have."""
        return self._charged(what, lambda inputs: self.eyes.say(inputs, self.new_tokens), self._affordable(views, text, self.new_tokens))

    def attended(self, views: Sequence[Image.Image], text: str, layer: int) -> list[Map]:
        """As `Eyes.attended`."""
        return self._charged("attention", lambda inputs: self.eyes.attended(inputs, layer), self._affordable(views, text, 1, layer))

    def feature(self, view: Image.Image) -> Map:
        """As `Eyes.feature`, of one view."""
        return self._charged("features", self.eyes.feature, self._affordable([view], "", 0))

    def answer(self, views: Sequence[Image.Image], text: str) -> tuple[str, bool]:
        """The answer to the question, and whether it was read off these views by this text: where they would go over the budget, it is
        read off the picture as it is."""
        inputs, fits = self.eyes.write(views, text), True
        if self.limits.flops is not None and self._spent + self._price(inputs) > self.limits.flops:
            inputs, fits = self.eyes.write([self.picture], self.question), False
        contrast = self.contrast
        if contrast is None:
            return self._charged("answer", lambda given: self.eyes.say(given, self.new_tokens), inputs), fits
        start = self._clock()
        said, passes = self.eyes.contrasted(inputs, self.new_tokens, contrast)
        for one in passes:
            self._charge(one if one.beside else replace(one, what="answer", seconds=self._clock() - start))
        return said, fits

    # ---- cost

    @property
    def ledger(self) -> Ledger | None:
        """Of all passes so far; None where the cost of one is not known."""
        found, held = list[Ledger](), list[Ledger]()
        for one in self.passes:
            if one.ledger is None:
                return None
            held.append(one.ledger)
            if not one.beside:
                found.append(together(held))
                held = []
        return summed(found) if found else None

    def _price(self, inputs: Any) -> int:
        """Of the answer."""
        if self.contrast is None:
            return self.eyes.price(inputs, self.new_tokens)
        return self.eyes.price_contrasted(inputs, self.new_tokens, self.contrast)

    def _affordable(self, views: Sequence[Image.Image], text: str, new: int, layer: int | None = None) -> Any:
        limits = self.limits
        if limits.seconds is not None and self._clock() - self._began >= limits.seconds:
            raise Spent("seconds")
        inputs = self.eyes.write(views, text)
        if limits.flops is not None and self._spent + self.eyes.price(inputs, new, layer) + self._aside > limits.flops:
            raise Spent("flops")
        return inputs

    def _charged(self, what: str, ask: Callable[[Any], tuple[T, Pass]], inputs: Any) -> T:
        start = self._clock()
        value, seen = ask(inputs)
        self._charge(replace(seen, what=what, seconds=self._clock() - start))
        return value

    def _charge(self, seen: Pass) -> None:
        self.passes.append(seen)
        if seen.ledger is not None:
            self._spent += seen.ledger.total_flops
        elif self.limits.flops is not None:
            raise FoveateError("flops= is not possible: what a pass of this model takes is not known; give nodes= or seconds=")
