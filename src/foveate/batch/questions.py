"""The rows of a file as what is put to a model: LLaVA's conversations, or questions about pictures and clips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.data.conversations import Unusable, check_row, check_text, listed, other_media, pictures_of, row_id, turns_of
from foveate.data.footage import CLIPS, FRAMES, MARKER, Footage, clips_of, markers, placed, standing
from foveate.data.pixels import Picture
from foveate.data.rows import open_rows
from foveate.errors import FoveateError
from foveate.inference import marked

_KNOWN = ("question", "answer", "answers", *CLIPS)


@dataclass(frozen=True)
class Question:
    """`turns` (role, text), of which the user's is the last, with a marker for each of the `pictures` and a CLIP for each of `clips`."""

    turns: list[tuple[str, str]]
    pictures: list[Picture]
    clips: list[Footage]


class Questions:
    """The rows of `data`, whatever `open_rows` takes: {"conversations": […]}, whose last question is asked after the turns before it and
    whose last answer is not looked at, or {"question": …}; pictures under `image` or `images`,
    clips under `video` or `videos`.

    images: the folder of both; None: `images` and `clips` beside the file, or else the file's own.
    frames: the sampling that says which frames of a clip are shown.
    FoveateError for what cannot be read, and for a folder that is not there.
    """

    def __init__(self, data: str | Path, images: str | Path | None = None, frames: str = FRAMES) -> None:
        self.rows = open_rows(data)
        near = Path(data).expanduser().absolute().parent
        # By its whole name, which stands in messages: a row fails alike wherever it is asked.
        self.folder = Path(images).expanduser().absolute() if images else near / "images" if (near / "images").is_dir() else near
        self._clips = near / "clips" if not images and (near / "clips").is_dir() else self.folder
        self._frames = frames
        if not self.folder.is_dir():
            raise FoveateError(f"image folder {self.folder} does not exist")

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        """The row's `id`, or its number."""
        try:
            return row_id(self.rows[number], number)
        except FoveateError:
            return f"row {number}"

    def __getitem__(self, number: int) -> Question:
        """FoveateError with the reason why this row cannot be asked."""
        row = self.rows[number]
        if not isinstance(row, dict):
            raise Unusable(f"is no object with a question: {str(row)[:80]!r}")
        row = listed(row)
        pictures, clips = pictures_of(row, self.folder), clips_of(row, self._clips, self._frames)
        turns = (_talk if "conversations" in row else _asked)(row, len(pictures), len(clips))
        return Question(turns, pictures, clips)


def _talk(row: dict[str, Any], images: int, clips: int) -> list[tuple[str, str]]:
    turns = row["conversations"]
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("from") in ("human", "user"):
        row = {**row, "conversations": [*turns, {"from": "gpt", "value": "-"}]}  # the check is of conversations that are answered
    wrong = check_row(row, images, clips)
    if wrong:
        raise Unusable(wrong)
    return turns_of(row, images, clips)[:-1]


def _asked(row: dict[str, Any], images: int, clips: int) -> list[tuple[str, str]]:
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise Unusable(f"has neither conversations nor a question; it has {', '.join(map(str, row))[:200] or 'nothing'}")
    wanted = {MARKER: images} | markers([question], images, clips)
    found = {marker: question.count(marker) for marker in wanted}
    if any(found.values()) and found != wanted:
        wrong = next(marker for marker in wanted if found[marker] != wanted[marker])
        raise Unusable(f"has {wanted[wrong]} {'images' if wrong == MARKER else 'clips'} but {found[wrong]} {wrong} markers")
    wrong = check_text(question) or other_media(row, images, _KNOWN)
    if wrong:
        raise Unusable(wrong)
    return [("user", marked(placed(question.strip(), standing([question], images, clips)), images, clips))]
