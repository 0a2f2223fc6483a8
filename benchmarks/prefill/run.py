"""Time to first token, decoding speed, memory and KV cache under every reducer, beside the speed-up that counted FLOPs allow.

    python benchmarks/prefill/run.py                                     # 0.5b shape, 729 visual tokens, CPU
    python benchmarks/prefill/run.py --tokens 3645 --rounds 5
    python benchmarks/prefill/run.py --shape 7b --device cuda --dtype bfloat16
    python benchmarks/prefill/run.py --shape tiny                        # seconds; tries the benchmark itself

Random weights, real shapes, one prompt at a time. In each round every variant is timed once, in shuffled order, so that a drift of the
machine hits all alike; ratios are taken within a round. An untimed round in front measures memory and counts tokens, and finds out which
methods cannot work on the model. Results (.json, .md, .png) are written after every round, and the same command goes on where it was.

The prompt goes from pixels to tower to language model as it always does. The tower's time is taken apart: its work is the same for all,
so where no reducer watches it, its output is replayed. What is called prefill is everything else: projector, scores, cuts, language model
and the first token.

Few rows run a matrix product below the machine's peak, whoever cut them. So the bare model is also timed on prompts of text as long as the
image's would be at each budget: what the machine allows, beside what the FLOPs allow.
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
from foveate import FoveateError
from foveate.accounting import observed
from foveate.anatomy import read
from foveate.contract import ClsAttention, ReceivedAttention, TowerKeys
from foveate.machine import exact_peaks, peak, synchronize
from foveate.reducers import METHODS, in_model, parse

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))  # the repository: what the benchmarks share lies in benchmarks/

from benchmarks.common import Tower, add_machine, bar, command, earlier, machine, take_rounds  # noqa: E402
from benchmarks.prefill.show import draw, table  # noqa: E402
from benchmarks.shapes import AFTER, BEFORE, SHAPES, build, prompt, words  # noqa: E402

KEEP = (0.5, 0.25, 0.11, 0.05)
KEEP_ALL = ("random:keep=1.0", "fastv:keep=1.0")
BARE, TOWER, SHORT = "bare", "tower", "short prompt"
CUT = "schedule"  # has no budget; each of its cuts is one of FastV's, which is measured


@dataclass(frozen=True)
class Variant:
    """`label` is its spelling; `reducers` None: nothing is attached; `text`: words in the place of the images' tokens."""

    label: str
    reducers: str | None = None
    method: str = ""
    keep: float = 1.0
    shortcuts: bool = True
    text: int | None = None


def variants(
    methods: list[str], keeps: list[float], tokens: int, options: dict[str, str], layers: int
) -> tuple[list[Variant], dict[str, str]]:
    """What is measured, and what is not, with the reason."""
    found = {BARE: Variant(BARE)}
    for keep in keeps:
        found[f"{SHORT}:keep={keep}"] = Variant(f"{SHORT}:keep={keep}", method=SHORT, keep=keep, text=round(keep * tokens))
    skipped: dict[str, str] = {}
    for text in KEEP_ALL:
        if text.partition(":")[0] in METHODS:
            found[text] = Variant(text, text)
            found[f"{text} (no shortcuts)"] = Variant(f"{text} (no shortcuts)", text, shortcuts=False)
    for method in methods:
        for keep in keeps:
            [reducer] = parse(":".join(filter(None, (method, options.get(method)))))
            try:
                reducer = reducer.at(keep)
            except FoveateError as error:
                skipped[f"{method} at {keep}"] = str(error)
                continue
            text = reducer.spelled(always=reducer.amounts)
            if not in_model([reducer]):
                skipped[text] = "it acts on the image, in front of the processor, where this benchmark begins"
            else:
                found.setdefault(text, Variant(text, text, method, keep))
    return list(found.values()), skipped


def watches(variant: Variant, layers: int) -> bool:
    """Whether the vision tower has to run for it."""
    sites = [site for reducer in parse(variant.reducers or "") for site in reducer.sites(layers)]
    return any(isinstance(need, (ClsAttention, ReceivedAttention, TowerKeys)) for site in sites for need in site.needs)


def inside(variant: Variant, layers: int) -> bool:
    """Whether it acts behind the first decoder layer."""
    return any(site.layer > 0 for reducer in parse(variant.reducers or "") for site in reducer.sites(layers))


class Bench:
    def __init__(self, given: argparse.Namespace) -> None:
        self.shape, self.device = SHAPES[given.shape], given.device
        dtype = getattr(torch, given.dtype)
        self.config = self.shape.config(given.layers)
        self.cost = self.shape.cost(self.config)
        self.bytes = dtype.itemsize
        self.model = build(self.config, self.device, dtype)
        self.inputs = prompt(self.shape, self.config, given.tokens, self.device, dtype)
        self.words = words(self.config, BEFORE + given.tokens + AFTER).to(self.device)
        self.layers = self.config.text_config.num_hidden_layers
        core = read(self.model)
        self.core: Any = core.core
        self.tower = Tower(core.tower, self.device)
        gc.collect()
        gc.freeze()  # collecting between two measurements shall not go through all of the libraries again

    def encode(self) -> dict[str, float]:
        """Seconds of the tower alone, by the clock and of all threads; from now on its output can be replayed."""
        return self.tower.alone(self.core, self.inputs)

    @torch.no_grad()
    def once(self, variant: Variant, decode: int) -> tuple[dict[str, float], Any, Any]:
        """One prompt: seconds by the clock ("prefill") and of all threads ("prefill cpu"), what went through the layers (where something
        is attached), and the cache."""
        gc.collect()
        watched = watches(variant, self.layers)
        attached: Any = contextlib.nullcontext()
        if variant.reducers is not None:
            attached = foveate.attach(self.model, variant.reducers, shortcuts=variant.shortcuts)
        inputs = self.inputs if variant.text is None else {"input_ids": self.words[:, : BEFORE + variant.text + AFTER]}
        self.tower.seconds = self.tower.cpu = 0.0
        with attached as run, self.tower.replayed(not watched):
            synchronize(self.device)
            start, began = time.perf_counter(), time.process_time()
            out = self.model(**inputs, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            synchronize(self.device)
            first, ran = time.perf_counter(), time.process_time()
            for _ in range(decode):
                out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            synchronize(self.device)
            end, ended = time.perf_counter(), time.process_time()
        seconds = {"prefill": first - start - self.tower.seconds, "prefill cpu": ran - began - self.tower.cpu}
        if watched:
            seconds |= {TOWER: self.tower.seconds, f"{TOWER} cpu": self.tower.cpu}
        if decode:
            seconds |= {"decode": end - first, "decode cpu": ended - ran}
        return seconds, run, out.past_key_values

    def survey(self, variant: Variant) -> dict[str, Any]:
        """What one untimed pass tells. Raises FoveateError where the method does not work on the model."""
        self.tower.mark = True
        with exact_peaks():
            _, run, cache = self.once(variant, 0)
            above = peak(self.device) - self.tower.base
        self.tower.mark = False
        if variant.text is not None:
            length = [[BEFORE + variant.text + AFTER]] * self.layers
            ledger = observed(self.cost, [[variant.text]] * self.layers, length, images=0, dtype_bytes=self.bytes)
        else:
            if run is None:  # bare: the same prompt once more, to be counted
                _, run, _ = self.once(Variant("", "none"), 0)
            ledger = run.last.ledger(self.cost, dtype_bytes=self.bytes)
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return {
            "method": variant.method,
            "keep": variant.keep,
            "watches_tower": watches(variant, self.layers),
            "inside_lm": inside(variant, self.layers),
            "visual_tokens": list(ledger.visual_tokens),
            # Without the tower, as the time is, and without scores: what shorter sequences alone allow.
            "flops": sum(flops for part, flops in ledger.flops.items() if part not in ("tower", "scores")),
            "kv_bytes": sum(t.numel() * t.element_size() for t in tensors),
            "kv_bytes_counted": sum(ledger.kv_bytes),
            "peak_bytes": above if self.tower.base and variant.text is None else None,  # counted from the tower's end on
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5b")
    parser.add_argument("--tokens", type=int, help="visual tokens of the prompt, a multiple of one image's; one image, unless told")
    parser.add_argument("--reducers", nargs="+", metavar="METHOD", help="names; all methods, unless told")
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP), help="budgets, as shares")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode", type=int, default=8, help="tokens to decode after the first one; 0 for none")
    add_machine(parser, HERE)
    given = parser.parse_args()
    given.tokens = given.tokens or SHAPES[given.shape].tokens[0]
    if given.tokens % SHAPES[given.shape].per_image:
        sys.exit(f"--tokens {given.tokens} is no multiple of the {SHAPES[given.shape].per_image} visual tokens of one image")
    if unknown := sorted(set(given.reducers or ()) - set(METHODS)):
        sys.exit(f"unknown reducers {', '.join(unknown)}; known are {', '.join(METHODS)}")
    torch.set_num_threads(given.threads)
    measure(given)


def measure(given: argparse.Namespace) -> None:
    settings = {name: getattr(given, name) for name in ("shape", "tokens", "device", "dtype", "threads", "decode", "layers")}
    shape = SHAPES[given.shape]
    depth = shape.config(given.layers).text_config.num_hidden_layers
    chosen, skipped = variants(given.reducers or [name for name in METHODS if name != CUT], given.keep, given.tokens, shape.options, depth)
    name = f"{given.shape}-{given.tokens}-{given.device}-{given.dtype}" + (f"-{given.layers}layers" if given.layers else "")
    name += "" if given.keep == list(KEEP) else "-keep" + "".join(f"-{keep:g}" for keep in given.keep)
    path = given.output / f"{name}.json"
    report: dict[str, Any] = {"settings": settings, "chosen": [v.label for v in chosen], "machine": machine(given.device)}
    done = earlier(path, report)
    named = ("shape", "tokens", "rounds", "decode", "threads", "device", "dtype", "layers")
    report["command"] = command("benchmarks/prefill/run.py", given, named, reducers=given.reducers, keep=given.keep)
    given.output.mkdir(parents=True, exist_ok=True)

    console = Console(stderr=True)
    with console.status(f"building {shape.what}"):
        bench = Bench(given)
        bench.encode()
    with bar(console) as progress:
        task = progress.add_task("untimed", total=len(chosen))
        surveyed: dict[str, Any] = {}
        for variant in chosen:
            progress.update(task, description=f"untimed: {variant.label}")
            try:
                surveyed[variant.label] = bench.survey(variant)
            except FoveateError as error:
                skipped[variant.label] = str(error)
            progress.advance(task)
        report |= {"weight_bytes": sum(p.numel() * p.element_size() for p in bench.model.parameters())}
        report |= {"variants": surveyed, "skipped": skipped}
        timed = {variant.label: variant for variant in chosen if variant.label in surveyed}

        def once(label: str) -> dict[str, float]:
            return bench.once(timed[label], given.decode)[0] if label in timed else bench.encode()

        take_rounds(path, report, done, [*timed, TOWER], once, given.rounds, (table, draw), progress)


if __name__ == "__main__":
    main()
