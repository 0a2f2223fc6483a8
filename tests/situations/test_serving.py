"""Serving where vLLM is not: models that would not hear of the setting, and tasks that an engine answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor

from foveate.batch import OnVLLM, tasks_on_vllm
from foveate.errors import FoveateError
from foveate.evaluation.asking import Answered, Asked, Engine
from foveate.evaluation.bench import bench
from foveate.inference import Said
from foveate.integrations.vllm import ARCHITECTURES, register, setting
from foveate.reducers import Reducer
from foveate.world import resolve
from tests.command import refused

without_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")

# ---- a model that would not hear of the setting ------------------------------------------------------------------------------------------


class Checks:
    """Stands for what vLLM checks of a configuration."""

    seen: list[str] = []

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        Checks.seen.append("base")


class Own(Checks):
    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        Checks.seen.append("own")


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The checks by architecture, after the plug-in was registered (twice, as may happen) with a vLLM of these models."""
    known: dict[str, Any] = {"OwnVLModel": Own, "LlavaForConditionalGeneration": Own}
    names = [*ARCHITECTURES, "OwnVLModel", "PlainVLModel"]
    registry = SimpleNamespace(register_model=lambda name, where: None, get_supported_archs=lambda: dict.fromkeys(names).keys())
    fakes: dict[str, Any] = {"vllm": ModuleType("vllm"), "vllm.model_executor.models.config": ModuleType("config")}
    fakes["vllm"].ModelRegistry = registry
    fakes["vllm.model_executor.models.config"].__dict__.update(MODELS_CONFIG_MAP=known, VerifyAndUpdateConfig=Checks)
    for name in ("vllm.model_executor", "vllm.model_executor.models"):
        fakes[name] = ModuleType(name)
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "foveate.integrations.vllm.unknown", raising=False)
    monkeypatch.setattr(setting, "installed", lambda: ("vllm", "0.32.0"))
    monkeypatch.setattr(Checks, "seen", [])
    register()
    register()
    yield known
    sys.modules.pop("foveate.integrations.vllm.unknown", None)  # it holds these fakes


@pytest.mark.parametrize(("name", "own"), [("OwnVLModel", "own"), ("PlainVLModel", "base")])
def test_a_model_that_is_not_known_refuses_the_setting_and_else_checks_as_before(checks: dict[str, Any], name: str, own: str) -> None:
    for config in (SimpleNamespace(), SimpleNamespace(foveate="none")):
        checks[name].verify_and_update_model_config(SimpleNamespace(architecture=name, hf_config=config))
    assert Checks.seen == [own, own]
    told = SimpleNamespace(architecture=name, hf_config=SimpleNamespace(foveate="divprune:keep=0.25"))
    with pytest.raises(FoveateError, match=rf"^'divprune:keep=0.25' would have no effect: vLLM serves this model as {name}, which"):
        checks[name].verify_and_update_model_config(told)


def test_models_that_are_known_are_left_to_themselves(checks: dict[str, Any]) -> None:
    assert checks["LlavaForConditionalGeneration"] is Own
    assert checks.keys() - {"OwnVLModel", "PlainVLModel"} == {"LlavaForConditionalGeneration"}


@pytest.mark.parametrize(("spelling", "words"), [("fastv", "acts in the LM"), (3, "is no reducer"), ("divprun", "unknown reducer")])
def test_a_wrong_setting_is_told_before_the_model(checks: dict[str, Any], spelling: Any, words: str) -> None:
    with pytest.raises(FoveateError, match=words):
        setting.refuse_unknown("PlainVLModel", SimpleNamespace(foveate=spelling))


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(resolve("asset:vlm"))


# ---- tasks -------------------------------------------------------------------------------------------------------------------------------


class Parrot(Engine):
    """Answers with the reducer's name; runs no DivPrune."""

    name, model, dtype, device, told = "parrot", "asset:vlm", "int4", "tpu", ("--engine", "parrot")

    def __init__(self, processor: Any) -> None:
        self.processor, self.closed, self.asked = processor, 0, 0

    def check(self, reducers: Sequence[Reducer], cache: Any) -> None:
        if any(reducer.name == "divprune" for reducer in reducers):
            raise FoveateError("a parrot cannot prune")

    def answered(self, asked: Asked, reducers: Sequence[Reducer], tell: Callable[[int], None], *, cache: Any, blind: bool) -> Answered:
        self.asked += 1
        count = len(asked.task.samples)
        return Answered([str(reducer) for reducer in reducers] * count or ["yes"] * count, totals=[[4 * count] * 2], ledgers=[None])

    def close(self) -> None:
        self.closed += 1


def task(folder: Path, images: Sequence[Sequence[str]] = (("a.png",), ("a.png",))) -> str:
    for name in {name for own in images for name in own}:
        Image.new("RGB", (32, 24), (len(name), 9, 9)).save(folder / name)
    rows = [{"images": list(own), "question": f"what {number}", "answers": ["yes"]} for number, own in enumerate(images)]
    (folder / "data.json").write_text(json.dumps(rows))
    return f"{folder / 'data.json'}:metric=exact,images={folder},max_new_tokens=3"


def test_an_engine_answers_in_the_place_of_a_model(processor: Any, tmp_path: Path) -> None:
    engine = Parrot(processor)
    how: dict[str, Any] = {"baselines": False, "progress": False}
    for _ in range(2):
        found = bench(engine, [task(tmp_path)], ["uniform"], [0.5], tmp_path / "out", **how)
    assert [cell.answers[0].prediction for cell in found.cells] == ["yes", "uniform:keep=0.5"]
    assert (found.cells[0].visual_tokens, found.cells[0].flops) == ([4.0, 4.0], {})
    assert (engine.asked, engine.closed) == (2, 2)
    assert {found.meta[name] for name in ("engine", "dtype", "device")} == {"parrot", "int4", "tpu"}
    assert found.meta["command"].endswith("--no-baselines --engine parrot")
    with pytest.raises(FoveateError, match=r"another engine \(there parrot, now transformers\)"):
        bench("asset:vlm", [task(tmp_path)], ["uniform"], [0.5], tmp_path / "out", **how)


@pytest.mark.parametrize(
    ("reducers", "options", "words"),
    [
        (["uniform", "divprune"], {}, "a parrot cannot prune"),
        (["uniform"], {"tiling": "anyres"}, "leave them out beside the engine parrot"),
        (["uniform"], {"dtype": "bfloat16"}, "leave them out beside the engine parrot"),
        (["uniform"], {"processor": 1}, "leave them out beside the engine parrot"),
    ],
)
def test_what_an_engine_cannot_do_is_told_before_anything_is_read(
    processor: Any, tmp_path: Path, reducers: list[str], options: dict[str, Any], words: str
) -> None:
    engine = Parrot(processor)
    with pytest.raises(FoveateError, match=words):
        bench(engine, ["nowhere.json:metric=exact"], reducers, [0.5], tmp_path / "out", progress=False, **options)
    assert engine.asked == 0
    assert not (tmp_path / "out").exists()


@dataclass
class Recorded:
    """Stands for vLLM: notes which engines were started and what was asked of them. `left`: image tokens of a prompt, by its setting."""

    processor: Any
    told: list[Any] = field(default_factory=list)
    broken: BaseException | None = None

    def __call__(self, model: str, options: Any) -> Recorded:
        self.options = options
        return self

    @property
    def config(self) -> Any:
        return SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=3))

    def start(self, reducers: Sequence[Reducer], dtype: str) -> None:
        self.told.append(["start", *map(str, reducers)])

    def stop(self) -> None:
        self.told.append(["stop"])

    def said(self, texts: Sequence[str], images: Sequence[Any], new: int, given: Any) -> list[Any]:
        if self.broken is not None:
            raise self.broken
        self.told.append([len(texts), given, *[image.size for own in images for image in own]])
        token = self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
        return [(Said("yes", 1, False), [1, *[token] * (5 * len(own)), 2]) for own in images]


@pytest.fixture
def vllm(processor: Any, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    made = Recorded(processor)
    monkeypatch.setitem(sys.modules, "foveate.batch.on_vllm", SimpleNamespace(Model=made))
    monkeypatch.setattr(tasks_on_vllm, "check_installed", lambda engine: None)
    return made


def test_an_engine_is_started_anew_only_where_it_has_to_be(vllm: Recorded, tmp_path: Path) -> None:
    engine = OnVLLM("asset:vlm", {"max_model_len": 64, "dtype": "bfloat16"})
    assert (vllm.options, engine.dtype) == ({"max_model_len": 64}, "bfloat16")
    assert list(engine.told) == ["--engine", "vllm", "--engine-options", '{"max_model_len": 64, "dtype": "bfloat16"}']
    spec = task(tmp_path, [("a.png",), ("a.png", "bb.png"), ()])
    found = bench(
        engine, [spec], ["divprune", "tome", "fastervlm", "random"], [0.5], tmp_path / "out", seeds=1, baselines=False, progress=False
    )
    sizes = [(32, 24)] * 3
    seeing, blind = [2, {}, *sizes], [1, {}]
    assert vllm.told == [
        *(["start"], blind, seeing),
        *(["start", "divprune:keep=0.5"], blind, seeing),
        *([1, {"foveate": "tome:keep=0.5"}], [2, {"foveate": "tome:keep=0.5"}, *sizes]),
        *(["start", "fastervlm:keep=0.5"], blind, seeing),  # other scores of the tower
        *(["start", "random:keep=0.5"], blind, seeing),  # other positions
        ["stop"],
    ]
    assert {tuple(cell.visual_tokens) for cell in found.cells} == {(5.0, 5.0, 5.0)}


def test_vllm_at_fault_ends_the_run_and_a_method_at_fault_its_cell(vllm: Recorded, tmp_path: Path) -> None:
    given: dict[str, Any] = {"tasks": [task(tmp_path)], "reducers": ["divprune"], "keep": [0.5]}
    vllm.broken = ValueError("the prompt is too long")
    with pytest.raises(FoveateError, match="data, none: vLLM does not answer: the prompt is too long"):
        bench(OnVLLM("asset:vlm"), **given, out=tmp_path / "out", baselines=False, progress=False)
    assert vllm.told[-1] == ["stop"]
    asked = Asked.of(vllm.processor, bench_task(tmp_path), 4)
    vllm.broken = setting.RequestError("no room")
    with pytest.raises(FoveateError, match=r"^no room$"):
        OnVLLM("asset:vlm").answered(asked, [], print, cache=None, blind=False)


def bench_task(folder: Path) -> Any:
    from foveate.evaluation.tasks import load_task

    return load_task(task(folder), False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "vlm"], "engine=vlm is not known (did you mean 'vllm'?)"),
        (["--engine", "ray"], "engine=ray is not known; choose transformers or vllm"),
        (["--engine-options", "{}"], "engine options are of the engine vllm"),
        (["--engine", "vllm", "--engine-options", "{1"], "--engine-options '{1' is not JSON"),
        pytest.param(["--engine", "vllm"], "pip install vllm", marks=without_vllm),
    ],
)
def test_bad_input_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    given = ["bench", "asset:vlm", "--tasks", "scenes", "--out", str(tmp_path / "out"), *options]
    assert message in refused(given, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "words"), [("fastv", "acts in the LM"), ("cdpruner", "looks at the question"), ("visionselector", "weights of its own")]
)
def test_a_method_that_cannot_be_served_is_told_at_once(vllm: Recorded, tmp_path: Path, method: str, words: str) -> None:
    with pytest.raises(FoveateError, match=f"vLLM cannot run '{method}.*{words}.*; the nearest that it can run is"):
        bench(OnVLLM("asset:vlm"), [task(tmp_path)], [method], [0.5], tmp_path / "out", progress=False)
    assert vllm.told == []


def test_cache_policies_are_of_transformers(vllm: Recorded, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"snapkv.* thins a cache of transformers, and vLLM has one of its own"):
        bench(OnVLLM("asset:vlm"), [task(tmp_path)], [], [0.5], tmp_path / "out", cache=["snapkv"], progress=False)
    assert vllm.told == []
