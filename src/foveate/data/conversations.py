"""Training conversations: LLaVA's JSON with an image folder, or a Hugging Face dataset or parquet with the same fields.

A row is {"id": ..., "image": a name, a list of names, or missing, "conversations": [{"from": "human", "value": "<image>\\n..."},
{"from": "gpt", "value": ...}, ...]}, with one image marker for each image.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from foveate.errors import FoveateError

log = logging.getLogger(__name__)

MARKER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, *BOMB)
SHOWN = 5  # of a long list of bad samples, so many stand in the message; all of them stand in the file


@dataclass(frozen=True)
class Conversation:
    """One training sample: turns are (role, text) with roles user and assistant in turn, images are decoded to RGB."""

    index: int
    id: str
    turns: list[tuple[str, str]]
    images: list[Image.Image]


@dataclass(frozen=True)
class Bad:
    """A sample that cannot be trained on, and why."""

    index: int
    id: str
    image: str
    reason: str

    def __str__(self) -> str:
        return f"{self.id}{f' ({self.image})' if self.image else ''}: {self.reason}"


class Source(Protocol):
    """Where rows come from. An image of a row is a path or the encoded bytes; `stamp` changes when the image may have."""

    name: str
    fingerprint: str

    def __len__(self) -> int: ...
    def row(self, index: int) -> dict[str, Any]: ...
    def images(self, row: dict[str, Any]) -> list[Path | bytes]: ...
    def sizes(self) -> np.ndarray: ...


# ---- sources -------------------------------------------------------------------------------------------------------------------------


class JsonSource:
    """LLaVA conversation JSON. Rows are kept as bytes, so that worker processes share them instead of copying a million Python objects."""

    def __init__(self, conversations: Path, images: Path | None, limit: int | None = None) -> None:
        try:
            text = conversations.read_bytes()
            rows = json.loads(text)
        except OSError as error:
            raise FoveateError(f"conversations {conversations} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise FoveateError(f"conversations {conversations} is not JSON: {error}") from None
        if not isinstance(rows, list) or not rows:
            raise FoveateError(f"conversations {conversations} must be a JSON list with at least one conversation")
        if images is not None and not images.is_dir():
            raise FoveateError(f"image folder {images} does not exist")
        self.name = str(conversations)
        self.folder = images
        encoded = [json.dumps(row).encode() for row in rows[:limit]]
        self.fingerprint = hashlib.sha256(text).hexdigest()[:16] + (f"[:{limit}]" if limit else "")
        self._ends = np.cumsum([len(row) for row in encoded])
        self._rows = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def row(self, index: int) -> dict[str, Any]:
        start = int(self._ends[index - 1]) if index else 0
        row = json.loads(self._rows[start : int(self._ends[index])].tobytes())
        return row if isinstance(row, dict) else {"conversations": None}

    def sizes(self) -> np.ndarray:
        """Bytes of each row: what stands for its length where lengths are compared."""
        return np.diff(self._ends, prepend=0)

    def images(self, row: dict[str, Any]) -> list[Path | bytes]:
        named = row.get("image")
        names = [] if named is None else named if isinstance(named, list) else [named]
        if names and self.folder is None:
            raise FoveateError(f"{self.name} names images, such as {names[0]!r}, but the recipe gives no `images` folder")
        return [self.folder / str(name) for name in names] if self.folder is not None else []


class HubSource:
    """A Hugging Face dataset (hub name, folder of `save_to_disk`, or parquet files): `image` or `images` holds pictures, paths or bytes."""

    def __init__(self, dataset: str, split: str, folder: Path | None, limit: int | None = None) -> None:
        import datasets

        path = Path(dataset)
        try:
            if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
                files = str(path if path.suffix == ".parquet" else path / "*.parquet")
                rows = datasets.load_dataset("parquet", data_files={split: files}, split=split)
            elif path.is_dir():
                rows = datasets.load_from_disk(dataset)
                rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
            else:
                rows = datasets.load_dataset(dataset, split=split)
        except (OSError, ValueError, KeyError) as error:
            raise FoveateError(f"dataset {dataset} (split {split}) cannot be loaded: {str(error).splitlines()[0]}") from None
        if "conversations" not in rows.column_names:
            raise FoveateError(f"dataset {dataset} has no column `conversations`; it has {', '.join(rows.column_names)}")
        self._column = next((name for name in ("image", "images") if name in rows.column_names), None)
        feature = rows.features.get(self._column) if self._column else None
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(self._column, datasets.Image(decode=False))
        elif feature is not None and isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(self._column, datasets.List(datasets.Image(decode=False)))
        self._rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        self.name, self.folder, self.fingerprint = f"{dataset}[{split}]", folder, str(self._rows._fingerprint)
        if not len(self._rows):
            raise FoveateError(f"dataset {self.name} is empty")

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        row = dict(self._rows[index])
        turns = row["conversations"]
        if isinstance(turns, dict):  # a list of structs that was stored as a struct of lists
            keys = list(turns)
            row["conversations"] = [dict(zip(keys, values, strict=True)) for values in zip(*turns.values(), strict=True)]
        return row

    def sizes(self) -> np.ndarray:
        return np.array([sum(len(turn["value"]) for turn in self.row(i)["conversations"]) for i in range(len(self))])

    def images(self, row: dict[str, Any]) -> list[Path | bytes]:
        held = row.get(self._column) if self._column else None
        found: list[Path | bytes] = []
        for image in [] if held is None else held if isinstance(held, list) else [held]:
            content = (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image
            found.append(content if isinstance(content, bytes) else (self.folder or Path()) / str(content))
        return found


# ---- the data set --------------------------------------------------------------------------------------------------------------------


class Conversations:
    """Map-style data set. `index[i]` is the row of item i: bad samples that the recipe says to skip are not in it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.index = np.arange(len(source))

    @classmethod
    def open(
        cls,
        conversations: Path | None = None,
        images: Path | None = None,
        dataset: str | None = None,
        split: str = "train",
        limit: int | None = None,
    ) -> Conversations:
        """From a LLaVA JSON file and its image folder, or from a Hugging Face dataset. FoveateError if it cannot be read."""
        if conversations is not None:
            return cls(JsonSource(conversations, images, limit))
        assert dataset is not None
        return cls(HubSource(dataset, split, images, limit))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> Conversation:
        index = int(self.index[item])
        row = self.source.row(index)
        try:
            images = [load_image(image) for image in self.source.images(row)]
        except UNREADABLE as error:  # it was good when it was checked
            raise FoveateError(f"{self.source.name}: an image of sample {row_id(row, index)} cannot be read any more: {error}") from None
        return Conversation(index, row_id(row, index), turns_of(row), images)

    def skip(self, bad: Sequence[Bad]) -> None:
        """Leave these samples out. FoveateError if none is left."""
        self.index = np.setdiff1d(self.index, [sample.index for sample in bad])
        if not len(self.index):
            raise FoveateError(f"{self.source.name}: no sample is left, all {len(self.source)} are bad")


def turns_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of a row that `check_row` has found good."""
    return [(ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]]


def row_id(row: dict[str, Any], index: int) -> str:
    return str(row.get("id") or f"row {index}")


def load_image(image: Path | bytes) -> Image.Image:
    """Decoded and as RGB. Raises what Pillow raises; a decompression bomb is an error already where Pillow only warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return opened.convert("RGB")


# ---- the check before training -------------------------------------------------------------------------------------------------------


def check_row(row: dict[str, Any], images: int) -> str:
    """What is wrong with the text of a row, "" if nothing is."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "has no conversations"
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or turn.get("from") not in ROLES:
            return f'a turn must be {{"from": "human" or "gpt", "value": text}}, found {str(turn)[:80]!r}'
    roles = [ROLES[turn["from"]] for turn in turns]
    if roles[0] == "system":
        roles = roles[1:]
    if len(roles) < 2 or len(roles) % 2 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        return f"human and gpt must take turns, beginning with human and ending with gpt; found {', '.join(t['from'] for t in turns)}"
    markers = sum(turn["value"].count(MARKER) for turn in turns if ROLES[turn["from"]] == "user")
    if any(MARKER in turn["value"] for turn in turns if ROLES[turn["from"]] != "user"):
        return f"{MARKER} stands outside of the human turns"
    if markers != images:
        return f"has {images} image{'s' if images != 1 else ''} but {markers} {MARKER} marker{'s' if markers != 1 else ''}"
    if any(not turn["value"].strip() for turn in turns if ROLES[turn["from"]] == "assistant"):
        return "has an empty answer"
    return ""


def check_image(image: Path | bytes) -> str:
    """What is wrong with an image, found by really decoding it; "" if nothing is."""
    try:
        load_image(image)
    except BOMB:
        return f"is a decompression bomb: more than Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels"
    except FileNotFoundError:
        return "is missing"
    except UNREADABLE as error:
        return f"cannot be decoded: {' '.join(str(error).split())[:120] or type(error).__name__}"
    return ""


class Checked:
    """Images that were found good before, by path, size and time of change: a resumed or repeated run does not decode them all again."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: set[str] = set()
        self._new: list[str] = []
        if path is not None and path.is_file():
            self._known = set(path.read_text(encoding="utf-8").splitlines())

    @staticmethod
    def key(path: Path) -> str:
        try:
            stat = os.stat(path)
        except OSError:
            return ""
        return f"{os.path.abspath(path)}\t{stat.st_size}\t{stat.st_mtime_ns}"

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def add(self, key: str) -> None:
        self._new.append(key)

    def save(self) -> None:
        """Appended, because several runs may share the file; a folder that cannot be written to only costs the next run its time."""
        if self.path is None or not self._new:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(key + "\n" for key in self._new))
        except OSError as error:
            log.info("the list of checked images was not kept: %s", error)
        self._new = []


def cache_file(source: Source) -> Path:
    """Where good images are remembered: in the user's cache, a file for each image folder or data set."""
    folder = getattr(source, "folder", None)
    name = hashlib.sha256((os.path.abspath(folder) if folder is not None else source.name).encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "foveate" / "checked-images" / f"{name}.tsv"


def find_bad(
    source: Source,
    cache: Path | None,
    rows: Sequence[int] | None = None,
    fits: Callable[[list[tuple[str, str]], int], str] = lambda turns, images: "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Bad]:
    """Every sample (of `rows`) that cannot be trained on: text, markers, what `fits` says of (turns, images), each image decoded once.

    `progress(done, total)` is called after each sample."""
    rows = range(len(source)) if rows is None else rows
    checked, bad = Checked(cache), []
    seen: dict[str, str] = {}

    def check(index: int) -> Bad | None:
        row = source.row(index)
        images = source.images(row)
        reason = check_row(row, len(images)) or fits(turns_of(row), len(images))
        if reason:
            return Bad(index, row_id(row, index), "", reason)
        for number, image in enumerate(images):
            key = Checked.key(image) if isinstance(image, Path) else f"{source.fingerprint}\t{index}\t{number}"
            if key in checked:
                continue
            reason = seen[key] if key in seen else check_image(image)
            if key:
                seen[key] = reason
            if reason:
                return Bad(index, row_id(row, index), image.name if isinstance(image, Path) else "embedded", f"image {reason}")
            checked.add(key)
        return None

    last = time.monotonic()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside of the interpreter's lock
        for done, found in enumerate(_windowed(pool, check, rows), start=1):
            if found is not None:
                bad.append(found)
            if done % 256 == 0 and time.monotonic() - last > 30:
                checked.save()
                last = time.monotonic()
            progress(done, len(rows))
    checked.save()
    return bad


def _windowed(pool: ThreadPoolExecutor, check: Callable[[int], Bad | None], rows: Sequence[int]) -> Iterator[Bad | None]:
    """`pool.map` in slices: it would otherwise hold a future for each of a million rows."""
    for start in range(0, len(rows), 4096):
        yield from pool.map(check, rows[start : start + 4096])


def refuse_or_skip(data: Conversations, bad: Sequence[Bad], policy: str, report: Path | None) -> None:
    """Stop with the list of bad samples, written whole to `report`; or leave them out, counted and named in the log.

    Without a `report` nothing is written or logged: another process does that."""
    if not bad:
        return
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text("".join(f"{sample}\n" for sample in bad), encoding="utf-8")
    first = "\n".join(f"  {sample}" for sample in bad[:SHOWN])
    more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    summary = f"{data.source.name}: {len(bad)} of {len(data.source)} samples cannot be trained on (full list: {report}):\n{first}{more}"
    if policy == "stop":
        raise FoveateError(f"{summary}\nRepair them, or set on_bad_sample: skip to train without them")
    if report is not None:
        log.warning("skipped: %s", summary)
    data.skip(bad)
