"""`foveate bench --cache`: cache policies at the budgets of the run, what they leave beside what they answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.command import refused

from foveate.errors import FoveateError
from foveate.evaluation.bench import CACHE, bench, cached
from foveate.evaluation.cells import Bench
from foveate.evaluation.table import CACHES, markdown, rows
from foveate.evaluation.tasks import load_task
from foveate.report.bench import write_bench_report


@pytest.fixture
def found(model: Any, processor: Any, world: Path, tmp_path: Path) -> Bench:
    policies, task = ["snapkv:window=4,keep=0.9", "zipvl:tau=0.5", "random"], load_task(str(world), False)
    how: dict[str, Any] = {"seeds": 2, "baselines": False, "limit": 3, "progress": False}
    return bench(model, [replace(task, max_new_tokens=4)], [], [0.25], tmp_path / "run", processor=processor, cache=policies, **how)


def test_each_policy_has_each_budget_and_its_seeds() -> None:
    arms = cached(["snapkv:window=4,keep=0.9", "zipvl", "random"], [0.5, 0.25, 1.0], 2)
    assert [(arm.method, arm.keep, arm.seed, str(arm.cache)) for arm in arms] == [
        ("cache snapkv:window=4", 0.5, None, "snapkv:window=4"),
        ("cache snapkv:window=4", 0.25, None, "snapkv:keep=0.25,window=4"),
        ("cache zipvl", 1.0, None, "zipvl"),
        ("cache random", 0.5, 0, "random"),
        ("cache random", 0.5, 1, "random:seed=1"),
        ("cache random", 0.25, 0, "random:keep=0.25"),
        ("cache random", 0.25, 1, "random:keep=0.25,seed=1"),
    ]
    assert len({arm.cell("t").name for arm in arms}) == len(arms)


@pytest.mark.parametrize(
    ("policies", "message"), [(["none"], "is none at all"), (["snapvk"], "did you mean 'snapkv'"), (["zipvl:tau=2.0"], "tau=2.0")]
)
def test_what_is_no_policy_is_refused(policies: list[str], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        cached(policies, [0.5], 1)


def test_what_is_left_of_the_cache_stands_beside_the_accuracy(found: Bench, model: Any, processor: Any) -> None:
    bare, *others = rows(found)
    by = {row.method: row for row in others}
    assert list(by) == ["cache snapkv:window=4", "cache zipvl:tau=0.5", "cache random"]
    assert bare.kv_stays == bare.kv_bytes
    assert by["cache random"].seeds == 2
    table = markdown(found)
    for row in others:
        assert row.method.startswith(CACHE)
        assert row.tokens == bare.tokens
        assert row.kv_bytes == bare.kv_bytes
        share = (row.kv_stays or 0) / (row.kv_bytes or 1)
        assert 0.24 < share < 0.27 if row.keep == 0.25 else row.keep == 1.0 and 0.05 < share < 0.7
        assert f"KV {share:.1%}" in table
    assert CACHES.split(";")[0] in table
    page = write_bench_report(found.folder, model=model, processor=processor, scenes=0, progress=False).read_text(encoding="utf-8")
    section = page.split('id="caches"')[1].split("</table>")[0]  # apart from what saves tokens
    assert all(name in section for name in ("snapkv:window=4", "zipvl:tau=0.5", "random", "2 seeds"))
    assert "cache snapkv" not in page.replace("--cache", "")


def test_the_command_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "asset:vlm", "--tasks", "scenes", "--out", str(tmp_path / "run"), "--cache"]
    assert "unknown cache policy 'snapvk'" in refused([*command, "snapvk"], capsys)
