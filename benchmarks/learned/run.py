"""Methods with weights of their own, trained with the model, beside training-free ones that let as many tokens through its layers.

    python benchmarks/learned/run.py                          # every arm that is not there yet, seeds 0, 1 and 2
    python benchmarks/learned/run.py --arms none pmod         # some of them
    python benchmarks/learned/run.py --table                  # table.md and the plot again

Every arm goes on from the shipped model by recipes/learned/tuned.yaml, the same steps on the same samples. `none` is tuned with all
tokens; a learned method is tuned under itself, and its weights with the model; VisionSelector, which freezes the model, has the model of
`none` and trains on it. Then each is asked the same held-out questions. Training-free methods are asked of two models, at the budget that
lets as many visual tokens through a layer, on the mean, as the learned method did: of `none`, and of one that was tuned under that very
method and budget. Differences are question by question, with 95 % intervals over pictures; a seed is one order of samples (and, where there
are any, one draw of new weights). results.json has what is finished, which is not done again; an interrupted training goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from foveate.evaluation.evaluate import evaluate
from foveate.evaluation.paired import bootstrap
from foveate.inspect.figures import COLOURS
from foveate.train.recipe import load_recipe
from foveate.train.run import train

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository: what the benchmarks share lies in benchmarks/

from benchmarks.arms import answers, options, run  # noqa: E402

RECIPE = HERE.parent.parent / "recipes" / "learned" / "tuned.yaml"
LEARNED = {
    "pmod": "pmod",
    "gammamod": "gammamod:layers=1-2-3,weigh=2p",
    "atpllava": "atpllava:keep=0.5,layers=1-3",
    "visionselector": "visionselector:keep=0.25",
}
FROZEN = frozenset({"visionselector"})  # methods that train nothing but their own weights
FREE = ("divprune", "random")
NONE = "none"
ARMS = [NONE, *LEARNED, *(f"{free} as {name}" for name in LEARNED for free in FREE)]


def tuned(name: str, seed: int, given: argparse.Namespace, reducer: str, start: Path | None = None, own: bool = False) -> Path:
    """Trains an arm under a reducer, or goes on with it; returns the folder of its model. start: a model in place of the shipped one, which
    then stays as it is; own: the reducer's weights are trained too."""
    text = RECIPE.read_text(encoding="utf-8").replace("runs/learned", str(given.work))
    path = given.work / "recipes" / "tuned.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    overrides = [f"output={given.work}/{name.replace(' ', '-')}-{seed}", f"seed={seed}", f"stages.0.steps={given.steps}"]
    overrides += [f"stages.0.reducers=[{{share: 1, reducer: '{reducer}'}}]"]
    overrides += ["stages.0.train.reducers=true"] if own else []
    if start is not None:
        overrides += [f"model.checkpoint={start}", "stages.0.train={bridge: false, reducers: true}"]
    return train(load_recipe(path, overrides))


def asked(model: Path, reducer: str, given: argparse.Namespace) -> dict[str, Any]:
    result = evaluate(str(model), given.work / "data", reducers=reducer, limit=given.questions)
    tokens = result.visual_tokens if result.layer_tokens is None else mean(result.layer_tokens)
    return {"reducer": reducer, "tokens": tokens, **answers(result)}


def measure(arm: str, seed: int, given: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of an arm: of its own model, and for a training-free method those of the model of `none` too."""
    plain = tuned(NONE, seed, given, NONE)
    if arm == NONE:
        return [{"arm": arm, "seed": seed, "tuned": True, **asked(plain, NONE, given)}]
    if arm in LEARNED:
        frozen = arm in FROZEN
        folder = tuned(arm, seed, given, LEARNED[arm], start=plain if frozen else None, own=True)
        return [{"arm": arm, "seed": seed, "tuned": not frozen, **asked(folder, LEARNED[arm], given)}]
    free, _, name = arm.partition(" as ")
    theirs = next((row for row in rows if (row["arm"], row["seed"]) == (name, seed)), None)
    if theirs is None:
        raise SystemExit(f"{arm}: {name} with seed {seed} has to be there first, since it says how many tokens; add it to --arms")
    reducer = f"{free}:keep={max(1, round(theirs['tokens']))}"
    found = [{"arm": arm, "seed": seed, "tuned": False, **asked(plain, reducer, given)}]
    if name not in FROZEN:
        found.append({"arm": arm, "seed": seed, "tuned": True, **asked(tuned(arm, seed, given, reducer), reducer, given)})
    return found


def of(rows: Sequence[dict[str, Any]], arm: str, was_tuned: bool) -> dict[str, Any] | None:
    """The answers of all seeds as one set, and the accuracy of each seed in %."""
    own = sorted((row for row in rows if (row["arm"], row["tuned"]) == (arm, was_tuned)), key=lambda row: row["seed"])
    if not own:
        return None
    return {
        "seeds": [row["seed"] for row in own],
        "tokens": mean(row["tokens"] for row in own),
        "answers": [
            (row["seed"], picture, i, right)
            for row in own
            for i, (picture, right) in enumerate(zip(row["pictures"], row["correct"], strict=True))
        ],
        "each": [100 * mean(row["correct"]) for row in own],
        "families": {name: 100 * mean(row["families"][name] for row in own) for name in own[0]["families"]},
    }


def difference(one: dict[str, Any], other: dict[str, Any], seeds: Sequence[int]) -> str:
    """By how many points `one` is better on the same questions of seeds that both have; a picture is drawn anew with all its seeds."""
    pairs = [{(seed, picture, i): right for seed, picture, i, right in side["answers"] if seed in seeds} for side in (one, other)]
    assert pairs[0].keys() == pairs[1].keys()
    gains = np.array([right - pairs[1][question] for question, right in pairs[0].items()], dtype=np.float64)
    low, high, _ = bootstrap(gains, [picture for _, picture, _ in pairs[0]])
    return f"{100 * gains.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})".replace("-", "−")


def table(report: dict[str, Any]) -> str:
    rows = report["rows"]
    count, families = len(rows[0]["correct"]), list(rows[0]["families"])
    lines = [
        f"{count:,} held-out questions; every training {report['steps']} steps of 16 samples, on {report['scenes']:,} scenes. "
        f"{report['machine']}.",
        "",
        "| method | tuned with the model | visual tokens a layer | correct, % | less the learned one, points | "
        f"{' | '.join(families)} | seeds |",
        f"|---|---|---:|---:|---:|{'---:|' * len(families)}---|",
    ]

    def line(arm: str, was_tuned: bool, against: dict[str, Any] | None) -> None:
        own = of(rows, arm, was_tuned)
        if own is None:
            return
        both = [seed for seed in own["seeds"] if against is not None and seed in against["seeds"]]
        told = difference(own, against, both) if against is not None and both else ""
        spread = f" ± {stdev(own['each']):.1f}" if len(own["each"]) > 1 else ""
        seeds = ", ".join(map(str, own["seeds"]))
        cells = [arm, "yes" if was_tuned else "no", f"{own['tokens']:.1f}", f"{mean(own['each']):.1f}{spread}", told]
        cells += [*(f"{own['families'][family]:.0f}" for family in families), seeds]
        lines.append(f"| {' | '.join(cells)} |")

    line(NONE, True, None)
    for name in LEARNED:
        learned = of(rows, name, name not in FROZEN)
        line(name, name not in FROZEN, None)
        for free in FREE:
            for was_tuned in (True, False):
                line(f"{free} as {name}", was_tuned, learned)
    note = (
        "`divprune as pmod`: at as many tokens as pmod lets through a layer on the mean. ±: sample standard deviation over seeds. "
        "Differences in points on the same questions, with 95 % intervals from drawing pictures anew, not corrected for their number."
    )
    return "\n".join([*lines, "", note, ""])


def plot(report: dict[str, Any]) -> Figure:
    """Accuracy over tokens: a mark for each method that was tuned, an open one for those asked of the model of `none`."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    kinds = [NONE, *LEARNED, *FREE]
    for arm in ARMS:
        kind = arm.partition(" as ")[0]
        for was_tuned in (True, False):
            own = of(report["rows"], arm, was_tuned)
            if own is not None:
                colour = COLOURS[kinds.index(kind) % len(COLOURS)]
                label = f"{kind}{'' if was_tuned else ', not tuned with'}"
                face = colour if was_tuned else "none"
                marker = "*" if kind == NONE else "s" if kind in LEARNED else "o"
                axes.plot([own["tokens"]] * len(own["each"]), own["each"], marker, color=colour, markerfacecolor=face, label=label)
    axes.set_xlabel("visual tokens in a layer, mean")
    axes.set_ylabel("correct answers, %")
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    return figure


if __name__ == "__main__":
    run(options(__doc__ or "", ARMS, [0, 1, 2], 300, "runs/learned", HERE).parse_args(), measure, table, plot)
