"""Bridges: trained modules from vision features to visual tokens, or to weights. One file per method, one line here.

Lenses: trained modules that a tiling has between tower and bridge, from features to features.
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from foveate.bridges.avg_pool2d import AvgPool2d
from foveate.bridges.base import Bridge, ElasticBridge
from foveate.bridges.c_abstractor import CAbstractor
from foveate.bridges.chain_of_sight import ChainOfSight
from foveate.bridges.comm import COMM
from foveate.bridges.d_abstractor import DAbstractor
from foveate.bridges.dual_perspective import DualPerspective
from foveate.bridges.ldpv2 import LDPv2
from foveate.bridges.mg_gate import MGGate
from foveate.bridges.mlp import MLP
from foveate.bridges.mqt import MQT
from foveate.bridges.pixel_shuffle import PixelShuffle
from foveate.bridges.resa import ReSA
from foveate.bridges.resampler import Resampler
from foveate.bridges.tile_queries import TileQueries
from foveate.bridges.vlora import VLoRA
from foveate.bridges.wide_windows import WideWindows
from foveate.errors import FoveateError

BRIDGES: dict[str, type[Bridge]] = {
    "mlp": MLP,
    "avg_pool2d": AvgPool2d,
    "pixel_shuffle": PixelShuffle,
    "resampler": Resampler,
    "chain_of_sight": ChainOfSight,
    "mqt": MQT,
    "resa": ReSA,
    "c_abstractor": CAbstractor,
    "d_abstractor": DAbstractor,
    "ldpv2": LDPv2,
    "wide_windows": WideWindows,
    "comm": COMM,
    "mg_gate": MGGate,
    "vlora": VLoRA,
}

LENSES: dict[str, type[nn.Module]] = {"tile_queries": TileQueries, "dual_perspective": DualPerspective}

__all__ = [
    "BRIDGES",
    "COMM",
    "LENSES",
    "MLP",
    "MQT",
    "AvgPool2d",
    "Bridge",
    "CAbstractor",
    "ChainOfSight",
    "DAbstractor",
    "ElasticBridge",
    "LDPv2",
    "MGGate",
    "PixelShuffle",
    "ReSA",
    "Resampler",
    "VLoRA",
    "WideWindows",
    "build_bridge",
    "build_lens",
    "complete_config",
]


def build_bridge(config: Mapping[str, Any]) -> Bridge:
    """The bridge of `config`: {"kind": one of BRIDGES, constructor arguments}. FoveateError for an unknown kind or argument."""
    arguments = {name: value for name, value in config.items() if name != "kind"}
    known = _arguments(config)
    for name in arguments:
        if name not in known:
            raise FoveateError(f"a {config['kind']} bridge has no argument {name!r}{_nearest(name, list(known))}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in arguments:
            raise FoveateError(f"a {config['kind']} bridge needs {name!r}")
    return BRIDGES[config["kind"]](**arguments)


def build_lens(config: Mapping[str, Any], *, levels: int, width: int) -> nn.Module:
    """The lens of `config`: {"kind": one of LENSES, constructor arguments}, for `levels` features of `width` values each."""
    return LENSES[config["kind"]](**{name: value for name, value in config.items() if name != "kind"}, levels=levels, width=width)


def complete_config(config: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """`config` with those of `facts` (widths, levels, grid: what the backbones dictate) that the bridge takes and it leaves open."""
    known = _arguments(config)
    return {**{name: value for name, value in facts.items() if name in known}, **config}


def _arguments(config: Mapping[str, Any]) -> dict[str, inspect.Parameter]:
    kind = config.get("kind")
    if kind not in BRIDGES:
        raise FoveateError(f"unknown bridge kind {kind!r}{_nearest(str(kind), list(BRIDGES))}")
    return dict(inspect.signature(BRIDGES[kind]).parameters)


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; choose from {', '.join(names)}"
