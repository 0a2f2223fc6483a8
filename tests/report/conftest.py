"""Three arms with made-up logs and answers on a small world of real scenes."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.evaluation.evaluate import Result, Verdict
from foveate.evaluation.metrics.scenes import FAMILY_RULES, score_family
from foveate.evaluation.sources import world_samples
from foveate.report.runs import Arm
from foveate.world.scenes import write_world

LAYERS = 6
Stage = tuple[str, list[tuple[str, list[float]]], float, float]  # name, (reducer, tokens per layer) in turn, seconds and FLOPs a step


def write_run(folder: Path, stages: list[Stage], bridges: list[tuple[int, dict[str, Any]]], steps: int = 200, noise: float = 0.05) -> None:
    """A run folder as `foveate train` leaves it, as far as reports read it. `bridges`: (image size, configuration) of each stage."""
    generator = random.Random(0)
    seconds = flops = images = 0.0
    lines = []
    for number, (name, parts, second, flop) in enumerate(stages):
        before = 0
        for step in [1, *range(10, steps + 1, 10)]:
            reducer, layers = parts[(step - 1) * len(parts) // steps]
            seconds, flops, images = seconds + second * (step - before), flops + flop * (step - before), images + 32 * (step - before)
            loss = 0.6 + 2.5 * math.exp(-step / (steps / 4)) - 0.2 * number + generator.gauss(0, noise)
            row = {"stage": name, "step": step, "loss": loss, "learning_rate": 1e-3, "images": images, "tokens_per_image": layers[0]}
            row |= {"visual_tokens_per_layer": layers, "flops": flops, "seconds": seconds, "reducer": reducer, "images_per_s": 32 / second}
            lines.append(json.dumps(row))
            before = step
        size, bridge = bridges[number]
        model = folder / f"{number}-{name}" / "model"
        model.mkdir(parents=True)
        config = {"model_type": "foveate", "image_size": size, "bridge": bridge, "vision_config": {"patch_size": 8}}
        (model / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")


def answers(world: Path, name: str, right: dict[str, float], seed: int = 0) -> Result:
    """A result that is right on a question with its family's probability, and otherwise gives another question's answer."""
    generator = random.Random(f"{name}/{seed}")
    questions = world_samples(world)
    rows = []
    for question in questions:
        family, (answer,) = question.group, question.answers
        other = generator.choice([q.answers[0] for q in questions if q.group == family])
        said = answer if generator.random() < right[family] else other
        image = Path(str(question.images[0])).relative_to(world / "images").as_posix()
        rows.append(Verdict(question.id, image, family, question.question, answer, said, FAMILY_RULES[family](said, answer)))
    families = {}
    for family in FAMILY_RULES:
        own = [row for row in rows if row.family == family]
        families[family] = score_family(family, [row.prediction for row in own], [row.answer for row in own])
    return Result(name, str(world), "none", False, 64, None, 1.5, families, rows)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads that wait for each other cost more than such small models are worth."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "scenes"
    write_world(folder, train=0, test=30, seed=5, size=64, progress=False, processes=1)
    return folder


@pytest.fixture(scope="session")
def make_arms(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[Arm]]:
    """arms(world): all tokens, Chain-of-Sight and LLaVolta."""

    def make(world: Path) -> list[Arm]:
        runs = tmp_path_factory.mktemp("runs")
        widths = {"levels": 1, "vision_width": 16, "text_width": 16}
        flat: dict[str, Any] = {"kind": "mlp", **widths}
        few = {"kind": "chain_of_sight", "scales": [[8, 4], [4, 1]], "grid": 8, "width": 64, "head_dim": 64, **widths}
        many = {**few, "scales": [[8, 4], [2, 1], [1, 1]]}
        all_tokens = [("none", [64.0] * LAYERS)]
        pooled = [
            ("vcc:layer=1,stride=8", [64.0] + [8.0] * (LAYERS - 1)),
            ("vcc:layer=3,stride=8", [64.0] * 3 + [8.0] * 3),
            ("vcc:layer=3,stride=2", [64.0] * 3 + [32.0] * 3),
            *all_tokens,
        ]
        plans: dict[str, tuple[list[Stage], list[tuple[int, dict[str, Any]]], dict[str, float]]] = {
            "All tokens": (
                [("pretrain", all_tokens, 0.5, 2e11), ("finetune", all_tokens, 0.9, 4e11)],
                [(64, flat), (64, flat)],
                dict(zip(FAMILY_RULES, (0.9, 0.8, 0.9, 0.4, 0.5, 0.2), strict=True)),
            ),
            "Chain-of-Sight": (
                [("pretrain", [("none", [8.0] * LAYERS)], 0.15, 5e10), ("finetune", [("none", [84.0] * LAYERS)], 1.0, 5e11)],
                [(64, few), (64, many)],
                dict(zip(FAMILY_RULES, (0.9, 0.7, 0.9, 0.3, 0.6, 0.2), strict=True)),
            ),
            "LLaVolta": (
                [("pretrain", all_tokens, 0.5, 2e11), ("finetune", pooled, 0.7, 3e11)],
                [(64, flat), (64, flat)],
                dict(zip(FAMILY_RULES, (0.8, 0.8, 0.8, 0.3, 0.5, 0.1), strict=True)),
            ),
        }
        found = []
        for name, (stages, bridges, right) in plans.items():
            folder = runs / name
            write_run(folder, stages, bridges)
            found.append(Arm(name, f"What {name} does, in one sentence of some length.", folder, answers(world, name, right)))
        return found

    return make
