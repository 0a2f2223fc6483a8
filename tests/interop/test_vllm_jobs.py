"""`foveate generate` and `foveate bench --engine vllm` answer as transformers does, and `foveate encode` writes what vLLM's models can be
given. Needs the environment that `make serve-test` builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from foveate.batch import Done, Embeddings, Job, OnVLLM, encode, generate
from foveate.errors import FoveateError
from foveate.evaluation.bench import bench
from foveate.evaluation.cells import Bench, load_bench
from foveate.tokens import budget
from tests.conformance.family import picture
from tests.interop.engine import LENGTH, alone
from tests.interop.served import MODELS, QWEN, Reference, requests

pytest.importorskip("vllm")

TEMPLATE = "{% for message in messages %}<s>{{ message['content'] | replace('<|image_pad|>', 'QWEN') }}{% endfor %}"
OPTIONS = {"enforce_eager": True, "max_model_len": LENGTH, "max_num_batched_tokens": 48, "max_num_seqs": 8, "block_size": 32}


def saved(folder: Path, name: str) -> Path:
    """A checkpoint with a chat template."""
    torch.manual_seed(0)
    (folder / name).mkdir()
    MODELS[name].build(folder / name)
    processor = AutoProcessor.from_pretrained(folder / name)
    processor.chat_template = TEMPLATE.replace("QWEN", QWEN)
    processor.save_pretrained(folder / name)
    return folder / name


def test_answers_are_those_of_transformers(tmp_path: Path) -> None:
    """A file with two images in a row, none in another, and one that is missing."""
    model = saved(tmp_path, "llava")
    for number in range(3):
        picture((64, 48), number).save(tmp_path / f"{number}.png")
    rows: list[dict[str, Any]] = [
        {"image": "0.png", "question": "what is it"},
        {"image": "1.png", "question": "the cat"},
        {"image": "2.png", "question": "a"},
        {"images": ["0.png", "1.png"], "question": "which one"},
        {"question": "small or big"},
        {"image": "none.png", "question": "what"},
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    job = Job(str(tmp_path / "data.json"), str(model), "divprune:keep=0.25", max_new_tokens=12, batch_size=4)
    one = generate(job, tmp_path / "one", progress=False)
    served: Done = alone(_served, job, tmp_path / "vllm")
    assert one is not None
    assert served.path.read_bytes() == one.path.read_bytes()
    assert [name for name, _ in served.failed] == ["row 5"]


def _served(job: Job, out: Path) -> Done | None:
    return generate(job, out, engine="vllm", options=OPTIONS, progress=False)


@pytest.mark.parametrize(("name", "reducers"), [("llava", ["divprune", "fastervlm"]), ("qwen2_5_vl", ["divprune", "tome"])])
def test_tasks_are_answered_as_by_transformers(tmp_path: Path, name: str, reducers: list[str]) -> None:
    """With the baselines: one that keeps positions, and one that acts on the image. Some questions have two images or none."""
    model = saved(tmp_path, name)
    for number in range(3):
        picture((64, 40 + 8 * number), number).save(tmp_path / f"{number}.png")
    rows: list[dict[str, Any]] = [
        {"image": "0.png", "question": "what is it", "answers": ["red"]},
        {"image": "1.png", "question": "the cat", "answers": ["a"]},
        {"images": ["0.png", "2.png"], "question": "which one", "answers": ["b"]},
        {"question": "small or big", "answers": ["small"]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    given: dict[str, Any] = {
        "tasks": [f"{tmp_path / 'data.json'}:metric=exact,images={tmp_path},max_new_tokens=12"],
        "reducers": reducers,
        "keep": [0.25],
    }
    one = bench(str(model), **given, out=tmp_path / "one", seeds=1, batch_size=2, progress=False, device="cpu")
    found: Bench = alone(_benched, str(model), given, tmp_path / "vllm")
    assert [cell.reducer for cell in found.cells] == [cell.reducer for cell in one.cells]
    assert len({str(cell.answers) for cell in one.cells}) > 3
    for ours, theirs in zip(one.cells, found.cells, strict=True):
        if name == "qwen2_5_vl" and ours.method == "random":  # follows the pixels, which vLLM's own model normalises itself
            continue
        assert theirs.answers == ours.answers, ours.reducer
        assert theirs.visual_tokens == ours.visual_tokens, ours.reducer
        assert (theirs.refused, theirs.flops) == ("", {})


def _benched(model: str, given: Any, out: Path) -> Bench:
    options = {**OPTIONS, "limit_mm_per_prompt": {"image": 2} | ({"video": 0} if "qwen" in model else {})}
    bench(OnVLLM(model, options), **given, out=out, seeds=1, batch_size=2, progress=False)
    return load_bench(out)


@pytest.mark.parametrize(
    ("name", "reducer"), [("llava", "fastervlm:keep=0.25"), ("qwen2_5_vl", "divprune:keep=0.25"), ("qwen2_vl", "tome:keep=0.5")]
)
def test_embeddings_are_of_the_places_that_attach_keeps(tmp_path: Path, name: str, reducer: str) -> None:
    model = saved(tmp_path, name)
    _, kept = Reference(MODELS[name], model).answers(reducer, requests())
    done = encode(pictures(tmp_path, model, reducer), tmp_path / "out", progress=False)
    assert done is not None
    assert not done.failed
    found = Embeddings(tmp_path / "out")
    assert [[left.kept.tolist() for left in found[row]] for row in range(len(found))] == kept
    for left in (left for row in range(len(found)) for left in found[row]):
        if name == "llava":
            assert left.positions.tolist() == list(range(len(left.kept)))
        else:
            assert left.positions.shape == (3, len(left.kept))
            rows, columns = left.positions[1:]
            width = next(n for n in range(1, 99) if torch.equal(rows * n + columns, left.kept))
            assert int(columns.max()) < width
    first = found.images[found.rows[0]["images"][0]]
    assert first["kept"] == budget(float(reducer.partition("=")[2]), first["tokens"])


def test_features_between_layers_are_not_left_out_in_silence(tmp_path: Path) -> None:
    job = pictures(tmp_path, saved(tmp_path, "qwen3_vl"), "divprune:keep=0.25")
    with pytest.raises(FoveateError, match="adds features between its decoder layers too"):
        encode(job, tmp_path / "out", progress=False)


def pictures(folder: Path, model: Path, reducer: str) -> Job:
    rows = []
    for number, request in enumerate(requests()):
        names = [f"{number}-{place}.png" for place in range(len(request.images))]
        for name, image in zip(names, request.images, strict=True):
            image.save(folder / name)
        rows.append({"images": names, "question": request.words})
    (folder / "pictures.json").write_text(json.dumps(rows))
    return Job(str(folder / "pictures.json"), str(model), reducer, batch_size=4)
