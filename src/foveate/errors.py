"""The exceptions that Foveate raises."""

import difflib
from collections.abc import Iterable
from enum import StrEnum


class FoveateError(Exception):
    """Bad input: the message names the thing, its value and the way out. The command line prints it and exits with code 2."""


class Reason(StrEnum):
    """Why a method and a model do not go together. The list is closed: anything else is a fault."""

    NO_TOWER_ATTENTION = "the vision tower has no attention to read"
    WINDOWED = "the tower's block attends within windows"
    NO_RASTER = "the tokens do not lie in a raster"
    UNKNOWN_PATCHES = "it is not known which patches made which token"
    NOT_BY_PATCH = "the tokens are not one for each patch of the tower"
    NO_TOWER_MASK = "the tower's blocks take no mask"
    TOWER_INPUTS = "the tower's blocks are given more than states"
    RECURRENT = "the decoder layer does not attend"
    SHARED_KEYS = "decoder layers read the keys of other layers"
    NO_BRANCH = "the decoder layer has no feed-forward branch of a known name"
    BOUNDED_CACHE = "no decoder layer's cache grows with the sequence"
    NO_MASK = "the decoder layers take no mask that a rule can be laid over"
    POSITIONS = "positions are not one number a token that a rotary module turns"
    NO_TOKENS = "images become weights of the decoder, not tokens"
    LATENT_CACHE = "decoder layers cache what keys and values are made of, and not these"
    ONE_AXIS = "the rotary embedding does not turn by time, height and width"


class NotApplicable(FoveateError):
    """This method cannot act on this model."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def readable(text: str) -> str:
    """A text of unknown origin as a part of a message: on one line, line breaks and what no file can hold escaped."""
    return text if text.isprintable() else repr(text)[1:-1]


def nearest(word: str, words: Iterable[str]) -> str:
    """What was probably meant, as a part of a message; "" if nothing comes near."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
