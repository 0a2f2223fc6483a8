"""A method that is one score, what it has for nothing, and what every method says of itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import foveate
from foveate import FoveateError, Layout, Ranker, TokenMap, View
from foveate.contract import BeforeLM, ImageSize, Site, Workload
from foveate.inspect.catalogue import print_catalogue
from foveate.reducers import BASELINES, METHODS, FastV, PyramidDrop, Schedule, SparseVLM, parse, spell
from foveate.tokens import SCOPES, budget


@dataclass(frozen=True)
class Later(Ranker):
    """Keeps what stands last."""

    name: ClassVar[str] = "later"
    paper: ClassVar[str] = "-"
    keep: float | int = 0.5
    of: str = "arriving"
    scope: str = "image"

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM()]

    def score(self, view: View, stage: int = 0) -> Tensor:
        return torch.arange(view.layout.shape[1]).expand(view.layout.shape).float()


def tiled() -> Layout:
    """Two images of 8 and 4 tokens: crops of 5 and 3, frames of 4, 4 and 4."""
    layout = Layout.sequence(torch.tensor([[True] * 8 + [False] + [True] * 4]))
    place = layout.place.clone()
    place[0, :8, 1] = torch.tensor([0] * 5 + [1] * 3)
    place[0, :8, 2] = torch.tensor([0] * 4 + [1] * 4)
    return replace(layout, place=place)


@pytest.mark.parametrize(
    ("scope", "kept"),
    [
        ("image", [4, 5, 6, 7, 11, 12]),
        ("crop", [2, 3, 4, 6, 7, 11, 12]),
        ("frame", [2, 3, 6, 7, 11, 12]),
        ("sample", [6, 7, 9, 10, 11, 12]),
    ],
)
def test_the_best_of_each_group_stay(scope: str, kept: list[int]) -> None:
    layout = tiled()
    found = Later(0.5, scope=scope).reduce(View.of(torch.zeros(1, 13, 2), layout=layout)).map
    assert found.representative[found.target.visual].tolist() == kept
    work = Workload((ImageSize((5, 3), (4, 4)), ImageSize.whole(4)), (8, 4))
    assert sum(Later(0.5, scope=scope).count(work)) == len(kept)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("keep", [0.3, 0.5, 2])
def test_shares_of_the_original_are_counted_before_earlier_cuts(scope: str, keep: float | int) -> None:
    first = View.of(torch.zeros(1, 13, 2), layout=tiled())
    dropped = torch.ones(1, 13, dtype=torch.bool)
    dropped[0, [0, 6, 12]] = False
    cut = TokenMap.keep(first.layout, dropped)
    view = replace(View.of(torch.zeros(1, 10, 2), layout=cut.target), first=first)
    found = Later(keep, of="original", scope=scope).reduce(view).map.target
    before, after, here = (layout.owners(scope) for layout in (first.layout, found, cut.target))
    for owner in before[first.layout.visual].unique():
        original = int((before[first.layout.visual] == owner).sum())
        arriving = int((here[cut.target.visual] == owner).sum())
        assert int((after[found.visual] == owner).sum()) == min(arriving, budget(keep, original))


def test_its_options_are_checked() -> None:
    for options, message in (({"keep": 0}, "keep=0 is not possible"), ({"of": "x"}, "of='x'"), ({"positions": "x"}, "positions='x'")):
        with pytest.raises(FoveateError, match=message):
            Later(**options)


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        (PyramidDrop((0.5, 0.25, 0.1)), "pyramiddrop:keep=0.5-0.25-0.1"),
        (PyramidDrop([9]), "pyramiddrop:keep=9"),
        (Schedule([(1, 0.5), (3, 0.50)]), "schedule:keeps=1:0.5"),
        (Schedule("0:1/2:1"), "schedule:keeps=0:1"),
        (SparseVLM((8, 4), (1, 3)), "sparsevlm:keep=8-4,layers=1-3"),
        (SparseVLM("v2-64"), "sparsevlm:keep=v2-64"),
        (FastV(5), "fastv:keep=5"),
    ],
)
def test_one_setting_has_one_spelling(given: Any, spelled: str) -> None:
    assert spell([given]) == spelled
    assert parse(spelled) == [given]


def test_what_methods_say_of_themselves() -> None:
    assert {name for name, method in METHODS.items() if method.experimental} == {
        "eemllm",
        "fopru",
        "schedule",
        "fastvid",
        "holov",
        "atpllava",
    }
    assert [method.name for method in BASELINES] == ["random", "uniform", "avgpool2d", "fewerframes", "downsample"]
    assert [m.paper for m in METHODS.values() if m not in BASELINES] == sorted(m.paper for m in METHODS.values() if m not in BASELINES)
    assert all(getattr(foveate.reducers, method.__name__) is method for method in METHODS.values())


def test_the_list_marks_what_is_experimental(capsys: pytest.CaptureFixture[str]) -> None:
    print_catalogue()
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("experimental: ") == 7
    assert "the tower's [CLS] attention (without [CLS]:" in printed
