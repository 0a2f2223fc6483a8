"""vLLM in a process of its own, which it needs for its settings and its memory: `run` starts one, asks it everything, and ends it."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.interop.served import NEW

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
LENGTH = 512


@dataclass(frozen=True)
class Asked:
    """A prompt, its pictures, and what the request sets (`mm_processor_kwargs`)."""

    text: str
    images: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Told:
    """tokens and cached of each prompt: its answer, and how much of the prompt was found in a cache; kept: what was reduced meanwhile, as
    (reducer, places that were kept); encoded: how many images each call of the tower had; error: in place of all that."""

    tokens: list[list[int]] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    kept: list[tuple[str, list[int]]] = field(default_factory=list)
    encoded: list[int] = field(default_factory=list)
    error: str = ""


def run(folder: Path, overrides: dict[str, Any], batches: Sequence[Sequence[Asked]], **options: Any) -> list[Told]:
    """What an engine with these `hf_overrides` answers to some batches, one after the other."""
    return alone(_run, folder, overrides, batches, options)


def alone(function: Callable[..., Any], *given: Any) -> Any:
    """The result of a function in a new process; what it raises is raised here."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_settled, function, *given).result()


def _settled(function: Callable[..., Any], *given: Any) -> Any:
    os.environ.update(SETTINGS)
    return function(*given)


def _run(folder: Path, overrides: dict[str, Any], batches: Sequence[Sequence[Asked]], options: dict[str, Any]) -> list[Told]:
    from vllm import SamplingParams

    reducing: Any = importlib.import_module("foveate.integrations.vllm.model")
    kept: list[tuple[str, list[int]]] = []
    encoded: list[int] = []
    reduce, embedded = reducing.reduce_embeddings, reducing.ReducingModel._embedded

    def noted(reducer: Any, *args: Any, **kwargs: Any) -> Any:
        found = reduce(reducer, *args, **kwargs)
        kept.append((str(reducer), found.kept.tolist()))
        return found

    def counted(self: Any, rooms: Any, given: Any) -> Any:
        encoded.append(len(rooms))
        return embedded(self, rooms, given)

    reducing.reduce_embeddings = noted
    reducing.ReducingModel._embedded = counted
    if options.pop("keyless", False):
        import foveate.integrations.vllm.processor as processing

        processing._key = lambda name, reducer: name
    engine = start(folder, overrides, **options)
    how = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    found = []
    for batch in batches:
        kept.clear()
        encoded.clear()
        try:
            answers = engine.generate([_prompt(asked) for asked in batch], how, use_tqdm=False)
        except Exception as error:
            found.append(Told(error=f"{type(error).__name__}: {error}"))
            continue
        tokens, cached = [list(one.outputs[0].token_ids) for one in answers], [one.num_cached_tokens for one in answers]
        found.append(Told(tokens, cached, list(kept), list(encoded)))
    return found


def start(folder: Path, overrides: dict[str, Any], version: str = "", **options: Any) -> Any:
    from vllm import LLM

    from foveate.integrations.vllm import setting

    given: dict[str, Any] = {
        "hf_overrides": overrides,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": LENGTH,
        "max_num_batched_tokens": 48,  # prompts are prefilled in pieces
        "max_num_seqs": 8,
        "block_size": 32,
        "enable_prefix_caching": True,
        "limit_mm_per_prompt": {"image": 2, "video": 0} if "qwen" in folder.name else {"image": 2},
        **options,
    }
    own = setting.installed
    if version:
        setting.installed = lambda: ("vllm", version)
    try:
        return LLM(str(folder), **given)
    finally:
        setting.installed = own


def _prompt(asked: Asked) -> dict[str, Any]:
    given: dict[str, Any] = {"prompt": asked.text}
    if asked.images:
        given |= {"multi_modal_data": {"image": list(asked.images)}, "mm_processor_kwargs": asked.options}
    return given


def failing(folder: Path, starts: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """What is said where servers with some `hf_overrides` and options do not start, one after the other."""
    return alone(_failing, folder, starts)


def _failing(folder: Path, starts: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    said = []
    for overrides, options in starts:
        try:
            start(folder, overrides, **options)
            said.append("")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said
