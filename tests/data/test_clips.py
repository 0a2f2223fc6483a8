"""Films of every kind give the same frames at the same times; samplings; and what cannot be shown is said."""

from __future__ import annotations

import builtins
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.data.films import SIDE, folder, frame, gif, number_of, sound, video

from foveate import FoveateError
from foveate.data.clips import SAMPLINGS, Changes, Clip, ClipError, Film, Rate, Uniform, open_clip, open_clips, open_film, parse


class Steps(Film):
    """A film that is not there: frames at given times."""

    def __init__(self, times: list[float], end: float, levels: list[int] | None = None) -> None:
        super().__init__("steps", times, end)
        self.levels = levels or [0] * len(times)
        self.decoded: list[int] = []

    def _decoded(self, wanted: Any) -> Any:
        for number in wanted:
            self.decoded.append(number)
            yield Image.new("RGB", (8, 8), (self.levels[number],) * 3)


# ---- kinds of films


def test_a_gif_has_its_own_times(tmp_path: Path) -> None:
    film = open_film(gif(tmp_path / "a.gif", [100, 300, 0, 200]))
    assert film.times == pytest.approx((0, 0.1, 0.4, 0.5))  # one that says nothing lasts 0.1 s
    assert film.end == pytest.approx(0.7)
    assert film.rate == pytest.approx(4 / 0.7)
    assert [number_of(image) for image in film.frames([0, 2, 3])] == [0, 2, 3]


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_other_animated_pictures_have_their_own_times(name: str, tmp_path: Path) -> None:
    film = open_film(gif(tmp_path / name, [100, 300, 200]))
    assert film.times == pytest.approx((0, 0.1, 0.4))
    assert film.end == pytest.approx(0.6)
    assert [number_of(image) for image in film.frames([0, 2])] == [0, 2]


def test_a_folder_goes_by_the_numbers_in_its_names(tmp_path: Path) -> None:
    where = folder(tmp_path / "shots", 12)
    (where / "notes.txt").write_text("not a frame")
    film = open_film(where, rate=2)
    assert film.times == tuple(i / 2 for i in range(12))
    assert film.end == 6
    assert [number_of(image) for image in film.frames([1, 2, 10])] == [1, 2, 10]


def test_a_picture_is_a_film_of_one_frame(tmp_path: Path) -> None:
    frame(3).save(tmp_path / "a.png")
    for rule in SAMPLINGS:
        clip = open_clip(tmp_path / "a.png", rule)
        assert (len(clip), clip.times, clip.end, clip.rate) == (1, (0.0,), 0.0, 0.0)
        assert number_of(clip.frames[0]) == 3


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.webm", "libvpx")])
def test_a_video_of_variable_rate_has_its_own_times(tmp_path: Path, name: str, codec: str) -> None:
    stamps = [500, 540, 600, 1000, 2500, 2540, 2600, 2700, 3000]
    film = open_film(video(tmp_path / name, stamps, codec))
    assert film.times == pytest.approx([(stamp - 500) / 1000 for stamp in stamps], abs=2e-3)
    for wanted in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [8], [1, 7], [3, 4]):  # forward, by key frames, and within their groups
        assert [number_of(image) for image in film.frames(wanted)] == wanted
    clip = Clip.of(film, "uniform:frames=4")
    assert [number_of(image) for image in clip.frames][:2] == [2, 3]  # it stands still between 0.5 and 2 s
    assert len(clip) == 3
    assert clip.metadata["frames_indices"][:2] == pytest.approx([100, 500], abs=2)


def test_frames_are_decoded_when_they_are_asked_for() -> None:
    film = Steps([0, 1, 2, 3], 4)
    frames = film.frames([0, 2, 3])
    assert film.decoded == []
    next(frames)
    assert film.decoded == [0]
    list(frames)
    assert film.decoded == [0, 2, 3]


def test_a_turned_video_is_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves = Image.new("RGB", (64, 32), "white")
    halves.paste("black", (32, 0, 64, 32))
    monkeypatch.setattr("tests.data.films.frame", lambda number: halves)
    path = video(tmp_path / "a.mp4", [0, 100, 200], size=(64, 32))
    content = path.read_bytes()
    at = content.index((1 << 16).to_bytes(4, "big"), content.index(b"tkhd") + 40)  # the matrix of the track
    # A quarter to the right, as telephones write it: what was left is above.
    turned = [0, 1 << 16, 0, (1 << 32) - (1 << 16), 0, 0]
    path.write_bytes(content[:at] + b"".join(value.to_bytes(4, "big") for value in turned) + content[at + 24 :])
    (shown,) = open_film(path).frames([0])
    assert shown.size == (32, 64)
    assert shown.convert("L").getpixel((16, 8)) > 200  # type: ignore[operator]
    assert shown.convert("L").getpixel((16, 56)) < 50  # type: ignore[operator]


# ---- samplings


def test_uniform_takes_the_middles_of_equal_parts_of_the_time() -> None:
    assert Uniform(frames=4).choose(Steps([i / 8 for i in range(16)], 2)) == [2, 6, 10, 14]
    assert Uniform(frames=1).choose(Steps([0, 0.1, 0.2], 10)) == [2]  # the last one is shown nearly all the time
    assert Uniform(frames=9).choose(Steps([0, 1, 2], 3)) == [0, 1, 2]


def test_rate_takes_what_is_shown_at_its_times() -> None:
    film = Steps([i / 10 for i in range(30)], 3)
    assert Rate(fps=1.0).choose(film) == [0, 10, 20]
    assert Rate(fps=10.0).choose(film) == list(range(30))
    assert Rate(fps=1000.0).choose(film) == list(range(30))
    assert Rate(fps=0.1).choose(film) == [0]
    still = Steps([0, 0.5, 0.6, 4.0], 5)
    assert Rate(fps=1.0).choose(still) == [0, 2, 3]  # at 1, 2 and 3 s the same frame is shown


def test_a_film_longer_than_the_context_is_thinned_or_refused() -> None:
    film = Steps([float(i) for i in range(100)], 100)
    assert Rate(fps=1.0, most=4).choose(film) == [12, 37, 62, 87]
    with pytest.raises(ClipError, match="gives 100 frames at 1 a second, more than 4; lower fps"):
        Rate(fps=1.0, most=4, longer="refuse").choose(film)


def test_changes_takes_the_frames_unlike_the_ones_before() -> None:
    film = Steps([0, 1, 2, 3, 4, 5], 6, levels=[0, 0, 50, 50, 200, 190])
    assert Changes(frames=3).choose(film) == [0, 2, 4]
    assert Changes(frames=1).choose(film) == [0]
    same = Steps([0, 1, 2, 3], 4)
    assert Changes(frames=2).choose(same) == [0, 1]  # of equal ones the earlier


@pytest.mark.parametrize("text", ["uniform:frames=3", "rate:fps=2.5,most=7,longer=refuse", "changes", "uniform"])
def test_samplings_are_spelled(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unifrom", "did you mean 'uniform'"),
        ("uniform:frames=0", "give a whole number of at least 1"),
        ("changes:frames=2.5", "give a whole number of at least 1"),
        ("rate:fps=0", "more than 0"),
        ("rate:fps=fast", "more than 0"),
        ("rate:most=-1", "give a whole number of at least 1"),
        ("rate:longer=cut", "thin"),
        ("rate:frames=3", "no option 'frames'"),
    ],
)
def test_bad_samplings_are_said(text: str, words: str) -> None:
    with pytest.raises(FoveateError, match=words):
        parse(text)


# ---- clips


def test_a_clip_is_what_processors_take(tmp_path: Path) -> None:
    clip = open_clip(gif(tmp_path / "a.gif", [500] * 8), "uniform:frames=4")
    assert clip.pixels.shape == (4, SIDE, SIDE, 3)
    assert clip.pixels.dtype == np.uint8
    assert clip.times == (0.5, 1.5, 2.5, 3.5)
    assert clip.metadata == {
        "fps": 1000.0,
        "frames_indices": [500, 1500, 2500, 3500],
        "total_num_frames": 4000,
        "duration": 4.0,
        "width": SIDE,
        "height": SIDE,
    }
    assert clip.rate == 1.0


def test_frames_of_several_sizes_become_those_of_the_first(tmp_path: Path) -> None:
    where = folder(tmp_path / "shots", 2)
    frame(2).resize((50, 20)).save(where / "shot2.png")
    assert open_clip(where).pixels.shape == (3, SIDE, SIDE, 3)


# ---- what cannot be shown


def test_what_is_no_film_is_said(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "nothing.mp4").write_bytes(b"")
    sound(tmp_path / "sound.mp4")
    whole = video(tmp_path / "whole.mp4", list(range(0, 1000, 100)))
    (tmp_path / "torn.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for name, words in [
        ("gone.mp4", "is missing: there is no "),
        ("empty", "has no frames"),
        ("text.mp4", "cannot be decoded"),
        ("nothing.mp4", "cannot be decoded"),
        ("sound.mp4", "holds sound and no pictures"),
        ("torn.mp4", "cannot be decoded|may be torn"),
    ]:
        with pytest.raises(ClipError, match=words):
            open_clip(tmp_path / name)


def test_a_film_torn_in_the_middle_is_said(tmp_path: Path) -> None:
    whole = video(tmp_path / "whole.mp4", list(range(0, 1000, 100)), gop=100).read_bytes()
    middle, end = whole.index(b"mdat") + 300, whole.index(b"moov")
    (tmp_path / "torn.mp4").write_bytes(whole[:middle] + bytes(end - middle - 8) + whole[end - 8 :])
    with pytest.raises(ClipError, match=r"torn\.mp4: it (is torn|cannot be decoded)"):
        open_clip(tmp_path / "torn.mp4")
    where = folder(tmp_path / "shots", 3)
    (where / "shot1.png").write_bytes(b"no picture")
    with pytest.raises(ClipError, match=r"has a frame shot1\.png that cannot be decoded"):
        open_clip(where)


def test_a_frame_that_is_not_there_is_said() -> None:
    class Short(Steps):
        def _decoded(self, wanted: Any) -> Any:
            yield from super()._decoded(wanted[:2])

    with pytest.raises(ClipError, match="is torn: its frame 2 of 4 is not there"):
        list(Short([0, 1, 2, 3], 4).frames([0, 1, 2]))
    for wanted in ([1, 0], [0, 0], [4], [-1]):
        with pytest.raises(FoveateError, match="give ascending numbers from 0 to 3"):
            list(Steps([0, 1, 2, 3], 4).frames(wanted))


def test_without_pyav_videos_say_what_they_need_and_gifs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refusing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
    (tmp_path / "a.mp4").write_bytes(b"anything")
    with pytest.raises(ClipError, match=r"pip install 'foveate\[video\]'"):
        open_clip(tmp_path / "a.mp4")
    assert len(open_clip(gif(tmp_path / "a.gif", [100, 100]))) == 2


def test_bad_clips_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [gif(tmp_path / "a.gif", [100, 100]), tmp_path / "gone.gif", folder(tmp_path / "shots", 2), tmp_path / "none.gif"]
    with pytest.raises(ClipError, match="gone"):
        list(open_clips(paths))
    bad: list[ClipError] = []
    with caplog.at_level(logging.WARNING):
        assert [len(clip) for clip in open_clips(paths, bad=bad)] == [2, 2]
    assert len(bad) == 2
    assert "2 of 4 clips cannot be read" in caplog.text


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = gif(tmp_path / "a.gif", [100, 100])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ClipError, match="more than Pillow's limit"):
        open_clip(film)
