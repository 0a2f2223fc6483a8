"""Models of the library in two processes, where one of them gets samples without any image."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foveate.train import run
from foveate.train.run import main
from foveate.train.stand_in import StandIn
from foveate.train.trainer import FoveateTrainer
from tests.situations.runs import checkpoint, prepare, recipe, rows, save_llava, stage
from tests.train.processes import in_two

ROOT = Path(__file__).parents[2]
ALL = {"bridge": True, "lm": True, "tower": True}
CASES = [({"bridge": True}, False), ({"bridge": True}, True), (ALL, True), ({"bridge": True, "lm": True}, False)]

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other sample is without an image; whole batches too."""
    folder = prepare(tmp_path_factory.mktemp("two"))
    save_llava(folder / "llava")
    samples = json.loads((folder / "data.json").read_text())
    blind = [sample for sample in samples if "image" not in sample]
    seeing = [sample for sample in samples if isinstance(sample.get("image"), str)][:4]
    (folder / "data.json").write_text(json.dumps([*blind, *blind, *seeing]))
    return folder


def made(root: Path, output: str, train: dict[str, Any], checkpointed: bool) -> Path:
    keys = {"train": train, "gradient_checkpointing": checkpointed, "steps": 6, "batch_size": 2, "micro_batch": 1}
    keys["validation"] = {"conversations": str(root / "data.json"), "images": str(root / "images"), "limit": 5, "every": 3}
    return recipe(root, output, checkpoint(root / "llava"), stage(0, **keys))


def test_two_processes_are_one(root: Path) -> None:
    """All cases in one start of two processes, since it is the start that takes time."""
    pairs = [(made(root, f"one-{i}", *case), made(root, f"two-{i}", *case)) for i, case in enumerate(CASES)]
    in_two(root, "from foveate.train.run import main", f"for path in {[str(two) for _, two in pairs]!r}:", "    main(Path(path))")
    for one, two in pairs:
        single = main(one)
        double = root / two.stem / "final"
        for mine, theirs in zip(rows(single.parent), rows(double.parent), strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
            assert mine.get("validation_loss") == pytest.approx(theirs.get("validation_loss"), abs=1e-6)
            assert mine["images"] == theirs["images"]
        a, b = load_file(single / "model.safetensors"), load_file(double / "model.safetensors")
        assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


@pytest.mark.parametrize(("train", "checkpointed"), CASES)
def test_a_stand_in_changes_no_loss_and_no_weight(
    root: Path, monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], checkpointed: bool
) -> None:
    """In one process, with it and without."""
    name = f"{'-'.join(train)}-{checkpointed}"
    plain = main(made(root, f"plain-{name}", train, checkpointed))
    make = FoveateTrainer

    def with_stand_in(**kwargs: Any) -> Any:
        return make(**{**kwargs, "stand_in": StandIn(kwargs["model"], kwargs["data_collator"].collator.processor)})

    monkeypatch.setattr(run, "FoveateTrainer", with_stand_in)
    other = main(made(root, f"stand-in-{name}", train, checkpointed))
    assert [row["loss"] for row in rows(plain.parent)] == [row["loss"] for row in rows(other.parent)]
    a, b = load_file(plain / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_checkpointing_changes_nothing_where_only_the_bridge_is_trained(root: Path) -> None:
    ends = [main(made(root, f"bridge-{checkpointed}", {"bridge": True}, checkpointed)) for checkpointed in (False, True)]
    assert rows(ends[0].parent) == rows(ends[1].parent)
