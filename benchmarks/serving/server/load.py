"""Load by vLLM's own `vllm bench serve`: clients that each send their next request when they have the answer to their last one."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from typing import Any

from benchmarks.serving.server.checkpoint import Shape
from benchmarks.serving.server.server import Server, watched

TEXT, ANSWER, SPREAD = 64, 16, 0.5  # tokens of a text and of an answer, and by how much of it they vary
FIGURES = {
    "seconds": "duration",
    "completed": "completed",
    "failed": "failed",
    "rate": "request_throughput",
    "prompt": "total_input_tokens",
    "answer": "total_output_tokens",
}


def load(
    server: Server, shape: Shape, clients: int, count: int, seed: int, keep: float | None, images: tuple[int, float] = (1, 1.0)
) -> Any:
    """What `count` requests of so many clients took: rates, times in seconds, and what the server told meanwhile.

    Texts, answers and pictures follow from the seed alone, so that all variants are asked the same; no two pictures are alike.

    keep    the budget that requests ask for; None: none
    images  in a request, and by how much of it their number varies
    """
    from vllm.benchmarks.serve import add_cli_args, main

    words = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", server.url, "--model", str(server.model)]
    words += ["--dataset-name", "random-mm", "--num-prompts", str(count), "--max-concurrency", str(clients), "--seed", str(seed)]
    words += ["--random-input-len", str(TEXT), "--random-output-len", str(ANSWER), "--random-range-ratio", str(SPREAD)]
    words += ["--random-mm-base-items-per-request", str(images[0]), "--random-mm-num-mm-items-range-ratio", str(images[1])]
    words += ["--random-mm-limit-mm-per-prompt", json.dumps({"image": 2})]
    words += ["--random-mm-bucket-config", str({(*size, 1): share for size, share in shape.pictures.items()})]
    words += ["--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,95", "--temperature", "0"]
    words += ["--ready-check-timeout-sec", "0", "--disable-tqdm", "--save-detailed"]
    if keep is not None:
        words += ["--extra-body", json.dumps({"mm_processor_kwargs": {"foveate_keep": keep}})]
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    with contextlib.redirect_stdout(io.StringIO()), watched(server) as seen:
        told = main(parser.parse_args(words))
    if not told["completed"]:
        raise RuntimeError(f"all {count} requests to {server.reducer or 'the bare model'} failed: {told['errors'][0]}")
    found = {name: told[own] for name, own in FIGURES.items()}
    times = {f"{name}_{p}": told[f"{p}_{name}_ms"] / 1000 for name in ("ttft", "itl") for p in ("p50", "p95")}
    return {**found, **times, **seen, "errors": sorted({error.strip().splitlines()[-1] for error in told["errors"] if error.strip()})[:3]}
