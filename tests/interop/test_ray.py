"""Ray Data answers a file as one process does. Needs the environment that `make ray-test` builds."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from foveate.batch import Job, generate
from foveate.errors import FoveateError
from foveate.world.scenes import write_world

pytestmark = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed in this environment; `make ray-test` builds one that has it"
)
OPTIONS = ["--model", "asset:vlm", "--reduce", "divprune:keep=0.25", "--max-new-tokens", "8", "--batch-size", "2"]


def test_actors_answer_as_one_process_does_also_after_a_kill(tmp_path: Path) -> None:
    write_world(tmp_path / "world", train=0, test=3, seed=0, progress=False)
    data = tmp_path / "world" / "test.json"
    rows = json.loads(data.read_text())[:20]
    rows[5]["image"] = "none.png"
    data.write_text(json.dumps(rows))
    job = Job(str(data), "asset:vlm", "divprune:keep=0.25", max_new_tokens=8, batch_size=2)
    one = generate(job, tmp_path / "one", progress=False)
    assert one is not None
    command = [sys.executable, "-m", "foveate", "generate", str(data), *OPTIONS, "--engine", "ray", "--workers", "2"]
    ray = subprocess.Popen([*command, "--out", str(tmp_path / "ray")], stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "ray").glob("parts/*.jsonl"))) < 2 and ray.poll() is None:
        time.sleep(0.05)
    ray.kill()
    ray.wait()
    done = generate(job, tmp_path / "ray", engine="ray", workers=2, progress=False)
    assert done is not None
    assert done.path.read_bytes() == one.path.read_bytes()
    assert [name for name, _ in done.failed] == [rows[5]["id"]]


def test_what_is_wrong_with_the_job_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{"question": "what?"}]))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(FoveateError, match="cannot load a vision-language model and its processor from"):
        generate(Job(str(tmp_path / "data.json"), str(tmp_path / "model")), tmp_path / "out", engine="ray", progress=False)
