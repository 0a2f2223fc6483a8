"""What is read off the machine: whether it has bfloat16, when the device is done, how much memory is in use; and whether freed memory is
kept."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


def has_bfloat16(device: str) -> bool:
    """Whether products of matrices in bfloat16 are made by the device's own instructions: without them a processor takes about eighty times
    as long as in float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # what torch itself asks before it hands them on


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> float:
    """Bytes in use now, from where the next peak counts. On the CPU the process' own resident memory; 0 where the system tells no peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        gc.collect()
        _trim()  # what was freed must not be there to be used again unseen
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0.0
    return _status("VmRSS")


@contextlib.contextmanager
def exact_peaks() -> Iterator[None]:
    """On the CPU: large blocks go back to the system at once, so that resident memory is what is in use. Afterwards the allocator has its
    habit again: it keeps blocks as large as it has seen, up to 32 MiB."""
    _allocator(M_MMAP_THRESHOLD, 1 << 16)
    try:
        yield
    finally:
        _habit()


@contextlib.contextmanager
def kept_memory(device: str) -> Iterator[None]:
    """On the CPU: blocks that are freed stay with the process, however large, until the `with` block is left.

    A training step asks for blocks as large as those of the step before. By its habit the allocator gives those above 32 MiB back to the
    system, which hands them out again page by page, filled with zeros."""
    if device != "cpu":
        yield
        return
    _habit()  # of versions of glibc that refuse more
    _allocator(M_MMAP_THRESHOLD, MOST)
    _allocator(M_TRIM_THRESHOLD, MOST)
    try:
        yield
    finally:
        _habit()
        _trim()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc: how much unused memory at its end, and how large a block, goes back to the system
MOST = 2**31 - 1  # bytes, the most that can be told


def _habit() -> None:
    _allocator(M_MMAP_THRESHOLD, 32 << 20)
    _allocator(M_TRIM_THRESHOLD, 64 << 20)


def _allocator(option: int, value: int) -> None:
    """Other C libraries have no such options."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(option, value)


def _trim() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def free_memory(device: str) -> int:
    """Bytes that this process may still take: on a GPU what its own allocator holds unused too."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    return int(psutil.virtual_memory().available)


def _status(name: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0.0)


def environment() -> str:
    """One line on what the numbers were made with."""
    import torch
    import transformers

    return (
        f"{_processor()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads; {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
