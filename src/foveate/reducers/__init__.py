"""The methods, one file each, one line below each. The common tests, the command line, recipes and `foveate.json` find a method by it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError
from foveate.reducers.base import SAVED_NAME as SAVED_NAME
from foveate.reducers.base import Reducer as Reducer
from foveate.reducers.base import parse_with as parse_with
from foveate.reducers.base import save_reducers as save_reducers
from foveate.reducers.base import visual_tokens as visual_tokens
from foveate.reducers.beside import beside
from foveate.reducers.learned import Learned as Learned
from foveate.reducers.learned import add_weights as add_weights
from foveate.reducers.learned import save_weights as save_weights
from foveate.reducers.learned import saved_weights as saved_weights
from foveate.reducers.learned import take_weights as take_weights
from foveate.reducers.picker import Picker as Picker
from foveate.reducers.preparing import Preparing as Preparing
from foveate.reducers.preparing import before_processor as before_processor
from foveate.reducers.preparing import in_model as in_model
from foveate.reducers.preparing import prepare as prepare
from foveate.reducers.ranker import Ranker as Ranker
from foveate.reducers.spelling import listed

# The methods in the order of tables: baselines, then papers by date. A line both exports a method and lists it.
# isort: off
from foveate.reducers.random import Random as Random
from foveate.reducers.uniform import Uniform as Uniform
from foveate.reducers.avgpool2d import AvgPool2d as AvgPool2d
from foveate.reducers.fewerframes import FewerFrames as FewerFrames
from foveate.reducers.downsample import Downsample as Downsample
from foveate.reducers.tome import ToMe as ToMe
from foveate.reducers.fastv import FastV as FastV
from foveate.reducers.vtw import VTW as VTW
from foveate.reducers.vcc import VCC as VCC
from foveate.reducers.hired import HiRED as HiRED
from foveate.reducers.eemllm import EEMLLM as EEMLLM
from foveate.reducers.fitprune import FitPrune as FitPrune
from foveate.reducers.sparsevlm import SparseVLM as SparseVLM
from foveate.reducers.yopo import YOPO as YOPO
from foveate.reducers.gammamod import GammaMoD as GammaMoD
from foveate.reducers.pyramiddrop import PyramidDrop as PyramidDrop
from foveate.reducers.fopru import FoPru as FoPru
from foveate.reducers.dycoke import DyCoke as DyCoke
from foveate.reducers.atpllava import ATPLLaVA as ATPLLaVA
from foveate.reducers.schedule import Schedule as Schedule
from foveate.reducers.fastervlm import FasterVLM as FasterVLM
from foveate.reducers.vispruner import VisPruner as VisPruner
from foveate.reducers.aim import AIM as AIM
from foveate.reducers.pmod import PMoD as PMoD
from foveate.reducers.visionzip import VisionZip as VisionZip
from foveate.reducers.v2pe import V2PE as V2PE
from foveate.reducers.giraffe import Giraffe as Giraffe
from foveate.reducers.prunevid import PruneVid as PruneVid
from foveate.reducers.dart import DART as DART
from foveate.reducers.divprune import DivPrune as DivPrune
from foveate.reducers.fastvid import FastVID as FastVID
from foveate.reducers.vidcom2 import VidCom2 as VidCom2
from foveate.reducers.holitom import HoliTom as HoliTom
from foveate.reducers.vscan import VScan as VScan
from foveate.reducers.cdpruner import CDPruner as CDPruner
from foveate.reducers.hiprune import HiPrune as HiPrune
from foveate.reducers.mmtok import MMTok as MMTok
from foveate.reducers.v2drop import V2Drop as V2Drop
from foveate.reducers.holov import HoloV as HoloV
from foveate.reducers.evs import EVS as EVS
from foveate.reducers.visionselector import VisionSelector as VisionSelector
from foveate.reducers.ppe import PPE as PPE
from foveate.reducers.flashvid import FlashVID as FlashVID
from foveate.reducers.pixelprune import PixelPrune as PixelPrune
from foveate.reducers.restore import RESTORE as RESTORE
from foveate.reducers.priortr import PriorTR as PriorTR
# isort: on

METHODS: dict[str, type[Reducer]] = listed(globals(), Reducer)
BASELINES = tuple(method for method in METHODS.values() if method.paper == "-")


def parse(text: str) -> list[Reducer]:
    """Reducers from their spelling, such as "vcc:layer=2,stride=8+random:keep=0.5"; "" and "none" give []."""
    return parse_with(text, METHODS)


def spell(reducers: Sequence[Reducer]) -> str:
    """The canonical spelling; `parse` reads it back."""
    return "+".join(str(r) for r in reducers) or "none"


def saved_reducers(model: str | Path) -> list[Reducer] | None:
    """The reducers that a model's `foveate.json` names, None where it has no such file.

    model: a folder, or the name of a model on the Hub (its main revision); without a connection the local cache is what there is.
    Raises FoveateError for a file that is not ours and for methods that are not known, or not at the version that was saved.
    """
    path = beside(model, SAVED_NAME)
    if path is None:
        return None
    try:
        saved = [dict(options) for options in json.loads(path.read_text(encoding="utf-8"))["reducers"]]
    except (ValueError, KeyError, TypeError) as error:
        raise FoveateError(f"{path} is not a list of reducers as foveate writes it: {error}") from error
    return [_restored(options, path) for options in saved]


def _restored(options: dict[str, Any], path: Path) -> Reducer:
    name = options.get("method")
    if name not in METHODS:
        raise FoveateError(f"{path}: unknown reducer {name!r}; known are {', '.join(sorted(METHODS))}")
    method = METHODS[name]
    if options.get("version") != method.version:
        raise FoveateError(
            f"{path}: {method.name} was saved at version {options.get('version')}, this is version {method.version}; "
            "name the reducer yourself to use today's"
        )
    return method.from_dict(options)


def load_reducers(model: str | Path) -> list[Reducer]:
    """As `saved_reducers`. Raises FoveateError also when there are none."""
    found = saved_reducers(model)
    if found is None:
        name = str(model) or "the model"
        raise FoveateError(f"{name} has no {SAVED_NAME}: the model was not trained with a reducer; name one, as in attach(model, VCC())")
    return found
