"""What a recipe costs before anything is loaded: tokens, parameters, FLOPs and memory of each stage.

Everything is built on the meta device. Backbones that papers use are planned from the table below; others need their config.json, in a
local folder or on the hub, but never their weights.
"""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, Dinov2Config, LlamaConfig, PreTrainedConfig

from foveate.accounting import CONVENTION, image_shape, parameters, predict, trainable
from foveate.accounting.conventions import compression_ratio, schedule_tokens
from foveate.data.rows import open_rows
from foveate.errors import FoveateError
from foveate.reducers import parse
from foveate.train import align
from foveate.train.order import apportion
from foveate.train.passes import Pass, Passes, passes_made, passes_of
from foveate.train.recipe import load_recipe
from foveate.train.schedule import spread, stage_steps
from foveate.train.settings import Source, Stage
from foveate.train.stages import Setup, naming, read_config, walk

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
KNOWN: dict[str, Callable[[], PreTrainedConfig]] = {
    "openai/clip-vit-large-patch14": partial(CLIPVisionConfig, **CLIP_L, image_size=224),
    "openai/clip-vit-large-patch14-336": partial(CLIPVisionConfig, **CLIP_L, image_size=336),
    "facebook/dinov2-large": partial(
        Dinov2Config, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=518
    ),
    "lmsys/vicuna-7b-v1.5": partial(
        LlamaConfig, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ),
    "lmsys/vicuna-13b-v1.5": partial(
        LlamaConfig, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000
    ),
}


STEPS = 2**20  # of a stage of which they are not known, for what is drawn in them

ALIGNED = "no language model runs: of it, head is the product of the visual tokens with its table of embeddings"
OWN_WORDS = "`contrast: data` makes that product smaller, by how much is in the log: the data are not read here"
SEVERAL = (
    "`losses` make several passes in a step, a line each: those without gradient cost a forward, and all get logits of all tokens; FLOPs "
    "are those of all passes of a step, tokens and KV the mean of the trained ones"
)
DRAWN = "the passes of a step are drawn; they are counted at some steps, evenly spread, in the log at each"
CACHED = "training reads the tower's features from a cache: the tower costs one forward an image, once, which is not counted"


@dataclass(frozen=True)
class PartPlan:
    """One pass in one part of a stage's schedule. FLOPs by part of the model and bytes are of one sample with one image."""

    share: Fraction  # of the steps
    reducers: str
    trained: bool  # False: a pass without gradient, of which training takes a forward
    view_tokens: int | None  # that is drawn; None where nothing is
    visual_tokens: list[int]  # in each decoder layer
    tokens: int  # their sum, LLaVolta's #Tokens
    compression: float | None  # None where no visual token comes to the language model
    forward_flops: dict[str, int]
    training_flops: dict[str, int]
    visual_kv_bytes: int


@dataclass(frozen=True)
class SourcePlan:
    """One of several sources: its samples, as far as they are here, how many the stage reads of them (again and again, where there are too
    few), the steps that these would fill, and their tokens with one image each."""

    name: str
    samples: int | None
    read: int | None
    steps: float | None
    tokens: int | None


@dataclass(frozen=True)
class StagePlan:
    """A stage: means over its schedule, weighted by share, and the parts themselves. Where a step has several passes, FLOPs are those of
    all of them, tokens and bytes the mean of those that are trained."""

    name: str
    image_size: int
    grid: tuple[int, int]
    tokens_by_scale: list[int]
    tokens_per_image: int
    parameters: dict[str, int]
    trainable: dict[str, int]
    parts: list[PartPlan]
    mean_tokens: Fraction
    compression: float | None
    forward_flops: dict[str, Fraction]
    training_flops: dict[str, Fraction]
    visual_kv_bytes: Fraction
    steps: int | None
    samples: int | None
    share: float | None  # of the run's training FLOPs; None where the number of samples of a stage is not known
    notes: list[str]
    sources: list[SourcePlan]  # where there are several

    @property
    def cost(self) -> Fraction | None:
        return None if self.samples is None else self.samples * sum(self.training_flops.values(), Fraction(0))


@dataclass(frozen=True)
class Plan:
    name: str
    text_tokens: int
    answer_tokens: int  # of them that get logits, where a step has one pass
    head: str  # the same in words
    convention: str
    stages: list[StagePlan]

    def to_json(self) -> str:
        return jsonlib.dumps(asdict(self), indent=2, default=lambda x: int(x) if x.denominator == 1 else float(x))


def plan(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    text_tokens: int = 0,
    answer_tokens: int | None = None,
    image: tuple[int, int] | None = None,
) -> Plan:
    """The plan of a recipe. `text_tokens`: of text in each sample, beside its one image; the default counts visual tokens alone.
    `answer_tokens`: how many of these are supervised and so get logits, all unless given, since no visual token is. `image`: its (width,
    height), on which a tiling depends; one view's unless given. FoveateError for more answer than text."""
    answer, head = supervised(text_tokens, answer_tokens)
    recipe = load_recipe(recipe_path, overrides)
    stages = []
    for setup in walk(recipe, partial(read_config, known=KNOWN)):
        with naming(setup.stage):
            steps = count_steps(setup.stage)
            passes = passes_of(recipe, setup.stage, steps or STEPS)
            stages.append(plan_stage(replace(setup, size=image), text_tokens, answer, steps, passes))
    costs = [stage.cost for stage in stages]
    if known := [cost for cost in costs if cost is not None]:
        whole = len(known) == len(costs)
        stages = [
            replace(stage, share=float(cost / sum(known)) if whole and cost is not None else None)
            for stage, cost in zip(stages, costs, strict=True)
        ]
    return Plan(recipe.name, text_tokens, answer, head, CONVENTION, stages)


def supervised(text_tokens: int, answer_tokens: int | None) -> tuple[int, str]:
    """How many tokens of a sample are taken to get logits, and what is to be said of it."""
    if answer_tokens is not None and answer_tokens > text_tokens:
        raise FoveateError(
            f"answer_tokens={answer_tokens}, but a sample has text_tokens={text_tokens}, which the answers are among; give more of these"
        )
    more = "; a model whose loss needs all tokens, which is tried when its stage begins, has them of all"
    if not text_tokens:
        return 0, "left out, since logits are those of supervised text and none is counted; --text-tokens and --answer-tokens say how much"
    if answer_tokens is None:
        return text_tokens, f"logits of all text, though only its supervised tokens get them; --answer-tokens says how many these are{more}"
    return answer_tokens, f"logits of {answer_tokens} supervised tokens{more}"


def plan_stage(setup: Setup, text_tokens: int, answer_tokens: int, steps: int | None, passes: Passes | None) -> StagePlan:
    config, stage, trained = setup.used, setup.stage, setup.trained
    (size, _), grid = image_shape(config)
    per_image, layers = setup.image.visual, config.get_text_config().num_hidden_layers
    drawn = spread(setup.budgets)
    ways: list[tuple[int | None, Setup]] = [(each, setup.asking_for(each)) for each in drawn]
    ways = ways or [(None, setup)]
    made, whole = passes_made(setup, steps or STEPS, passes)
    head_tokens = answer_tokens if passes is None else None
    parts = [
        part_plan(way, replace(one, share=one.share / len(ways)), text_tokens, head_tokens, per_image=per_image, drawn=each)
        for one in made
        for each, way in ways
    ]
    learning = [part for part in parts if part.trained]
    in_a_step = sum((part.share for part in learning), Fraction(0))
    mean = schedule_tokens((part.share / in_a_step, part.visual_tokens) for part in learning)
    counted, notes = resized(setup, size)
    notes += tiled(setup) + weighed(setup)
    if len(drawn) < len(setup.budgets):
        notes.append(f"view_tokens are drawn of {len(setup.budgets)} numbers; what they cost is the mean of {len(drawn)}, evenly spread")
    samples = None if steps is None else steps * stage.batch_size
    remarks = {CACHED: stage.features is not None, ALIGNED: stage.kind == "align", SEVERAL: passes is not None}
    remarks |= {OWN_WORDS: stage.contrast == "data", DRAWN: not whole}
    return StagePlan(
        name=stage.name,
        image_size=size,
        grid=grid,
        tokens_by_scale=by_scale(setup, grid) or [per_image],
        tokens_per_image=per_image,
        parameters=parameters(counted),
        trainable=trainable(counted, trained),
        parts=parts,
        mean_tokens=mean,
        compression=float(compression_ratio(mean, per_image, layers)) if mean else None,
        forward_flops=weighted([(part.share, part.forward_flops) for part in parts]),
        training_flops=weighted([(part.share, part.training_flops) for part in parts]),
        visual_kv_bytes=sum((part.share * part.visual_kv_bytes for part in learning), Fraction(0)) / in_a_step,
        steps=steps,
        samples=samples,
        share=None,
        notes=[*notes, *setup.cautions, *(note for note, applies in remarks.items() if applies)],
        sources=plan_sources(stage, samples, setup.image.tokens + text_tokens),
    )


def part_plan(
    setup: Setup, made: Pass, text_tokens: int, head_tokens: int | None, *, per_image: int | None = None, drawn: int | None = None
) -> PartPlan:
    """`head_tokens`: that get logits, None: all; `per_image`: visual tokens of an image before any is left out, those of `setup` unless
    given; `drawn`: of a view in such a step."""
    reducers, per_image = parse(made.reducers), per_image or setup.image.visual
    given: dict[str, Any] = {"images": [setup.image], "text_tokens": text_tokens, "reducers": reducers, "trained": setup.trained}
    given["head_tokens"] = setup.image.tokens + text_tokens if head_tokens is None else head_tokens
    forward = predict(setup.config, **given, mode="prefill")
    training = predict(setup.config, **given, mode="train") if made.trained else forward
    counts, spent, first, kv = list(forward.visual_tokens), training.flops, forward.flops, sum(forward.visual_kv_bytes)
    if setup.stage.kind == "align":
        first, spent = (align.flops(ledger, setup.config, [setup.image]) for ledger in (forward, training))
        counts, kv = [0] * len(counts), 0
    if setup.stage.features is not None:
        spent = {**spent, "tower": 0}
    ratio = float(compression_ratio(counts, per_image, len(counts))) if any(counts) else None
    return PartPlan(made.share, made.reducers, made.trained, drawn, counts, sum(counts), ratio, first, spent, kv)


def resized(setup: Setup, size: int) -> tuple[Any, list[str]]:
    """The configuration with the tower's position table at the stage's size, as the papers count a tower that is trained there."""
    config, trained = setup.used, setup.trained
    if not setup.assembled or not trained.tower or size == (native := config.native_size):
        return config, []
    changed = deepcopy(config)
    changed.vision_config.image_size = size
    more = trainable(changed, trained)["tower"] - trainable(config, trained)["tower"]
    return changed, [
        f"the tower's position table is counted at {size} px; interpolated from its own {native} px it has {more:,} fewer parameters"
    ]


def tiled(setup: Setup) -> list[str]:
    """What a tiling makes of the image, in a line."""
    if not setup.assembled or setup.config.tiling is None or setup.image.size is None:
        return []
    (width, height), views, marks = setup.image.size, len(setup.image.crops), len(setup.image.marks)
    more = f" and {marks} marks" if marks else ""
    return [
        f"{setup.config.tiling}: an image of {width} x {height} px becomes {views} views, {setup.image.visual} visual tokens{more}; "
        "--image says another size"
    ]


def weighed(setup: Setup) -> list[str]:
    """What an image becomes where it is no tokens, in a line."""
    if not setup.assembled or not setup.config.weighs:
        return []
    bridge: Any = setup.bridge
    numbers = len(bridge.layers) * bridge.rank * sum(inputs for inputs, _ in bridge.targets.values())
    return [
        f"an image becomes no visual token but {numbers:,} numbers: weights of rank {bridge.rank} of {', '.join(bridge.targets)} in "
        f"decoder layers {', '.join(map(str, bridge.layers))}; what they cost is in lm_linear, for each token of text (--text-tokens)"
    ]


def by_scale(setup: Setup, grid: tuple[int, int]) -> list[int]:
    scales, each = getattr(setup.bridge, "scales", []), setup.config.view_tokens if setup.assembled else None
    counts = [(grid[0] // window) * (grid[1] // window) * queries for window, queries in scales]
    return counts if each is None else counts[: 1 + list(accumulate(counts)).index(each)] if counts else []


def count_steps(stage: Stage) -> int | None:
    """Optimiser steps of a stage; None where it lasts epochs and its data is not here."""
    if stage.steps is not None:
        return stage.steps
    counts = [count_samples(source) for source in stage.sources]
    if None in counts:
        return None
    return stage_steps(sum(filter(None, counts)), stage.batch_size, epochs=stage.epochs, steps=None)


def count_samples(source: Source) -> int | None:
    """Samples that a source has for a stage; None where it is not here and has no limit. (Bad ones are not known here.)"""
    where, samples = Path(source.conversations or source.dataset or "").expanduser(), source.limit
    if os.path.exists(where):
        samples = len(open_rows(where, source.split, source.config, source.limit))
    return min(filter(None, (samples, source.samples)), default=None)


def plan_sources(stage: Stage, samples: int | None, tokens: int) -> list[SourcePlan]:
    """What the `samples` of a stage, with so many tokens each, come to by source, where there are several."""
    sources = stage.sources
    if len(sources) == 1:
        return []
    counts = [count_samples(source) for source in sources]
    weights = [Fraction(count or 0) if source.share is None else source.share for source, count in zip(sources, counts, strict=True)]
    known = samples is not None and all(weights)
    read = apportion(weights, samples) if known and samples is not None else [None] * len(sources)
    return [
        SourcePlan(source.label, count, n, None if n is None else round(n / stage.batch_size, 2), None if n is None else n * tokens)
        for source, count, n in zip(sources, counts, read, strict=True)
    ]


def weighted(parts: Sequence[tuple[Fraction, dict[str, int]]]) -> dict[str, Fraction]:
    return {key: sum((share * flops[key] for share, flops in parts), Fraction(0)) for key in parts[0][1]}


# ---- printing


def main(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    json: bool = False,
    text_tokens: int = 0,
    answer_tokens: int | None = None,
    image: tuple[int, int] | None = None,
) -> None:
    """`foveate plan`."""
    found = plan(recipe, overrides, text_tokens=text_tokens, answer_tokens=answer_tokens, image=image)
    if json:
        print(found.to_json())
    else:
        print_plan(found)


def print_plan(found: Plan, console: Console | None = None) -> None:
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    text = f"{found.text_tokens} text tokens" if found.text_tokens else "no text tokens"
    stages = grid_table(
        f"{found.name}: stages", "stage", "image", "patches", "visual tokens", "by scale", "steps", "share of training FLOPs"
    )
    trained = grid_table("Trainable parameters", "stage", *found.stages[0].trainable, "all")
    costs = [sum(stage.training_flops.values()) for stage in found.stages]
    flops = Unit.of(costs, FLOPS)
    kv = Unit.of([part.visual_kv_bytes for stage in found.stages for part in stage.parts], BYTES)
    schedule = grid_table(
        f"Visual tokens in the language model; {flops.name} and {kv.name} of KV cache per sample of one image and {text}",
        *("stage", "share", "reducers", "tokens by layer", "#Tokens", "CR", "forward", "training", "KV"),
    )
    split = grid_table(f"{flops.name} of a training step by part of the model", "stage", *found.stages[0].training_flops, "all")
    mixed = grid_table("Sources", "stage", "source", "samples", "read", "passes", "steps", "tokens read")
    for stage in found.stages:
        for source in stage.sources:
            passes = "?" if not source.samples or source.read is None else f"{source.read / source.samples:.3g}"
            counts = ["?" if n is None else f"{n:,}" for n in (source.samples, source.read)]
            rest = ["?" if n is None else f"{n:,}" for n in (source.steps, source.tokens)]
            mixed.add_row(stage.name, source.name, *counts, passes, *rest)
        stages.add_row(
            stage.name,
            f"{stage.image_size} px",
            f"{stage.grid[0]} x {stage.grid[1]}",
            str(stage.tokens_per_image),
            " + ".join(map(str, stage.tokens_by_scale)),
            "?" if stage.steps is None else f"{stage.steps:,}",
            "?" if stage.share is None else f"{stage.share:.1%}",
        )
        trained.add_row(stage.name, *(f"{count:,}" for count in (*stage.trainable.values(), sum(stage.trainable.values()))))
        split.add_row(stage.name, *(flops(x) for x in (*stage.training_flops.values(), sum(stage.training_flops.values()))))
        for part in stage.parts:
            schedule.add_row(
                *(
                    stage.name,
                    str(part.share),
                    part.reducers + ("" if part.view_tokens is None else ", drawn") + ("" if part.trained else ", no gradient"),
                    runs(part.visual_tokens),
                    f"{part.tokens:,}",
                    percent(part.compression),
                ),
                *(flops(sum(part.forward_flops.values())), flops(sum(part.training_flops.values())), kv(part.visual_kv_bytes)),
            )
        if len(stage.parts) > 1:
            schedule.add_row(
                *(stage.name, "mean", "", "", f"{float(stage.mean_tokens):,.0f}", percent(stage.compression)),
                *(flops(sum(stage.forward_flops.values())), flops(sum(stage.training_flops.values())), kv(stage.visual_kv_bytes)),
                style="bold",
            )
    for table in (stages, *([mixed] if mixed.rows else []), trained, schedule, split):
        console.print(table)
    for stage in found.stages:
        for note in stage.notes:
            console.print(f"{stage.name}: {note}", highlight=False)
    console.print(f"Head: {found.head}.", highlight=False)
    console.print(f"FLOPs: {found.convention}. KV of visual tokens alone, 2 bytes a value.", highlight=False)


def grid_table(title: str, *columns: str) -> Table:
    """Numbers are folded, never cut off, where the window is narrow."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        left = column in ("stage", "source", "reducers", "tokens by layer")
        table.add_column(column.replace("_", " "), justify="left" if left else "right", overflow="fold")
    return table


@dataclass(frozen=True)
class Unit:
    """A unit in which the numbers of a column are written: the largest of them has at least one digit before the point."""

    name: str
    size: float
    digits: int

    @classmethod
    def of(cls, numbers: Iterable[Fraction | int], units: Sequence[Unit]) -> Unit:
        largest = max(numbers, default=0)
        return next((unit for unit in units if largest >= unit.size), units[-1])

    def __call__(self, number: Fraction | int) -> str:
        return f"{float(number) / self.size:,.{self.digits}f}"


FLOPS = (Unit("TFLOPs", 1e12, 3), Unit("GFLOPs", 1e9, 3), Unit("MFLOPs", 1e6, 3), Unit("kFLOPs", 1e3, 3))
BYTES = (Unit("MiB", 2**20, 1), Unit("KiB", 2**10, 1))


def percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1%}"


def runs(counts: Sequence[int]) -> str:
    """Equal neighbours together: "576 x2, 72 x30"."""
    return ", ".join(f"{n} x{len(list(group))}" for n, group in groupby(counts))
