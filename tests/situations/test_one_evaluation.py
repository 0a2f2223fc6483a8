"""`foveate eval` and `foveate bench` answer alike, since they are one: same questions, same loop, same scores."""

from pathlib import Path
from typing import Any

import pytest

from foveate.errors import FoveateError
from foveate.evaluation import asking
from foveate.evaluation.bench import bench, plan
from foveate.evaluation.evaluate import evaluate
from foveate.evaluation.samples import in_turn
from foveate.evaluation.table import markdown
from foveate.report.compared import lines
from tests.situations.test_export import assembled

HOW: dict[str, Any] = {"batch_size": 3, "progress": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return assembled()


@pytest.fixture(scope="module")
def found(model: Any, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    net, processor = model
    out = tmp_path_factory.mktemp("bench") / "out"
    return bench(net, [f"{world}:name=w"], ["vcc:layer=1"], [0.5], out, processor=processor, baselines=False, blind=True, **HOW)


@pytest.mark.parametrize(
    ("method", "options"),
    [("none", {"reducers": "none"}), ("blind", {"reducers": "none", "blind": True}), ("vcc:layer=1", {"reducers": "vcc:layer=1,stride=2"})],
)
def test_a_cell_holds_what_eval_says(method: str, options: dict[str, Any], model: Any, world: Path, found: Any) -> None:
    net, processor = model
    (cell,) = (cell for cell in found.cells if cell.method == method)
    result = evaluate(net, world, processor=processor, **options, **HOW)
    assert [(one.id, one.group, one.prediction) for one in cell.answers] == [(row.id, row.family, row.prediction) for row in result.rows]
    assert [one.score for one in cell.answers] == [float(row.correct) for row in result.rows]
    assert cell.accuracy == pytest.approx(100 * result.mean)
    assert all((world / "images" / row.image).is_file() for row in result.rows)
    assert result.blind == (method == "blind")
    if result.layer_tokens is not None:
        assert cell.visual_tokens == result.layer_tokens


def test_grey_pictures_are_a_row_and_no_method(found: Any) -> None:
    assert [(arm.method, arm.blind) for arm in plan([], [1], 1, baselines=False, blind=True)] == [("none", False), ("blind", True)]
    assert [(arm.method, arm.blind) for arm in plan([], [1], 1, baselines=False)] == [("none", False)]
    assert "| blind |" in markdown(found)
    _, others = lines(found, "w", {answer.group for answer in found.bare("w").answers})
    assert [line.method for line in others] == ["vcc:layer=1"]
    assert "--blind" in found.meta["command"]


@pytest.mark.parametrize("options", [{"reducers": "none"}, {"reducers": []}, {"blind": True}])
def test_the_bare_model_is_not_attached_to(options: dict[str, Any], model: Any, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a model that cannot be attached to is evaluated all the same."""

    def attach(*_: Any, **__: Any) -> Any:
        raise FoveateError("this model cannot be attached to")

    monkeypatch.setattr(asking, "attach", attach)
    net, processor = model
    result = evaluate(net, world, processor=processor, limit=3, **options, **HOW)
    assert (len(result.rows), result.layer_tokens, result.layer_ranges) == (3, None, None)
    with pytest.raises(FoveateError, match="cannot be attached to"):
        evaluate(net, world, processor=processor, reducers="vcc:layer=1", limit=3, progress=False)


@pytest.mark.parametrize(
    ("groups", "order"),
    [("aaab", [0, 3, 1, 2]), ("ab", [0, 1]), ("", []), ("abcabc", [0, 1, 2, 3, 4, 5]), ("bbaa", [0, 2, 1, 3])],
)
def test_groups_take_turns(groups: str, order: list[int]) -> None:
    assert in_turn(list(groups)) == order
