"""Runs of several recipes and seeds put together: what each costs and keeps beside the first, as a table and as pictures.

A record is one run, as `record` makes it: {"arm", "seed", "pretrain_seconds", "finetune_seconds", "pretrain_flops", "finetune_flops",
"pretrain_tokens", "finetune_tokens" (visual tokens per image and layer), "accuracy", "majority", "n" (by family), "learned" (families whose
95 % interval lies above the majority answer), "right" (a 0 or 1 for each question, in their order)}. Where the run was asked questions on
its way it also has "curve": [{"stage", "step", "seconds", "flops", "figures": {task: {figure: value}}}], from its beginning. "pace", what
its log says of the machine (`report.pace`), may be missing: its seconds are then no comparison, as nothing says that the machine was quiet.

An arm is compared with the first over the seeds that both have, seed by seed. Spread is the sample standard deviation over seeds (n - 1).
The interval of a difference is paired: question by question, the mean over the seeds, whole pictures drawn anew (`evaluation.paired`). It
says how far the *questions* carry; how far the seeds do, the spread says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from foveate.errors import FoveateError
from foveate.evaluation.paired import bootstrap_families
from foveate.inspect.figures import COLOURS
from foveate.inspect.words import si
from foveate.report.pace import Clock, clock, paces, read_pace
from foveate.report.runs import Arm, Mark, StageLog, marks, read_log, split_stages

NUMBERS = ("pretrain_seconds", "finetune_seconds", "pretrain_flops", "finetune_flops", "pretrain_tokens", "finetune_tokens")
FIELDS = ("arm", "seed", *NUMBERS, "accuracy", "majority", "n", "learned", "right")

Seconds = Mapping[str, Sequence[tuple[float, float]]]
"""By arm, the seconds of pre-training and of fine-tuning of each round, measured by themselves."""


@dataclass(frozen=True)
class Times:
    """Seconds that were measured by themselves: of each arm its stages, (name, steps), and round by round the seconds of a step in each."""

    stages: Mapping[str, Sequence[tuple[str, int]]]
    rounds: Sequence[Mapping[str, Sequence[float]]]

    def seconds(self) -> Seconds:
        found: dict[str, list[tuple[float, float]]] = {}
        for arm, stages in self.stages.items():
            for steps in (one[arm] for one in self.rounds if arm in one):
                *before, last = [count * step for (_, count), step in zip(stages, steps, strict=True)]
                found.setdefault(arm, []).append((sum(before), last))
        return found

    def paced(self, one: Mapping[str, Any]) -> dict[str, Any]:
        """The record with its seconds on the way at the median pace of each stage."""
        begins, before = {}, 0.0
        stages, steps = self.stages[one["arm"]], [of[one["arm"]] for of in self.rounds if one["arm"] in of]
        for (name, count), step in zip(stages, map(median, zip(*steps, strict=True)), strict=True):
            begins[name] = before, step
            before += count * step
        curve = [{**mark, "seconds": begins[mark["stage"]][0] + mark["step"] * begins[mark["stage"]][1]} for mark in one.get("curve", [])]
        return {**one, "curve": curve}


@dataclass(frozen=True)
class Question:
    """What a place of "right" is about."""

    image: str
    family: str


@dataclass(frozen=True)
class Spread:
    """A mean and the sample standard deviation over seeds (None for a single one)."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(mean(values), stdev(values) if len(values) > 1 else None)

    def text(self, form: str, factor: float = 1.0) -> str:
        """The mean ± the spread, both times `factor`, as numbers of the format `form`."""
        mean = f"{self.mean * factor:{form}}".replace("-", "−")
        return mean if self.deviation is None else f"{mean} ± {self.deviation * factor:{form.removeprefix('+')}}"


@dataclass(frozen=True)
class ArmSummary:
    """One arm over the seeds that it shares with the first. `ratio` and `difference` are to the first arm, seed by seed; accuracies are
    shares; `interval` is that of the difference of the mean, None for the first. Seconds that were measured by themselves have their spread
    over the rounds."""

    arm: str
    seeds: list[int]
    numbers: dict[str, Spread]
    ratio: dict[str, Spread]  # the numbers, and seconds and flops of both stages together
    accuracy: dict[str, Spread]  # by family, and "mean" over the learned families
    difference: dict[str, Spread]
    interval: tuple[float, float] | None

    @property
    def loses_nothing(self) -> bool:
        """The interval of the difference to the first arm reaches 0, or is above it."""
        return self.interval is not None and self.interval[1] >= 0


@dataclass(frozen=True)
class Comparison:
    """All arms, the first one being what the others are compared with. `rounds`: in how many the seconds were measured by themselves, 0
    where they are the runs' own; `clock`: what the runs' logs say of these."""

    arms: list[ArmSummary]
    learned: list[str]  # families that count in the mean: at least one arm is above the majority answer in every one of its seeds
    majority: dict[str, float]
    n: dict[str, int]
    rounds: int
    clock: Clock

    @property
    def compares_seconds(self) -> bool:
        return self.rounds > 0 or self.clock.quiet


def record(arm: Arm, seed: int) -> dict[str, Any]:
    """The record of a finished run."""
    log = read_log(arm.run)
    before, last = split_stages(log)

    def tokens(stages: Sequence[StageLog]) -> float:
        run = [stage for stage in stages if stage.layer_tokens] or stages  # a stage of kind align runs no layer
        return sum(stage.layer_tokens * stage.images for stage in run) / sum(stage.images for stage in run)

    families = arm.result.families
    return {
        "arm": arm.name,
        "seed": seed,
        "pretrain_seconds": sum(stage.seconds for stage in before),
        "finetune_seconds": last.seconds,
        "pretrain_flops": sum(stage.flops for stage in before),
        "finetune_flops": last.flops,
        "pretrain_tokens": tokens(before),
        "finetune_tokens": tokens([last]),
        "accuracy": {family: score.accuracy for family, score in families.items()},
        "majority": {family: score.majority_accuracy for family, score in families.items()},
        "n": {family: score.n for family, score in families.items()},
        "learned": [family for family, score in families.items() if score.low > score.majority_accuracy],
        "right": "".join(str(int(row.correct)) for row in arm.result.rows),
        "pace": [asdict(pace) for pace in paces(log)],
        **({"curve": [asdict(mark) for mark in found]} if (found := marks(log)) else {}),
    }


def aggregate(records: Sequence[dict[str, Any]], questions: Sequence[Question], seconds: Seconds | None = None) -> Comparison:
    """Means, spreads, ratios, differences and their intervals. The first record's arm is the one to compare with; arms that share no seed
    with it are left out. `questions`: those that all runs were asked. `seconds`: measured by themselves, instead of those of the runs.

    FoveateError for a record without its fields, two records of one arm and seed, other questions, or an arm without measured seconds, or
    with other rounds than the first.
    """
    table: dict[str, dict[int, dict[str, Any]]] = {}
    rounds = 0 if not seconds else max(map(len, seconds.values()))
    for number, one in enumerate(records):
        if missing := [key for key in FIELDS if key not in one]:
            raise FoveateError(f"record {number} lacks {', '.join(missing)}")
        own = table.setdefault(one["arm"], {})
        if one["seed"] in own:
            raise FoveateError(f"two records of arm {one['arm']!r} with seed {one['seed']}")
        if len(one["right"]) != len(questions):
            raise FoveateError(f"arm {one['arm']!r}, seed {one['seed']}: {len(one['right'])} answers to {len(questions)} questions")
        if seconds is not None and len(seconds.get(one["arm"], [])) != rounds:
            raise FoveateError(f"seconds of arm {one['arm']!r} were measured in {len(seconds.get(one['arm'], []))} rounds, not in {rounds}")
        own[one["seed"]] = one
    if not table:
        raise FoveateError("no records to put together")
    first = table[records[0]["arm"]]
    one = next(iter(first.values()))
    families = list(one["accuracy"])
    for arm, own in table.items():
        for seed, run in own.items():
            if list(run["accuracy"]) != families or run["n"] != one["n"]:
                raise FoveateError(f"arm {arm!r}, seed {seed}: other families or numbers of questions than the first record's")
    learned = [family for family in families if any(all(family in run["learned"] for run in own.values()) for own in table.values())]
    arms, runs = [], []
    for arm, own in table.items():
        if seeds := sorted(set(own) & set(first)):
            summary = _summary(arm, [own[seed] for seed in seeds], [first[seed] for seed in seeds], families, learned, questions)
            arms.append(summary if not seconds else _timed(summary, seconds[arm], seconds[records[0]["arm"]]))
            runs += [(f"{arm}, seed {seed}", [read_pace(pace) for pace in own[seed].get("pace", [])]) for seed in seeds]
    return Comparison(arms, learned, dict(one["majority"]), dict(one["n"]), rounds, clock(runs))


def _summary(
    arm: str,
    own: Sequence[dict[str, Any]],
    base: Sequence[dict[str, Any]],
    families: Sequence[str],
    learned: Sequence[str],
    questions: Sequence[Question],
) -> ArmSummary:
    counted = list(learned) or list(families)

    def number(run: dict[str, Any], name: str) -> float:
        if name in ("seconds", "flops"):
            return float(run[f"pretrain_{name}"] + run[f"finetune_{name}"])
        return float(run[name])

    def share(run: dict[str, Any], family: str) -> float:
        return mean(run["accuracy"][f] for f in counted) if family == "mean" else float(run["accuracy"][family])

    pairs = list(zip(own, base, strict=True))
    shares = {family: [share(run, family) for run in own] for family in (*families, "mean")}
    differences = {family: [share(run, family) - share(other, family) for run, other in pairs] for family in (*families, "mean")}
    return ArmSummary(
        arm=arm,
        seeds=[run["seed"] for run in own],
        numbers={name: Spread.of([number(run, name) for run in own]) for name in NUMBERS},
        ratio={
            name: Spread.of([number(run, name) / number(other, name) for run, other in pairs]) for name in (*NUMBERS, "seconds", "flops")
        },
        accuracy={family: Spread.of(values) for family, values in shares.items()},
        difference={family: Spread.of(values) for family, values in differences.items()},
        interval=None if own[0]["arm"] == base[0]["arm"] else _interval(pairs, counted, questions),
    )


def _timed(arm: ArmSummary, own: Sequence[tuple[float, float]], base: Sequence[tuple[float, float]]) -> ArmSummary:
    """The summary with the seconds of the rounds in place of the runs'."""

    def told(rounds: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
        before, after = zip(*rounds, strict=True)
        return {"pretrain_seconds": list(before), "finetune_seconds": list(after), "seconds": [sum(both) for both in rounds]}

    mine, first = told(own), told(base)
    ratios = {name: Spread.of([x / y for x, y in zip(mine[name], first[name], strict=True)]) for name in mine}
    numbers = {name: Spread.of(mine[name]) for name in mine if name in NUMBERS}
    return replace(arm, numbers={**arm.numbers, **numbers}, ratio={**arm.ratio, **ratios})


def _interval(
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], counted: Sequence[str], questions: Sequence[Question]
) -> tuple[float, float]:
    """Of the difference of the mean over the families."""
    difference = np.mean([_right(run) - _right(other) for run, other in pairs], axis=0)
    images, families = [question.image for question in questions], [question.family for question in questions]
    _, low, high, _ = bootstrap_families(difference, images, families, counted)
    return low, high


def _right(run: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([int(letter) for letter in run["right"]], dtype=np.float64)


def markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table, an arm a row, with its conventions under it."""
    base, families = comparison.arms[0].arm, list(comparison.majority)
    told = [family if family in comparison.learned else f"{family} \\*" for family in families]
    titles = ["", "tokens", "pre-training FLOPs", "seconds", "both, FLOPs", *told, "mean", "difference, points", "95 %", "seeds"]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    majority = [f"{100 * comparison.majority[family]:.0f}" for family in families]
    lines.append(f"| the best constant answer | | | | | {' | '.join(majority)} | | | | |")
    for arm in comparison.arms:
        first = arm.interval is None
        cells = [
            arm.arm,
            " → ".join(f"{arm.numbers[f'{stage}_tokens'].mean:.4g}" for stage in ("pretrain", "finetune")),
            si(arm.numbers["pretrain_flops"].mean) if first else arm.ratio["pretrain_flops"].text(".3f"),
            _seconds(arm, first, comparison.compares_seconds),
            si(arm.numbers["pretrain_flops"].mean + arm.numbers["finetune_flops"].mean) if first else arm.ratio["flops"].text(".3f"),
            *(arm.accuracy[family].text(".1f", 100) for family in (*families, "mean")),
            "" if first else arm.difference["mean"].text("+.1f", 100),
            "" if arm.interval is None else " to ".join(f"{100 * end:+.1f}".replace("-", "−") for end in arm.interval),
            ", ".join(map(str, arm.seeds)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seconds = (
        f"Seconds were measured by themselves, arms in turns on an idle machine; ± over {comparison.rounds} rounds."
        if comparison.rounds
        else comparison.clock.told
    )
    counts = ", ".join(f"{family} {count}" for family, count in comparison.n.items())
    notes = [
        f"FLOPs and seconds of all arms but the first are ratios to {base}; FLOPs: 2 per multiply-add, forward and backward, predicted "
        f"from the shapes, without the tower, whose features are cached. {seconds} Tokens: visual ones in a layer of the language model, "
        "in pre-training and in fine-tuning. Accuracies in %; ± is the sample standard deviation over seeds; 95 %: interval of the "
        f"difference, paired by question, whole pictures drawn anew. n: {counts}."
    ]
    unlearned = [family for family in families if family not in comparison.learned]
    if unlearned and comparison.learned:
        notes.append(f"\\* {', '.join(unlearned)}: in no arm clearly above the majority answer in every seed; left out of the mean.")
    elif unlearned:
        notes.append("\\* No family is clearly above the majority answer in every seed of any arm; the mean is over all of them.")
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"


def _seconds(arm: ArmSummary, first: bool, compared: bool) -> str:
    if not compared:
        return "–"
    return f"{arm.numbers['pretrain_seconds'].mean:.0f} s" if first else arm.ratio["pretrain_seconds"].text(".3f")


def plot(comparison: Comparison) -> Figure:
    """Left: cost of pre-training against the difference of mean accuracy, with its interval; right: the difference by family."""
    base, families, others = comparison.arms[0].arm, list(comparison.majority), comparison.arms[1:]
    figure = Figure(figsize=(11, 3.4 + 0.16 * len(others)), layout="constrained")
    left, right = figure.subplots(1, 2)
    cost = "seconds" if comparison.compares_seconds else "flops"
    for number, arm in enumerate(others):
        colour = COLOURS[number % len(COLOURS)]
        marker = "os^D"[number // len(COLOURS) % 4]
        difference = 100 * arm.difference["mean"].mean
        assert arm.interval is not None
        reach = [[max(0.0, difference - 100 * arm.interval[0])], [max(0.0, 100 * arm.interval[1] - difference)]]
        left.errorbar(
            [arm.ratio[f"pretrain_{cost}"].mean], [difference], yerr=reach, fmt=marker, markersize=5, capsize=2, color=colour, label=arm.arm
        )
        places = [i + (number - (len(others) - 1) / 2) * 0.7 / max(1, len(others)) for i in range(len(families))]
        means = [100 * arm.difference[family].mean for family in families]
        spread = [100 * (arm.difference[family].deviation or 0.0) for family in families]
        right.errorbar(places, means, yerr=spread, fmt=marker, markersize=4, capsize=1.5, linewidth=1, color=colour)
    left.set_xlabel(f"pre-training {'seconds' if comparison.compares_seconds else 'FLOPs'}, ratio to {base}")
    left.set_ylabel(f"mean accuracy − {base}, points")
    left.set_xlim(left=0)
    right.set_xticks(range(len(families)), [family if family in comparison.learned else f"{family} *" for family in families], rotation=20)
    right.set_ylabel(f"accuracy − {base}, points")
    for axes in (left, right):
        axes.axhline(0, color="#888888", linewidth=0.8, zorder=0)
        axes.grid(color="#88888840", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    if others:
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    return figure


@dataclass(frozen=True)
class Results:
    """What a folder of results holds."""

    records: list[dict[str, Any]]
    questions: list[Question]
    times: Times | None

    def compared(self, first: str | None = None) -> Comparison:
        """All arms with the arm `first`, or with that of the first record."""
        records = sorted(self.records, key=lambda one: first is not None and one["arm"] != first)  # stable: the others as they were
        return aggregate(records, self.questions, None if self.times is None else self.times.seconds())


def plot_curves(records: Sequence[dict[str, Any]], seconds: bool) -> Figure | None:
    """Headlines on the way against FLOPs of training and, with `seconds`, against those too (left): a row for each task, a line for each
    run, a colour for each arm. None where no run was asked."""
    runs = [(one["arm"], [Mark(**mark) for mark in one["curve"]]) for one in records if one.get("curve")]
    tasks = list(dict.fromkeys(task for _, found in runs for mark in found for task in mark.figures))
    if not tasks:
        return None
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    costs = ("seconds", "flops") if seconds else ("flops",)
    width = 2 * len(costs)  # of the legend
    figure = Figure(figsize=(4.5 * len(costs), 3.2 * len(tasks) + 0.2 * -(-len(arms) // width)), layout="constrained")
    told: set[str] = set()
    for task, pair in zip(tasks, figure.subplots(len(tasks), len(costs), squeeze=False), strict=True):
        for axes, against in zip(pair, costs, strict=True):
            for arm, found in runs:
                own = [mark for mark in found if task in mark.figures]
                values = [next(iter(mark.figures[task].values())) for mark in own]
                number = arms.index(arm)
                axes.plot(
                    [getattr(mark, against) for mark in own],
                    values,
                    marker="os^D"[number // len(COLOURS) % 4],
                    markersize=3,
                    linewidth=1.0,
                    color=COLOURS[number % len(COLOURS)],
                    label=None if arm in told else arm,
                )
                told.add(arm)
            axes.set_xlabel("training, s" if against == "seconds" else "training, FLOPs")
            axes.set_xlim(left=0)
            axes.grid(color="#88888840", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        pair[0].set_ylabel(f"{task}: {next(name for _, found in runs for mark in found for name in mark.figures.get(task, {}))}")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=width)
    return figure


def read_results(folder: str | Path) -> Results:
    """runs.json (a list of records), questions.json (a list of [image, family]) and, where it is there, times.json of a folder:
    {"stages": {arm: [[name, steps]]}, "rounds": [{"steps": {arm: [seconds of a step in each stage]}}]}. FoveateError where they cannot be
    read."""

    def read(name: str) -> Any:
        path = Path(folder) / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FoveateError(f"cannot read the results {path}: {error}") from error

    records = read("runs.json")
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise FoveateError(f"{Path(folder) / 'runs.json'} must be a list of records, one for each run")
    times = read("times.json") if (Path(folder) / "times.json").is_file() else None
    measured = None if times is None else Times(times["stages"], [one["steps"] for one in times["rounds"]])
    return Results(records, [Question(*one) for one in read("questions.json")], measured)


def write_comparison(results: str | Path, out: str | Path) -> Comparison:
    """Writes table.md, plot.svg and plot.png of a folder of results into the folder `out`, and where runs were asked on their way
    curves.svg and curves.png too."""
    found = read_results(results)
    comparison, times = found.compared(), found.times
    curves = found.records if times is None else [times.paced(one) for one in found.records]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(comparison), encoding="utf-8")
    figures = {"plot": plot(comparison), "curves": plot_curves(curves, comparison.compares_seconds)}
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", dpi=120)
    return comparison
