"""A server of vLLM in processes of its own, and what it tells of itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

START = 600.0  # seconds that a server may take to start
GLANCE = 0.5  # seconds between two looks at its gauges
BATCHED = 2048  # tokens of one step
IMAGES = 4  # in a prompt


@dataclass
class Server:
    """`vllm serve` on this machine.

    model      folder of the checkpoint
    reducer    as spelled; None: the model as it is
    port       on which it is asked
    log        file of all that it says
    length     longest prompt with its answer, in tokens
    threads    that it computes with
    """

    model: Path
    reducer: str | None
    port: int
    log: Path
    length: int
    threads: int
    process: Any = field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begins to start; `wait` waits for the end of it. RuntimeError where the port is taken."""
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                raise RuntimeError(
                    f"something answers on port {self.port} already: end it (a server of an earlier run?), or give another --port"
                )
        words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model), "--port", str(self.port)]
        words += ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", str(self.length)]
        words += ["--max-num-batched-tokens", str(BATCHED), "--max-num-seqs", "32", "--mm-processor-cache-gb", "0.1"]
        words += ["--limit-mm-per-prompt", json.dumps({"image": IMAGES, "video": 0}), "--chat-template-content-format", "openai"]
        words += ["--trust-request-mm-kwargs", "--disable-uvicorn-access-log"]
        if self.reducer is not None:
            words += ["--hf-overrides", json.dumps({"foveate": self.reducer})]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(self.threads)}
        settings |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
        settings |= {"VLLM_SERVER_DEV_MODE": "1"}  # for `forget`
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                words, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **settings}, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers. RuntimeError with the end of its log where it does not."""
        end = time.monotonic() + START
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            time.sleep(1)
        said = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
        self.stop()
        raise RuntimeError(f"the server of {self.reducer or 'the bare model'} did not start; {self.log} ends with:\n{said}")

    def stop(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Kill -9, of all of its processes."""
        tree = self._tree()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        self.start()
        self.wait()
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def forget(self) -> None:
        """Empties its caches: of prefixes, encoded images and processed ones. RuntimeError where it does not."""
        for cache in ("encoder", "mm"):
            self._reset(cache)
        for _ in range(20):  # of blocks that are in use nothing is forgotten, and a request gives them back a moment after its end
            if json.loads(self._reset("prefix"))["success"]:
                return
            time.sleep(0.5)
        raise RuntimeError(f"the server of {self.reducer or 'the bare model'} does not empty its prefix cache")

    def _reset(self, cache: str) -> bytes:
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/reset_{cache}_cache", method="POST"), timeout=30) as answer:
            return bytes(answer.read())

    # ---- what it tells

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            return read_metrics(answer.read().decode())

    def _tree(self) -> list[Any]:
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def memory(self) -> int:
        """Resident, of all of its processes, in bytes."""
        return self._sum(lambda process: process.memory_info().rss)

    def cpu(self) -> float:
        """Seconds that its processes have run."""
        return self._sum(lambda process: sum(process.cpu_times()[:2]))

    def _sum(self, of: Any) -> Any:
        total = 0
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                total += of(process)
        return total


def read_metrics(text: str) -> dict[str, float]:
    """Of Prometheus' text format the sum of each name's samples; labels that are numbers of blocks as "kv_blocks"."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        head, _, value = line.rpartition(" ")
        name, _, labels = head.partition("{")
        if name == "vllm:cache_config_info":
            blocks = labels.partition('num_gpu_blocks="')[2].partition('"')[0]
            found["kv_blocks"] = found.get("kv_blocks", 0.0) + (float(blocks) if blocks.isdigit() else 0.0)
        with suppress(ValueError):
            found[name] = found.get(name, 0.0) + float(value)
    return found


COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "prefix_asked": "vllm:prefix_cache_queries_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
    "image_asked": "vllm:mm_cache_queries_total",
    "image_hits": "vllm:mm_cache_hits_total",
}


def counted(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What the counters have counted between two looks."""
    return {name: after.get(metric, 0.0) - before.get(metric, 0.0) for name, metric in COUNTERS.items()}


@contextmanager
def watched(server: Server) -> Iterator[dict[str, float]]:
    """Fills a dictionary with what a server has counted meanwhile, the most KV blocks that it had in use at any look, and what ran.

    cpu     seconds of the server's processes
    others  share of the machine that ran neither the server nor this process
    """
    found: dict[str, float] = {}
    most, over = [0.0], threading.Event()

    def look() -> None:
        while not over.wait(GLANCE):
            with suppress(OSError):
                most[0] = max(most[0], server.metrics().get("vllm:kv_cache_usage_perc", 0.0))

    before, cpu, own, all_cpus, began = server.metrics(), server.cpu(), time.process_time(), _busy(), time.perf_counter()
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
    wall, after = time.perf_counter() - began, server.metrics()
    ran = server.cpu() - cpu
    others = _busy() - all_cpus - ran - (time.process_time() - own)
    blocks = after.get("kv_blocks", 0.0)
    found |= {**counted(before, after), "kv_peak": most[0] * blocks, "kv_blocks": blocks, "cpu": ran}
    found |= {"others": max(0.0, others / wall / (psutil.cpu_count() or 1))}


def _busy() -> float:
    """Seconds that all cores together have run something."""
    times = psutil.cpu_times()
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq")))
