"""What flex attention would save under rules of who sees whom: one layer's attention, compiled over blocks, beside a kernel under a mask.

    python benchmarks/depth/flex/run.py                              # the heads of the 0.5b shape, 34 x 34 visual tokens, 44 of text
    python benchmarks/depth/flex/run.py --side 8 --text 8 --rounds 3 # compiles as long, and tries the benchmark itself

EE-MLLM and YOPO hide most pairs of visual tokens from each other, and the engine lays that over the masks of the model: the kernel computes
all pairs. Flex attention (torch.nn.attention.flex_attention) leaves out blocks of `--block` x `--block` pairs of which none is seen, and
needs a compiler. Here it is given the same rule as the engine, as a table and as a function of rows and columns, and what it returns is
compared with what the kernel returns under the mask. EE-MLLM has a third way: a visual token sees itself alone, so that its own value is
what it gets, and only the rows of text have to attend. In each round all are timed once, in shuffled order, by the clock and by the CPU
seconds of all threads, which tell the ways apart on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from foveate.contract import View
from foveate.engine.rulings import laid_over
from foveate.files import write_json
from foveate.reducers import parse
from foveate.tokens import Layout

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))  # the repository: what the benchmarks share lies in benchmarks/

from benchmarks.common import GRANTED, Usage, machine, spread  # noqa: E402
from benchmarks.shapes import BEFORE, SHAPES  # noqa: E402

Rule = Callable[[Any, Any, Any, Any], Tensor]
CAUSAL, RULES, APART = "causal", ("eemllm", "yopo"), 1e-4  # how far results may differ
KERNEL, TABLE, FUNCTION, ROWS = "kernel", "flex, rule as a table", "flex, rule as a function", "kernel, rows of text alone"


def prompt_layout(side: int, text: int) -> Layout:
    """One picture of `side` x `side` tokens behind some text, the rest of the text behind it."""
    before = min(BEFORE, text)
    visual = torch.tensor([[False] * before + [True] * side**2 + [False] * (text - before)])
    return Layout.sequence(visual, grids=[(side, side)])


def engines(layout: Layout, name: str) -> Tensor:
    """(N, N) bool: what the engine makes of a causal mask under the rules of a method."""
    N = layout.shape[1]
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    if name == CAUSAL:
        return causal
    decision: Any = parse(name)[0].reduce(View.of(torch.zeros(1, N, 1), layout=layout))
    mask: Tensor = laid_over(None, (decision,), layout, layout, lambda: causal[None, None], N, torch.float32)
    return mask[0, 0]


def functions(layout: Layout) -> dict[str, Rule]:
    """The same as functions of slots, for flex attention: by method whether query q sees key k."""
    # The compiler for processors takes neither views with strides nor a choice between two rules.
    visual, row, column = (part.contiguous() for part in (layout.visual[0], layout.place[0, :, 3], layout.place[0, :, 4]))

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return k <= q

    def eemllm(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (~visual[q] | (k == q))

    def yopo(b: Any, h: Any, q: Any, k: Any) -> Any:
        both = visual[q] & visual[k]
        near = ((row[q] - row[k]).abs() <= 2) & ((column[q] - column[k]).abs() <= 2)
        return (both & near) | (~both & (k <= q))

    return {CAUSAL: causal, "eemllm": eemllm, "yopo": yopo}


def table_of(mask: Tensor) -> Rule:
    return lambda b, h, q, k: mask[q, k]


class Bench:
    """Queries (1, H, N, d), keys and values (1, G, N, d) of random numbers, and the ways to attend."""

    def __init__(self, side: int, text: int, heads: int, key_heads: int, width: int, block: int = 128) -> None:
        self.layout = prompt_layout(side, text)
        N, generator = self.layout.shape[1], torch.Generator().manual_seed(0)
        self.query = torch.randn(1, heads, N, width, generator=generator)
        self.key, self.value = (torch.randn(1, key_heads, N, width, generator=generator) for _ in range(2))
        self.repeats, self.block = heads // key_heads, block

    def kernel(self, mask: Tensor | None) -> Tensor:
        """As transformers does it: keys of fewer heads are repeated where there is a mask."""
        if mask is None:
            return scaled_dot_product_attention(self.query, self.key, self.value, is_causal=True, enable_gqa=True)
        key, value = (kind.repeat_interleave(self.repeats, 1) for kind in (self.key, self.value))
        return scaled_dot_product_attention(self.query, key, value, attn_mask=mask)

    def rows(self, mask: Tensor, text: Tensor) -> Tensor:
        """EE-MLLM: what visual tokens get is their own value."""
        key, value = (kind.repeat_interleave(self.repeats, 1) for kind in (self.key, self.value))
        return value.index_copy(2, text, scaled_dot_product_attention(self.query[:, :, text], key, value, attn_mask=mask[text]))

    def ways(self) -> tuple[dict[str, Callable[[], Tensor]], dict[str, dict[str, Any]]]:
        """By "method: way" a call that attends, and what is known of each: of flex attention the share of blocks that it computes, and the
        seconds until these were found ("made") and until it had run once ("compiled")."""
        calls: dict[str, Callable[[], Tensor]] = {}
        known: dict[str, dict[str, Any]] = {}
        rules, N, text = functions(self.layout), self.layout.shape[1], (~self.layout.visual[0]).nonzero()[:, 0]
        flex: Any = torch.compile(flex_attention, dynamic=False)
        for name in (CAUSAL, *RULES):
            mask = engines(self.layout, name)
            given = None if name == CAUSAL else mask
            calls[f"{name}: {KERNEL}"] = partial(self.kernel, given)
            if name == "eemllm":
                calls[f"{name}: {ROWS}"] = partial(self.rows, mask, text)
            for way, rule in ((FUNCTION, rules[name]), (TABLE, table_of(mask))):
                start = time.perf_counter()
                blocks = create_block_mask(rule, None, None, N, N, device="cpu", BLOCK_SIZE=self.block)
                made = time.perf_counter() - start
                call = partial(flex, self.query, self.key, self.value, block_mask=blocks, enable_gqa=True)
                calls[f"{name}: {way}"] = call
                call()
                compiled = time.perf_counter() - start - made
                known[f"{name}: {way}"] = {"blocks": 1 - blocks.sparsity() / 100, "made": made, "compiled": compiled}
            for label, attend in calls.items():
                if label.startswith(f"{name}:"):
                    apart = float((attend() - calls[f"{name}: {KERNEL}"]()).abs().max())
                    known[label] = {**known.get(label, {}), "apart": apart, "seen": float(mask.sum()) / N**2}
        return calls, known


def table(report: dict[str, Any]) -> str:
    given = report["settings"]
    N = given["side"] ** 2 + given["text"]
    lines = [f"`{report['command']}`", "", f"{report['machine']}.", ""]
    lines += [
        f"One layer's attention over {N} tokens, {given['side']} x {given['side']} of them visual: {given['heads']} heads of "
        f"{given['width']} values, {given['key_heads']} of keys, float32. {len(report['rounds'])} rounds; medians, with the smallest and "
        "the largest in parentheses. **CPU ms** are those of all threads together, in which they ran. Blocks are of "
        f"{given['block']} x {given['block']} pairs.",
        "",
        "| rule | way | pairs seen | blocks computed | ms | ÷ kernel under its mask | CPU ms | ÷ kernel | largest difference "
        "| block mask made in, ms | compiled in, s |",
        "|---" * 11 + "|",
    ]
    for label, one in report["known"].items():
        rule, _, way = label.partition(": ")
        cells = [rule, way, f"{one['seen']:.1%}", f"{one['blocks']:.0%}" if "blocks" in one else ""]
        for kind in range(2):
            cells.append(spread([1e3 * row[label][kind] for row in report["rounds"]], 2))
            cells.append(spread([row[label][kind] / row[f"{rule}: {KERNEL}"][kind] for row in report["rounds"]], 2))
        cells.append(f"{one['apart']:.0e}")
        cells += [f"{1e3 * one['made']:.1f}", f"{one['compiled']:.1f}"] if "made" in one else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {text}" for text in told(report))]
    if report["granted"] is not None and report["granted"] < GRANTED:
        lines += ["", f"**The machine was busy**: the threads ran in {report['granted']:.0%} of the time that they wanted to."]
    return "\n".join(lines) + "\n"


def told(report: dict[str, Any]) -> list[str]:
    """Of each rule the fastest way, by CPU seconds, and what it saves a prompt of all layers."""
    layers, found = report["settings"]["layers"], []
    middle = {label: statistics.median(row[label][1] for row in report["rounds"]) for label in report["known"]}
    for rule in RULES:
        kernel, causal = middle[f"{rule}: {KERNEL}"], middle[f"{CAUSAL}: {KERNEL}"]
        others = {label: seconds for label, seconds in middle.items() if label.startswith(f"{rule}: ") and label != f"{rule}: {KERNEL}"}
        best = min(others, key=lambda label: others[label])
        flex = min(seconds for label, seconds in others.items() if "flex" in label)
        text = f"`{rule}`: the kernel under its mask takes {kernel / causal:.2f} times the causal one's time. "
        text += f"The fastest other way, {best.partition(': ')[2]}, takes {others[best] / kernel:.2f} of it"
        text += "" if others[best] == flex else f", flex attention {flex / kernel:.2f}"
        text += f": over {layers} layers {layers * (kernel - others[best]):+.3f} CPU s saved of {layers * kernel:.3f}"
        found.append(text + ("." if others[best] == flex else f", by flex attention {layers * (kernel - flex):+.3f} s."))
    return found


def timed(calls: dict[str, Callable[[], Tensor]], rounds: int) -> list[dict[str, list[float]]]:
    """Of each round by label seconds by the clock, and of all threads."""
    found = []
    for number in range(rounds):
        order = list(calls)
        random.Random(number).shuffle(order)
        seconds = {}
        for label in order:
            start, began = time.perf_counter(), time.process_time()
            calls[label]()
            seconds[label] = [time.perf_counter() - start, time.process_time() - began]
        found.append(seconds)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5b", help="whose heads and layers")
    parser.add_argument("--side", type=int, default=34, help="rows and columns of the picture, in visual tokens")
    parser.add_argument("--text", type=int, default=44)
    parser.add_argument("--block", type=int, default=128, help="rows and columns of flex attention's blocks")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=HERE)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    config = SHAPES[given.shape].config(None).text_config
    heads, key_heads, width = config.num_attention_heads, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        calls, known = Bench(given.side, given.text, heads, key_heads, width, given.block).ways()
        if wrong := {label: one["apart"] for label, one in known.items() if not one["apart"] <= APART}:
            sys.exit(f"these are not what the kernel returns under the mask, by so much: {wrong}")
        usage = Usage()
        rounds = timed(calls, given.rounds)
    settings = {"shape": given.shape, "side": given.side, "text": given.text, "threads": given.threads, "layers": config.num_hidden_layers}
    settings |= {"heads": heads, "key_heads": key_heads, "width": width, "block": given.block}
    options = " ".join(f"--{name} {getattr(given, name)}" for name in ("shape", "side", "text", "block", "rounds", "threads"))
    report: dict[str, Any] = {"command": f"python benchmarks/depth/flex/run.py {options}", "machine": machine("cpu")}
    report |= {"settings": settings, "known": known, "rounds": rounds, "granted": usage.granted()}
    given.output.mkdir(parents=True, exist_ok=True)
    more = "" if given.block == 128 else f"-blocks-of-{given.block}"
    path = given.output / f"{given.shape}-{given.side**2 + given.text}-cpu-float32{more}.json"
    write_json(path, report)
    path.with_suffix(".md").write_text(table(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
