"""Many processors need torchvision, whose package of PyPI does not load its operators beside a CPU build of torch.

The two operators that its import insists on are declared here, for these tests alone; nothing calls them. torchvision, timm and what else
some processors want come from a folder of their own (the Makefile fills it), so that all other tests run without them.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXTRAS = Path(__file__).parent.parent.parent / ".venv" / "conformance"
if EXTRAS.is_dir():
    sys.path.append(str(EXTRAS))
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

CELLS: dict[tuple[str, str, str], str] = {}
SCORES: dict[tuple[str, str], str] = {}
BARE: dict[tuple[str, str], str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="every family, not only the representative ones")
    parser.addoption("--table", type=Path, help="where to write the page; the outcomes are written to expected.json, not compared with it")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    said: dict[str, Any] = dict(report.user_properties)
    if report.when == "call":
        word = "failed" if report.failed else said.get("outcome", "failed")
        if "cell" in said:
            family, method, check = said["cell"]
            CELLS[family, method, check] = word
            if "bare" in said:
                BARE[family, check] = said["bare"]
        if "scored" in said:
            family, reducers = said["scored"]
            SCORES[family, reducers] = word


def pytest_sessionfinish(session: pytest.Session) -> None:
    where = session.config.getoption("--table", None)
    if where is not None and not hasattr(session.config, "workerinput"):
        from tests.conformance.expected import update
        from tests.conformance.table import render

        where.write_text(render(update(CELLS, SCORES, BARE)), encoding="utf-8")
