"""What there is: reducers, bridges, tilings, cache policies and strategies with their papers, and the architectures that are tested."""

from __future__ import annotations

import re
import sys

from rich.console import Console
from rich.table import Table

from foveate.anatomy import TESTED
from foveate.bridges import BRIDGES
from foveate.cache_policies import POLICIES
from foveate.inference.strategies import STRATEGIES
from foveate.reducers import METHODS, Reducer
from foveate.reducers.exporting import unexportable
from foveate.tilings import TILINGS

_DEPTH = 32  # decoder layers of the 7B models that the papers speak of


def acts(method: type[Reducer]) -> str:
    """Where a method's default setting acts in a language model of 32 layers."""
    found: dict[str, list[str]] = {}
    for site in method().sites(_DEPTH):
        found.setdefault(site.effect.words, []).append(str(site.index))
    return ", ".join(words.format(", ".join(indices)) for words, indices in found.items())


def needs(method: type[Reducer]) -> str:
    """What a method's default setting has to know of the model."""
    return "; ".join(dict.fromkeys(signal.words for site in method().sites(_DEPTH) for signal in site.needs if signal.words))


def served(method: type[Reducer]) -> str:
    """Whether other engines, such as servers, can run a method's default setting; asking one for it says why not."""
    return "no" if unexportable(method()) else "yes"


def print_catalogue() -> None:
    console = Console(width=None if sys.stdout.isatty() else 170)
    reducers = Table("reducer", "arXiv", "acts (defaults, 32 layers)", "needs", "served", "what it does", box=None, pad_edge=False)
    for name, method in METHODS.items():
        mark = "experimental: " if method.experimental else ""
        reducers.add_row(name, method.paper, acts(method), needs(method), served(method), mark + _first(method))
    bridges = Table("bridge", "arXiv", "what it does", box=None, pad_edge=False)
    for name, bridge in BRIDGES.items():
        cited = re.search(r"arXiv (\d{4}\.\d{5})", sys.modules[bridge.__module__].__doc__ or "")
        bridges.add_row(name, cited[1] if cited else "-", _first(bridge))
    tilings = Table("tiling", "arXiv", "what it does", box=None, pad_edge=False)
    for name, tiling in TILINGS.items():
        tilings.add_row(name, tiling.paper, _first(tiling))
    caches = Table("cache policy", "arXiv", "what it does", box=None, pad_edge=False)
    for name, policy in POLICIES.items():
        caches.add_row(name, policy.paper, ("experimental: " if policy.experimental else "") + _first(policy))
    searches = Table("strategy", "arXiv", "what it does", box=None, pad_edge=False)
    for name, strategy in STRATEGIES.items():
        searches.add_row(name, strategy.paper, _first(strategy))
    console.print(reducers, "", bridges, "", tilings, "", caches, "", searches, "", sep="\n", markup=False)
    console.print("architectures (docs/conformance.md says which reducer serves which):", markup=False)
    console.print(", ".join(f"{name} ({wants})" if wants else name for name, wants in TESTED.items()), markup=False)


def _first(of: type) -> str:
    return (of.__doc__ or "").strip().splitlines()[0]
