"""The table of sites (`foveate.contract.sites`): what a type of site says of tokens, cache and decisions is what happens there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import pytest
import torch
from PIL import Image
from transformers import DynamicCache

import foveate
from foveate.contract import BeforeLM, BeforeProcessor, Decision, FromLayer, InEncoder, Site, ThroughLayer, View, Visibility, Workload
from foveate.contract.sites import SITES as SITES_TABLE
from foveate.reducers import Reducer, visual_tokens
from foveate.tokens import Kind, TokenMap
from tests.tiny import LAYERS, PATCHES, Batch, llava, prompt

SITES: list[Site] = [InEncoder(1), BeforeLM(), FromLayer(2), FromLayer(3), ThroughLayer(0), ThroughLayer(2)]


@dataclass(frozen=True)
class EverySecond(Reducer):
    """Every second visual token stays, at any site."""

    name: ClassVar[str] = "every-second"
    paper: ClassVar[str] = "-"
    site: Any = None
    decides: Any = None  # in place of the site's own

    def sites(self, layers: int) -> list[Site]:
        return [self.site]

    def reduce(self, view: View, stage: int = 0) -> Decision:
        patch = (view.layout.kind == Kind.PATCH) & view.layout.visual
        kept: Decision = (self.decides or self.site.effect.decides)(TokenMap.keep(view.layout, ~patch | (patch.cumsum(1) % 2 == 1)))
        return kept

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return [(arriving + 1) // 2 for arriving in work.arriving]


def _id(site: Site) -> str:
    return f"{type(site).__name__}-{site.index}"


def test_every_type_of_site_is_here() -> None:
    assert {type(site) for site in SITES} | {BeforeProcessor, Visibility} == set(get_args(Site)) == set(SITES_TABLE)
    assert BeforeProcessor().effect.decides is None


@pytest.mark.parametrize("site", SITES, ids=_id)
def test_tokens_cache_and_cost(site: Site) -> None:
    batch, cache, reducer = Batch([prompt(1, [1, 2, 3])]), DynamicCache(), EverySecond(site=site)
    beside = len(batch.rows[0]) - PATCHES
    fewer = [layer >= site.layer if site.effect.lasts else layer == site.layer for layer in range(LAYERS)]
    expected = [PATCHES // 2 if less else PATCHES for less in fewer]
    with foveate.attach(llava(), reducer) as run, torch.no_grad():
        run.anatomy.core(**batch.inputs, past_key_values=cache)
    assert visual_tokens([reducer], PATCHES, LAYERS) == expected
    assert list(run.ledger.visual_tokens) == expected
    assert [layer.keys.shape[2] for layer in cache.layers] == [tokens + beside for tokens in expected]
    whole = foveate.accounting.predict(run.config, text_tokens=beside)
    assert [here < there for here, there in zip(run.ledger.layer_flops, whole.layer_flops, strict=True)] == fewer
    assert (run.ledger.flops["tower"] < whole.flops["tower"]) == (site.effect.place == "tower")


@pytest.mark.parametrize("site", SITES, ids=_id)
def test_another_decision_is_refused(site: Site) -> None:
    other = next(decision for decision in get_args(Decision) if decision is not site.effect.decides)
    with (
        foveate.attach(llava(), EverySecond(site=site, decides=other)) as run,
        pytest.raises(foveate.FoveateError, match=f"decides {other.__name__}"),
    ):
        run.anatomy.core(**Batch([prompt(1, [1, 2, 3])]).inputs)


def test_in_front_of_the_processor_the_model_is_not_touched() -> None:
    class Prepares(EverySecond):
        def prepare(self, image: Image.Image) -> Image.Image:
            return image.resize((image.width // 2, image.height // 2))

    reducer = Prepares(site=BeforeProcessor())
    assert foveate.reducers.prepare([reducer], Image.new("RGB", (8, 4))).size == (4, 2)
    assert foveate.reducers.in_model([reducer]) == []
    assert visual_tokens([reducer], PATCHES, LAYERS) == [PATCHES] * LAYERS
