"""Foveate trains and runs vision-language models (VLMs) on fewer visual tokens.

Importing it also makes its own models known to transformers' Auto classes.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import foveate.model  # noqa: F401  # registers them
from foveate.cache_policies import CachePolicy
from foveate.contract import (
    BeforeLM,
    BeforeProcessor,
    Bypass,
    CacheView,
    Cut,
    Evict,
    FromLayer,
    InCache,
    InEncoder,
    Question,
    Signal,
    ThroughLayer,
    View,
    Visibility,
    Visible,
)
from foveate.engine.attach import attach
from foveate.engine.run import Run
from foveate.errors import FoveateError, NotApplicable
from foveate.reducers.base import Reducer
from foveate.reducers.plain import Kept, reduce
from foveate.reducers.ranker import Ranker
from foveate.tokens import Kind, Layout, TokenMap

if TYPE_CHECKING:
    from foveate.train.scheduled import ScheduleCallback

__version__ = version("foveate")
__all__ = [
    "BeforeLM",
    "BeforeProcessor",
    "Bypass",
    "CachePolicy",
    "CacheView",
    "Cut",
    "Evict",
    "FoveateError",
    "FromLayer",
    "InCache",
    "InEncoder",
    "Kept",
    "Kind",
    "Layout",
    "NotApplicable",
    "Question",
    "Ranker",
    "Reducer",
    "Run",
    "ScheduleCallback",
    "Signal",
    "ThroughLayer",
    "TokenMap",
    "View",
    "Visibility",
    "Visible",
    "attach",
    "reduce",
]


def __getattr__(name: str) -> Any:
    """What is looked up when it is first asked for: inference needs nothing of the Trainer."""
    if name == "ScheduleCallback":
        from foveate.train.scheduled import ScheduleCallback

        return ScheduleCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
