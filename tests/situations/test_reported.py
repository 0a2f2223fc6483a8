"""What commands say of a run: numbers of all of it, and a sentence where there is nothing to show."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from foveate.errors import FoveateError
from foveate.evaluation import asking
from foveate.evaluation.bench import bench
from foveate.evaluation.evaluate import Result, evaluate, print_result
from foveate.evaluation.table import markdown, print_table
from foveate.inference import Answers
from foveate.inspect.look import look
from foveate.inspect.profile import print_profiles, profile
from foveate.search.run import search
from tests.conformance.family import picture
from tests.situations.test_export import assembled


@pytest.fixture(scope="module")
def model() -> Any:
    return assembled()


def printed(show: Any, *given: Any) -> str:
    out = StringIO()
    show(*given, Console(file=out, width=200))
    return out.getvalue()


# ---- tokens of all batches


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_tokens_are_of_all_questions_whatever_the_batches(
    batch_size: int, model: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where images have tokens by their size: of five questions the first has 10, the last 50."""
    counts = iter([10, 20, 30, 40, 50])

    def unknown(*_: Any, **__: Any) -> None:
        raise FoveateError("what this costs is not known")

    last = SimpleNamespace(layouts=[], visual_tokens=[], ledger=unknown)
    run = SimpleNamespace(last=last, passes=[], config=None, anatomy=SimpleNamespace(layers=[None] * 3))

    def ask(model: Any, processor: Any, images: Any, owners: Any, texts: Any, new: int, clips: Any) -> Answers:
        own = [next(counts) for _ in texts]
        visual = torch.arange(60) < torch.tensor(own)[:, None]
        run.last.layouts = [SimpleNamespace(visual=visual), SimpleNamespace(visual=visual[:, ::2]), SimpleNamespace(visual=visual[:, :10])]
        run.passes.append(run.last)
        return Answers(["yes"] * len(texts), own, [60] * len(texts))

    @contextmanager
    def attach(*_: Any, **__: Any) -> Iterator[Any]:
        yield run

    monkeypatch.setattr(asking, "ask", ask)
    monkeypatch.setattr(asking, "attach", attach)
    net, processor = model
    how: dict[str, Any] = {"processor": processor, "reducers": "vcc:layer=1,stride=2", "limit": 5, "progress": False}
    result = evaluate(net, world, batch_size=batch_size, **how)
    assert (result.visual_tokens, result.visual_range) == (30, (10, 50))
    assert result.layer_tokens == [30, 15, 10]
    assert result.layer_ranges == [(10, 50), (5, 25), (10, 10)]
    text = printed(print_result, result)
    assert "30 (10 to 50) visual tokens per image" in text
    assert "through the layers: 30 (10 to 50) x1, 15 (5 to 25) x1, 10 x1" in text
    result.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == result


@pytest.mark.parametrize(("reducers", "layers"), [("none", None), ("vcc:layer=1,stride=2", [16, 8, 8]), ("random:keep=4", [4, 4, 4])])
def test_where_all_images_have_as_many_it_is_said_once(reducers: str, layers: Any, model: Any, world: Path) -> None:
    net, processor = model
    how: dict[str, Any] = {"processor": processor, "limit": 5, "batch_size": 2, "max_new_tokens": 1, "progress": False}
    result = evaluate(net, world, reducers=reducers, **how)
    assert (result.visual_tokens, result.visual_range, result.layer_tokens) == (16, (16, 16), layers)
    text = printed(print_result, result)
    assert "16 visual tokens per image" in text
    assert ("through the layers: " in text) == (layers is not None)


def test_results_from_before_are_read(model: Any, world: Path, tmp_path: Path) -> None:
    net, processor = model
    evaluate(net, world, processor=processor, limit=2, max_new_tokens=1, progress=False).save(tmp_path / "new.json")
    old = json.loads((tmp_path / "new.json").read_text())
    del old["visual_range"], old["layer_ranges"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    read = Result.load(tmp_path / "old.json")
    assert read.visual_range is None
    assert "16 visual tokens per image" in printed(print_result, read)


# ---- nothing to show


@pytest.mark.parametrize("keep", [[1.0], [0.5], [1.0, 0.25]])
def test_a_bench_without_methods_says_so(keep: list[float], model: Any, world: Path, tmp_path: Path) -> None:
    net, processor = model
    found = bench(net, [f"{world}:limit=2,max_new_tokens=1"], [], keep, tmp_path, processor=processor, baselines=False, progress=False)
    for text in (printed(print_table, found), markdown(found)):
        assert "The bare model alone: there is no method to compare it with" in " ".join(text.split())
        assert "visual tokens" in text
        assert "| method |" not in text


def test_a_profile_without_methods_says_so(model: Any) -> None:
    net, processor = model
    say = "The bare model alone: name methods to compare it with, such as --reduce"
    alone = profile(net, processor, [], ["scene:1"], "what?", new_tokens=2, repeats=1)
    assert say in printed(print_profiles, "m", {"lm": 1}, alone)
    both = profile(net, processor, ["random:keep=0.5"], ["scene:1"], "what?", new_tokens=2, repeats=1)
    assert say not in printed(print_profiles, "m", {"lm": 1}, both)


# ---- pictures of what has no place


@pytest.mark.parametrize(
    "bridge",
    [
        {"kind": "chain_of_sight", "scales": [[4, 4], [2, 1]]},
        {"kind": "chain_of_sight", "scales": [[2, 2]]},
        {"kind": "resampler", "queries": 4},
    ],
)
def test_look_says_why_resampled_tokens_are_not_drawn(bridge: dict[str, Any]) -> None:
    net, processor = assembled(bridge=bridge)
    with pytest.raises(FoveateError, match=rf"the {bridge['kind']} bridge makes its tokens by learned queries .*foveate profile counts it"):
        look(net, [picture((32, 32), 1)], "what?", ["random:keep=0.5"], processor=processor, max_new_tokens=1)


@pytest.mark.parametrize("bridge", [{"kind": "mlp"}, {"kind": "pixel_shuffle"}, {"kind": "avg_pool2d"}])
def test_look_draws_those_that_have_a_place(bridge: dict[str, Any]) -> None:
    net, processor = assembled(bridge=bridge)
    figure = look(net, [picture((32, 32), 1)], "what?", ["random:keep=0.5"], processor=processor, max_new_tokens=1)
    assert len(figure.axes) >= 2


# ---- a model alone


@pytest.mark.parametrize("name", ["evaluate", "bench", "search", "look"])
def test_who_gives_a_model_alone_is_told_how_to_give_both(name: str, model: Any, world: Path, tmp_path: Path) -> None:
    tasks, alone = [f"{world}:name=w"], model[0]
    calls: dict[str, Callable[[], Any]] = {
        "evaluate": lambda: evaluate(alone, world),
        "bench": lambda: bench(alone, tasks, [], [], tmp_path / "out"),
        "search": lambda: search(alone, tasks, tmp_path / "out", loss=1.0),
        "look": lambda: look(alone, [picture((32, 32), 0)], "what?", ["random"]),
    }
    with pytest.raises(FoveateError, match=rf"^{name} needs the processor of a model that is already loaded: {name}\(.*, processor="):
        calls[name]()
    assert not (tmp_path / "out").exists()
