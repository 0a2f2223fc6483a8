"""What a piece of work consists of, by torch's profiler: seconds by kind of operation, and the most memory that its tensors took."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from benchmarks.common import Usage
from torch.profiler import ProfilerActivity, profile

from foveate.machine import synchronize

PRODUCTS, ATTENTION, MOVING, DECIDING, OTHER, BETWEEN = "products", "attention", "moving", "masks, ranking", "other", "between"
KINDS = {
    PRODUCTS: "addmm mm bmm baddbmm addmv mv dot matmul linear einsum convolution mkldnn_convolution mkldnn_linear linear_pointwise",
    ATTENTION: "softmax",  # beside all whose names say so
    MOVING: (
        "index index_select index_put index_put_impl index_add index_copy gather scatter scatter_add scatter_reduce take take_along_dim "
        "copy to_copy clone contiguous cat stack repeat repeat_interleave constant_pad_nd pad masked_scatter masked_select embedding flip"
    ),
    DECIDING: (
        "eq ne lt le gt ge isfinite isnan bitwise_and bitwise_or bitwise_not bitwise_xor logical_and logical_or logical_not where "
        "masked_fill any all nonzero is_nonzero item local_scalar_dense equal sort argsort topk max min argmax cummax cumsum arange "
        "tril triu unique unique2 unique_dim bincount"
    ),
}
"""By kind the operations that belong to it, without the underscores in front of and behind their names."""

_KIND = {name: kind for kind, names in KINDS.items() for name in names.split()}
T = TypeVar("T")


def kind_of(operation: str) -> str:
    """The kind of an operation of torch, by its name."""
    name = operation.rpartition("::")[2].strip("_")
    return ATTENTION if "attention" in name else _KIND.get(name, OTHER)


def profiled(call: Callable[[], T], device: str) -> tuple[T, dict[str, Any]]:
    """What a call returns, and of it

    seconds     by kind of operation, without those that an operation calls; on the CPU of the thread that calls them, which waits for the
                others; `BETWEEN` is what is left of the whole: Python, hooks, the model's own calls
    wall        the whole, by the clock
    peak_bytes  the most that tensors which came to be in the meantime took at a time; what libraries take for themselves is not in it
    granted     the share of its threads that the machine granted meanwhile; None: not known
    """
    gc.collect()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    found = profile(activities=activities, profile_memory=True, acc_events=True)
    with _unheard():
        found.start()
    try:
        began, start = Usage(), time.perf_counter()
        result = call()
        synchronize(device)
        wall, granted = time.perf_counter() - start, began.granted()
    finally:
        with _unheard():
            found.stop()
    seconds = dict.fromkeys((*KINDS, OTHER, BETWEEN), 0.0)
    for event in found.key_averages():
        own: float = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        seconds[kind_of(event.key)] += own / 1e6
    seconds[BETWEEN] = wall - sum(seconds.values())
    inner: Any = found.profiler
    return result, {"seconds": seconds, "wall": wall, "peak_bytes": most(inner.kineto_results.events()), "granted": granted}


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """A `with` block in which nothing is written to standard error: the profiler says there, from C++, that it begins and ends."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def most(events: Iterable[Any]) -> int:
    """The most bytes in use at a time, of a profiler's events: what its allocator gave (above 0) and took back (below)."""
    at = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        at += event.nbytes()
        peak = max(peak, at)
    return peak
