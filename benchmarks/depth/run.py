"""What methods of depth, learned ones, rules of who sees whom and cache policies take in seconds and memory, beside what is counted.

    python benchmarks/depth/run.py                                   # LLaVA-OneVision-0.5B's shape, 729 visual tokens, CPU
    python benchmarks/depth/run.py --shape qwen2.5-vl-0.5b --tokens 1024
    python benchmarks/depth/run.py --shape tiny                      # seconds; tries the benchmark itself
    python benchmarks/depth/run.py --only pmod gammamod              # beside the bare model, in files of their own

Random weights, real sizes, one prompt at a time, every method at the share that its paper gives. In each round every variant is timed once,
in shuffled order, so that a drift of the machine hits all alike; ratios are taken within a round. Results (.json, .md, .png) are written
after every round, and the same command goes on where it was.

No variant looks at the vision tower or changes it: its output is replayed, and its own time is taken once a round. So what is called
prefill is everything else until the first token is there. After it some tokens are decoded one by one: a step is their median.

Untimed passes in front count tokens, FLOPs (those that the method needs, and those that ran), and the bytes of the cache; then one prefill
and some steps of each variant go through torch's profiler. It tells the most memory that tensors took at a time (what was there before,
weights and pixels, is not in it) and how long each kind of operation took: from that the table says why seconds are not what FLOPs allow.

Routers and scorers have the weights that training begins with: what they choose is of no use, and costs what any choice costs. Only ATP-
LLaVA's choice decides how much it costs. Its thresholds are set so that the published share of tokens is left, mean over the layers.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import foveate
from foveate import FoveateError
from foveate.accounting.counter import Counter
from foveate.anatomy import read
from foveate.files import write_json
from foveate.machine import synchronize
from foveate.reducers import add_weights, parse

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))  # the repository: what the benchmarks share lies in benchmarks/

from benchmarks.common import Tower, add_machine, bar, before, command, earlier, machine, take_rounds  # noqa: E402
from benchmarks.depth.operations import profiled  # noqa: E402
from benchmarks.depth.show import BARE, CACHE, DEPTH, LEARNED, VISIBILITY, draw, table  # noqa: E402
from benchmarks.shapes import SHAPES, build, prompt  # noqa: E402

TOWER = "tower"
METHODS = (
    (DEPTH, "pmod:untrained=true"),
    (DEPTH, "gammamod:untrained=true"),
    (DEPTH, "vtw"),
    (DEPTH, "pyramiddrop"),
    (LEARNED, "atpllava:layers={layers}"),
    (LEARNED, "visionselector:untrained=true"),
    (VISIBILITY, "eemllm"),
    (VISIBILITY, "eemllm:visual_update=none"),
    (VISIBILITY, "yopo"),
)
"""The defaults are the published settings: p-MoD's schedule, a half of the tokens in γ-MoD's layers and after each of PyramidDrop's stages,
VTW's middle of the depth, a fifth for VisionSelector, a window of 5 for YOPO."""
POLICIES = ("zipvl", "snapkv:keep=0.2", "pyramidkv:keep=0.12", "lookm:keep=0.2,merge=pivot", "prefixkv:keep=0.2", "random:keep=0.2")
"""Of the abstracts 12 % (PyramidKV) and 80 % less (LOOK-M); PrefixKV's fifth; SnapKV's budgets are numbers for longer prompts than these,
so that it has a fifth too, and so has the baseline. ZipVL has no budget."""
ATP, ATP_SHARE, ATP_LAYERS, OF_LAYERS = "atpllava", 0.25, (5, 15, 25), 32  # 144 of 576 tokens, mean over the layers
TRIES, NEAR = 8, 0.01  # of a bias, and how near to the share it is to come
STEPS = 4  # that are profiled together, and told as one


@dataclass(frozen=True)
class Variant:
    """Nothing is attached to the bare model, what spells "none" is attached to count it."""

    label: str
    kind: str = BARE
    reducers: str = "none"
    cache: str | None = None

    @property
    def name(self) -> str:
        return (self.cache or self.reducers).partition(":")[0]


def variants(layers: int, only: list[str] | None) -> list[Variant]:
    """Those of a model of so many decoder layers, or the bare model and `only` some by their names."""
    acts = "-".join(map(str, sorted({max(1, round(layers * at / OF_LAYERS)) for at in ATP_LAYERS})))
    found = [Variant(text, kind, text) for kind, text in ((kind, text.format(layers=acts)) for kind, text in METHODS)]
    found += [Variant(f"cache={text}", CACHE, cache=text) for text in POLICIES]
    if unknown := sorted(set(only or ()) - {variant.name for variant in found}):
        sys.exit(f"unknown: {', '.join(unknown)}; known are {', '.join(dict.fromkeys(variant.name for variant in found))}")
    return [Variant(BARE), *(variant for variant in found if only is None or variant.name in only)]


class Bench:
    def __init__(self, given: argparse.Namespace) -> None:
        self.shape, self.device = SHAPES[given.shape], given.device
        dtype = getattr(torch, given.dtype)
        self.config, self.bytes, self.tokens = self.shape.config(given.layers), dtype.itemsize, given.tokens
        self.cost = self.shape.cost(self.config)
        self.model = build(self.config, self.device, dtype)
        self.inputs = prompt(self.shape, self.config, given.tokens, self.device, dtype)
        self.anatomy = read(self.model)
        self.tower = Tower(self.anatomy.tower, self.device)
        self.encode()
        gc.collect()
        gc.freeze()  # collecting between two measurements shall not go through all of the libraries again

    def encode(self) -> dict[str, float]:
        """Seconds of the tower alone; from now on its output can be replayed."""
        return self.tower.alone(self.anatomy.core, self.inputs)

    @property
    def read_bytes(self) -> int:
        """Bytes of the weights that a decoding step reads."""
        weights: list[Tensor] = [weight for layer in self.anatomy.layers for weight in layer.parameters()]
        weights += self.model.get_output_embeddings().parameters()
        return sum(weight.numel() * weight.element_size() for weight in weights)

    @contextlib.contextmanager
    def attached(self, variant: Variant, always: bool = False) -> Iterator[Any]:
        """A `with` block in which the variant acts and the tower's output is replayed. always: the bare model is watched too."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.tower.replayed())
            acts = always or variant.kind != BARE
            yield stack.enter_context(foveate.attach(self.model, variant.reducers, cache=variant.cache)) if acts else None

    def first(self) -> tuple[Any, Tensor]:
        """The prompt: the cache, and the first token."""
        out = self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)

    def step(self, cache: Any, token: Tensor) -> Tensor:
        """The token after `token`."""
        out: Tensor = self.model(input_ids=token, past_key_values=cache, use_cache=True).logits
        return out[:, -1].argmax(-1, keepdim=True)

    @torch.no_grad()
    def once(self, variant: Variant, decode: int) -> dict[str, float]:
        """Seconds of a prefill by the clock ("prefill") and of all threads ("prefill cpu"), and of a decoding step ("step")."""
        gc.collect()
        steps = []
        with self.attached(variant):
            synchronize(self.device)
            start, began = time.perf_counter(), time.process_time()
            cache, token = self.first()
            synchronize(self.device)
            seconds = {"prefill": time.perf_counter() - start, "prefill cpu": time.process_time() - began}
            for _ in range(decode):
                start = time.perf_counter()
                token = self.step(cache, token)
                synchronize(self.device)
                steps.append(time.perf_counter() - start)
        return seconds | ({"step": statistics.median(steps)} if steps else {})

    @torch.no_grad()
    def survey(self, variant: Variant) -> dict[str, Any]:
        """What untimed passes tell. FoveateError where the method does not work on the model."""
        with self.attached(variant, always=True) as run:
            with Counter(self.model) as counted:
                cache, _ = self.first()
            ledger = run.last.ledger(self.cost, dtype_bytes=self.bytes)
            held = kept_bytes(cache)
        with self.attached(variant):
            (cache, token), prefill = profiled(self.first, self.device)
            token = self.step(cache, token)  # the first one after a prompt is not like those that follow
            _, steps = profiled(lambda: [self.step(cache, token) for _ in range(STEPS)], self.device)
            seconds = {kind: spent / STEPS for kind, spent in steps["seconds"].items()}
        return {
            "kind": variant.kind,
            "visual_tokens": list(ledger.visual_tokens),
            # What is multiplied in order to decide is told from sizes; where a method's choice decides it, that is the most that it may be.
            "flops": {**{part: flops for part, flops in ledger.flops.items() if part != TOWER}, "scores": counted.flops["scores"]},
            "ran": {part: flops for part, flops in counted.flops.items() if part != TOWER},
            "kv_bytes": held,
            "kv_counted": sum(ledger.kv_stays or ledger.kv_bytes),
            "kv_peak": ledger.kv_peak or sum(ledger.kv_bytes),
            "prefill": prefill,
            "step": {**steps, "seconds": seconds, "wall": steps["wall"] / STEPS},
        }

    @torch.no_grad()
    def fit(self, text: str) -> float:
        """Sets ATP-LLaVA's thresholds so that its published share of tokens is left, and returns their bias."""
        low, high, bias = -6.0, 6.0, 0.0
        for _ in range(TRIES):
            self.set_thresholds(text, bias)
            with self.attached(Variant(text, LEARNED, text)) as run:
                self.first()
            share = statistics.mean(run.last.visual_tokens) / self.tokens
            if abs(share - ATP_SHARE) < NEAR:
                break
            low, high = (bias, high) if share > ATP_SHARE else (low, bias)
            bias = (low + high) / 2
        return bias

    def set_thresholds(self, text: str, bias: float) -> None:
        thresholds: Any = add_weights(self.model, parse(text))[ATP]
        thresholds.bias.data.fill_(bias)


def kept_bytes(cache: Any) -> int:
    """Bytes of the memory in which a cache's keys and values lie."""
    storages = [kind.untyped_storage() for layer in cache.layers for kind in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5b")
    parser.add_argument("--tokens", type=int, help="visual tokens of the prompt, a multiple of one image's")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="names; all methods and policies, unless told")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode", type=int, default=8, help="tokens to decode after the first one")
    add_machine(parser, HERE)
    given = parser.parse_args()
    given.tokens = given.tokens or SHAPES[given.shape].tokens[0]
    if given.tokens % SHAPES[given.shape].per_image:
        sys.exit(f"--tokens {given.tokens} is no multiple of the {SHAPES[given.shape].per_image} visual tokens of one image")
    if given.decode < 1:
        sys.exit(f"--decode {given.decode}: a step is the median of at least one")
    torch.set_num_threads(given.threads)
    measure(given)


def measure(given: argparse.Namespace) -> None:
    shape, names = SHAPES[given.shape], ("shape", "tokens", "device", "dtype", "threads", "decode", "layers")
    chosen = variants(shape.config(given.layers).text_config.num_hidden_layers, given.only)
    name = f"{given.shape}-{given.tokens}-{given.device}-{given.dtype}" + (f"-{given.layers}layers" if given.layers else "")
    path = given.output / f"{name}{''.join(f'-{method}' for method in given.only or ())}.json"
    report: dict[str, Any] = {"settings": {option: getattr(given, option) for option in names}, "chosen": [v.label for v in chosen]}
    report["machine"] = machine(given.device)
    there, done = before(path, report), earlier(path, report)
    report["command"] = command("benchmarks/depth/run.py", given, (*names, "rounds"), only=given.only)
    given.output.mkdir(parents=True, exist_ok=True)

    console = Console(stderr=True)
    with console.status(f"building {shape.what}"):
        bench = Bench(given)
    report |= {"variants": there.get("variants", {}), "skipped": there.get("skipped", {}), "read_bytes": bench.read_bytes}
    if text := next((variant.reducers for variant in chosen if variant.name == ATP), None):
        report["bias"] = there["bias"] if "bias" in there else bench.fit(text)
        bench.set_thresholds(text, report["bias"])
    with bar(console) as progress:
        task = progress.add_task("untimed", total=len(chosen))
        for variant in chosen:
            progress.update(task, description=f"untimed: {variant.label}")
            if variant.label not in report["variants"] | report["skipped"]:
                try:
                    report["variants"][variant.label] = bench.survey(variant)
                except FoveateError as error:
                    report["skipped"][variant.label] = str(error)
            progress.advance(task)
        write_json(path, {**report, "rounds": done[0], "granted": done[1]})
        timed = {variant.label: variant for variant in chosen if variant.label in report["variants"]}

        def once(label: str) -> dict[str, float]:
            return bench.once(timed[label], given.decode) if label in timed else bench.encode()

        take_rounds(path, report, done, [*timed, TOWER], once, given.rounds, (table, draw), progress)


if __name__ == "__main__":
    main()
