"""`foveate profile` on the shipped model: what needs no clock is exact, what does is there."""

import io
import json

import pytest
import torch
from rich.console import Console
from tests.command import refused

from foveate.cli import main
from foveate.errors import FoveateError
from foveate.inference import load_model
from foveate.inspect.look import open_image
from foveate.inspect.profile import TIMES, Profile, print_profiles, profile

REDUCERS = ["random:keep=0.25", "fastv:keep=0.5,layer=3"]


@pytest.fixture(scope="module")
def profiles() -> list[Profile]:
    torch.set_num_threads(1)
    model, processor = load_model("asset:vlm")
    model.generate(**processor(images=[open_image("scene:7")], text=["<image>"], return_tensors="pt"), max_new_tokens=1)
    before = hooks(model)  # with those that the library puts there at the first pass
    found = profile(model, processor, REDUCERS, ["scene:7"], "how many objects are there?", new_tokens=3, repeats=2)
    assert hooks(model) == before
    return found


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_bare_model_comes_first_and_everything_predicted_is_measured(profiles: list[Profile]) -> None:
    assert [p.reducers for p in profiles] == ["none", "random", "fastv:layer=3"]
    assert [p.visual_tokens for p in profiles] == [[64] * 6, [16] * 6, [64] * 3 + [32] * 3]
    for one in profiles:
        assert one.predicted_tokens == one.visual_tokens
        assert one.predicted_kv_bytes == one.kv_bytes
        for part, flops in one.predicted.items():
            assert flops == one.counted[part], part
    assert [one.counted["other"] for one in profiles] == [0, 0, 0]
    assert profiles[0].counted["scores"] == profiles[1].counted["scores"] == 0
    assert profiles[2].counted["scores"] > 0  # one row of attention


def test_every_time_has_a_median_within_its_range(profiles: list[Profile]) -> None:
    for one in profiles:
        assert set(one.seconds) == set(TIMES)
        for middle, low, high in (*one.seconds.values(), one.tokens_per_second):
            assert 0 < low <= middle <= high
        assert one.first_token == pytest.approx(sum(one.seconds[name][0] for name in TIMES[:-1]))


def test_the_table_shows_one_number_where_both_are_the_same(profiles: list[Profile]) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    print_profiles("asset:vlm", {"tower": 1, "bridge": 2, "lm": 3}, profiles, console)
    text = console.export_text()
    line = next(line for line in text.splitlines() if "last layer" in line)
    assert [cell.strip() for cell in line.strip("│ ").split("│")][1:] == ["64", "16", "32"]
    line = next(line for line in text.splitlines() if "FLOPs, scores" in line)
    assert [cell.strip() for cell in line.strip("│ ").split("│")][1:] == ["0", "0", f"{profiles[2].counted['scores'] / 1e3:.2f} k"]
    assert "– | 0" in next(line for line in text.splitlines() if "FLOPs, other" in line)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["profile", "asset:vlm", "--reduce", "random:keep=0.5", "--json", "--repeats", "1", "--new-tokens", "2"])
    assert not end.value.code
    read = json.loads(capsys.readouterr().out)
    assert read["profiles"][1]["visual_tokens"] == [32] * 6
    assert read["parameters"]["lm"] > read["parameters"]["tower"] > read["parameters"]["bridge"] > 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["asset:vlm", "--reduce", "fastv:kep=0.5"], "did you mean 'keep'"),
        (["asset:vlm", "--image", "no-such.png"], "no-such.png"),
        (["no/such/model"], "no such model folder"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(["profile", *argv], capsys)


def test_impossible_settings() -> None:
    with pytest.raises(FoveateError, match="at least 2 tokens"):
        profile(None, None, [], ["scene:7"], "?", new_tokens=1, repeats=1)
    with pytest.raises(FoveateError, match="at least one image"):
        profile(None, None, [], [], "?", new_tokens=2, repeats=1)
