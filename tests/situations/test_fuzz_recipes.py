"""Recipes with random mistakes: whatever is wrong is a FoveateError, told soon, and before the first step.

A few in the tests, as many as one likes by hand: python -m tests.situations.test_fuzz_recipes 2500
"""

import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.errors import FoveateError
from foveate.train import run
from foveate.train.plan import plan
from foveate.train.run import main
from tests.situations.runs import document, prepare, save_llava

LIMIT = 60.0  # seconds for one recipe, on a busy machine
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**12, 10**30, 0.5, 1e-30, 1e300, float("inf"), float("nan")),
    *("", "none", "x", "1/3", "-1/3", "0.1.2", "ünïcode 🙂", "a" * 300, ".", "/proc/none", "\u0000", "asset:nothing", "no/such/model"),
    *("fastv:layer=1,keep=0.5", "fastv:layer=99", "vcc:layer=1,stride=2+random:keep=0.5", "tome:site=tower", "hired:keep=1e9"),
    *("fastervlm:keep=0.3", "downsample:keep=0.5", "schedule", ":", "fastv:keep=nan"),
    *("adafactor", "sgd", "lion_32bit", "muon", "lomo", "bf16", "bf16-copy", "fp16", "cosine", "constant", "bfloat16", "float16"),
    *("eager", "flash_attention_2", "mlp", "pixel_shuffle", "avg_pool2d", "resampler", "cross_attention", "lm_head", "q_proj"),
    *([], [[]], [1], [-1], [0, 1], [[2, 1]], [[4, 2], [2, 1]], [[0, 0]], [[-2, 1]], [[10**9, 1]], ["q_proj"]),
    *({}, {"kind": "mlp"}, {"kind": "resampler"}, {"bridge": 1e-3}, {"lora": {"rank": 2}}, {"lora": {"rank": 10**6}}),
    *({"share": 1}, {"every": 1}, {"scales": [[1, 1]]}),
]
KEYS = [
    *("validation", "reducers", "image_size", "bridge", "train", "learning_rate", "optimizer", "precision", "max_length", "epochs"),
    *("micro_batch", "lr_schedule", "warmup", "adam_betas", "gradient_checkpointing", "group_by_length", "weight_decay", "checkpoint"),
    *("vision_feature_layer", "add_image_token", "dtype", "attn_implementation", "limit", "split", "kind", "levels", "head_dim"),
    *("report_to", "seed", "nonsense"),
]
NO_YAML = ["\t", "{", "]", "'", "&a ", "*a", "!!python/object:x ", "\x07", "%", "- ", "2001-99-99"]


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a document."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in inside for place in places(value, (*path, key)))]


def mutated(made: dict[str, Any], dice: random.Random) -> str:
    """The text of a recipe with one to three mistakes."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        path = dice.choice(places(made)[1:])
        parent: Any = made
        for key in path[:-1]:
            parent = parent[key]
        kind = dice.random()
        if kind < 0.5:
            parent[path[-1]] = dice.choice(VALUES)
        elif kind < 0.65:
            del parent[path[-1]]
        elif kind < 0.75 and isinstance(parent, list):
            parent.append(parent[path[-1]])
        elif isinstance(parent, dict):
            parent[dice.choice(KEYS)] = dice.choice(VALUES)
        if not made:
            break
    text = json.dumps(made, indent=1)
    text = text.replace("Infinity", ".inf").replace("NaN", ".nan")
    if dice.random() < 0.1:  # and some that are no YAML any more
        at = dice.randrange(len(text))
        text = text[:at] + dice.choice(NO_YAML) + text[at:]
    return text


class Reached(Exception):
    """The recipe was found good."""


def reach(*args: Any, **kwargs: Any) -> None:
    raise Reached


def told(root: Path, dice: random.Random) -> str:
    """What becomes of one mutated recipe: "refused", or "good" where training would have begun."""
    made = document(root, f"fuzz-{dice.getrandbits(60)}")
    turns = {"share": "1/2", "cycle": ["none", "random:keep=0.5"]}
    made["stages"][1]["reducers"] = [{"share": "1/2", "reducer": "fastv:layer=1,keep=0.5"}, turns]
    made["stages"][0]["train"] = {"bridge": True, "lm": {"lora": {"rank": 2, "targets": ["q_proj"]}}}
    if dice.random() < 0.2:
        made["model"] = {"checkpoint": str(root / "llava")}
        made["stages"] = made["stages"][:1]
    path = root / "fuzz.yaml"
    path.write_text(mutated(made, dice), encoding="utf-8", errors="surrogatepass")
    begin = time.monotonic()
    outcome = ""
    for tell in (plan, main):
        try:
            tell(path)
        except FoveateError:
            outcome = "refused"
        except Reached:
            outcome = "good"
    assert time.monotonic() - begin < LIMIT
    return outcome


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ready(tmp_path_factory.mktemp("fuzz"))


def ready(folder: Path) -> Path:
    save_llava(folder / "llava")
    return prepare(folder)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mistakes_are_told(root: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    with monkeypatch.context() as patch:
        patch.chdir(root)
        patch.setattr(Path, "home", lambda: root)
        patch.setattr(run, "run_stage", reach)
        told(root, random.Random(seed))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as whole:
        place = ready(Path(temporary))
        whole.chdir(place)
        whole.setattr(Path, "home", lambda: place)
        whole.setattr(run, "run_stage", reach)
        outcomes: Counter[str] = Counter()
        slowest = 0.0
        for number in range(int(sys.argv[1]) if len(sys.argv) > 1 else 100):
            started = time.monotonic()
            try:
                outcomes[told(place, random.Random(number))] += 1
            except Exception:
                print(f"seed {number}:\n{(place / 'fuzz.yaml').read_text()}", file=sys.stderr)
                raise
            slowest = max(slowest, time.monotonic() - started)
        print(f"{dict(outcomes)}, slowest {slowest:.1f} s")
