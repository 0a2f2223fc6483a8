"""Ways to see small things in a large picture: more pixels, tiles, scales, fewer tokens of tiles, and a search.

    python benchmarks/high-resolution/run.py                     # every arm that is not there yet
    python benchmarks/high-resolution/run.py --arms "one view" "zoom search"
    python benchmarks/high-resolution/run.py --table             # table.md and the pictures again

Scenes of the embedded world are drawn 512 px wide with things a third of their usual size, writing among them, and asked about their
writing and their shapes. Every arm fine-tunes a shipped model on the same scenes and questions, then answers the same held-out ones,
asked one by one. All start from asset:vlm but Chain-of-Sight, which has a bridge of its own (asset:begun, a weaker model); the bridge
of the scales reads twice the channels and begins with zeros for the second half. The search's model sees, beside the whole scenes, two
parts of each, and learns to say whether a thing is there and whether it is large.

Tokens are all that go through the language model in all passes of a question, text and answer among them, mean over its layers; FLOPs
are of everything. Differences are paired by question, with 95 % intervals from drawing pictures anew. results.json keeps what is
finished, which is not run again; a training that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from ruamel.yaml import YAML

from foveate.evaluation.metrics.scenes import FAMILY_RULES
from foveate.evaluation.paired import bootstrap
from foveate.files import write_json
from foveate.inference import load_model, progress_bar
from foveate.inference.strategies import Found, opened, parse
from foveate.inference.strategies.boxes import Box, grid, inside
from foveate.inference.strategies.words import WORLD
from foveate.inspect.figures import COLOURS
from foveate.inspect.paths import Path as Way
from foveate.inspect.paths import draw_paths
from foveate.inspect.words import si
from foveate.machine import environment
from foveate.model import from_backbones
from foveate.train.recipe import load_recipe
from foveate.train.run import train
from foveate.world.pictures import Scene, Thing
from foveate.world.questions import refer
from foveate.world.scenes import world_scene, write_world

HERE = Path(__file__).parent
SIDE, DETAIL = 512, 3
_COLOURS = (*COLOURS, "#c0392b", "#6b4fb3")
FIRST = "one view"  # the arm that all others are compared with


@dataclass(frozen=True)
class Tuned:
    """A model: what it starts from, and what its stage says beside what all have. `parts`: it is shown parts of the scenes too."""

    start: str
    stage: dict[str, Any]
    parts: bool = False


MODELS = {
    "view-64": Tuned("asset:vlm", {"image_size": 64}),
    "view-128": Tuned("asset:vlm", {"image_size": 128}),
    "anyres": Tuned("asset:vlm", {"image_size": 64, "tiling": "anyres"}),
    "internvl": Tuned("asset:vlm", {"image_size": 64, "tiling": "internvl:tiles=4"}),
    "s2": Tuned("scales", {"image_size": 64}),
    "chain-of-sight": Tuned("asset:begun", {"image_size": 128, "bridge": {"scales": [[16, 4], [8, 4], [1, 1]]}}),
    "zoom": Tuned("asset:vlm", {"image_size": 64}, parts=True),
}


@dataclass(frozen=True)
class Arm:
    """A model under reducers, asked by a strategy. `group`: what the picture joins by a line."""

    model: str
    strategy: str = "once"
    reducers: str = "none"
    group: str = ""


ZOOM = f"zoomeye:words={WORLD.name},depth=2,high=0.2,low=-0.2"  # the paper's thresholds for InternVL2.5; each model has its own there
ARMS = {
    FIRST: Arm("view-64", group="more pixels"),
    "one view of 128 px": Arm("view-128", group="more pixels"),
    "any resolution": Arm("anyres"),
    "InternVL tiles": Arm("internvl", group="tiles"),
    "InternVL tiles + DivPrune 50 %": Arm("internvl", reducers="divprune:keep=0.5,scope=crop", group="tiles"),
    "InternVL tiles + DivPrune 25 %": Arm("internvl", reducers="divprune:keep=0.25,scope=crop", group="tiles"),
    "S², two sizes": Arm("s2"),
    "Chain-of-Sight, scaled": Arm("chain-of-sight"),
    "zoom model, asked once": Arm("zoom", group="zoom"),
    "zoom search, 6 parts": Arm("zoom", f"{ZOOM},nodes=6", group="zoom"),
    "zoom search": Arm("zoom", ZOOM, group="zoom"),
    "zoom search + FastV 25 %": Arm("zoom", ZOOM, "fastv:keep=0.25"),
}


# ---- data ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One question about one thing. `box`: of the thing, in pixels."""

    text: str
    answer: str
    family: str
    box: Box


def asked(scene: Scene) -> list[Question]:
    """A question about each thing that one can be asked about."""
    rng, found = random.Random(f"asked/{scene.seed}"), []
    for thing in scene.things:
        if thing.kind != "shape":
            found.append(
                _of(thing, f"what {thing.kind} is {'handwritten' if thing.kind == 'digit' else 'printed'}?", thing.name, "reading")
            )
            continue
        about = rng.choice(("color", "shape"))
        reference = refer(scene, thing, ("shape",) if about == "color" else ("color",), rng)
        if reference is not None:
            answer = str(thing.colour) if about == "color" else thing.name
            found.append(_of(thing, f"what {about} is {reference[0]}?", answer, "attribute"))
    rng.shuffle(found)
    return found


def _of(thing: Thing, text: str, answer: str, family: str) -> Question:
    top, left, bottom, right = (round(edge * SIDE) for edge in thing.box)
    return Question(text, answer, family, (left, top, right, bottom))


def there(question: Question, part: Box) -> bool:
    """Whether the middle of the thing lies in a part."""
    left, top, right, bottom = question.box
    x, y = (left + right) // 2, (top + bottom) // 2
    return part[0] <= x < part[2] and part[1] <= y < part[3]


def large(question: Question, part: Box) -> bool:
    """Whether a part shows the whole thing at least twice as large as the whole picture does, give or take a few pixels of its edge."""
    left, top, right, bottom = question.box
    wide, high = (right - left) // 10, (bottom - top) // 10
    return part[2] - part[0] < SIDE and inside((left + wide, top + high, right - wide, bottom - high), part)


def write_data(folder: Path, scenes: int, test: int) -> None:
    """The pictures; whole.json, of the scenes; parts.json, of them and two parts of each; test.json."""
    write_world(folder, train=scenes, test=test, seed=0, size=SIDE, detail=DETAIL)
    whole, parts = [], []
    (folder / "images" / "parts").mkdir(exist_ok=True)
    for index in range(scenes):
        questions, image = asked(world_scene(0, "train", index, DETAIL)), f"train/{index:06d}.png"
        rng = random.Random(f"parts/{index}")
        if not questions:
            continue
        whole.append(talk(f"{index}", image, [(one.text, one.answer) for one in questions]))
        parts.append(talk(f"{index}-0", image, [turn(one, (0, 0, SIDE, SIDE), rng) for one in questions]))
        for depth in (1, 2):
            cells, about = grid((0, 0, SIDE, SIDE), 2**depth, 2**depth), rng.choice(questions)
            holds = [cell for cell in cells if large(about, cell)] or [cell for cell in cells if there(about, cell)]
            part = holds[0] if rng.random() < 0.8 else rng.choice(cells)
            name = f"parts/{index:06d}-{depth}.png"
            if not (folder / "images" / name).is_file():
                Image.open(folder / "images" / image).crop(part).save(folder / "images" / name, compress_level=1)
            parts.append(talk(f"{index}-{depth}", name, [turn(one, part, rng) for one in balanced(questions, part, rng)]))
    write_json(folder / "whole.json", whole, indent=None)
    write_json(folder / "parts.json", parts, indent=None)
    rows = []
    for index in range(test):
        for number, one in enumerate(asked(world_scene(0, "test", index, DETAIL))):
            told = {"question": one.text, "answer": one.answer, "family": one.family}
            rows.append({"id": f"{index}-{number}", "image": f"test/{index:06d}.png", **told})
    write_json(folder / "asked.json", rows, indent=None)


def balanced(questions: Sequence[Question], part: Box, rng: random.Random) -> list[Question]:
    """The questions about things in a part and as many about others, one at least: a model that hears no nine times of ten says no."""
    here = [one for one in questions if there(one, part)]
    others = [one for one in questions if one not in here]
    chosen = [*here, *rng.sample(others, min(len(others), max(1, len(here))))]
    rng.shuffle(chosen)
    return chosen


def turn(question: Question, part: Box, rng: random.Random) -> tuple[str, str]:
    """What is asked about a thing when a part is shown: the question itself only where it can be answered, or of the whole picture."""
    whole = part == (0, 0, SIDE, SIDE)
    if (whole and rng.random() < 0.8) or (large(question, part) and rng.random() < 0.4):
        return question.text, question.answer
    if not whole and rng.random() < 0.5:
        return WORLD.exists.format(cue=question.text), "yes" if there(question, part) else "no"
    return WORLD.answerable.format(question=question.text), "yes" if large(question, part) else "no"


def talk(name: str, image: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    said = []
    for number, (question, answer) in enumerate(turns):
        said += [{"from": "human", "value": ("" if number else "<image>\n") + question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": said}


# ---- training and asking ---------------------------------------------------------------------------------------------------------------


def tuned(name: str, seed: int, given: argparse.Namespace) -> Path:
    """The folder of a fine-tuned model."""
    world, model = given.work / "data", MODELS[name]
    stage = {
        "name": "finetune",
        "data": {"conversations": str(world / ("parts.json" if model.parts else "whole.json")), "images": str(world / "images")},
        "train": {"bridge": True, "lm": True},
        "epochs": given.epochs,
        "batch_size": 16,
        "learning_rate": 5.0e-4,
        "warmup": 0.05,
        "precision": "auto",
        **model.stage,
    }
    start = scales(given.work / "start-scales") if model.start == "scales" else model.start
    whole = {
        "name": name,
        "output": str(given.work / f"{name}-{seed}"),
        "seed": seed,
        "model": {"checkpoint": str(start), "attn_implementation": "eager"},
        "stages": [stage],
    }
    path = given.work / f"{name}-{seed}.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(whole, file)
    return train(load_recipe(path))


def scales(folder: Path) -> Path:
    """asset:vlm with a bridge for two sizes, which does not look at the second yet."""
    if not folder.is_dir():
        model, processor = load_model("asset:vlm", "cpu")
        wide, made = from_backbones(
            model.model.vision_tower,
            model.model.causal_lm,
            {"kind": "mlp", "levels": 2},
            vision_feature_layer=model.config.vision_feature_layer,
            image_size=64,
            tiling="s2:sizes=2",
            image_processor=processor.image_processor,
            tokenizer=processor.tokenizer,
            chat_template=processor.chat_template,
        )
        old, new = model.model.bridge, wide.model.bridge
        with torch.no_grad():
            new.linear_1.weight.zero_()
            new.linear_1.weight[:, : old.linear_1.in_features] = old.linear_1.weight
            new.linear_1.bias.copy_(old.linear_1.bias)
        new.linear_2.load_state_dict(old.linear_2.state_dict())
        wide.save_pretrained(folder)
        made.save_pretrained(folder)
    return folder


def answers(arm: Arm, final: Path, rows: Sequence[dict[str, Any]], folder: Path) -> list[Found]:
    model, processor = load_model(final)
    strategy = parse(arm.strategy)
    with opened(model, processor, arm.reducers) as eyes, progress_bar(True) as bar:
        shown, found = bar.add_task(f"{arm.model}, {arm.strategy}", total=len(rows)), []
        for row in rows:
            found.append(strategy.run(eyes, [Image.open(folder / row["image"])], row["question"], new_tokens=6))
            bar.advance(shown)
    return found


def record(name: str, seed: int, rows: Sequence[dict[str, Any]], found: Sequence[Found]) -> dict[str, Any]:
    arm = ARMS[name]
    costs = [one.ledger for one in found if one.ledger is not None]
    scores = [float(FAMILY_RULES[row["family"]](one.answer, row["answer"])) for row, one in zip(rows, found, strict=True)]
    return {
        "arm": name,
        "seed": seed,
        "model": arm.model,
        "strategy": arm.strategy,
        "reducers": arm.reducers,
        "tokens": mean(mean(cost.total_tokens) for cost in costs),
        "visual": mean(one.visual_tokens for one in found),
        "passes": mean(len(one.passes) for one in found),
        "flops": mean(cost.total_flops for cost in costs),
        "seconds": mean(one.seconds for one in found),
        "scores": scores,
        "answers": [one.answer for one in found],
    }


# ---- what is said ----------------------------------------------------------------------------------------------------------------------


def compared(results: dict[str, Any], name: str, of: str) -> tuple[float, float, float]:
    """(difference, low, high) of an arm less another, in points; means over seeds."""
    mine, other = (np.mean([run["scores"] for run in results["runs"] if run["arm"] == arm], axis=0) for arm in (name, of))
    apart = mine - other
    low, high, _ = bootstrap(apart, [row["image"] for row in results["questions"]])
    return 100 * float(apart.mean()), 100 * low, 100 * high


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each arm that is there the means over its seeds, in the order of `ARMS`."""
    found = []
    for name in ARMS:
        runs = [run for run in results["runs"] if run["arm"] == name]
        if not runs:
            continue
        row = {"arm": name, "seeds": len(runs), **{what: mean(run[what] for run in runs) for what in ("tokens", "passes", "flops")}}
        for family in ("reading", "attribute"):
            own = [i for i, one in enumerate(results["questions"]) if one["family"] == family]
            row[family] = 100 * mean(run["scores"][i] for run in runs for i in own) if own else float("nan")
        row["all"] = 100 * mean(score for run in runs for score in run["scores"])
        found.append(row)
    return found


def table(results: dict[str, Any]) -> str:
    rows = rows_of(results)
    first = next((row for row in rows if row["arm"] == FIRST), None)
    lines = [
        f"Scenes of {SIDE} px with things a third of their usual size; {len(results['questions'])} questions about {results['test']} "
        f"held-out scenes, models tuned on {results['scenes']} scenes.",
        "",
        "| arm | tokens a question | passes | FLOPs | reading, % | attribute, % | all, % | against one view, points |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        apart = ""
        if first is not None and row["arm"] != FIRST:
            apart = "{:+.1f} ({:+.1f} to {:+.1f})".format(*compared(results, row["arm"], FIRST)).replace("-", "−")
        numbers = [f"{row['tokens']:,.0f}", f"{row['passes']:.1f}", si(row["flops"])]
        numbers += [f"{row[what]:.1f}" for what in ("reading", "attribute", "all")]
        lines.append(f"| {' | '.join([row['arm'], *numbers, apart])} |")
    search = next((row for row in rows if row["arm"] == "zoom search"), None)
    others = [row for row in rows if search is not None and ARMS[row["arm"]].model != "zoom"]
    if search is not None and others:
        near = min(others, key=lambda row: abs(np.log(row["flops"] / search["flops"])))
        apart = "{:+.1f} points ({:+.1f} to {:+.1f})".format(*compared(results, "zoom search", near["arm"])).replace("-", "−")
        lines += [
            "",
            f"At the nearest cost to the search's, {near['arm']} takes {near['flops'] / search['flops']:.2f} of its FLOPs; "
            f"the search is {apart} apart.",
        ]
    lines += [
        "",
        "Tokens: all that go through the language model in all passes of a question, text and answer among them, mean over its layers. "
        "FLOPs: of everything, 2 per multiply-add. Differences are paired by question, 95 % intervals from drawing pictures anew, not "
        "corrected for their number. "
        f"Seeds of training: {', '.join(map(str, sorted({run['seed'] for run in results['runs']})))}. {results['machine']}",
    ]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any]) -> Figure:
    """Accuracy over tokens and over FLOPs; arms of one group are joined."""
    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    rows, groups = rows_of(results), list(dict.fromkeys(arm.group or name for name, arm in ARMS.items()))
    for axes, what, label in zip(
        figure.subplots(1, 2, sharey=True), ("tokens", "flops"), ("tokens a question", "FLOPs a question"), strict=True
    ):
        for number, group in enumerate(groups):
            own = sorted((row for row in rows if (ARMS[row["arm"]].group or row["arm"]) == group), key=lambda row: row[what])
            style = {"color": _COLOURS[number % len(_COLOURS)], "marker": "osD^vPX"[number % 7], "markersize": 5}
            axes.plot([row[what] for row in own], [row["all"] for row in own], "-", label=group if own else None, **style)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.grid(color="#88888840", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("correct, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def path(given: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """path.png: the way of the search on the first questions about writing."""
    model, processor = load_model(tuned("zoom", given.seeds[0], given))
    row = next(row for row in rows if row["family"] == "reading")
    picture, ways = Image.open(given.work / "data" / "images" / row["image"]), []
    with opened(model, processor) as eyes:
        bare = parse("once").run(eyes, [picture], row["question"], new_tokens=6)
        for arm in ("zoom search, 6 parts", "zoom search"):
            found = parse(ARMS[arm].strategy).run(eyes, [picture], row["question"], new_tokens=6)
            ways.append(Way(arm, found, found.answer != bare.answer))
    told = f"asked once: “{bare.answer}”; the answer is “{row['answer']}”"
    draw_paths(row["question"], told, picture, ways).savefig(given.output / "path.png", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="all of them unless given", metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings")
    parser.add_argument("--scenes", type=int, default=1600, help="to tune on")
    parser.add_argument("--test", type=int, default=80, help="scenes to ask about, two or three questions each")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only write the table and the pictures")
    parser.add_argument("--work", type=Path, default=Path("runs/high-resolution"), help="where data and models go")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    given = parser.parse_args()
    file = given.output / "results.json"
    told = {"scenes": given.scenes, "test": given.test, "epochs": given.epochs}
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {**told, "runs": []}
    if differs := [name for name, value in told.items() if results[name] != value and not given.table]:
        raise SystemExit(f"{file} was made with other {', '.join(differs)}; move it away, or give another --output")
    if not given.table:
        given.output.mkdir(parents=True, exist_ok=True)
        write_data(given.work / "data", given.scenes, given.test)
        rows = json.loads((given.work / "data" / "asked.json").read_text(encoding="utf-8"))
        for seed in given.seeds:
            for name in given.arms or ARMS:
                if any(run["arm"] == name and run["seed"] == seed for run in results["runs"]):
                    continue
                start = time.perf_counter()
                final = tuned(ARMS[name].model, seed, given)
                made = record(name, seed, rows, answers(ARMS[name], final, rows, given.work / "data" / "images"))
                print(f"{name}: {100 * mean(made['scores']):.1f} %, {time.perf_counter() - start:.0f} s", flush=True)
                results = {**results, "machine": environment(), "questions": rows, "runs": [*results["runs"], made]}
                write_json(file, results, indent=None)
        if any(run["model"] == "zoom" for run in results["runs"]):
            path(given, rows)
    (given.output / "table.md").write_text(table(results), encoding="utf-8")
    plot(results).savefig(given.output / "plot.png", dpi=120, metadata={"Software": None})
    print(table(results))


if __name__ == "__main__":
    main()
