"""Batch jobs: nothing is lost, nothing comes twice, everything stands in order; whoever works, however often it is killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import foveate
from foveate import files
from foveate.batch import Embeddings, Job, answering, encode, generate, parts, told
from foveate.batch.questions import Questions
from foveate.errors import FoveateError
from foveate.evaluation.evaluate import evaluate
from foveate.inference import load_model, model_inputs, prompts
from foveate.reducers.exporting import Reduced
from foveate.world.scenes import write_world
from tests.command import refused
from tests.train.processes import dying, in_two, started

MODEL, REDUCER, ROWS, BATCH, NEW = "asset:vlm", "divprune:keep=0.25", 20, 4, 8

Row = dict[str, Any]


def without(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is not None, reason=f"{package} is installed in this environment")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty questions about two of three pictures."""
    folder = tmp_path_factory.mktemp("jobs")
    write_world(folder / "world", train=0, test=3, seed=0, progress=False)
    rows = json.loads((folder / "world" / "test.json").read_text())[:ROWS]
    (folder / "world" / "test.json").write_text(json.dumps(rows))
    return folder / "world"


@pytest.fixture(scope="module")
def answers(world: Path) -> list[Row]:
    done = generate(job(world / "test.json"), world.parent / "whole", progress=False)
    assert done is not None
    return lines(done.path)


def job(data: Path, **options: Any) -> Job:
    return Job(str(data), **{"model": MODEL, "reducers": REDUCER, "max_new_tokens": NEW, "batch_size": BATCH, **options})


def lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def written(world: Path, rows: Any, name: str = "rows.json") -> Path:
    (world / name).write_text(json.dumps(rows))
    return world / name


def test_answers_are_those_of_an_evaluation_in_order(world: Path, answers: list[Row]) -> None:
    found = evaluate(MODEL, world, reducers=REDUCER, batch_size=7, progress=False)
    assert [(row["row"], row["id"], row["answer"]) for row in answers] == [
        (number, row.id, row.prediction) for number, row in enumerate(found.rows)
    ]


def test_rows_that_cannot_be_asked_are_counted_and_spoil_no_other(world: Path, tmp_path: Path, answers: list[Row]) -> None:
    torn = world / "images" / "torn.png"
    torn.write_bytes((world / "images" / "test" / "000000.png").read_bytes()[:100])
    good = json.loads((world / "test.json").read_text())[: 2 * BATCH]
    bad = [
        ({"image": "torn.png", "question": "what?"}, "cannot be decoded"),
        ({"image": "none.png", "question": "what?"}, "is missing"),
        ({"image": "torn.png"}, "has neither conversations nor a question"),
        ({"image": "torn.png", "question": "<image> <image>"}, "has 1 images but 2 <image> markers"),
        ({"video": "a.mp4", "question": "what?"}, "it is missing: there is no"),
        ({"image": "test/000000.png", "conversations": [{"from": "gpt", "value": "a"}]}, "human and gpt must take turns"),
        ("what?", "is no object"),
    ]
    places = (0, 3, 4, 5, 6, 9, 14)  # where they stand in the file
    mixed: list[Any] = list(good)
    for at, (row, _) in zip(places, bad, strict=True):
        mixed.insert(at, row)
    done = generate(job(written(world, mixed)), tmp_path / "out", progress=False)
    assert done is not None
    rows = lines(done.path)
    assert [row["row"] for row in rows] == list(range(len(mixed)))
    assert [number for number, row in enumerate(rows) if "error" in row] == list(places)
    assert all(reason in rows[at]["error"] for at, (_, reason) in zip(places, bad, strict=True))
    assert [row["answer"] for row in rows if "answer" in row] == [row["answer"] for row in answers[: 2 * BATCH]]
    assert done.failed[0] == ("row 0", rows[0]["error"])
    assert told(done).splitlines()[0].endswith(f"{len(mixed)} rows, 7 failed")
    assert told(done).splitlines()[-1] == "  and 2 more"


def test_the_last_question_of_a_conversation_is_asked_after_the_turns_before_it(world: Path) -> None:
    turns = [("human", "<image>\nis it red?"), ("gpt", "no"), ("human", "is it blue?"), ("gpt", "yes")]
    rows = [{"image": "test/000000.png", "conversations": [{"from": who, "value": said} for who, said in turns[:n]]} for n in (2, 3, 4)]
    questions = Questions(written(world, rows))
    assert questions.folder == world / "images"
    asked = [questions[number].turns for number in range(3)]
    assert asked == [[("user", turns[0][1])], *[[("user", turns[0][1]), ("assistant", "no"), ("user", "is it blue?")]] * 2]


def test_a_kill_loses_nothing_and_nothing_is_asked_twice(
    world: Path, tmp_path: Path, answers: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    child = started(tmp_path / "said.txt", killed_after, 2, job(world / "test.json"), out)
    child.join(600)
    left = len(list(out.glob("parts/*.jsonl")))
    assert (child.exitcode, left) == (-signal.SIGKILL, 2), (tmp_path / "said.txt").read_text()
    assert not (out / "answers.jsonl").exists()
    asked = noted(monkeypatch)
    done = generate(job(world / "test.json"), out, progress=False)
    assert done is not None
    assert asked == list(range(left * BATCH, ROWS))
    assert lines(done.path) == answers
    assert not (out / "parts").exists()
    again = generate(job(world / "test.json"), out, progress=False)
    assert again == done
    assert len(asked) == ROWS - left * BATCH


def killed_after(count: int, own: Job, out: Path) -> None:
    """Works on a job and is killed, -9, as it has written `count` parts."""
    setattr(parts, "write", dying(lambda: len(list(out.glob("parts/*.jsonl"))) == count, files.write))  # noqa: B010
    generate(own, out, progress=False)


def noted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that a model is asked from now on."""
    asked: list[int] = []
    said = answering.Attached.said

    def watched(self: Any, given: Any) -> Any:
        asked.extend(prompt.row for prompt in given)
        return said(self, given)

    monkeypatch.setattr(answering.Attached, "said", watched)
    return asked


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"reducers": "none"}, "reducers (there divprune:keep=0.25, now none)"),
        ({"batch_size": 5}, "batch_size (there 4, now 5)"),
        ({"dtype": "bfloat16", "max_new_tokens": 3}, "dtype (there float32, now bfloat16); another max_new_tokens (there 8, now 3)"),
    ],
)
def test_a_folder_goes_on_with_its_own_job_alone(world: Path, answers: list[Row], options: dict[str, Any], what: str) -> None:
    with pytest.raises(FoveateError) as refusal:
        generate(job(world / "test.json", **options), world.parent / "whole", progress=False)
    assert f"holds a job with another {what}. Choose another folder with --out" in str(refusal.value)
    assert lines(world.parent / "whole" / "answers.jsonl") == answers


@pytest.mark.parametrize("raised", [ValueError("no such size"), ZeroDivisionError("division by zero"), IndexError("of a tile")])
def test_what_a_model_does_not_take_is_found_out_row_by_row(
    world: Path, tmp_path: Path, answers: list[Row], monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    said = answering.Attached.said

    def picky(self: Any, given: Any) -> Any:
        if any(prompt.row == 2 for prompt in given):
            raise raised
        return said(self, given)

    monkeypatch.setattr(answering.Attached, "said", picky)
    data = written(world, json.loads((world / "test.json").read_text())[:BATCH], "few.json")
    done = generate(job(data), tmp_path / "out", progress=False)
    assert done is not None
    assert done.failed == [(answers[2]["id"], f"{type(raised).__name__}: {raised}")]
    assert [row["answer"] for row in lines(done.path) if row["row"] != 2] == [row["answer"] for row in answers[:BATCH] if row["row"] != 2]


def test_a_job_that_can_do_nothing_stops(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, given: Any) -> Any:
        raise ValueError("no such model")

    monkeypatch.setattr(answering.Attached, "said", broken)
    with pytest.raises(FoveateError, match="none of 4 rows could be done; the first: ValueError: no such model"):
        generate(job(world / "test.json"), tmp_path, progress=False)


def test_two_processes_are_one(world: Path, answers: list[Row]) -> None:
    """They go on where one was, and share what it has left."""
    out = world.parent / "two"
    (out / "parts").mkdir(parents=True)
    (out / "job.json").write_text((world.parent / "whole" / "job.json").read_text())
    (out / "parts" / "000001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers[BATCH : 2 * BATCH]))
    in_two(
        world.parent,
        "import json, os",
        "from foveate.batch import Job, answering, generate",
        "said = answering.Attached.said",
        "def noted(self, given):",
        f"    with open({str(world.parent)!r} + '/asked' + os.environ['RANK'], 'a') as file:",
        "        file.writelines(f'{prompt.row}\\n' for prompt in given)",
        "    return said(self, given)",
        "answering.Attached.said = noted",
        f"generate({job(world / 'test.json')!r}, {str(out)!r})",
    )
    assert lines(out / "answers.jsonl") == answers
    asked = [sorted(map(int, (world.parent / f"asked{rank}").read_text().split())) for rank in (0, 1)]
    assert sorted(asked[0] + asked[1]) == [row for row in range(ROWS) if row // BATCH != 1]
    assert all(asked)


# ---- embeddings ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reducer", [REDUCER, "random:keep=0.25", "tome:keep=0.5"])
def test_embeddings_are_what_enters_the_language_model_under_attach(world: Path, tmp_path: Path, reducer: str) -> None:
    done = encode(job(world / "test.json", reducers=reducer), tmp_path / "out", progress=False)
    assert done is not None
    assert (done.rows, done.images, done.failed) == (ROWS, 2, [])
    found = Embeddings(tmp_path / "out")
    model, processor = load_model(MODEL)
    states: list[torch.Tensor] = []
    run = foveate.attach(model, reducer)
    run.anatomy.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: states.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    questions = Questions(world / "test.json")
    for row in (0, ROWS - 1):
        image = foveate.data.pixels.open_image(questions[row].pictures[0])
        with torch.inference_mode():
            model(**model_inputs(processor, [[image]], prompts(processor, ["what?"])))
        (left,) = found[row]
        entered, now = run.last.entered, run.last.layouts[0]
        assert torch.equal(entered.place[entered.visual][left.kept, 1:], now.place[now.visual][:, 1:])
        torch.testing.assert_close(left.embeddings, states.pop()[now.visual])
        kept = reducer.startswith("random")
        assert left.positions.tolist() == (left.kept.tolist() if kept else list(range(len(left.kept))))
    assert done.kept == sum(image["kept"] for image in found.images.values()) < done.tokens


def test_embeddings_go_on_after_an_interruption_and_name_what_failed(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": f"test/00000{n}.png", "question": "what?"} for n in (0, 1, 2)]
    rows[1:1] = [{"image": "none.png", "question": "what?"}, {"question": "what?"}]
    own = job(written(world, rows, "pictures.json"), batch_size=2)
    encode(own, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(parts, "write", interrupted(files.write))
        with pytest.raises(KeyboardInterrupt):
            encode(own, tmp_path / "out", progress=False)
    with pytest.raises(FoveateError, match="holds no embeddings"):
        Embeddings(tmp_path / "out")
    done = encode(own, tmp_path / "out", progress=False)
    assert done is not None
    assert [name for name, _ in done.failed] == ["row 1"]
    for path in (tmp_path / "whole" / "shards").iterdir():
        a, b = load_file(path), load_file(tmp_path / "out" / "shards" / path.name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    found = Embeddings(tmp_path / "out")
    assert [len(found[row]) for row in (0, 2, 3, 4)] == [1, 0, 1, 1]
    assert isinstance(found[0][0], Reduced)
    with pytest.raises(FoveateError, match="row 1: cannot read the image"):
        found[1]


def interrupted(write: Callable[..., None]) -> Callable[..., None]:
    def once(path: Path, content: bytes) -> None:
        if path.name.startswith("000001"):
            raise KeyboardInterrupt
        write(path, content)

    return once


@pytest.mark.parametrize(
    ("reducer", "reason"),
    [
        ("fastv:keep=0.25", "it acts in the LM; the nearest that it can run is "),
        ("cdpruner:keep=0.25", "it looks at the question; the nearest that it can run is "),
        ("none", "runs one reducer, and 'none' names 0"),
    ],
)
def test_what_cannot_be_exported_is_not_encoded(world: Path, tmp_path: Path, reducer: str, reason: str) -> None:
    with pytest.raises(FoveateError, match="foveate encode") as refusal:
        encode(job(world / "test.json", reducers=reducer), tmp_path / "out")
    assert reason in str(refusal.value)
    assert not (tmp_path / "out").exists()


# ---- the command line ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "rey"], "engine=rey is not known (did you mean 'ray'?)"),
        (["--engine", "vllm", "--engine-options", "{1"], "--engine-options '{1' is not JSON"),
        (["--engine", "vllm", "--engine-options", "[1]"], "--engine-options '[1]' must be an object"),
        (["--workers", "2"], "workers are of the engine ray"),
        (["--images", "nowhere"], "nowhere does not exist"),
        (["--dtype", "int8"], "dtype=int8 is not possible; choose one of float32, bfloat16, float16"),
        (["--reduce", "divprun"], "divprun"),
        pytest.param(["--engine", "ray"], 'pip install "foveate[ray]"', marks=without("ray")),
        pytest.param(["--engine", "vllm"], "pip install vllm", marks=without("vllm")),
    ],
)
def test_bad_input_is_one_message(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    given = ["generate", str(world / "test.json"), "--model", MODEL, "--out", str(tmp_path / "out"), *options]
    assert message in refused(given, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("gone.json", None, "cannot be read"), ("text.json", "what?", "is not JSON"), ("empty.json", "[]", "is empty")],
)
def test_data_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    for command in ("generate", "encode"):
        given = [command, str(tmp_path / name), "--model", MODEL, "--reduce", REDUCER, "--out", str(tmp_path / "out")]
        assert message in refused(given, capsys)
