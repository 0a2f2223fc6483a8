"""One run at a time in an output folder, and what a folder goes on with."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from foveate import lock
from foveate.errors import FoveateError
from foveate.lock import locked
from foveate.train import files
from foveate.train.run import main
from foveate.train.trainer import FoveateTrainer
from tests.situations.runs import checkpoint, prepare, recipe, rows, same, stage, stages

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("lock"))


def enter(output: Path) -> None:
    with locked(output, PartialState(cpu=True)):
        assert (output / lock.OWNER).is_file()


def hold(output: Path, last: Callable[[], None]) -> int:
    """Another process that holds the folder and then does `last`, which never returns; its number."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            held = lock.acquire(output)
            os.write(write, b"x" if held.is_locked else b"")
            last()
        finally:
            os._exit(1)
    assert os.read(read, 1) == b"x"
    return child


def test_a_second_run_is_refused_while_the_first_lives_and_not_afterwards(root: Path) -> None:
    output = root / "held"
    child = hold(output, lambda: time.sleep(600))
    try:
        for _ in range(2):
            with pytest.raises(FoveateError, match=f"{output} is in use: process {child} on {socket.gethostname()} works there since"):
                main(recipe(root, "held"))
        assert not (output / "recipe.json").exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (output / lock.OWNER).is_file()  # it had no time to tidy up
    enter(output)
    assert not (output / lock.OWNER).exists()


def test_a_lock_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path, PartialState(cpu=True)):
        raise KeyError
    enter(tmp_path)


def test_two_runs_of_one_process(tmp_path: Path) -> None:
    with locked(tmp_path, PartialState(cpu=True)), pytest.raises(FoveateError, match=f"process {os.getpid()} "):
        enter(tmp_path)
    enter(tmp_path)


@pytest.mark.parametrize("before", [None, {"host": socket.gethostname(), "pid": 2**22 + 1, "since": "yesterday"}])
def test_a_holder_that_has_not_said_who_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, object] | None) -> None:
    """Between the lock and the note there is a moment, in which the note may still be that of a process that was killed."""
    with locked(tmp_path, PartialState(cpu=True)):
        owner = tmp_path / lock.OWNER
        said = owner.read_text()
        owner.unlink()
        if before is not None:
            owner.write_text(json.dumps(before))
            monkeypatch.setattr(lock, "ORPHANS", 0)
        monkeypatch.setattr(time, "sleep", lambda seconds: owner.write_text(said))
        with pytest.raises(FoveateError, match=f"process {os.getpid()} on"):
            enter(tmp_path)


def test_another_machine_is_respected(tmp_path: Path) -> None:
    owner = tmp_path / lock.OWNER
    owner.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "2026-01-01T00:00:00+00:00"}))
    for _ in range(2):
        with pytest.raises(FoveateError, match=f"process 7 on elsewhere .*If that run has ended, remove {owner}"):
            enter(tmp_path)
    owner.unlink()
    enter(tmp_path)


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"host": "here"}', '{"host": 1, "pid": "x", "since": 0}'])
def test_a_torn_note_of_the_owner_is_none(tmp_path: Path, torn: str) -> None:
    (tmp_path / lock.OWNER).write_text(torn)
    enter(tmp_path)


def test_workers_that_outlive_their_process_are_waited_for(tmp_path: Path) -> None:
    """Forked data workers hold the lock as well, and notice the death of their process only after a while."""

    def leave_a_worker() -> None:
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(hold(tmp_path, leave_a_worker), 0)
    begin = time.monotonic()
    enter(tmp_path)
    assert time.monotonic() - begin < lock.ORPHANS


# ---- going on ------------------------------------------------------------------------------------------------------------------------


def test_a_finished_run_goes_on_with_one_more_stage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = main(recipe(root, "both"))
    first = main(recipe(root, "grown", stages(1)))
    before = (first.parent / "0-one" / "model" / "model.safetensors").stat().st_mtime_ns
    path = recipe(root, "grown")

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FoveateTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            main(path)
    assert not files.is_complete(first)  # what was final is not any more, also for a start after that
    assert main(path) == first
    assert same(first.parent, both.parent)
    assert (first.parent / "0-one" / "model" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FoveateError, match=r"stages: \[.*before, now"):
        main(recipe(root, "grown", stages(1)))


def test_a_stage_that_has_not_begun_may_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def longer(made: dict[str, Any]) -> None:
        made["stages"][1:1] = [made["stages"][0] | {"name": "between"}]
        made["stages"][2]["steps"] = 4

    step, taken = FoveateTrainer.training_step, 0

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    whole = main(recipe(root, "longer-at-once", longer))
    with monkeypatch.context() as patch:
        patch.setattr(FoveateTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            main(recipe(root, "longer"))
    with pytest.raises(FoveateError, match=r"stages\.0\.steps: 3 before, now 2"):
        main(recipe(root, "longer", longer, stage(0, steps=2)))
    assert same(main(recipe(root, "longer", longer)).parent, whole.parent)
    with pytest.raises(FoveateError, match=r"stages\.2\.steps: 4 before, now 5"):
        main(recipe(root, "longer", longer, stage(2, steps=5)))


def test_the_data_of_a_stage_that_has_not_begun_may_change(tmp_path: Path) -> None:
    """And once it has begun it may not: the folder is bound to what was there then."""
    plain: dict[str, Any] = {"stages": [{"name": "one"}, {"name": "two"}]}
    first, other = ({"recipe": plain, "facts": {"one": {"data": "a"}, "two": {"data": data}}} for data in "bc")
    files.claim(tmp_path, first)
    (tmp_path / "0-one").mkdir()
    files.claim(tmp_path, other)
    (tmp_path / "1-two").mkdir()
    assert not files.compare(tmp_path, other)
    with pytest.raises(FoveateError, match=r'facts\.two\.data: "c" before, now "b"'):
        files.compare(tmp_path, first)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learning_rate": 0.5}, r"stages\.0\.learning_rate: 0\.01 before, now 0\.5"),
        ({"steps": 4}, r"stages\.0\.steps: 3 before, now 4"),
        ({"train": {"bridge": True, "tower": True}}, r"stages\.0\.train\.tower: false before, now true"),
    ],
)
def test_a_finished_stage_that_has_changed(root: Path, keys: dict[str, object], message: str) -> None:
    if not (root / "changed").exists():
        main(recipe(root, "changed", stages(1)))
    with pytest.raises(FoveateError, match=message):
        main(recipe(root, "changed", stage(0, **keys)))
    assert files.is_complete(root / "changed" / "final")


def test_finished_stages_are_not_needed_once_the_next_has_ended(root: Path) -> None:
    """Their models take room, and people remove them."""
    import shutil

    final = main(recipe(root, "pruned"))
    log = rows(final.parent)
    shutil.rmtree(final.parent / "0-one")
    (final / files.MARK).unlink()
    main(recipe(root, "pruned"))
    assert rows(final.parent) == log


def test_a_folder_of_something_else(root: Path) -> None:
    (root / "strange").mkdir()
    (root / "strange" / "recipe.json").write_text("[1, 2")
    with pytest.raises(FoveateError, match=r"recipe\.json is not the recipe of a run"):
        main(recipe(root, "strange"))


def test_runs_and_stages_are_checkpoints_to_start_from(root: Path) -> None:
    start = main(recipe(root, "start", stages(1))).parent
    ends = []
    for number, folder in enumerate((start, start / "final", start / "0-one")):
        ends.append(main(recipe(root, f"from-{number}", checkpoint(folder))).parent)
    assert all(same(ends[0], end) for end in ends[1:])
