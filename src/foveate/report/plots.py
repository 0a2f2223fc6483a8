"""The plots of the demo's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from foveate.inspect.figures import COLOURS, DASHES, INK, new_figure
from foveate.report.runs import Arm, Mark, StageLog


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the up to window - 1 ones before it."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def accuracy_bars(arms: Sequence[Arm]) -> Figure:
    """Accuracy of each arm per family with its 95 % interval, the majority answer as a black bar across."""
    figure, axes = new_figure(3.0)
    families = list(arms[0].result.families)
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        scores = [arm.result.families[family] for family in families]
        places = [i - 0.4 + (number + 0.5) * width for i in range(len(families))]
        heights = [100 * score.accuracy for score in scores]
        whiskers = [
            [100 * max(0.0, score.accuracy - score.low) for score in scores],
            [100 * max(0.0, score.high - score.accuracy) for score in scores],
        ]
        error = {"elinewidth": 0.8, "ecolor": INK, "capsize": 1.5, "capthick": 0.8}
        axes.bar(places, heights, width * 0.92, color=COLOURS[number % len(COLOURS)], label=arm.name, yerr=whiskers, error_kw=error)
    for i, family in enumerate(families):
        height = 100 * arms[0].result.families[family].majority_accuracy
        axes.hlines(height, i - 0.44, i + 0.44, colors=INK, linewidth=1.6, label="majority answer" if i == 0 else None)
    axes.set_xticks(range(len(families)), families)
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy, %")
    axes.grid(axis="x", visible=False)
    _legend_below(figure, axes)
    return figure


def loss_curves(stages: Sequence[tuple[str, StageLog]], against: str) -> Figure:
    """Smoothed training loss of each arm in one stage against "step" or "seconds" since the stage began."""
    figure, axes = new_figure()
    for number, (name, stage) in enumerate(stages):
        x = [getattr(point, against) for point in stage.points]
        loss = smooth([point.loss for point in stage.points], smoothing_window(stage))
        axes.plot(x, loss, DASHES[number % len(DASHES)], color=COLOURS[number % len(COLOURS)], label=name)
    axes.set_xlabel("optimiser step" if against == "step" else "seconds of training in this stage")
    axes.set_ylabel("training loss")
    axes.set_xlim(left=0)
    if against == "step":
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _legend_below(figure, axes)
    return figure


def source_losses(stage: StageLog) -> Figure | None:
    """Smoothed training loss of each source of one arm's stage against its steps; None where it does not mix several."""
    names = list(dict.fromkeys(name for point in stage.points for name in point.sources))
    if not names:
        return None
    figure, axes = new_figure()
    for number, name in enumerate(names):
        own = [(point.step, point.sources[name]) for point in stage.points if name in point.sources]
        loss = smooth([value for _, value in own], smoothing_window(stage))
        style = {"linestyle": DASHES[number % len(DASHES)], "color": COLOURS[number % len(COLOURS)]}
        axes.plot([step for step, _ in own], loss, label=name, **style)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("training loss by source")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _legend_below(figure, axes)
    return figure


def accuracy_curves(runs: Sequence[tuple[str, Sequence[Mark]]], against: str, task: str) -> Figure:
    """The headline figure of a task in the middle of each run, against the run's "seconds" of training or "flops" so far."""
    figure, axes = new_figure()
    name = ""
    for number, (run, found) in enumerate(runs):
        own = [(getattr(mark, against), next(iter(mark.figures[task].items()))) for mark in found if task in mark.figures]
        name = own[0][1][0] if own else name
        style = {"linestyle": DASHES[number % len(DASHES)], "color": COLOURS[number % len(COLOURS)], "marker": "o", "markersize": 3}
        axes.plot([x for x, _ in own], [value for _, (_, value) in own], label=run, **style)
    axes.set_xlabel("seconds of training" if against == "seconds" else "FLOPs of training")
    axes.set_ylabel(f"{task}: {name}")
    axes.set_xlim(left=0)
    _legend_below(figure, axes)
    return figure


def smoothing_window(stage: StageLog) -> int:
    """Logged steps in the running mean of a loss curve: a twenty-fifth of the curve."""
    return max(1, len(stage.points) // 25)


def tokens_per_layer(stages: Sequence[tuple[str, StageLog]]) -> Figure:
    """Visual tokens per image in each layer of the language model, one line per arm and part of the stage's schedule."""
    parts = [(number, name, stage, part) for number, (name, stage) in enumerate(stages) for part in stage.parts]
    figure, axes = new_figure(2.4 + 0.16 * len(parts))
    for number, name, stage, part in parts:
        own = stage.parts
        share = (own.index(part) + 1) / len(own)
        label = name if len(own) == 1 else f"{name}, steps {part.first} to {part.last}: {part.reducer}"
        edges = [layer - 0.5 for layer in range(len(part.layers) + 1)]
        axes.stairs(
            part.layers,
            edges,
            baseline=None,
            color=COLOURS[number % len(COLOURS)],
            alpha=0.35 + 0.65 * share,
            linewidth=0.9 + 1.3 * share,
            linestyle=DASHES[number % len(DASHES)],
            label=label,
        )
    axes.set_xlabel("layer of the language model")
    axes.set_ylabel("visual tokens per image")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _legend_below(figure, axes, columns=1)
    return figure


def _legend_below(figure: Figure, axes: Any, columns: int = 2) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, handlelength=2.2, columnspacing=1.2)
