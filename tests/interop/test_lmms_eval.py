"""lmms-eval's own command runs the shipped model on tasks of embedded scenes. Needs the environment that `make interop` builds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import GenerationConfig

from foveate.engine.attach import attach
from foveate.errors import FoveateError
from foveate.evaluation.evaluate import Result, evaluate
from foveate.inference import load_model
from foveate.world.films import write_films
from foveate.world.scenes import write_world

pytestmark = pytest.mark.skipif(
    find_spec("lmms_eval") is None, reason="lmms-eval is not installed in this environment; `make interop` builds one that has it"
)
LAYERS = 6  # of the shipped model
COUNTED = {
    "none": [64] * LAYERS,
    "fastervlm:keep=0.25": [16] * LAYERS,
    "fastv:keep=0.25,layer=2": [64, 64, 16, 16, 16, 16],
}

SCENES = """\
task: foveate_scenes
dataset_path: {folder}/scenes
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
process_results: !function utils.score
generation_kwargs: {{max_new_tokens: 8}}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
MIXED = """\
task: foveate_mixed
dataset_path: {folder}/mixed
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visuals
doc_to_text: question
doc_to_target: question
process_results: !function utils.length
generation_kwargs: {{max_new_tokens: 12, until: ["<loc"]}}
metric_list:
  - {{metric: letters, aggregation: mean, higher_is_better: true}}
"""
FILMS = """\
task: foveate_films
dataset_path: {folder}/films
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.film
doc_to_text: question
doc_to_target: answer
process_results: !function utils.score
generation_kwargs: {{max_new_tokens: 8}}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
UTILS = """\
from foveate.evaluation.metrics.scenes import RULES


def film(doc):
    return [doc["video"]]


def visual(doc):
    return [doc["image"]]


def visuals(doc):
    return list(doc["images"])


def score(doc, results):
    return {"acc": float(RULES[doc["family"]](results[0], doc["answer"]))}


def length(doc, results):
    return {"letters": len(results[0])}
"""
# Images (numbers of scenes) and question, of all lengths in no order. Without an image the model says what the stop cuts.
ASKED = [
    ([0, 1], "how many objects are there?"),
    ([], "describe the image."),
    ([2], "is there a star?"),
    ([3, 4, 5], "how many large red objects are there?"),
    ([], "what number is printed?"),
    ([6], "what colour is the circle?"),
]


@dataclass(frozen=True)
class Tasks:
    folder: Path
    world: Path

    def picture(self, number: int) -> Image.Image:
        return Image.open(self.world / "images" / "test" / f"{number:06d}.png").convert("RGB")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    """A world of twelve scenes with its questions, and requests of none, one and several images."""
    folder = tmp_path_factory.mktemp("tasks")
    found = Tasks(folder, folder / "world")
    write_world(found.world, train=0, test=12, seed=3, progress=False)
    questions = json.loads((found.world / "test.json").read_text())
    images = [{"path": str(found.world / "images" / question["image"])} for question in questions]
    columns = {name: [question[name] for question in questions] for name in ("id", "question", "answer", "family")}
    scenes = Dataset.from_dict({**columns, "image": images}, Features({**dict.fromkeys(columns, Value("string")), "image": ImageFeature()}))
    DatasetDict({"test": scenes}).save_to_disk(folder / "scenes")
    pictures = [[{"path": str(found.world / "images" / "test" / f"{number:06d}.png")} for number in numbers] for numbers, _ in ASKED]
    mixed = Dataset.from_dict(
        {"question": [text for _, text in ASKED], "images": pictures},
        Features({"question": Value("string"), "images": [ImageFeature()]}),
    )
    DatasetDict({"test": mixed}).save_to_disk(folder / "mixed")
    for name, text in (("scenes.yaml", SCENES), ("mixed.yaml", MIXED)):
        (folder / name).write_text(text.format(folder=folder))
    (folder / "utils.py").write_text(UTILS)
    return found


def command(
    folder: Path, out: Path, model: str, arguments: str, *more: str, named: str = "foveate_scenes,foveate_mixed"
) -> subprocess.CompletedProcess[str]:
    """lmms-eval on tasks of a folder, without network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "home"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", arguments, "--tasks", named]
    words += ["--include_path", str(folder), "--batch_size", "16", "--device", "cpu", "--output_path", str(out), "--log_samples", *more]
    return subprocess.run(words, env={**os.environ, **offline}, cwd=out, capture_output=True, text=True, check=False)


def own(tasks: Tasks, reducers: str) -> Result:
    """Foveate's own evaluation of the same questions."""
    return evaluate("asset:vlm", tasks.world, reducers=reducers, device="cpu", batch_size=16, progress=False)


def by_hand(tasks: Tasks, reducers: str) -> list[str]:
    """Answers to the mixed requests, one prompt at a time, written out, and not yet cut at the task's stop."""
    model, processor = load_model("asset:vlm", "cpu")
    found = []
    for numbers, text in ASKED:
        prompt = "<s><user>" + "<image>\n" * len(numbers) + text + "<assistant>"
        pictures = [tasks.picture(number) for number in numbers]
        inputs = processor(text=prompt, images=pictures or None, return_tensors="pt")
        with torch.inference_mode(), attach(model, reducers):
            ids = model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=12, eos_token_id=2, pad_token_id=0))
        found.append(processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


@pytest.mark.parametrize(
    ("model", "reduce", "reducers", "more"),
    [
        ("foveate", "", "none", ()),
        ("foveate", ",reduce=fastv:keep=0.25:layer=2", "fastv:keep=0.25,layer=2", ()),
        ("foveate_hf", ",reduce=fastervlm:keep=0.25", "fastervlm:keep=0.25", ("--force_simple",)),
    ],
)
def test_its_command_agrees_with_our_evaluation(
    tasks: Tasks, tmp_path: Path, model: str, reduce: str, reducers: str, more: tuple[str, ...]
) -> None:
    done = command(tasks.folder, tmp_path, model, f"pretrained=asset:vlm,dtype=float32{reduce}", *more)
    written = sorted(tmp_path.rglob("*_results.json"))
    assert len(written) == 1, done.stdout + done.stderr
    results = json.loads(written[0].read_text())
    samples = {
        name: [json.loads(line) for path in tmp_path.rglob(f"*_samples_{name}.jsonl") for line in path.read_text().splitlines()]
        for name in ("foveate_scenes", "foveate_mixed")
    }

    expected = own(tasks, reducers)
    assert len(expected.rows) > 100
    assert [sample["doc_id"] for sample in samples["foveate_scenes"]] == list(range(len(expected.rows)))
    asked = [(sample["input"], sample["target"]) for sample in samples["foveate_scenes"]]
    assert asked == [(row.question, row.answer) for row in expected.rows]
    assert [sample["filtered_resps"] for sample in samples["foveate_scenes"]] == [row.prediction for row in expected.rows]
    accuracy = sum(row.correct for row in expected.rows) / len(expected.rows)
    assert results["results"]["foveate_scenes"]["acc,none"] == pytest.approx(accuracy, abs=1e-12)
    assert 0.3 < accuracy < 1

    said = by_hand(tasks, reducers)
    assert any("<loc" in text for text in said)
    assert [sample["filtered_resps"] for sample in samples["foveate_mixed"]] == [text.split("<loc")[0].strip() for text in said]

    tokenizer = load_model("asset:vlm", "cpu")[1].tokenizer
    entering = COUNTED[reducers][0]
    for row, sample in zip(expected.rows, samples["foveate_scenes"], strict=True):
        words = len(tokenizer(f"<s><user>\n{row.question}<assistant>")["input_ids"])
        [counts] = sample["token_counts"]
        assert counts["input_tokens"] == words + entering
        assert 1 <= counts["output_tokens"] <= 8
    for (numbers, text), sample in zip(ASKED, samples["foveate_mixed"], strict=True):
        words = len(tokenizer("<s><user>" + "\n" * len(numbers) + text + "<assistant>")["input_ids"])
        assert sample["token_counts"][0]["input_tokens"] == words + len(numbers) * entering

    images = [1] * len(expected.rows) + [len(numbers) for numbers, _ in ASKED if numbers]
    each = sum(images) / len(images)
    assert results["throughput"]["avg_visual_tokens_first_layer"] == pytest.approx(each * entering)
    assert results["throughput"]["avg_visual_tokens_all_layers"] == pytest.approx(each * sum(COUNTED[reducers]) / LAYERS)
    simple = "--force_simple" in more
    assert ("FoveateSimple (simple)" if simple else "FoveateChat (chat)") in results["config"]["model_backend"]


@pytest.mark.parametrize("more", [(), ("--force_simple",)], ids=["chat", "simple"])
def test_its_command_asks_about_films(tmp_path: Path, more: tuple[str, ...]) -> None:
    """A model without videos is shown the frames as pictures."""
    pytest.importorskip("av")
    world = tmp_path / "world"
    write_films(world, train=0, test=6, seed=3, size=64, kind="mp4", progress=False)
    questions = json.loads((world / "test.json").read_text())
    columns = {name: [question[name] for question in questions] for name in ("id", "question", "answer", "family")}
    columns["video"] = [str(world / "clips" / question["video"]) for question in questions]
    DatasetDict({"test": Dataset.from_dict(columns)}).save_to_disk(tmp_path / "films")
    (tmp_path / "films.yaml").write_text(FILMS.format(folder=tmp_path))
    (tmp_path / "utils.py").write_text(UTILS)
    arguments = "pretrained=asset:vlm,dtype=float32,frames=uniform:frames=4,reduce=evs:keep=0.5:scope=sample"
    (tmp_path / "out").mkdir()
    done = command(tmp_path, tmp_path / "out", "foveate", arguments, *more, named="foveate_films")
    written = sorted((tmp_path / "out").rglob("*_samples_foveate_films.jsonl"))
    assert len(written) == 1, done.stdout + done.stderr
    samples = [json.loads(line) for line in written[0].read_text().splitlines()]
    expected = evaluate(
        "asset:vlm", world, reducers="evs:keep=0.5,scope=sample", frames="uniform:frames=4", device="cpu", batch_size=16, progress=False
    )
    assert [sample["filtered_resps"] for sample in samples] == [row.prediction for row in expected.rows]
    assert len(samples) > 24
    tokenizer = load_model("asset:vlm", "cpu")[1].tokenizer
    for row, sample in zip(expected.rows, samples, strict=True):
        words = len(tokenizer(f"<s><user>{4 * chr(10)}{row.question}<assistant>")["input_ids"])
        assert sample["token_counts"][0]["input_tokens"] == words + 4 * 64 // 2


def loaded(arguments: str, more: dict[str, Any]) -> Any:
    """The model as lmms-eval makes it of its command's arguments."""
    from lmms_eval.models import get_model

    return get_model("foveate").create_from_arg_string(arguments, more)


def test_its_command_says_what_is_wrong(tasks: Tasks, tmp_path: Path) -> None:
    done = command(tasks.folder, tmp_path, "foveate", "pretrained=asset:vlm,reduce=fastw:keep=0.25")
    assert "unknown reducer 'fastw' (did you mean 'fastv'?)" in done.stdout
    assert not list(tmp_path.rglob("*_results.json"))


def test_both_classes_are_registered() -> None:
    from lmms_eval.models import get_model, list_available_models

    from foveate.integrations.lmms_eval.model import FoveateChat, FoveateSimple

    assert {"foveate", "foveate_hf"} <= set(list_available_models(include_aliases=True))
    for name in ("foveate", "foveate_hf"):
        assert get_model(name) is FoveateChat
        assert get_model(name, force_simple=True) is FoveateSimple


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (
            "pretrained=asset:vlm,reduce=fastv:keep=0.25,layer=3",
            {},
            r"no argument 'layer'; known are pretrained, reduce, .* joined by colons",
        ),
        ("pretrained=asset:vlm,reducer=fastv", {}, r"no argument 'reducer' \(did you mean 'reduce'\?\)"),
        ("reduce=none", {}, "pretrained is missing"),
        ("pretrained=asset:vlm,reduce=fastv:layer=9", {}, "there is no decoder layer 9"),
        ("pretrained=asset:vlm,dtype=float31", {}, "dtype='float31' is not possible"),
        ("pretrained=asset:vlm", {"batch_size": "auto"}, "batch_size='auto' is not possible"),
        ("pretrained=/nowhere", {}, "no such model folder: /nowhere"),
    ],
)
def test_bad_arguments_are_named(arguments: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        loaded(arguments, more)


def test_what_is_not_supported_says_so() -> None:
    model = loaded("pretrained=asset:vlm", {"batch_size": "2", "device": "cpu"})
    assert model.model.dtype == torch.float16  # as the weights are saved
    with pytest.raises(NotImplementedError, match="generate_until variant"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])


def test_images_are_made_smaller_before_the_processor(tasks: Tasks) -> None:
    from lmms_eval.api.instance import Instance

    def messages(image: Image.Image) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": "is it?"}]}]

    model = loaded("pretrained=asset:vlm,dtype=float32,device_map=auto,reduce=downsample:keep=0.25", {"batch_size": "2"})
    model.task_dict = {"task": {"test": [tasks.picture(number) for number in range(3)]}}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=("is it?", messages, {"until": ["\n\n"], "max_new_tokens": 4}, number, "task", "test"),
            idx=0,
            metadata={"task": "task", "doc_id": number, "repeats": 1},
        )
        for number in range(3)
    ]
    words = len(model.processor.tokenizer("<s><user>\nis it?<assistant>")["input_ids"])
    assert [one.token_counts.input_tokens for one in model.generate_until(requests)] == [words + 16] * 3


def test_saved_reducers_are_attached(tmp_path: Path) -> None:
    model, processor = load_model("asset:vlm", "cpu")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "foveate.json").write_text(json.dumps({"reducers": [{"method": "vcc", "version": 1, "layer": 2, "stride": 4}]}))
    for more, names in (("", ["vcc"]), (",reduce=none", []), (",reduce=divprune", ["divprune"])):
        found = loaded(f"pretrained={tmp_path}{more}", {"device": "cpu"})
        assert [reducer.name for reducer in found.reducers] == names
