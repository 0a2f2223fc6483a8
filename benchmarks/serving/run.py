"""Requests per second, time to first token and peak memory of a small server, bare and reduced, at several numbers of clients.

    python benchmarks/serving/run.py                                          # small shape, CPU: about ten minutes
    python benchmarks/serving/run.py --shape 7b --device cuda --dtype bfloat16
    python benchmarks/serving/run.py --shape tiny --rounds 1                  # seconds; tries the benchmark itself

Every client sends its next request when it has the answer to its last one. The server takes what waits, at most as many requests as there
are clients, pads them on the left and answers them in one batched `generate`; a request that comes meanwhile waits. Clients take no time
of their own, so one loop plays them all, and which requests meet in a batch depends on their answers' lengths alone: it is the same for
every variant. Requests have texts and answers of mixed lengths and no, one or two images, fixed by a seed; weights are random.

The time to first token counts from the moment at which a request was sent: its wait, the tower and the prefill of its whole batch. In each
round every variant serves the same requests at every concurrency, in shuffled order, so that a drift of the machine hits all alike; ratios
are taken within a round. An untimed first batch of each measures memory. Results (.json, .md, .png) are written after every round, and the
same command goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

import foveate
from foveate import FoveateError
from foveate.machine import exact_peaks, peak, reset_peak, synchronize
from foveate.reducers import parse, visual_tokens

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))  # the repository: what the benchmarks share lies in benchmarks/

from benchmarks.common import add_machine, command, earlier, machine, measured, save  # noqa: E402
from benchmarks.serving.show import BARE, draw, missed, table  # noqa: E402
from benchmarks.shapes import SHAPES, build, prompt  # noqa: E402

METHODS = ("random", "fastervlm", "divprune", "fastv", "pyramiddrop")
KEEP = 0.25
CLIENTS = (1, 8, 32)
IMAGES = (1, 0, 1, 2, 1)  # of one request after the other
WORDS = (8, 96)  # after the images
ANSWER = (4, 16)  # tokens
SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
PADDED = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass(frozen=True)
class Request:
    """inputs: what the processor would make of it; answer: how many tokens it is answered by."""

    inputs: dict[str, Tensor]
    answer: int


class Clock(StoppingCriteria):
    """When a batch had its first token, and each row the last one of its answer. Ends a row there."""

    def __init__(self, answers: list[int], device: str) -> None:
        self.answers, self.device = answers, device
        self.first, self.last = 0.0, [0.0] * len(answers)
        self._made = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        synchronize(self.device)
        now = time.perf_counter()
        self._made += 1
        self.first = self.first or now
        self.last = [now if answer == self._made else last for answer, last in zip(self.answers, self.last, strict=True)]
        return torch.tensor([answer <= self._made for answer in self.answers], device=input_ids.device)


def batched(requests: list[Request]) -> dict[str, Tensor]:
    """Inputs of one batch, padded on the left."""
    rows = [{**request.inputs, "attention_mask": torch.ones_like(request.inputs["input_ids"])} for request in requests]
    longest = max(row["input_ids"].shape[1] for row in rows)
    inputs = {}
    for name in {name for row in rows for name in row}:
        if name in PADDED:
            parts = [row.get(name, torch.zeros_like(row["input_ids"])) for row in rows]
            inputs[name] = torch.cat([pad(part, (longest - part.shape[1], 0)) for part in parts])
        else:
            inputs[name] = torch.cat([row[name] for row in rows if name in row])
    return inputs


class Server:
    def __init__(self, given: argparse.Namespace) -> None:
        shape, self.device = SHAPES[given.shape], given.device
        dtype = getattr(torch, given.dtype)
        config = shape.config(given.layers)
        self.model = build(config, self.device, dtype)
        special = [getattr(config, name) for name in SPECIAL if hasattr(config, name)]
        # No answer ends by itself, and none contains the placeholder of an image.
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, suppress_tokens=special)
        mixed = random.Random(0)
        self.requests = []
        for number in range(max(served(given, clients) for clients in given.clients)):
            tokens = IMAGES[number % len(IMAGES)] * shape.per_image
            inputs = prompt(shape, config, tokens, self.device, dtype, after=mixed.randint(*WORDS), seed=number)
            self.requests.append(Request(inputs, mixed.randint(*ANSWER)))
        self.serve(BARE, 1, 1)  # what the libraries set up once is nobody's
        gc.collect()
        gc.freeze()  # collecting between two measurements shall not go through all of the libraries again

    def attached(self, variant: str) -> Any:
        return contextlib.nullcontext() if variant == BARE else foveate.attach(self.model, variant, record="none")

    @torch.no_grad()
    def serve(self, variant: str, clients: int, count: int) -> dict[str, float]:
        """Seconds until the first `count` requests are answered, by the clock and of all threads ("cpu"), and the median and the 95th
        percentile of the times to first token."""
        gc.collect()
        coming, first = iter(self.requests[:count]), []
        with self.attached(variant):
            synchronize(self.device)
            start = end = time.perf_counter()
            began = time.process_time()
            queue = deque((request, start) for request in islice(coming, clients))
            while queue:
                taken = [queue.popleft() for _ in range(min(clients, len(queue)))]
                clock = self._answer([request for request, _ in taken])
                first += [clock.first - sent for _, sent in taken]
                end = max(clock.last)
                queue.extend((request, sent) for sent, request in zip(sorted(clock.last), coming, strict=False))
            ran = time.process_time() - began
        times = {"p50": statistics.median(first), "p95": percentile(first, 95)}
        return {"requests": count, "seconds": end - start, "cpu": ran, **times}

    def _answer(self, requests: list[Request]) -> Clock:
        clock = Clock([request.answer for request in requests], self.device)
        self.model.generate(**batched(requests), max_new_tokens=max(clock.answers), stopping_criteria=StoppingCriteriaList([clock]))
        return clock

    def survey(self, variant: str, clients: int) -> float | None:
        """Peak of memory while one batch is answered, on top of weights and requests; None where the system does not tell. In bytes."""
        with exact_peaks():
            base = reset_peak(self.device)
            self.serve(variant, clients, clients)
            return peak(self.device) - base if base else None


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def served(given: argparse.Namespace, clients: int) -> int:
    """Requests of one measurement: two for each client at least."""
    return max(given.requests, 2 * clients)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--reducers", nargs="+", metavar="REDUCER", help=f"spellings; {', '.join(METHODS)} at {KEEP}, unless told")
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS), help="numbers of them, each a measurement of its own")
    parser.add_argument("--requests", type=int, default=16, help="least number of requests in one measurement; twice the clients if more")
    parser.add_argument("--rounds", type=int, default=5)
    add_machine(parser, HERE)
    given = parser.parse_args()
    options = SHAPES[given.shape].options
    given.reducers = given.reducers or [f"{m}:keep={KEEP}" + (f",{options[m]}" if m in options else "") for m in METHODS]
    if min(given.clients) < 1:
        sys.exit("--clients: every number must be at least 1")
    try:
        for reducer in given.reducers:
            parse(reducer)
    except FoveateError as error:
        sys.exit(str(error))
    torch.set_num_threads(given.threads)
    measure(given)


def measure(given: argparse.Namespace) -> None:
    settings = {name: getattr(given, name) for name in ("shape", "clients", "requests", "device", "dtype", "threads", "layers")}
    shape = SHAPES[given.shape]
    depth = shape.config(given.layers).text_config.num_hidden_layers
    chosen = [BARE, *given.reducers]
    path = given.output / (f"{given.shape}-{given.device}-{given.dtype}" + (f"-{given.layers}layers" if given.layers else "") + ".json")
    report: dict[str, Any] = {"settings": settings, "chosen": chosen, "machine": machine(given.device)}
    rounds, granted = earlier(path, report)
    named = ("shape", "requests", "rounds", "threads", "device", "dtype", "layers")
    report["command"] = command("benchmarks/serving/run.py", given, named, clients=given.clients, reducers=given.reducers)
    given.output.mkdir(parents=True, exist_ok=True)

    console = Console(stderr=True)
    with console.status(f"building {shape.what}"):
        server = Server(given)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        variants: dict[str, Any] = {}
        skipped: dict[str, str] = {}
        task = progress.add_task("untimed", total=len(chosen))
        for variant in chosen:
            progress.update(task, description=f"untimed: {variant}")
            try:
                peaks = {str(clients): server.survey(variant, clients) for clients in given.clients}
                kept = visual_tokens(parse("" if variant == BARE else variant), shape.per_image, depth)
                variants[variant] = {"visual_tokens": statistics.mean(kept), "peak_bytes": peaks}
            except FoveateError as error:
                skipped[variant] = str(error)
            progress.advance(task)
        report |= {"weight_bytes": sum(p.numel() * p.element_size() for p in server.model.parameters())}
        report |= {"variants": variants, "skipped": skipped}
        cells = len(given.clients) * len(variants)
        task = progress.add_task("", total=given.rounds * cells, completed=len(rounds) * cells)

        def one_round(number: int) -> dict[str, dict[str, dict[str, float]]]:
            shuffled, done = random.Random(number), number * cells
            found: dict[str, dict[str, dict[str, float]]] = {}
            for clients in shuffled.sample(given.clients, len(given.clients)):
                for variant in shuffled.sample(list(variants), len(variants)):
                    progress.update(task, description=f"round {number + 1}, {clients} clients: {variant}", completed=done)
                    found.setdefault(str(clients), {})[variant] = server.serve(variant, clients, served(given, clients))
                    done += 1
            return found

        for number in range(len(rounds), given.rounds):
            found, share = measured(number, partial(one_round, number), console)
            rounds.append(found)
            granted.append(share)
            progress.update(task, completed=len(rounds) * cells)
            save(path, {**report, "rounds": rounds, "granted": granted}, table, draw)
    if rounds:
        save(path, {**report, "rounds": rounds, "granted": granted}, table, draw)
        slower = missed({**report, "rounds": rounds})
        told = f"slower than the bare model: {'; '.join(slower)}" if slower else "the goal is met"
        console.print(f"{path}, with .md and .png beside it; {told}")


if __name__ == "__main__":
    main()
