"""What training has to be whatever it is divided by: the cases that the tests of FSDP2 and of DeepSpeed share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.situations.runs import Change, checkpoint, prepare, recipe, rows, save_llava, stage
from tests.train.processes import launched

from foveate.inference import load_model
from foveate.train.run import main

FLOATS = ("loss", "grad_norm", "losses", "validation_loss")  # in the log


def cases(root: Path) -> dict[str, list[Change]]:
    """Two stages: the bridge alone with what a sharded step could stumble over (samples without images alone in a process, accumulation,
    several passes, validation), then the bridge grown, on larger images, with LoRA and reducers. And all of a library's model."""
    every = {"conversations": str(root / "data.json"), "images": str(root / "images"), "every": 2, "limit": 5}
    passes = {"losses": ["rdist"], "reducers": [{"share": 1, "reducer": "vcc:layer=1,stride=2"}]}
    lora = {"train": {"bridge": True, "lm": {"lora": {"rank": 2}}}, "save_steps": 2}
    taken = {"reducers": [{"share": 1, "cycle": ["fastervlm:keep=0.5", "fastv:layer=1,keep=0.5", "none"]}]}
    everything = {"train": {"bridge": True, "lm": True, "tower": True}, "steps": 2, "learning_rate": 1e-3}
    return {
        "stages": [stage(0, **passes, validation=every, max_grad_norm=0, steps=2), stage(1, **lora, **taken)],
        "library": [checkpoint(root / "llava"), stage(0, **everything)],
    }


def train_everywhere(root: Path, config: str) -> None:
    """Trains all `cases` in one process and, divided as `config` says, in two; then the second stage once more, killed."""
    save_llava(prepare(root) / "llava")
    recipes = []
    for name, changes in cases(root).items():
        main(recipe(root, f"{name}-one", *changes))
        recipes.append(recipe(root, f"{name}-two", *changes, stage(0, micro_batch=1)))
    killed = recipe(root, "killed", *cases(root)["stages"], from_the_second(root / "stages-two" / "0-one" / "model"))
    done = launched(config, root, "-m", "tests.train.launched", *map(str, recipes), f"{killed}@two:2")
    assert done.returncode != 0, done.stderr[-3000:]
    assert [path.name for path in (root / "killed" / "0-two").glob("*/complete")] == ["complete"], done.stderr[-3000:]


def from_the_second(folder: Path) -> Change:
    def change(made: dict[str, Any]) -> None:
        made["model"], made["stages"] = {"checkpoint": str(folder)}, made["stages"][1:]

    return change


def check_the_same(root: Path) -> None:
    """Losses to rounding, all else in the log exactly; weights; and a final model that is whole."""
    for name in cases(root):
        one, two = (rows(root / f"{name}-{processes}") for processes in ("one", "two"))
        exact = [[{key: value for key, value in row.items() if key not in FLOATS} for row in log] for log in (one, two)]
        assert exact[0] == exact[1]
        for mine, theirs in zip(one, two, strict=True):
            for key in mine.keys() & set(FLOATS):
                assert theirs[key] == pytest.approx(mine[key], rel=1e-5, abs=1e-5), (name, mine["step"], key)
        a, b = (load_file(root / f"{name}-{processes}" / "final" / "model.safetensors") for processes in ("one", "two"))
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[key], b[key], atol=1e-3) for key in a)
    model, processor = load_model(root / "stages-two" / "final", "cpu")
    assert (model.config.image_size, len(model.config.bridge["scales"])) == (64, 3)
    assert processor.image_token in processor.tokenizer.get_vocab()


def check_resumed(root: Path, config: str) -> None:
    """The very command of the documentation goes on with the run that was killed, which is then, to the last bit, the one left alone."""
    done = launched(config, root, "-m", "foveate", "train", str(root / "killed.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from step 2" in done.stderr
    one, two = ([(row["loss"], row["grad_norm"]) for row in rows(root / run)[-3:]] for run in ("stages-two", "killed"))
    assert one == two
    a, b = (load_file(root / run / "final" / "model.safetensors") for run in ("stages-two", "killed"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def how_divided(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / f"{name}.json").read_text())
    return found
