"""Calls that encode, written by hand: what was given, and how many tokens came of it. No model runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from foveate.anatomy import Anatomy, Extras, Laid, Media
from foveate.tokens import Kind


class Core(nn.Module):
    """The core of a model without weights; `vision` are fields of its vision configuration, the other names of its own."""

    def __init__(self, vision: dict[str, Any] | None = None, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(vision_config=SimpleNamespace(**vision or {}), **config)


def call(
    *lengths: int,
    core: nn.Module | None = None,
    modality: str = "image",
    crops: list[tuple[int, int]] | None = None,
    overheard: dict[str, Any] | None = None,
    extras: Extras = Extras(),  # noqa: B008
    **given: Any,
) -> Media:
    """A call that has made items of so many tokens each, of width 2."""
    core = Core() if core is None else core
    features = [torch.zeros(n, 2) for n in lengths]
    return Media(Anatomy(core, nn.Module(), nn.ModuleList()), modality, features, given, crops or [], overheard or {}, extras)


def drawn(laid: Laid) -> str:
    """One letter a token: p, a patch; n, a newline; c, [CLS]; r, a register."""
    return "".join({Kind.PATCH: "p", Kind.NEWLINE: "n", Kind.CLS: "c", Kind.REGISTER: "r"}[Kind(kind)] for kind in laid.kind.tolist())


def cells(laid: Laid) -> list[list[int]]:
    """Row and column of each token."""
    found: list[list[int]] = laid.place[:, 2:].tolist()
    return found


def raster(rows: int, columns: int) -> list[list[int]]:
    return [[r, c] for r in range(rows) for c in range(columns)]
