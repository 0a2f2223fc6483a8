"""One model read at many numbers of visual tokens, beside models that were trained at one number each.

    python benchmarks/elastic/run.py                      # every arm that is not there yet, seed 0
    python benchmarks/elastic/run.py --arms mqt mqt-4     # some of them
    python benchmarks/elastic/run.py --table              # table.md and the curve again
    python benchmarks/elastic/run.py --arms mqt chain-of-sight --steps 1000 --work runs/elastic-longer --output benchmarks/elastic/longer

The elastic arms are recipes/elastic/*.yaml as they are: the bridge is first fitted to words, then all is trained, and each step draws its
number of tokens. An arm `mqt-4` is the same recipe with 4 tokens in all steps. All arms have the same tower, language model, samples, order
and number of steps; the features of the frozen tower are cached and shared. Each trained model is asked the same held-out questions, an
elastic one once at every number. results.json has what is finished, which is not done again; an interrupted training goes on where it was.
Differences are question by question, with 95 % intervals over pictures; a seed is one draw of bridge weights and of the order of samples.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from foveate.evaluation.evaluate import evaluate
from foveate.inference import load_model
from foveate.inspect.figures import COLOURS
from foveate.train.recipe import load_recipe
from foveate.train.run import train

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository: what the benchmarks share lies in benchmarks/

from benchmarks.arms import answers, options, run  # noqa: E402

RECIPES = HERE.parent.parent / "recipes" / "elastic"
READ = {"mqt": (1, 2, 4, 8, 16, 32, 64), "chain-of-sight": (4, 20, 52)}
APART = {"mqt": (4, 16, 64), "chain-of-sight": (4, 20, 52)}  # trained by themselves
ARMS = [*READ, *(f"{name}-{count}" for name, counts in APART.items() for count in counts)]


def parts(arm: str) -> tuple[str, int | None]:
    """The recipe of an arm, and the number of tokens that all of its steps have."""
    return next((name, int(arm.removeprefix(f"{name}-")) if arm != name else None) for name in READ if arm.startswith(name))


def finished(arm: str, seed: int, given: argparse.Namespace) -> Path:
    """Trains an arm, or goes on with it. Returns the folder of its model."""
    name, count = parts(arm)
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").replace("runs/elastic", str(given.work))
    path = given.work / "recipes" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    overrides = [f"output={given.work}/{arm}-{seed}", f"seed={seed}"]
    overrides += [] if count is None else [f"stages.{stage}.view_tokens={count}" for stage in (0, 1)]
    overrides += [f"stages.1.steps={given.steps}", "stages.1.epochs=null"] if given.steps else []
    return train(load_recipe(path, overrides))


def asked(arm: str, seed: int, given: argparse.Namespace, _: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """What a trained model answers at each of its numbers of tokens."""
    name, count = parts(arm)
    model, processor = load_model(str(finished(arm, seed, given)))
    found = []
    for read in READ[name] if count is None else (count,):
        processor.set_view_tokens(read)
        result = evaluate(model, given.work / "data", processor=processor, limit=given.questions)
        assert result.visual_tokens == read
        found.append({"arm": arm, "seed": seed, "tokens": read, **answers(result)})
    return found


def difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """By how many points `one` is better than `other` on the same questions, and half of the 95 % interval over pictures."""
    assert one["pictures"] == other["pictures"]
    by_picture: dict[str, float] = defaultdict(float)
    for picture, a, b in zip(one["pictures"], one["correct"], other["correct"], strict=True):
        by_picture[picture] += a - b
    questions, mean = len(one["correct"]), sum(by_picture.values()) / len(by_picture)
    spread = math.sqrt(sum((value - mean) ** 2 for value in by_picture.values()))
    return 100 * sum(by_picture.values()) / questions, 100 * 1.96 * spread / questions


def accuracy(row: dict[str, Any]) -> float:
    return 100 * sum(row["correct"]) / len(row["correct"])


def of(rows: Sequence[dict[str, Any]], arm: str, tokens: int) -> dict[str, Any] | None:
    """The answers of all seeds as one set."""
    own = [row for row in rows if (row["arm"], row["tokens"]) == (arm, tokens)]
    if not own:
        return None
    pictures = [f"{row['seed']}/{picture}" for row in own for picture in row["pictures"]]
    return {"pictures": pictures, "correct": [one for row in own for one in row["correct"]]}


def table(report: dict[str, Any]) -> str:
    rows = report["rows"]
    seeds, questions = sorted({row["seed"] for row in rows}), len(rows[0]["correct"])
    settings = f"{report['scenes']:,} scenes at 64 px, {report['steps'] or 'an epoch of'} steps"
    lines = [
        f"{questions:,} held-out questions, {len(seeds)} seed{'s' * (len(seeds) > 1)}; {settings}. {report['machine']}.",
        "",
        "| bridge | visual tokens | one model for all, % | gain on the last | trained at this number alone, % | the one model's lead |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, counts in READ.items():
        before = None
        for count in counts:
            elastic, alone = of(rows, name, count), of(rows, f"{name}-{count}", count)
            cells = [name, str(count), "" if elastic is None else f"{accuracy(elastic):.1f}"]
            cells.append("" if elastic is None or before is None else points(elastic, before))
            cells.append("" if alone is None else f"{accuracy(alone):.1f}")
            cells.append("" if elastic is None or alone is None else points(elastic, alone))
            if elastic is not None or alone is not None:
                lines.append(f"| {' | '.join(cells)} |")
            before = elastic or before
    return "\n".join([*lines, "", "Differences in points on the same questions, with 95 % intervals over pictures.", ""])


def points(one: dict[str, Any], other: dict[str, Any]) -> str:
    lead, half = difference(one, other)
    return f"{lead:+.1f} ± {half:.1f}".replace("-", "−")


def plot(report: dict[str, Any]) -> Figure:
    """Accuracy over visual tokens: a line for each model that is read at several numbers, points for those of one."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for colour, (name, counts) in zip(COLOURS, READ.items(), strict=False):
        for arms, style in (([name] * len(counts), "o-"), ([f"{name}-{count}" for count in counts], "x")):
            found = [(count, row) for arm, count in zip(arms, counts, strict=True) if (row := of(report["rows"], arm, count))]
            label = f"{name}, {'one model' if style == 'o-' else 'one model a number'}"
            if found:
                axes.plot([count for count, _ in found], [accuracy(row) for _, row in found], style, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("visual tokens of an image")
    axes.set_ylabel("correct answers, %")
    axes.legend()
    return figure


if __name__ == "__main__":
    run(options(__doc__ or "", ARMS, [0], 0, "runs/elastic", HERE).parse_args(), asked, table, plot)
