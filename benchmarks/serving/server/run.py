"""Requests per second and latencies of vLLM's own server under load, bare and with the plug-in's reducers.

    python benchmarks/serving/server/run.py                            # LLaVA-1.5's proportions in small
    python benchmarks/serving/server/run.py --faults --soak 10000      # and what goes wrong, and memory over many requests
    python benchmarks/serving/server/run.py --shape tiny --rounds 1 --clients 1 4

Runs in the environment that `make serve-test` builds. A server is started for the bare model and for each method, all of them at once;
they wait while another is asked. A method's budgets are asked for by the requests (`foveate_keep`). Load comes from vLLM's own
`vllm bench serve`, closed loop: a client sends its next request when it has the answer to its last. Requests have texts of 32 to 96 tokens
in front of no, one or two pictures of several sizes, no two of them alike, and answers of 8 to 24 tokens; weights are random.

In each round every variant is sent the same requests at every number of clients, in shuffled order, so that a drift of the machine hits
all alike; ratios are taken within a round. Results (.json, .md, .png) are written after every measurement, and the same command goes on
where it was: what is measured is not measured again.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from foveate import FoveateError
from foveate.accounting import predict
from foveate.machine import environment
from foveate.reducers import parse
from foveate.reducers.exporting import exported

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))  # the repository: what the benchmarks share lies in benchmarks/

from benchmarks.common import before, command, save  # noqa: E402
from benchmarks.serving.server.checkpoint import SHAPES, build  # noqa: E402
from benchmarks.serving.server.faults import faults, soak  # noqa: E402
from benchmarks.serving.server.load import ANSWER, TEXT, load  # noqa: E402
from benchmarks.serving.server.server import Server  # noqa: E402
from benchmarks.serving.server.show import draw, missed, table  # noqa: E402
from benchmarks.serving.show import BARE  # noqa: E402

KEEP = (0.25, 0.1)
CLIENTS = (1, 8, 32)
WARM = 8  # untimed requests to each server


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="llava")
    parser.add_argument("--reducers", nargs="+", metavar="METHOD", help="methods; those of the shape, unless told")
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP), help="budgets")
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS), help="numbers of them, each a measurement of its own")
    parser.add_argument("--requests", type=int, default=8, help="least number of requests in one measurement; twice the clients if more")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="that a server computes with")
    parser.add_argument("--port", type=int, default=18_800, help="of the first server; the others have the next ones")
    parser.add_argument("--faults", action="store_true", help="also see what a server does when something goes wrong")
    parser.add_argument("--soak", type=int, default=0, metavar="REQUESTS", help="also send so many small requests, and look at the memory")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    given = parser.parse_args()
    given.reducers = given.reducers or list(SHAPES[given.shape].methods)
    if min(*given.clients, given.requests) < 1:
        sys.exit("--clients and --requests: every number must be at least 1")
    try:
        for method in given.reducers:
            for keep in given.keep:
                exported([parse(method)[0].at(keep)], "vLLM")
    except FoveateError as error:
        sys.exit(str(error))
    with tempfile.TemporaryDirectory(prefix="serving-") as work:
        Measuring(given, Path(work)).run()


def wanted(rounds: int, clients: Sequence[int], variants: Sequence[str]) -> list[tuple[int, int, str]]:
    """(round, clients, variant) of all measurements, in the order in which they are made, which is the same each time."""
    found = []
    for number in range(rounds):
        shuffled = random.Random(number)
        for several in shuffled.sample(clients, len(clients)):
            found += [(number, several, variant) for variant in shuffled.sample(variants, len(variants))]
    return found


class Measuring:
    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        self.given, self.work, self.shape = given, work, SHAPES[given.shape]
        self.console = Console(stderr=True)
        self.path = given.output / f"{given.shape}-cpu-float32.json"
        self.variants = {BARE: (None, None)} | {str(parse(m)[0].at(k)): (m, k) for m in given.reducers for k in given.keep}
        settings = {name: getattr(given, name) for name in ("shape", "clients", "requests", "threads", "keep")}
        self.report: dict[str, Any] = {"settings": settings, "variants": list(self.variants), "machine": environment()}
        self.report = {"what": self.shape.what, **self.report}
        self.report = {**before(self.path, self.report), **self.report}
        named = ("shape", "requests", "rounds", "threads")
        words = command("benchmarks/serving/server/run.py", given, named, clients=given.clients, keep=given.keep, reducers=given.reducers)
        self.report["command"] = words + (" --faults" if given.faults else "") + (f" --soak {given.soak}" if given.soak else "")

    def run(self) -> None:
        given = self.given
        given.output.mkdir(parents=True, exist_ok=True)
        cells = self.report.setdefault("cells", [])
        self.report["flops"] = self._flops()
        build(self.shape, self.work / given.shape)
        every = wanted(given.rounds, given.clients, list(self.variants))
        done = {(cell["round"], cell["clients"], cell["variant"]) for cell in cells}
        left = [cell for cell in every if cell not in done]
        if left:
            self._measure(left, len(every))
        if given.faults and "faults" not in self.report:
            self.console.print("what a server does when something goes wrong …")
            self.report["faults"] = faults(lambda: self._server(given.shape, given.reducers[0], 90))
            self._save()
        if given.soak and self.report.get("soak", {}).get("asked") != given.soak:
            self.console.print(f"{given.soak} small requests …")
            build(SHAPES["tiny"], self.work / "tiny")
            self.report["soak"] = {
                "asked": given.soak,
                **soak(lambda: self._server("tiny", given.reducers[0], 91), SHAPES["tiny"], given.soak),
            }
        self._save()
        said = "; ".join(missed(self.report)) if cells else "nothing measured"
        self.console.print(f"{self.path}, with .md and .png beside it; {f'missed: {said}' if said else 'the goals are met'}")

    def _measure(self, left: list[tuple[int, int, str]], total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with ExitStack() as stack:
            servers: dict[str | None, Server] = {}
            with self.console.status("starting the servers"):
                for number, method in enumerate(dict.fromkeys(self.variants[variant][0] for _, _, variant in left)):
                    server = servers[method] = self._server(self.given.shape, method, number)
                    stack.callback(server.stop)
                    server.start()
                    server.wait()  # one after the other: together they would take as long
                for number, (method, server) in enumerate(servers.items()):
                    load(server, self.shape, min(WARM, max(self.given.clients)), WARM, 99 + number, None if method is None else 0.5)
            with Progress(*columns, console=self.console) as progress:
                task = progress.add_task("", total=total, completed=total - len(left))
                for number, clients, variant in left:
                    progress.update(task, description=f"round {number + 1}, {clients} clients: {variant}")
                    method, keep = self.variants[variant]
                    count = max(self.given.requests, 2 * clients)
                    seed = 1000 * (number + 1) + clients
                    servers[method].forget()  # a method's budgets are asked of one server, with the same texts
                    told = load(servers[method], self.shape, clients, count, seed, keep)
                    self.report["cells"].append({"round": number, "clients": clients, "variant": variant, **told})
                    self._save()
                    progress.advance(task)

    def _server(self, shape: str, method: str | None, number: int) -> Server:
        log, port = self.work / f"{shape}-{method or BARE}.log", self.given.port + number
        return Server(self.work / shape, method, port, log, SHAPES[shape].length, self.given.threads)

    def _flops(self) -> dict[str, float]:
        """FLOPs of a request of each variant, with the commonest picture: prefill and answer. {} where they cannot be predicted."""
        config, processor = self.shape.write()
        height, width = max(self.shape.pictures, key=lambda size: self.shape.pictures[size])
        text = f"{self.shape.image} " + " ".join(f"w{number}" for number in range(TEXT))
        how: dict[str, Any] = {"inputs": processor(text=[text], images=[Image.new("RGB", (width, height))], return_tensors="pt")}
        found = {}
        for name, (method, keep) in self.variants.items():
            how["reducers"] = [] if method is None or keep is None else [parse(method)[0].at(keep)]
            try:
                parts = [predict(config, **how), predict(config, mode="decode", new_tokens=ANSWER - 1, **how)]
            except FoveateError:
                return {}
            found[name] = float(sum(part.total_flops for part in parts))
        return found

    def _save(self) -> None:
        save(self.path, self.report, table, draw)


if __name__ == "__main__":
    main()
