"""Depth, rules of who sees whom and caches in seconds: what is measured, and what the tables make of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.depth.flex.run import FUNCTION, KERNEL, ROWS, RULES, TABLE, Bench, engines, functions, prompt_layout, told
from benchmarks.depth.flex.run import table as flex
from benchmarks.depth.operations import ATTENTION, BETWEEN, DECIDING, MOVING, OTHER, PRODUCTS, kind_of, profiled
from benchmarks.depth.run import main
from benchmarks.depth.show import beyond, draw, reason, table, verdict


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", PRODUCTS),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("aten::_softmax", ATTENTION),
        ("aten::index_put_", MOVING),
        ("aten::_index_put_impl_", MOVING),
        ("aten::copy_", MOVING),
        ("aten::_local_scalar_dense", DECIDING),
        ("aten::masked_fill_", DECIDING),
        ("aten::silu", OTHER),
        ("mkldnn::_linear_pointwise", PRODUCTS),
    ],
)
def test_operations_are_told_apart(operation: str, kind: str) -> None:
    assert kind_of(operation) == kind


def test_the_most_memory_is_that_of_tensors() -> None:
    before = [torch.empty(10_000)]

    def work() -> torch.Tensor:
        first = torch.empty(1000)
        second = torch.empty(1000)
        before.clear()  # it was there already, so that nothing becomes free
        del first
        return torch.cat([second, second])

    result, found = profiled(work, "cpu")
    assert result.shape == (2000,)
    assert found["peak_bytes"] == 4 * (1000 + 2000)
    assert sum(found["seconds"].values()) == pytest.approx(found["wall"])
    assert found["seconds"][MOVING] > 0


def routed(prefill: float = 0.8, step: float = 0.1, **spent: float) -> dict[str, Any]:
    """A report of two rounds: a method that needs half of the FLOPs, and as many seconds of the bare model's as is said."""

    def one(flops: int, seconds: dict[str, float], kv: int, kind: str) -> dict[str, Any]:
        whole = dict.fromkeys((PRODUCTS, ATTENTION, MOVING, DECIDING, OTHER, BETWEEN), 0.0) | seconds
        counted = {"lm_linear": 4 * flops, "lm_attention": flops, "other": 17}
        passed = {"seconds": whole, "wall": sum(whole.values()), "peak_bytes": 2**22, "granted": 0.5 if kind == "depth" else None}
        found = {"kind": kind, "visual_tokens": [64, 64], "flops": counted, "ran": counted, "kv_bytes": kv, "kv_counted": kv}
        return {**found, "kv_peak": kv, "prefill": passed, "step": passed}

    rounds = [
        {
            "bare": {"prefill": 1.0, "prefill cpu": 2.0, "step": 0.1},
            "pmod": {"prefill": prefill * off, "prefill cpu": 1.5, "step": step},
            "tower": {"tower": 2.0},
        }
        for off in (1.0, 1.1)
    ]
    found = {"bare": one(4 * 10**9, {PRODUCTS: 0.8, MOVING: 0.2}, 2**20, "bare"), "pmod": one(2 * 10**9, spent, 2**19, "depth")}
    report = {"variants": found, "rounds": rounds, "granted": [1.0, None], "skipped": {"vtw": "no such layer"}, "read_bytes": 9 * 2**20}
    return {**report, "settings": {"decode": 3}, "command": "python run.py", "machine": "a machine"}


def test_what_seconds_are_beyond_flops_is_told_by_what_took_them() -> None:
    report = routed(products=0.5, moving=0.3, other=0.02)
    over = beyond(report, "pmod", "prefill")
    assert over == pytest.approx({PRODUCTS: 0.1, ATTENTION: 0.0, MOVING: 0.2, DECIDING: 0.0, OTHER: 0.02, BETWEEN: 0.0})
    text = reason(report, "pmod")
    assert text.startswith("`pmod`: faster in every round; 0.84 of the seconds at 0.50 of the FLOPs.")
    assert "took 0.320 s more than its FLOPs allow: gathering, scattering and copying 0.200, matrix products 0.100 (at 16 GFLOP/s" in text
    assert "the bare model's at 20)." in text
    report["variants"]["pmod"]["ran"] = {"lm_linear": 8 * 10**9, "lm_attention": 4 * 10**9}
    assert "Its kernels computed 1.20 times the FLOPs that it needs." in reason(report, "pmod")
    assert "took 0.000 s" in reason(routed(products=0.4, moving=0.1), "pmod")
    assert "A step took 200.0 ms more than the bare model's: gathering, scattering and copying 200.0." in reason(
        routed(step=0.12, products=0.8, moving=0.4), "pmod"
    )


def test_what_is_not_faster_is_said() -> None:
    policy = routed(step=0.101, products=0.8, moving=0.2)
    policy["variants"]["pmod"]["kind"] = "cache"
    assert reason(policy, "pmod").startswith("`pmod`: a step **not faster** in any round, 1.01 to 1.01 of its seconds; the prefill 0.84 of")
    assert verdict([0.9, 0.99]) == "faster in every round"
    assert verdict([0.9, 1.01]).startswith("**not told apart**")
    assert verdict([1.0, 1.2]) == "**not faster** in any round, 1.00 to 1.20 of its seconds"


def test_the_table_of_a_report(tmp_path: Path) -> None:
    text = table(routed(products=0.5, moving=0.3))
    assert "in which the threads ran in 100%, – of the time" in text
    assert "| `pmod` | depth | 64 | 0.50 | 0.840 (0.800–0.880) | 0.84 (0.80–0.88) | 1.68 | 0.75 (0.75–0.75) | 2.84 (2.80–2.88) |" in text
    assert "| 0.50, 0.50 | 4 |" in text
    assert "A step reads 9 MiB of weights and, of the bare model's cache, 1.0 MiB: 10.0% of what it reads." in text
    assert "**The machine was busy** in the pass of pmod (50%)." in text
    assert "- `vtw`: no such layer" in text
    draw(routed(products=0.5), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_depth_is_measured_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["pmod", "atpllava", "eemllm", "snapkv"]

    def measure(rounds: int) -> dict[str, Any]:
        arguments = ["--shape", "tiny", "--decode", "2", "--threads", "1", "--rounds", str(rounds), "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "--only", *names])
        main()
        (path,) = tmp_path.glob("*.json")
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert table(report) == path.with_suffix(".md").read_text(encoding="utf-8")
        assert path.with_suffix(".png").is_file()
        return report

    first, report = measure(1), measure(2)
    assert report["rounds"][0] == first["rounds"][0]
    assert report["variants"] == first["variants"]
    assert len(report["rounds"]) == len(report["granted"]) == 2
    assert all(set(row) == {*report["variants"], "tower"} for row in report["rounds"])
    assert report["skipped"] == {}
    found = report["variants"]
    for label, one in found.items():
        assert one["kv_bytes"] == one["kv_counted"]
        assert one["prefill"]["peak_bytes"] > one["kv_bytes"]
        for spent in (one["prefill"], one["step"]):
            assert sum(spent["seconds"].values()) == pytest.approx(spent["wall"])
            assert min(seconds for kind, seconds in spent["seconds"].items() if kind != BETWEEN) >= 0
        masked = label.startswith("eemllm")
        assert (one["ran"]["lm_attention"] > one["flops"]["lm_attention"]) is masked
        for part in ("bridge", "lm_linear", "head", "scores"):
            assert one["ran"][part] == one["flops"][part]
    bare, routed, snap = found["bare"], found["pmod:untrained=true"], found["cache=snapkv:keep=0.2"]
    assert routed["kv_bytes"] < bare["kv_bytes"] == bare["kv_peak"]
    assert routed["flops"]["lm_linear"] < bare["flops"]["lm_linear"] == snap["flops"]["lm_linear"]
    assert snap["kv_bytes"] * 104 == bare["kv_bytes"] * 21  # a fifth of 8 + 64 + 32 tokens
    (atp,) = (one for label, one in found.items() if label.startswith("atpllava"))
    assert sum(atp["visual_tokens"]) / 8 / 64 == pytest.approx(0.25, abs=0.02)


def test_what_is_unknown_is_refused_before_a_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--shape", "tiny", "--only", "pmod", "nomod"])
    with pytest.raises(SystemExit, match="unknown: nomod; known are pmod, gammamod"):
        main()


@pytest.mark.parametrize("rule", ["causal", *RULES])
def test_flex_attention_is_given_the_engines_rule(rule: str) -> None:
    layout = prompt_layout(5, 11)
    slots = torch.arange(layout.shape[1])
    mask = engines(layout, rule)
    assert torch.equal(functions(layout)[rule](0, 0, slots[:, None], slots), mask)
    assert (int(mask.sum()) < 36 * 37 // 2) is (rule == "eemllm")  # neighbours that come later are seen too


def test_text_alone_attends_as_under_ee_mllms_mask() -> None:
    attention = Bench(side=4, text=10, heads=4, key_heads=2, width=8)
    mask, text = engines(attention.layout, "eemllm"), (~attention.layout.visual[0]).nonzero()[:, 0]
    torch.testing.assert_close(attention.rows(mask, text), attention.kernel(mask))
    assert not torch.allclose(attention.rows(mask, text), attention.kernel(None))


def test_what_flex_attention_saves_is_told() -> None:
    seconds = {f"causal: {KERNEL}": 0.002}
    for rule, kernel, fast in (("eemllm", 0.004, 0.001), ("yopo", 0.004, 0.003)):
        seconds |= {f"{rule}: {KERNEL}": kernel, f"{rule}: {FUNCTION}": fast, f"{rule}: {TABLE}": 0.005}
    seconds[f"eemllm: {ROWS}"] = 0.0005
    known = {label: {"seen": 0.5, "apart": 1e-7} for label in seconds}
    settings = {"side": 34, "text": 44, "layers": 24, "heads": 14, "key_heads": 2, "width": 64, "block": 128}
    rounds = [{label: [2 * one, one] for label, one in seconds.items()}]
    report = {"settings": settings, "known": known, "rounds": rounds, "granted": 0.5, "command": "python run.py", "machine": "a machine"}
    rows, window = told(report)
    assert "takes 2.00 times the causal one's time. The fastest other way, kernel, rows of text alone, takes 0.12 of it" in rows
    assert "flex attention 0.25: over 24 layers +0.084 CPU s saved of 0.096, by flex attention +0.072 s." in rows
    assert window.endswith("rule as a function, takes 0.75 of it: over 24 layers +0.024 CPU s saved of 0.096.")
    assert "| yopo | kernel | 50.0% |  | 8.00 (8.00–8.00) | 1.00 (1.00–1.00) | 4.00 (4.00–4.00) | 1.00 (1.00–1.00) | 1e-07 |  |  |" in flex(
        report
    )
    assert "The machine was busy" in flex(report)
