"""What a model costs on this machine, predicted beside measured: `foveate profile`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from json import dumps
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from foveate.accounting import CONVENTION, Ledger, predict
from foveate.accounting.counter import Counter, parameters_of, parts_of
from foveate.data.chat import takes_videos
from foveate.data.clips import Clip, open_clip
from foveate.engine.attach import attach
from foveate.errors import FoveateError
from foveate.inference import load_model, model_inputs, shrunk
from foveate.inspect.look import open_image, prompt_of
from foveate.machine import environment, peak, reset_peak, synchronize
from foveate.reducers import in_model, parse, prepare, spell

TIMES = ("processor", "tower", "bridge", "prefill", "first decode")
FLOPS = ("tower", "bridge", "lm_linear", "lm_attention", "head", "scores", "other")


@dataclass(frozen=True)
class Profile:
    """One model under one set of reducers, for one prompt.

    predicted  by part: from the configuration and the processor's outputs alone; {} with `why` where that cannot be told
    counted    by part: the products that ran in one prefill; "other" is rotary angles and recurrences
    seconds    medians and ranges; "prefill" is everything between the bridge and the first token
    peak_bytes on top of what was in use before; on the CPU None where the system does not tell it
    """

    reducers: str
    visual_tokens: list[int]
    predicted_tokens: list[int]
    predicted: dict[str, int]
    counted: dict[str, int]
    predicted_kv_bytes: int
    kv_bytes: int
    seconds: dict[str, tuple[float, float, float]]
    tokens_per_second: tuple[float, float, float]
    peak_bytes: int | None
    why: str = ""

    @property
    def first_token(self) -> float:
        """Seconds from the image to the first token."""
        return sum(self.seconds[name][0] for name in TIMES if name != "first decode")


def profile(
    model: Any,
    processor: Any,
    reducers: Sequence[str],
    images: Sequence[str],
    question: str,
    *,
    new_tokens: int,
    repeats: int,
    frames: str | None = None,
) -> list[Profile]:
    """Profiles of the bare model and of every one of `reducers`, each measured `repeats` times in turn after one warm-up. With `frames`, a
    sampling, the only one of `images` is a film.

    FoveateError for images and films that cannot be read, unknown reducers, and those that do not work on the model.
    """
    if repeats < 1 or new_tokens < 2:
        raise FoveateError(f"repeats={repeats}, new_tokens={new_tokens}: measure at least once, and at least 2 tokens")
    if not images:
        raise FoveateError("a profile needs at least one image")
    if frames is not None and len(images) != 1:
        raise FoveateError(f"--frames is for one film, and {len(images)} are named")
    clip = None if frames is None else open_clip(images[0], frames)
    pictures = [open_image(image) for image in images] if clip is None else list(clip.frames)
    texts = ["none", *(spell(parse(text)) for text in reducers)]
    benches = [_Bench(model, processor, text, pictures, question, new_tokens, clip) for text in dict.fromkeys(texts)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=len(benches) * (repeats + 2))
        for bench in benches:
            bench.survey()
            bar.advance(task)
        for _ in range(repeats + 1):
            for bench in benches:
                bench.measure()
                bar.advance(task)
    return [bench.result() for bench in benches]


class _Bench:
    """`clip`: whose frames the pictures are."""

    def __init__(
        self, model: Any, processor: Any, reducers: str, pictures: list[Any], question: str, new_tokens: int, clip: Clip | None
    ) -> None:
        self.model, self.text, self.new_tokens = model, reducers, new_tokens
        self.reducers = parse(reducers)
        self.processor, before = shrunk(processor, self.reducers)
        self.pictures = [prepare(before, picture) for picture in pictures]
        self.clip = None if clip is None or not takes_videos(processor) else replace(clip, frames=tuple(self.pictures))
        self.prompt = prompt_of(processor, question, len(pictures), clip)
        self.runs: list[dict[str, float]] = []

    def inputs(self) -> Any:
        shown: tuple[Any, Any] = ([self.pictures], ()) if self.clip is None else ([[]], [[self.clip]])
        return model_inputs(self.processor, shown[0], [self.prompt], shown[1]).to(self.model.device, self.model.dtype)

    def survey(self) -> None:
        """What one pass tells that no clock is needed for."""
        inputs = self.inputs()
        try:
            self.told: Ledger | None = predict(
                self.model.config, inputs=inputs, reducers=self.reducers, dtype_bytes=self.model.dtype.itemsize
            )
            self.why = ""
        except FoveateError as error:
            self.told, self.why = None, str(error)
        with attach(self.model, in_model(self.reducers)) as run, Counter(self.model) as counted, torch.no_grad():
            out = self.model(**inputs, use_cache=True, logits_to_keep=1)
        self.counted = dict(counted.flops)
        self.tokens = run.last.visual_tokens
        self.kv_bytes = sum(
            t.numel() * t.element_size() for layer in out.past_key_values.layers for t in (layer.keys, layer.values) if t is not None
        )
        del out
        base = reset_peak(self.model.device.type)
        self.step(inputs)
        self.peak = max(0, round(peak(self.model.device.type) - base)) if base else None

    @torch.no_grad()
    def step(self, inputs: Any) -> dict[str, float]:
        seconds = dict.fromkeys(("tower", "bridge"), 0.0)
        with ExitStack() as stack:
            if self.reducers:
                stack.enter_context(attach(self.model, in_model(self.reducers)))
            for module, part in parts_of(self.model).items():
                if part in seconds:
                    stack.enter_context(_timed(module, part, seconds, self.model.device))
            began = _now(self.model.device)
            out = self.model(**inputs, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            first = _now(self.model.device)
            marks = [first]
            for _ in range(self.new_tokens - 1):
                out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
                marks.append(_now(self.model.device))
        seconds["prefill"] = first - began - seconds["tower"] - seconds["bridge"]
        seconds["first decode"] = marks[1] - marks[0]
        seconds["decoded"] = (len(marks) - 1) / (marks[-1] - marks[0])
        return seconds

    def measure(self) -> None:
        began = time.perf_counter()
        inputs = self.inputs()
        spent = time.perf_counter() - began
        self.runs.append({"processor": spent, **self.step(inputs)})

    def result(self) -> Profile:
        timed = self.runs[1:]  # the first one warms up
        seconds = {name: _spread([run[name] for run in timed]) for name in TIMES}
        told = self.told
        return Profile(
            self.text,
            self.tokens,
            list(told.visual_tokens) if told else [],
            dict(told.flops) if told else {},
            self.counted,
            sum(told.kv_bytes) if told else 0,
            self.kv_bytes,
            seconds,
            _spread([run["decoded"] for run in timed]),
            self.peak,
            self.why,
        )


class _timed:
    """Adds the seconds of a module's forward to `seconds[part]`."""

    def __init__(self, module: nn.Module, part: str, seconds: dict[str, float], device: torch.device) -> None:
        self.part, self.seconds, self.device = part, seconds, device
        self.handles = [module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._end)]

    def _begin(self, *_: Any) -> None:
        self.began = _now(self.device)

    def _end(self, *_: Any) -> None:
        self.seconds[self.part] += _now(self.device) - self.began

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()


def _now(device: torch.device) -> float:
    synchronize(device.type)
    return time.perf_counter()


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def as_json(model: str, dtype: str, parameters: dict[str, int], profiles: Sequence[Profile]) -> str:
    return dumps(
        {
            "model": model,
            "dtype": dtype,
            "parameters": parameters,
            "environment": environment(),
            "convention": CONVENTION,
            "profiles": [asdict(p) for p in profiles],
        },
        indent=1,
    )


def print_profiles(model: str, parameters: dict[str, int], profiles: Sequence[Profile], console: Console | None = None) -> None:
    """One column a set of reducers. Two numbers: predicted | measured; one, where they are the same."""
    console = console or Console()
    what = ", ".join(f"{part} {_number(count)}" for part, count in parameters.items())
    bare = profiles[0]
    table = Table(title=f"{model}: parameters {what}", title_justify="left", caption_justify="left")
    table.add_column("")
    for one in profiles:
        table.add_column(one.reducers, justify="right", overflow="fold")

    def row(name: str, cells: list[str]) -> None:
        table.add_row(name, *cells)

    row("visual tokens, mean of layers", [_pair(_mean(p.predicted_tokens), _mean(p.visual_tokens)) for p in profiles])
    row("visual tokens, last layer", [_pair(p.predicted_tokens[-1] if p.predicted_tokens else None, p.visual_tokens[-1]) for p in profiles])
    for part in FLOPS:
        row(f"FLOPs, {part.replace('_', ' ')}", [_pair(p.predicted.get(part), p.counted[part]) for p in profiles])
    row("FLOPs, all", [_pair(sum(p.predicted.values()) or None, sum(p.counted.values())) for p in profiles])
    row("speed-up that FLOPs allow, without tower and bridge", [f"{_behind(bare) / _behind(p):.2f}" for p in profiles])
    row("KV cache, bytes", [_pair(p.predicted_kv_bytes or None, p.kv_bytes) for p in profiles])
    table.add_section()
    for name in TIMES[:-1]:
        row(f"ms, {name}", [_ms(p.seconds[name]) for p in profiles])
    row("ms to the first token", [f"{1000 * p.first_token:.1f}" for p in profiles])
    row("ms, first decode", [_ms(p.seconds["first decode"]) for p in profiles])
    row("tokens/s decoded", [f"{p.tokens_per_second[0]:.1f}" for p in profiles])
    row("peak memory above the weights", ["–" if p.peak_bytes is None else _number(p.peak_bytes) + "B" for p in profiles])
    row("speed-up of prefill measured", [f"{bare.seconds['prefill'][0] / p.seconds['prefill'][0]:.2f}" for p in profiles])
    table.caption = f"Two numbers: predicted | measured; one: they are the same. FLOPs: {CONVENTION}. {environment()}"
    console.print(table)
    if len(profiles) == 1:
        console.print("The bare model alone: name methods to compare it with, such as --reduce fastv:keep=0.25.", markup=False)
    for why in dict.fromkeys(p.why for p in profiles if p.why):
        console.print(f"not predicted: {why}", markup=False)


def _pair(told: Any, seen: Any) -> str:
    if told == seen:
        return _number(seen)
    return f"{'–' if told is None else _number(told)} | {_number(seen)}"


def _behind(one: Profile) -> int:
    """What the prefill counts, its scores included."""
    return sum(flops for part, flops in one.counted.items() if part not in ("tower", "bridge"))


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.2f} {unit}"
    return f"{value:g}" if value == int(value) else f"{value:.1f}"


def _ms(spread: tuple[float, float, float]) -> str:
    middle, low, high = (1000 * value for value in spread)
    return f"{middle:.1f} ({low:.1f}–{high:.1f})"


def main(
    name: str,
    reducers: Sequence[str],
    images: Sequence[str],
    question: str,
    *,
    new_tokens: int,
    repeats: int,
    device: str | None,
    json: bool,
    frames: str | None = None,
) -> None:
    """What the command does."""
    for text in reducers:
        parse(text)  # unknown ones are named before a model is loaded
    model, processor = load_model(name, device)
    found = profile(model, processor, reducers, images, question, new_tokens=new_tokens, repeats=repeats, frames=frames)
    parameters = parameters_of(model)
    if json:
        print(as_json(name, str(model.dtype), parameters, found))
    else:
        print_profiles(name, parameters, found)
