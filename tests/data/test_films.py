"""Scenes that move: what happens, the questions and the files. Answers are checked by an oracle of its own, from what is seen alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate.cli import main
from foveate.data.clips import open_clip
from foveate.errors import FoveateError
from foveate.world.films import world_clip, write_films
from foveate.world.happenings import HAPPENINGS, Happening, account, happenings
from foveate.world.moving import FRAMES, LEAST, MovingScene, moving_scene
from foveate.world.pictures import SHAPES, Thing, render

SHOWN = range(1, FRAMES, 2)  # what uniform:frames=8 takes of a clip
Seen = dict[str, list[Thing | None]]


def seen(scene: MovingScene, frames: range) -> Seen:
    """Of everything that is ever there, by its kind if it is writing, what it is in each frame."""
    shown = [{thing.name if thing.kind == "shape" else thing.kind: thing for thing in scene.at(frame).things} for frame in frames]
    return {name: [things.get(name) for things in shown] for name in sorted({name for things in shown for name in things})}


def story(film: list[Thing | None]) -> tuple[str, int]:
    """What a thing does, and in which frame that is first seen."""
    if None in film:
        return ("appear", film.index(next(filter(None, film)))) if film[0] is None else ("leave", film.index(None))
    first = film[0]
    assert first is not None
    turned = [number for number, thing in enumerate(film) if thing and thing.colour != first.colour]
    moved = [number for number, thing in enumerate(film) if thing and thing.box != first.box]
    return ("turn", turned[0]) if turned else ("move", moved[0]) if moved else ("stay", 0)


def way(film: list[Thing | None]) -> str:
    first, last = film[0], film[-1]
    assert first is not None and last is not None  # noqa: PT018
    down, right = last.box[0] - first.box[0], last.box[1] - first.box[1]
    assert max(abs(down), abs(right)) > 0.25  # never a close call
    return ("down" if down > 0 else "up") if abs(down) > abs(right) else ("right" if right > 0 else "left")


def oracle(question: str, films: Seen) -> str:
    shapes = {name: film for name, film in films.items() if name in SHAPES}
    at = {"at first": 0, "at the end": -1}
    if found := re.fullmatch(r"what does the (\w+) do\?", question):
        return story(shapes[found[1]])[0]
    if found := re.fullmatch(r"does the (\w+) (\w+) before the (\w+) (\w+)s\?", question):
        (one, when), (other, then) = story(shapes[found[1]]), story(shapes[found[3]])
        assert (one, other) == (found[2], found[4])
        assert when != then
        return "yes" if when < then else "no"
    if found := re.fullmatch(r"where does the (\w+) move\?", question):
        return way(shapes[found[1]])
    if found := re.fullmatch(r"what color is the (\w+) (at first|at the end)\?", question):
        thing = shapes[found[1]][at[found[2]]]
        assert thing is not None
        return str(thing.colour)
    if found := re.fullmatch(r"is there a (\w+) (\w+) (at first|at the end)\?", question):
        there = [film[at[found[3]]] for film in shapes.values()]
        return "yes" if any(thing and (thing.colour, thing.name) == (found[1], found[2]) for thing in there) else "no"
    if found := re.fullmatch(r"how many objects (?:are there )?(at first|at the end|in all|appear|leave)\?", question):
        if found[1] in at:
            return str(sum(film[at[found[1]]] is not None for film in shapes.values()))
        return str(sum(found[1] in ("in all", story(film)[0]) for film in shapes.values()))
    found = re.fullmatch(r"what (number|word|digit) is (printed|handwritten)\?", question)
    assert found is not None, question
    written = [thing.name for thing in films[found[1]] if thing is not None]
    assert len(written) >= 2  # in passing, and not missed
    return written[0]


@pytest.fixture(scope="module")
def asked() -> list[tuple[MovingScene, list[Happening]]]:
    scenes = [world_clip(5, "test", number) for number in range(150)]
    return [(scene, happenings(scene)) for scene in scenes]


def test_every_answer_is_seen_in_every_second_frame(asked: list[tuple[MovingScene, list[Happening]]]) -> None:
    for scene, questions in asked:
        films = seen(scene, SHOWN)
        assert [one.answer for one in questions] == [oracle(one.question, films) for one in questions]


def test_every_family_is_asked_and_none_is_guessed(asked: list[tuple[MovingScene, list[Happening]]]) -> None:
    every = [one for _, questions in asked for one in questions]
    answers = {family: Counter(one.answer for one in every if one.family == family) for family in HAPPENINGS}
    for family, counts in answers.items():
        total = sum(counts.values())
        assert total > 40, family
        assert max(counts.values()) / total < (0.62 if family in ("order", "presence") else 0.5), family
    assert set(answers["event"]) == {"stay", "appear", "leave", "turn", "move"}
    assert set(answers["motion"]) == {"right", "left", "down", "up"}
    assert len(every) > 5 * len(asked)


def test_no_question_answers_another(asked: list[tuple[MovingScene, list[Happening]]]) -> None:
    for _, questions in asked:
        for one, other in combinations(questions, 2):
            assert not one.spoils(other)
            assert one.question != other.question


def test_things_keep_apart_and_have_time(asked: list[tuple[MovingScene, list[Happening]]]) -> None:
    for scene, _ in asked:
        assert len({actor.thing.name for actor in scene.shapes}) == len(scene.shapes) >= 2
        starts = [actor.start for actor in scene.shapes if actor.story in ("appear", "leave", "turn")]
        assert len(set(starts)) == len(starts)
        for actor in scene.actors:
            assert actor.start % 2 == actor.end % 2 == 0
            assert actor.story in ("stay", "pass") or 2 <= actor.start <= actor.end <= scene.frames - 2
        for frame in range(scene.frames):
            boxes = [thing.box for thing in scene.at(frame).things]
            assert all(0 <= edge <= 1 for box in boxes for edge in box)
            for a, b in combinations(boxes, 2):
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_an_account_tells_everything(asked: list[tuple[MovingScene, list[Happening]]]) -> None:
    for scene, _ in asked:
        told = account(scene).split(", ")
        assert len(told) == len(scene.actors)
        films = seen(scene, range(scene.frames))
        for actor in scene.shapes:
            [own] = [text for text in told if f" {actor.thing.name} " in text]
            does, _ = story(films[actor.thing.name])
            more = f" {way(films[actor.thing.name])}" if does == "move" else ""
            assert f" {actor.thing.name} {does}s{more}" in own


@pytest.mark.parametrize("frames", [LEAST, 14, 22])
def test_shorter_and_longer_clips_tell_as_much(frames: int) -> None:
    for seed in range(20):
        scene = moving_scene(seed, "train", frames)
        films = seen(scene, range(1, frames, 2))
        assert all(one.answer == oracle(one.question, films) for one in happenings(scene))


def test_seeds_and_splits() -> None:
    assert moving_scene(3) == moving_scene(3)
    assert moving_scene(3) != moving_scene(4)
    assert moving_scene(3).actors != moving_scene(3, "test").actors


# ---- files


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("kind", ["mp4", "frames"])
def test_clips_show_the_truth(kind: str, tmp_path: Path) -> None:
    if kind == "mp4":
        pytest.importorskip("av")
    for name in ("one", "two"):
        write_films(tmp_path / name, 1, 1, seed=2, size=64, kind=kind, progress=False, processes=1)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    (row,) = json.loads((tmp_path / "one" / "scenes.json").read_text())
    scene = world_clip(2, "test", 0)
    clip = open_clip(tmp_path / "one" / "clips" / row["video"], f"uniform:frames={FRAMES}")
    assert len(clip) == FRAMES == len(row["frames"])
    if kind != "frames":
        assert (clip.end, clip.rate) == (2.0, 8.0)
    for number, (frame, things) in enumerate(zip(clip.frames, row["frames"], strict=True)):
        wanted = render(scene.at(number), 64)
        apart = np.abs(np.asarray(frame, np.float32) - wanted).mean()
        assert apart < 6 if kind == "mp4" else apart == 0
        assert [(thing["kind"], thing["name"], tuple(thing["box"])) for thing in things] == [
            (thing.kind, thing.name, thing.box) for thing in scene.at(number).things
        ]


def test_rows_are_llavas(tmp_path: Path) -> None:
    write_films(tmp_path / "world", 2, 2, seed=2, size=32, kind="frames", progress=False, processes=1)
    read: Any = {name: json.loads((tmp_path / "world" / f"{name}.json").read_text()) for name in ("pretrain", "finetune", "test")}
    for name in ("pretrain", "finetune"):
        assert [row["video"] for row in read[name]] == ["train/000000", "train/000001"]
        for row in read[name]:
            first, *others = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"]
            assert first.startswith("<video>\n")
            assert not any("<" in text for text in others)
    assert {row["video"] for row in read["test"]} == {"test/000000", "test/000001"}
    assert {row["family"] for row in read["test"]} <= set(HAPPENINGS)
    before = digests(tmp_path / "world")
    write_films(tmp_path / "world", 2, 2, seed=2, size=32, kind="frames", progress=False, processes=1)  # nothing is left to do
    assert digests(tmp_path / "world") == before
    with pytest.raises(FoveateError, match="holds another world"):
        write_films(tmp_path / "world", 2, 2, seed=3, size=32, kind="frames", progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "16"], "are of clips; give --video"),
        (["--video", "--detail", "2"], "--detail 2 is of scenes that stand still"),
        (["--video", "--frames", "15"], "needs even numbers"),
        (["--video", "--kind", "avi"], "clips are not written as 'avi'; choose one of mp4, frames"),
    ],
)
def test_what_cannot_be_is_said(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["data", "scenes", str(tmp_path / "out"), "--train", "1", "--test", "1", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
