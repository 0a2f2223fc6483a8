"""Time to first token where tokens go inside of the vision tower, beside the same share cut in front of the language model.

    python benchmarks/tower_cuts/run.py                                  # Qwen2.5-VL's tower, 256 visual tokens, CPU
    python benchmarks/tower_cuts/run.py --shape internvl-1b              # InternViT-300M, four tiles
    python benchmarks/tower_cuts/run.py --shape qwen2.5-vl-tiny          # seconds; tries the benchmark itself

Random weights, real sizes, one prompt at a time, from pixels to the first token: what is called prefill is all of it, and the tower's part
of it is timed by the tower's own hooks. In each round every variant is timed once, in shuffled order, so that a drift of the machine hits
all alike; ratios are taken within a round. An untimed round in front counts tokens and FLOPs. Results (.json, .md, .png) are written after
every round, and the same command goes on where it was.

Every method is there with and without its place in the tower: FasterVLM ranks by attention, of the tower's last block in front of the
language model, of one of two earlier ones inside of the tower, and the blocks after that run on what stays; ToMe merges in front of the
language model, or a few tokens in every block. Random tokens cost nothing to choose.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import foveate
from foveate.anatomy import blocks, read
from foveate.machine import synchronize

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))  # the repository: what the benchmarks share lies in benchmarks/

from benchmarks.common import add_machine, bar, command, earlier, machine, take_rounds  # noqa: E402
from benchmarks.shapes import SHAPES, build, prompt  # noqa: E402
from benchmarks.tower_cuts.show import BARE, BEFORE_LM, IN_TOWER, draw, table  # noqa: E402

KEEP = (0.5, 0.25)
OWN = ("qwen2.5-vl-0.5b", "internvl-1b", "qwen2.5-vl-tiny", "internvl-tiny")


@dataclass(frozen=True)
class Variant:
    """`reducers` None: nothing is attached; `kind` and `method` say what it is compared with."""

    label: str
    kind: str = BARE
    method: str = BARE
    keep: float = 1.0
    reducers: str | None = None


def variants(keeps: list[float], early: int, middle: int, depth: int) -> list[Variant]:
    """early, middle: blocks of the tower whose attention ranks there; depth: how many it has."""
    found = [Variant(BARE)]
    for keep in keeps:
        for kind, method, text in (
            (BEFORE_LM, "random", f"random:keep={keep}"),
            (BEFORE_LM, "fastervlm", f"fastervlm:keep={keep},layer=-1"),
            (BEFORE_LM, "tome", f"tome:keep={keep}"),
            (IN_TOWER, f"fastervlm, block {middle}", f"fastervlm:keep={keep},layer={middle},site=tower"),
            (IN_TOWER, f"fastervlm, block {early}", f"fastervlm:keep={keep},layer={early},site=tower"),
            (IN_TOWER, "tome, by size", f"tome:keep={keep},site=tower,blocks={depth - 1}"),
            (IN_TOWER, "tome", f"tome:keep={keep},site=tower,blocks={depth - 1},proportional=false"),
        ):
            found.append(Variant(text, kind, method, keep, text))
    return found


def ranking_blocks(tower: Any) -> tuple[int, int]:
    """An early and a middle block that attend to whole pictures and have others after them."""
    depth = len(blocks(tower))
    whole = [block for block in getattr(tower, "fullatt_block_indexes", range(depth)) if block < depth - 1]
    return min(whole, key=lambda block: abs(block - depth // 4)), min(whole, key=lambda block: abs(block - depth // 2))


class Bench:
    def __init__(self, given: argparse.Namespace) -> None:
        shape, self.device, dtype = SHAPES[given.shape], given.device, getattr(torch, given.dtype)
        self.config = shape.config(given.layers)
        self.model = build(self.config, self.device, dtype)
        self.inputs = prompt(shape, self.config, given.tokens, self.device, dtype)
        tower: Any = read(self.model).tower
        self.depth, self.ranking = len(blocks(tower)), ranking_blocks(tower)
        self._began = self.seconds = 0.0
        tower.register_forward_pre_hook(self._begin)
        tower.register_forward_hook(self._end)
        gc.collect()
        gc.freeze()  # collecting between two measurements shall not go through all of the libraries again

    def _begin(self, *_: Any) -> None:
        synchronize(self.device)
        self._began = time.perf_counter()

    def _end(self, *_: Any) -> None:
        synchronize(self.device)
        self.seconds += time.perf_counter() - self._began

    @torch.no_grad()
    def once(self, reducers: str | None) -> tuple[dict[str, float], Any]:
        """One prompt to its first token: seconds by the clock ("prefill"), of the tower in it ("tower") and of all threads ("cpu"); and
        the attachment."""
        gc.collect()
        attached: Any = contextlib.nullcontext() if reducers is None else foveate.attach(self.model, reducers)
        with attached as run:
            self.seconds = 0.0
            synchronize(self.device)
            start, began = time.perf_counter(), time.process_time()
            self.model(**self.inputs, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
            synchronize(self.device)
            end, ended = time.perf_counter(), time.process_time()
        return {"prefill": end - start, "tower": self.seconds, "cpu": ended - began}, run

    def survey(self, variant: Variant) -> dict[str, Any]:
        """What one untimed pass tells."""
        _, run = self.once(variant.reducers or "none")
        ledger = run.last.ledger(self.config)
        return {
            "kind": variant.kind,
            "method": variant.method,
            "keep": variant.keep,
            "visual_tokens": list(ledger.visual_tokens),
            "flops": {part: flops for part, flops in ledger.flops.items() if flops},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=OWN, default=OWN[0])
    parser.add_argument("--tokens", type=int, help="visual tokens of the prompt, a multiple of one image's")
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP), help="budgets, as shares")
    parser.add_argument("--rounds", type=int, default=5)
    add_machine(parser, HERE)
    given = parser.parse_args()
    given.tokens = given.tokens or SHAPES[given.shape].tokens[0]
    if given.tokens % SHAPES[given.shape].per_image:
        sys.exit(f"--tokens {given.tokens} is no multiple of the {SHAPES[given.shape].per_image} visual tokens of one image")
    torch.set_num_threads(given.threads)
    measure(given)


def measure(given: argparse.Namespace) -> None:
    shape, names = SHAPES[given.shape], ("shape", "tokens", "device", "dtype", "threads", "layers")
    console = Console(stderr=True)
    with console.status(f"building {shape.what}"):
        bench = Bench(given)
    chosen = variants(given.keep, *bench.ranking, bench.depth)
    name = f"{given.shape}-{given.tokens}-{given.device}-{given.dtype}" + (f"-{given.layers}layers" if given.layers else "")
    path = given.output / f"{name}.json"
    report: dict[str, Any] = {"settings": {option: getattr(given, option) for option in names}, "chosen": [v.label for v in chosen]}
    report["machine"] = machine(given.device)
    done = earlier(path, report)
    report["command"] = command("benchmarks/tower_cuts/run.py", given, (*names, "rounds"), keep=given.keep)
    report["weight_bytes"] = sum(p.numel() * p.element_size() for p in bench.model.parameters())
    given.output.mkdir(parents=True, exist_ok=True)

    with bar(console) as progress:
        task = progress.add_task("untimed", total=len(chosen))
        report["variants"] = {}
        for variant in chosen:
            progress.update(task, description=f"untimed: {variant.label}")
            report["variants"][variant.label] = bench.survey(variant)
            progress.advance(task)
        reducers = {variant.label: variant.reducers for variant in chosen}
        take_rounds(path, report, done, list(reducers), lambda label: bench.once(reducers[label])[0], given.rounds, (table, draw), progress)


if __name__ == "__main__":
    main()
