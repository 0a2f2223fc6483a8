"""Which methods other engines can run, how many tokens these leave, and what is said of the others."""

from __future__ import annotations

import pytest
import torch

from foveate.anatomy import places
from foveate.contract import ClsAttention, content_keys
from foveate.errors import FoveateError
from foveate.inspect.catalogue import served
from foveate.reducers import METHODS, Reducer, parse
from foveate.reducers.exporting import count_embeddings, exported, nearest_exportable, reduce_embeddings, unexportable
from foveate.tokens import Layout


def one(spelling: str) -> Reducer:
    (reducer,) = parse(spelling)
    return reducer


EMBEDDINGS = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
RASTER = Layout.item(*places(24, shape=(4, 6)))
TILES = Layout.item(*places(24, crops=3, shape=(1, 1), newline=False))

NEAREST = {
    "random:layer=2": "random",
    "uniform:keep=0.5,layer=3": "uniform:keep=0.5",
    "vcc:stride=4": "vcc:layer=0,stride=4",
    "tome:keep=0.5,site=tower": "tome:keep=0.5",
    "divprune:keep=0.3,scope=sample": "divprune:keep=0.3",
    "cdpruner:keep=0.5": "divprune:keep=0.5",
    "dart:keep=0.25": "divprune:keep=0.25",
    "fastv:keep=9": "fastervlm:keep=9",
    "sparsevlm": "fastervlm",
    "pyramiddrop": "fastervlm:keep=0.5",
    "aim": "fastervlm:keep=0.125",
    "mmtok:keep=0.5": "divprune:keep=0.5",
    "v2drop": "divprune",
    "priortr:keep=9": "fastervlm:keep=9",
    "vscan:keep=0.2": "fastervlm:keep=0.2",
    "downsample:keep=0.5": "uniform:keep=0.5",
    "giraffe:high=0.5,s=2.0": "giraffe:high=0.5",
}


@pytest.mark.parametrize(("refused", "instead"), NEAREST.items())
def test_what_is_not_exportable_is_refused_with_the_nearest_that_is(refused: str, instead: str) -> None:
    (reducer,) = parse(refused)
    reason = unexportable(reducer)
    assert reason
    assert str(nearest_exportable(reducer)) == instead
    assert not unexportable(nearest_exportable(reducer))
    with pytest.raises(FoveateError, match=f"it {reason}; the nearest that it can run is {instead}$"):
        exported([reducer], "the server")
    with pytest.raises(FoveateError, match=reason):
        count_embeddings(reducer, RASTER)
    with pytest.raises(FoveateError, match=reason):
        reduce_embeddings(reducer, EMBEDDINGS, RASTER)


def test_the_list_says_it_of_every_method() -> None:
    able = {
        "random",
        "uniform",
        "avgpool2d",
        "tome",
        "hired",
        "fopru",
        "fastervlm",
        "vispruner",
        "visionzip",
        "divprune",
        "hiprune",
        "holov",
    }
    able |= {"fewerframes", "dycoke", "giraffe", "prunevid", "fastvid", "vidcom2", "holitom", "evs", "flashvid"}
    assert {name for name, method in METHODS.items() if served(method) == "yes"} == able
    assert all(served(method) == "no" for name, method in METHODS.items() if name not in able)


@pytest.mark.parametrize("several", ["divprune:keep=0.25+pyramiddrop", "random+uniform", "none"])
def test_it_is_one_reducer(several: str) -> None:
    with pytest.raises(FoveateError, match="runs one reducer"):
        exported(parse(several))
    assert exported(parse("divprune")) == parse("divprune")[0]


def test_the_number_follows_from_sizes_or_there_is_none() -> None:
    assert count_embeddings(one("divprune:keep=0.25"), RASTER) == 6
    assert count_embeddings(one("fastervlm:keep=3"), TILES) == 9
    assert count_embeddings(one("avgpool2d:stride=2"), RASTER) == 6
    assert count_embeddings(one("hired:keep=0.5"), RASTER) == 12
    assert count_embeddings(one("hired:keep=0.5,unspent=give"), TILES) == 12
    for spelled, layout in [("hired:keep=0.5", TILES), ("avgpool2d", Layout.item(*places(24, raster=False)))]:
        with pytest.raises(FoveateError, match="does not follow from sizes alone; choose"):
            count_embeddings(one(spelled), layout)


def test_newlines_and_cls_stay_beside_the_budget() -> None:
    from foveate.tokens import Kind

    layout = Layout.item(*places(26, shape=(4, 6), before=[Kind.CLS], newline=True))
    reduced = reduce_embeddings(one("uniform:keep=0.25"), torch.randn(26, 8), layout)
    assert count_embeddings(one("uniform:keep=0.25"), layout) == len(reduced.kept) == 8
    assert reduced.kept[0] == 0
    assert reduced.kept[-1] == 25


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_positions(positions: str) -> None:
    (reducer,) = parse(f"uniform:keep=0.25,positions={positions}")
    reduced = reduce_embeddings(reducer, EMBEDDINGS, RASTER, positions=torch.arange(24) + 7)
    assert reduced.positions.tolist() == ((reduced.kept if positions == "keep" else torch.arange(6)) + 7).tolist()
    grid = RASTER.place[0, :, 2:].T  # (3, 24): the gaps of places in a grid stay open
    assert torch.equal(reduce_embeddings(reducer, EMBEDDINGS, RASTER, positions=grid).positions, grid[:, reduced.kept])
    mean = reduce_embeddings(one("vcc:layer=0,stride=4"), EMBEDDINGS, RASTER)
    assert mean.positions.tolist() == [1, 5, 9, 13, 17, 21]


def test_what_stands_behind_the_states_is_cut_with_them() -> None:
    wide = torch.cat([EMBEDDINGS, torch.randn(24, 8)], 1)
    for spelled in ["divprune:keep=0.25", "tome:keep=0.25"]:
        narrow, whole = (reduce_embeddings(one(spelled), x, RASTER, width=8) for x in (EMBEDDINGS, wide))
        assert torch.equal(narrow.kept, whole.kept)
        assert torch.equal(narrow.embeddings, whole.embeddings[:, :8])
    assert torch.equal(reduce_embeddings(one("divprune:keep=0.25"), wide, RASTER, width=8).embeddings, wide[narrow_kept(wide)])


def narrow_kept(wide: torch.Tensor) -> torch.Tensor:
    return reduce_embeddings(one("divprune:keep=0.25"), wide[:, :8], RASTER).kept


def test_random_follows_the_pixels_and_scores_are_asked_for() -> None:
    (reducer,) = parse("random:keep=0.5")
    this, other = (content_keys([torch.full((3, 4, 4), value)])[0] for value in (0.1, 0.2))
    kept = [reduce_embeddings(reducer, EMBEDDINGS, RASTER, key=key).kept.tolist() for key in (this, other, this)]
    assert kept[0] == kept[2] != kept[1]
    scores = torch.arange(24.0)
    assert reduce_embeddings(one("fastervlm:keep=3"), EMBEDDINGS, RASTER, {ClsAttention(-2): scores}).kept.tolist() == [21, 22, 23]
    with pytest.raises(FoveateError, match="ClsAttention"):
        reduce_embeddings(one("fastervlm:keep=3"), EMBEDDINGS, RASTER)
