"""Writes scenes that move to disk: clips, accounts, conversations and test questions in the LLaVA format.

OUT/clips/{train,test}/000000.mp4   or a folder of PNG files
OUT/pretrain.json   one account per training clip: what happens, in order
OUT/finetune.json   about six questions per training clip, one conversation
OUT/test.json       one question a row: id, video, question, answer, family
OUT/scenes.json     the truth about the test clips: of each frame each thing's kind, name, colour, size and box
OUT/world.json      the world's parameters, marked complete at the very end
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from foveate.errors import FoveateError
from foveate.files import write_json
from foveate.jobs import spread
from foveate.world.happenings import DESCRIBE_CLIP, account, happenings
from foveate.world.moving import FRAMES as FRAMES
from foveate.world.moving import LEAST, RATE, MovingScene, moving_scene
from foveate.world.pictures import Split, render
from foveate.world.scenes import claimed, talk

VERSION = 1  # of the world: raised whenever the same seed would give other scenes or texts
KINDS = {"mp4": ".mp4", "frames": ""}
"""What clips are written as, and how their names end. Animated pictures hold no frame that is like the one before."""
_BITS = 4_000_000  # a second: lossy, with no loss that is seen


def world_clip(seed: int, split: Split, index: int, frames: int = FRAMES) -> MovingScene:
    """The moving scene behind `OUT/clips/<split>/<index>` of the world of a seed."""
    return moving_scene(f"films/{seed}/{index}", split, frames)


def write_films(
    out: Path,
    train: int,
    test: int,
    seed: int,
    size: int = 128,
    frames: int = FRAMES,
    kind: str | None = None,
    progress: bool = True,
    processes: int | None = None,
) -> None:
    """Writes a world of `train` + `test` clips of `frames` frames of `size` px. The files are the same for any number of processes.

    kind: one of KINDS; unless given, "mp4" where PyAV is there, else "frames".
    Running it again on a complete world of the same parameters does nothing; an interrupted one is written anew.
    Raises FoveateError for bad numbers, for "mp4" without PyAV, and for a folder that holds anything else.
    """
    for name, value, least in (("train", train, 0), ("test", test, 0), ("size", size, 32), ("frames", frames, LEAST)):
        if value < least:
            raise FoveateError(f"{name}={value}: a world of clips needs {name} >= {least}")
    if train + test == 0:
        raise FoveateError("train=0 and test=0: a world needs at least one clip")
    if frames % 2 or size % 2:
        raise FoveateError(f"frames={frames}, size={size}: a world of clips needs even numbers")
    there = find_spec("av") is not None
    kind = kind or ("mp4" if there else "frames")
    if kind not in KINDS:
        raise FoveateError(f"clips are not written as {kind!r}; choose one of {', '.join(KINDS)}")
    if kind == "mp4" and not there:
        raise FoveateError("mp4 needs PyAV: pip install 'foveate[video]'; or choose frames")
    out = Path(out)
    parameters = {
        "version": VERSION,
        "moving": True,
        "train": train,
        "test": test,
        "seed": seed,
        "size": size,
        "frames": frames,
        "kind": kind,
    }
    if not claimed(out, parameters, "clips"):
        return
    jobs: list[tuple[Path, int, Split, int, int, int, str]] = [(out, seed, "train", i, size, frames, kind) for i in range(train)]
    jobs += [(out, seed, "test", i, size, frames, kind) for i in range(test)]
    # Starting processes takes as long as some hundred clips.
    rows = [*track(spread(_write_one, jobs, processes, few=200), "clips", len(jobs), disable=not progress)]
    learn, check = rows[:train], rows[train:]
    write_json(out / "pretrain.json", [talk(row, "video", [(DESCRIBE_CLIP, row["caption"])]) for row in learn], indent=0)
    asked = [[(q["question"], q["answer"]) for q in row["questions"]] for row in learn]
    write_json(out / "finetune.json", [talk(row, "video", turns) for row, turns in zip(learn, asked, strict=True)], indent=0)
    questions = [{"id": f"{row['id']}-{i}", "video": row["video"], **q} for row in check for i, q in enumerate(row["questions"])]
    write_json(out / "test.json", questions, indent=0)
    write_json(out / "scenes.json", [{key: row[key] for key in ("id", "video", "caption", "frames")} for row in check], indent=None)
    write_json(out / "world.json", {**parameters, "complete": True}, indent=None)


def _write_one(job: tuple[Path, int, Split, int, int, int, str]) -> dict[str, Any]:
    out, seed, split, index, size, frames, kind = job
    item = world_clip(seed, split, index, frames)
    video = f"{split}/{index:06d}{KINDS[kind]}"
    scenes = [item.at(frame) for frame in range(frames)]
    _WRITERS[kind](out / "clips" / video, [Image.fromarray(render(scene, size)) for scene in scenes])
    keys = ("kind", "name", "colour", "size", "box")
    return {
        "id": f"{split}-{index:06d}",
        "video": video,
        "caption": account(item),
        "questions": [{"question": q.question, "answer": q.answer, "family": q.family} for q in happenings(item)],
        "frames": [[{key: told[key] for key in keys} for told in map(asdict, scene.things)] for scene in scenes],
    }


def _mp4(path: Path, frames: Sequence[Image.Image]) -> None:
    import av

    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("mpeg4", rate=RATE)  # which every build of FFmpeg can write, without a licence of its own
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.bit_rate, stream.gop_size, stream.thread_count = "yuv420p", _BITS, len(frames), 1
        stream.time_base = stream.codec_context.time_base = Fraction(1, RATE)
        for number, frame in enumerate(frames):
            shown = av.VideoFrame.from_image(frame)
            shown.pts, shown.time_base = number, Fraction(1, RATE)
            out.mux(stream.encode(shown))
        out.mux(stream.encode())


def _frames(path: Path, frames: Sequence[Image.Image]) -> None:
    path.mkdir(exist_ok=True)
    for number, frame in enumerate(frames):
        frame.save(path / f"{number:03d}.png", compress_level=1)


_WRITERS: dict[str, Callable[[Path, Sequence[Image.Image]], None]] = {"mp4": _mp4, "frames": _frames}
