"""Tilings: how an image becomes the views that a vision tower sees. One method a file, one line below each."""

from __future__ import annotations

from foveate.reducers.spelling import listed, read
from foveate.tilings.base import Sight as Sight
from foveate.tilings.base import Tiling as Tiling
from foveate.tilings.pixels import cut as cut

# The methods in the order of tables: none, then papers by date. A line both exports a method and lists it.
# isort: off
from foveate.tilings.whole import Whole as Whole
from foveate.tilings.anyres import AnyRes as AnyRes
from foveate.tilings.s2 import S2 as S2
from foveate.tilings.xcomposer import XComposer as XComposer
from foveate.tilings.internvl import InternVL as InternVL
from foveate.tilings.deepstack import DeepStack as DeepStack
from foveate.tilings.slime import SliME as SliME
from foveate.tilings.inf_llava import InfLLaVA as InfLLaVA
from foveate.tilings.minimonkey import MiniMonkey as MiniMonkey
from foveate.tilings.onevision import OneVision as OneVision
from foveate.tilings.idefics3 import Idefics3 as Idefics3
from foveate.tilings.nvlm import NVLM as NVLM
from foveate.tilings.native import Native as Native
from foveate.tilings.leopard import Leopard as Leopard
from foveate.tilings.bluelm import BlueLM as BlueLM
from foveate.tilings.lrs import LRS as LRS
# isort: on

TILINGS: dict[str, type[Tiling]] = listed(globals(), Tiling)


def parse(text: str) -> Tiling:
    """A tiling from its spelling, such as "internvl:tiles=6,budget=12". FoveateError for an unknown name or option."""
    return read(text, "tiling", TILINGS)
