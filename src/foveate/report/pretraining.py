"""Several seeds of the same training runs put together: means, spreads, ratios, a table and a plot.

A record is one run: {"arm", "seed", "pretrain_seconds", "finetune_seconds", "pretrain_flops", "finetune_flops", "pretrain_tokens",
"finetune_tokens" (visual tokens per image and layer), "accuracy": {family: share}, "majority": {family: share}, "n": {family: questions},
"learned": [families whose 95 % interval lies above the majority answer]}. `record` makes one from a finished run. Where the run was asked
questions on its way it also has "curve": [{"stage", "step", "seconds", "flops", "figures": {task: {figure: value}}}], from its beginning.

Spread is the sample standard deviation over seeds (n - 1). Ratios and differences are taken seed by seed against the first arm's run with
the same seed, and averaged then; so they are those of runs that were made under the same conditions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from foveate.errors import FoveateError
from foveate.inspect.figures import COLOURS
from foveate.inspect.words import si
from foveate.report.runs import Arm, Mark, StageLog, marks, read_log, split_stages

NUMBERS = ("pretrain_seconds", "finetune_seconds", "pretrain_flops", "finetune_flops", "pretrain_tokens", "finetune_tokens")


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
    """One arm over all its seeds. `ratio` and `difference` are to the first arm, seed by seed; accuracies are shares."""

    arm: str
    numbers: dict[str, Spread]
    ratio: dict[str, Spread]  # the numbers, and seconds and flops of both stages together
    accuracy: dict[str, Spread]  # by family, and "mean" over the learned families
    difference: dict[str, Spread]
    by_seed: dict[int, tuple[float, float]]  # seed -> (ratio of pre-training seconds, difference of mean accuracy), for the plot


@dataclass(frozen=True)
class Comparison:
    """All arms, the first one being what the others are compared with."""

    arms: list[ArmSummary]
    seeds: list[int]
    left_out: list[int]  # seeds that not every arm has
    learned: list[str]  # families that count in the mean: at least one arm is above the majority answer in every seed
    majority: dict[str, float]
    n: dict[str, int]


def record(arm: Arm, seed: int) -> dict[str, Any]:
    """The record of a finished run."""
    log = read_log(arm.run)
    before, last = split_stages(log)

    def tokens(stages: Sequence[StageLog]) -> float:
        return sum(stage.layer_tokens * stage.images for stage in stages) / sum(stage.images for stage in stages)

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
        **({"curve": [asdict(mark) for mark in found]} if (found := marks(log)) else {}),
    }


def aggregate(records: Sequence[dict[str, Any]]) -> Comparison:
    """Means, spreads, ratios and differences. The first record's arm is the one to compare with.

    Seeds that not every arm has are left out and listed. FoveateError for a record without its fields, two records of one arm and seed,
    arms with different families, or no seed in common.
    """
    table: dict[str, dict[int, dict[str, Any]]] = {}
    for number, one in enumerate(records):
        missing = [key for key in ("arm", "seed", *NUMBERS, "accuracy", "majority", "n", "learned") if key not in one]
        if missing:
            raise FoveateError(f"record {number} lacks {', '.join(missing)}")
        own = table.setdefault(one["arm"], {})
        if one["seed"] in own:
            raise FoveateError(f"two records of arm {one['arm']!r} with seed {one['seed']}")
        own[one["seed"]] = one
    if not table:
        raise FoveateError("no records to put together")
    seeds = sorted(set.intersection(*(set(own) for own in table.values())))
    if not seeds:
        raise FoveateError(f"no seed was run for every arm ({', '.join(f'{arm}: {sorted(own)}' for arm, own in table.items())})")
    first = table[records[0]["arm"]]
    families = list(first[seeds[0]]["accuracy"])
    for arm, own in table.items():
        for seed in seeds:
            if list(own[seed]["accuracy"]) != families or own[seed]["n"] != first[seeds[0]]["n"]:
                raise FoveateError(f"arm {arm!r}, seed {seed}: other families or numbers of questions than the first record's")
    learned = [family for family in families if any(all(family in own[seed]["learned"] for seed in seeds) for own in table.values())]
    arms = [_summary(arm, own, first, seeds, families, learned) for arm, own in table.items()]
    one = first[seeds[0]]
    left_out = sorted({seed for own in table.values() for seed in own} - set(seeds))
    return Comparison(arms, seeds, left_out, learned, dict(one["majority"]), dict(one["n"]))


def _summary(
    arm: str,
    own: dict[int, dict[str, Any]],
    first: dict[int, dict[str, Any]],
    seeds: Sequence[int],
    families: Sequence[str],
    learned: Sequence[str],
) -> ArmSummary:
    def number(run: dict[str, Any], name: str) -> float:
        if name in ("seconds", "flops"):
            return float(run[f"pretrain_{name}"] + run[f"finetune_{name}"])
        return float(run[name])

    def share(run: dict[str, Any], family: str) -> float:
        return mean(run["accuracy"][f] for f in (learned or families)) if family == "mean" else float(run["accuracy"][family])

    ratios = {name: [number(own[seed], name) / number(first[seed], name) for seed in seeds] for name in (*NUMBERS, "seconds", "flops")}
    shares = {family: [share(own[seed], family) for seed in seeds] for family in (*families, "mean")}
    differences = {family: [share(own[seed], family) - share(first[seed], family) for seed in seeds] for family in (*families, "mean")}
    return ArmSummary(
        arm=arm,
        numbers={name: Spread.of([number(own[seed], name) for seed in seeds]) for name in NUMBERS},
        ratio={name: Spread.of(values) for name, values in ratios.items()},
        accuracy={family: Spread.of(values) for family, values in shares.items()},
        difference={family: Spread.of(values) for family, values in differences.items()},
        by_seed={seed: (ratios["pretrain_seconds"][i], differences["mean"][i]) for i, seed in enumerate(seeds)},
    )


def markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table with its conventions under it."""
    arms, base = comparison.arms, comparison.arms[0].arm
    lines = [f"| | {' | '.join(arm.arm for arm in arms)} |", f"|---|{'---:|' * len(arms)}"]

    def row(label: str, cells: Sequence[str]) -> None:
        lines.append(f"| {label} | {' | '.join(cells)} |")

    def ratio(name: str) -> list[str]:
        return ["1", *(arm.ratio[name].text(".3f") for arm in arms[1:])]

    for stage, name in (("pretrain", "pre-training"), ("finetune", "fine-tuning")):
        row(f"{name}, wall clock, s", [arm.numbers[f"{stage}_seconds"].text(".1f") for arm in arms])
        row(f"{name}, wall clock, ratio", ratio(f"{stage}_seconds"))
        row(f"{name}, FLOPs", [si(arm.numbers[f"{stage}_flops"].mean) for arm in arms])
        row(f"{name}, FLOPs, ratio", ratio(f"{stage}_flops"))
        row(f"{name}, visual tokens per layer", [f"{arm.numbers[f'{stage}_tokens'].mean:.4g}" for arm in arms])
    row("both, wall clock, ratio", ratio("seconds"))
    row("both, FLOPs, ratio", ratio("flops"))
    for family, majority in comparison.majority.items():
        mark = "" if family in comparison.learned else " \\*"
        label = f"{family}, % (n = {comparison.n[family]}, majority {100 * majority:.1f}){mark}"
        row(label, [arm.accuracy[family].text(".1f", 100) for arm in arms])
    row("mean accuracy, %", [arm.accuracy["mean"].text(".1f", 100) for arm in arms])
    row("mean accuracy, difference in points", ["", *(arm.difference["mean"].text("+.1f", 100) for arm in arms[1:])])

    count = len(comparison.seeds)
    notes = [
        f"{count} seed{'' if count == 1 else 's'} ({', '.join(map(str, comparison.seeds))}). ± is the sample standard deviation over "
        f"seeds. Ratios and differences are to {base} with the same seed. FLOPs: 2 per multiply-add, forward and backward, predicted from "
        "the shapes. Majority: the best constant answer."
    ]
    unlearned = [family for family in comparison.majority if family not in comparison.learned]
    if unlearned and comparison.learned:
        notes.append(f"\\* {', '.join(unlearned)}: in no arm clearly above the majority answer in every seed; left out of the mean.")
    elif unlearned:
        notes.append("\\* No family is clearly above the majority answer in every seed of any arm; the mean is over all of them.")
    if comparison.left_out:
        notes.append(f"Left out, because not every arm has them: seeds {', '.join(map(str, comparison.left_out))}.")
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"


def plot(comparison: Comparison) -> Figure:
    """Left: pre-training wall clock against the difference of mean accuracy, one dot a seed; right: the difference per family."""
    base = comparison.arms[0].arm
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    families = list(comparison.majority)
    others = comparison.arms[1:]
    for number, arm in enumerate(comparison.arms):
        colour = COLOURS[number % len(COLOURS)]
        ratios, differences = zip(*arm.by_seed.values(), strict=True)
        left.scatter(ratios, [100 * d for d in differences], s=26, color=colour, alpha=0.8, label=arm.arm, edgecolors="none")
        if number:
            places = [i + (number - 1 - (len(others) - 1) / 2) * 0.22 for i in range(len(families))]
            means = [100 * arm.difference[family].mean for family in families]
            spread = [100 * (arm.difference[family].deviation or 0.0) for family in families]
            right.errorbar(places, means, yerr=spread, fmt="o", markersize=5, capsize=2, linewidth=1.2, color=colour, label=arm.arm)
    left.set_xlabel(f"pre-training wall clock, ratio to {base}")
    left.set_ylabel("mean accuracy, difference in points")
    left.set_xlim(left=0)
    right.set_xticks(range(len(families)), [family if family in comparison.learned else f"{family} *" for family in families], rotation=20)
    right.set_ylabel(f"accuracy − {base}, points")
    for axes in (left, right):
        axes.axhline(0, color="#888888", linewidth=0.8, zorder=0)
        axes.grid(color="#88888840", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    return figure


def plot_curves(records: Sequence[dict[str, Any]]) -> Figure | None:
    """Headlines on the way against seconds of training (left) and FLOPs (right): a row for each task, a line for each run, a colour for
    each arm. None where no run was asked."""
    runs = [(one["arm"], [Mark(**mark) for mark in one["curve"]]) for one in records if one.get("curve")]
    tasks = list(dict.fromkeys(task for _, found in runs for mark in found for task in mark.figures))
    if not tasks:
        return None
    arms = list(dict.fromkeys(one["arm"] for one in records))
    figure = Figure(figsize=(9, 3.2 * len(tasks)), layout="constrained")
    for task, pair in zip(tasks, figure.subplots(len(tasks), 2, squeeze=False), strict=True):
        for axes, against in zip(pair, ("seconds", "flops"), strict=True):
            told: set[str] = set()
            for arm, found in runs:
                own = [mark for mark in found if task in mark.figures]
                values = [next(iter(mark.figures[task].values())) for mark in own]
                colour = COLOURS[arms.index(arm) % len(COLOURS)]
                label = None if arm in told else arm
                axes.plot([getattr(mark, against) for mark in own], values, "o-", markersize=3, linewidth=1.2, color=colour, label=label)
                told.add(arm)
            axes.set_xlabel("training, s" if against == "seconds" else "training, FLOPs")
            axes.set_xlim(left=0)
            axes.grid(color="#88888840", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        pair[0].set_ylabel(task)
        pair[0].legend(frameon=False, fontsize=9)
    return figure


def write_comparison(results: str | Path, out: str | Path) -> Comparison:
    """Read a list of records from `results` (JSON) and write table.md, plot.svg and plot.png into the folder `out`, and where runs were
    asked on their way curves.svg and curves.png too."""
    try:
        records = json.loads(Path(results).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FoveateError(f"cannot read the results {results}: {error}") from error
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise FoveateError(f"{results} must be a list of records, one for each run")
    comparison = aggregate(records)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(comparison), encoding="utf-8")
    figure = plot(comparison)
    figure.savefig(folder / "plot.svg", metadata={"Date": None})
    figure.savefig(folder / "plot.png", dpi=120)
    if (curves := plot_curves(records)) is not None:
        curves.savefig(folder / "curves.svg", metadata={"Date": None})
        curves.savefig(folder / "curves.png", dpi=120)
    return comparison
