"""docs/cache.md: its code runs as it stands there, and its tables name what there is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.cache_policies import POLICIES
from foveate.inspect.catalogue import print_catalogue
from tests.tiny import LAYERS, ROWS, Batch, llava

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "cache.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
def test_the_code_runs(code: str) -> None:
    names: dict[str, Any] = {"__name__": "page", "model": llava(), "inputs": Batch(ROWS[:1]).singles[0]}
    exec(compile(code.replace("max_new_tokens=256", "max_new_tokens=2"), "docs/cache.md", "exec", dont_inherit=True), names)
    if "KeyNorm" in names:
        with torch.no_grad(), foveate.attach(names["model"], cache=names["KeyNorm"](keep=0.5)):
            cache = names["model"](**names["inputs"], use_cache=True).past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers] == [12] * LAYERS
    else:
        assert sum(names["run"].ledger.kv_stays) < sum(names["run"].ledger.kv_bytes)


def test_the_tables_name_every_policy_with_its_options() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", PAGE, re.MULTILINE))
    assert {name: set(re.findall(r"`(\w+)`", options)) for name, options in rows.items()} == {
        name: {field.name for field in fields(policy)} - {"every"} for name, policy in POLICIES.items()
    }
    table = (DOCS / "methods.md").read_text(encoding="utf-8").split("| policy |")[1].split("\n\n")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (.*)$", table, re.MULTILINE))
    assert told.keys() == POLICIES.keys()
    for name, policy in POLICIES.items():
        assert policy.paper in told[name] or policy.paper == "-"
        assert ("experimental: " in told[name]) == policy.experimental


def test_the_list_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    print_catalogue()
    told = capsys.readouterr().out.split("cache policy")[1].split("strategy")[0]
    assert all(f"\n{name} " in told for name in POLICIES)
    assert "experimental: Keeps in each layer as many" in told
