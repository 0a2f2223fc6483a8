"""Strategies: how a picture is asked about in more than one pass. Searches look at parts of one that is too large for one look; contrasting
ones answer with a second pass beside. One method a file, one line below each."""

from __future__ import annotations

from foveate.inference.strategies.base import Found as Found
from foveate.inference.strategies.base import Strategy as Strategy
from foveate.inference.strategies.contrasting import Contrasting as Contrasting
from foveate.inference.strategies.eyes import Eyes as Eyes
from foveate.inference.strategies.eyes import Pass as Pass
from foveate.inference.strategies.eyes import opened as opened
from foveate.inference.strategies.session import Seen as Seen
from foveate.inference.strategies.words import WORDS as WORDS
from foveate.inference.strategies.words import Words as Words
from foveate.reducers.spelling import listed, read

# The methods: none, then papers by date. A line both exports a method and lists it.
# isort: off
from foveate.inference.strategies.once import Once as Once
from foveate.inference.strategies.vcd import VCD as VCD
from foveate.inference.strategies.dc2 import DC2 as DC2
from foveate.inference.strategies.damro import DAMRO as DAMRO
from foveate.inference.strategies.zoomeye import ZoomEye as ZoomEye
from foveate.inference.strategies.lrs import LRS as LRS
# isort: on

STRATEGIES: dict[str, type[Strategy]] = listed(globals(), Strategy)


def parse(text: str) -> Strategy:
    """A strategy from its spelling, such as "zoomeye:nodes=20,words=world". FoveateError for an unknown name or option."""
    return read(text, "strategy", STRATEGIES)
