"""Rows of a data set, wherever they are: the one reader of training, plans, evaluation and benchmarks.

    FILE.json, FILE.jsonl    a list of objects, or an object on each line; UTF-8, with or without a byte order mark
    FILE.parquet             or several, by a pattern such as "set/train-*.parquet"
    FOLDER                   what datasets.save_to_disk wrote, or whatever datasets.load_dataset takes: files named after their splits, a
                             local clone of a data set of the hub, with or without configurations in its README
    OWNER/NAME               a data set of the hub

Which rows a split has is what datasets.load_dataset says, slices such as "train[:10%]" included; a file is the split "train".
Nothing is decoded: a picture within a data set is {"bytes": ..., "path": ...}.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from foveate.errors import FoveateError, readable

LINES = 100  # rows of a table that are read together


class Unusable(FoveateError):
    """What is wrong with one row, the others being as they are."""


class Rows(Protocol):
    """`columns`: where every row has the same ones; `fingerprint`: changes with what the rows say, and with nothing else."""

    name: str
    columns: Sequence[str] | None

    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any:
        """A row, which should be a dictionary but may be any JSON value. FoveateError for one that cannot be read."""

    def lengths(self) -> np.ndarray:
        """Of each row, something that grows with the length of its text."""


def open_rows(where: str | Path, split: str | None = None, config: str | None = None, limit: int | None = None, hub: bool = False) -> Rows:
    """The rows of a data set, at least one, at most `limit`. `split`: may be left out where there is one; `hub`: `where` may name a data
    set there.

    FoveateError for what is no data set or cannot be read, for a split or configuration that is not there, and where there are no rows.
    """
    path = Path(where).expanduser()
    if path.suffix in (".json", ".jsonl"):
        if config is not None:
            raise FoveateError(f"{path} is one file without configurations; leave out config={config}")
        rows: Rows = JsonRows(path, split, limit)
    else:
        rows = TableRows(where, split, config, limit, hub)
    if not len(rows):
        raise FoveateError(f"{rows.name} is empty: it has no rows, and needs at least one conversation or question")
    return rows


def parts(wanted: str | None, lengths: Mapping[str, int], where: str) -> list[tuple[str, int, int]]:
    """(split, first row, end) of the pieces that a split is made of, as datasets.load_dataset understands its name.

    `lengths`: how many rows the splits have that there are."""
    if wanted is None and len(lengths) > 1:
        raise FoveateError(f"{where} has the splits {', '.join(lengths)}: say which with split=")
    if wanted is None or wanted in lengths:
        (name,) = lengths if wanted is None else [wanted]
        return [(name, 0, lengths[name])]
    from datasets import ReadInstruction

    try:
        found = ReadInstruction.from_spec(wanted).to_absolute(dict(lengths))
    except (ValueError, AssertionError, KeyError, TypeError):
        if list(lengths) == ["train"]:
            raise FoveateError(f"{where} has no splits, all its rows are train: leave out split={wanted}") from None
        raise FoveateError(f"{where} has the splits {', '.join(lengths)}: there is no {wanted!r} among them") from None
    return [(piece.splitname, piece.from_ or 0, lengths[piece.splitname] if piece.to is None else piece.to) for piece in found]


# ---- JSON ------------------------------------------------------------------------------------------------------------------------------


class JsonRows:
    """Kept as bytes, so that worker processes share them instead of copying a million Python objects."""

    columns: Sequence[str] | None = None

    def __init__(self, path: Path, split: str | None, limit: int | None) -> None:
        rows, digest = read_json(path)
        kept = [row for _, start, end in parts(split, {"train": len(rows)}, str(path)) for row in rows[start:end]][:limit]
        encoded = [json.dumps(row).encode() for row in kept]
        self.name = str(path)
        piece = f"[{split}]" if split not in (None, "train") else ""
        self.fingerprint = digest + piece + (f"[:{limit}]" if limit else "")
        self._ends = np.cumsum([len(row) for row in encoded], dtype=np.int64)
        self._rows = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        start = int(self._ends[index - 1]) if index else 0
        return json.loads(self._rows[start : int(self._ends[index])].tobytes())

    def lengths(self) -> np.ndarray:
        return np.diff(self._ends, prepend=0)


def read_json(path: Path) -> tuple[list[Any], str]:
    """The rows of a file of JSON or JSON lines, and a hash of the file's bytes. FoveateError for what is neither."""
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        gone = isinstance(error, FileNotFoundError)
        why = f"No such file as {path.absolute()}" if gone else getattr(error, "strerror", None) or error
        raise FoveateError(f"{readable(str(path))} cannot be read: {readable(str(why))}") from None
    encoding = json.detect_encoding(content)
    if encoding not in ("utf-8", "utf-8-sig"):
        family = encoding.removesuffix("-be").removesuffix("-le")
        raise FoveateError(f"{path} is text in {family}, and must be UTF-8: save it anew, or `iconv -f {family} -t utf-8 {path} > NEW`")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise FoveateError(
            f"{path} is not UTF-8: the byte {content[error.start]:#04x} at position {error.start} belongs to another encoding; save the "
            f"file anew as UTF-8, or, if it is Latin-1, `iconv -f latin1 -t utf-8 {path} > NEW`"
        ) from None
    try:
        rows = json.loads(text)
        if isinstance(rows, dict) and path.suffix == ".jsonl":
            rows = [rows]
    except (ValueError, RecursionError) as whole:
        rows = _lines(path, text, whole)
    if not isinstance(rows, list):
        raise FoveateError(f"{path} must be a JSON list or JSON lines: it must hold a list of objects, one for each sample")
    return rows, hashlib.sha256(content).hexdigest()[:16]


def _lines(path: Path, text: str, whole: Exception) -> list[Any]:
    """An object on each line. Where that is not what the file seems to be, the error is that of the `whole` file."""
    rows, lines = [], [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for number, line in lines:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if path.suffix != ".jsonl" and not any(isinstance(row, dict) for row in rows):
                raise FoveateError(f"{path} is not JSON: {whole}") from None
            what = getattr(error, "msg", None) or str(error)
            raise FoveateError(f"{path} is not JSON lines: line {number} of {lines[-1][0]}: {what}") from None
    return rows


# ---- tables ----------------------------------------------------------------------------------------------------------------------------


class TableRows:
    """What the datasets library reads."""

    def __init__(self, where: str | Path, split: str | None, config: str | None, limit: int | None, hub: bool) -> None:
        import datasets

        found = _load(where, config, hub)
        wanted = parts(split, {name: len(rows) for name, rows in found.items()}, str(where))
        pieces = [found[name].select(range(start, end)) for name, start, end in wanted]
        rows = pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        self.name = f"{where}[{split}]" if split is not None and len(found) > 1 else str(where)
        self.columns: Sequence[str] | None = list(rows.column_names)
        self._features = rows.features
        self._rows = rows.with_format("arrow")  # this way nothing is decoded

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._read(index, index + 1)[0]

    def _read(self, start: int, end: int) -> list[dict[str, Any]]:
        try:
            rows = self._rows[start:end].to_pylist()
            return [{name: _plain(value, self._features[name]) for name, value in row.items()} for row in rows]
        except Exception as error:  # of a broken file, which is read no earlier than here
            raise FoveateError(f"cannot be read from {self.name}: {_reason(error)}") from None

    @cached_property
    def fingerprint(self) -> str:
        """Over every row's values: the same for a file that was touched, copied or compressed anew."""
        digest = hashlib.sha256(repr(self.columns).encode("utf-8", "surrogatepass"))
        for start in range(0, len(self), LINES):
            try:
                rows: Any = self._read(start, min(start + LINES, len(self)))
            except FoveateError as error:
                rows = str(error)
            _feed(digest, rows)
        return digest.hexdigest()[:16]

    def lengths(self) -> np.ndarray:
        if "conversations" not in (self.columns or []):
            return np.zeros(len(self), dtype=np.int64)
        talks = self._rows.select_columns(["conversations"])
        return np.array([_length(talks[i : i + 1].to_pylist()[0]["conversations"]) for i in range(len(self))])


def _load(where: str | Path, config: str | None, hub: bool) -> dict[str, Any]:
    """Every split of a data set by its name."""
    import datasets

    path = Path(where).expanduser()
    try:
        files = [] if path.exists() else sorted(glob(str(path)))
        if path.is_file() or files:
            kind = (files[0] if files else path.suffix).rpartition(".")[2]
            if kind not in ("parquet", "arrow"):
                raise FoveateError(
                    f"{path} is no data set: give a .json, .jsonl or .parquet file, or a folder of parquet files, or one that "
                    "datasets.save_to_disk or foveate data scenes wrote"
                )
            found = datasets.load_dataset(kind, name=config, data_files=files or str(path))
        elif path.is_dir():
            saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
            found = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path), name=config)
        elif hub and str(where).count("/") <= 1 and not path.suffix and not path.is_absolute():
            found = datasets.load_dataset(str(where), name=config)
        else:
            raise FoveateError(f"{readable(str(where))} cannot be loaded: there is no file or folder {path.absolute()}")
    except FoveateError:
        raise
    except IndexError:  # how the library fails on a saved set without any rows
        return {"train": datasets.Dataset.from_dict({})}
    except Exception as error:  # that library and its readers raise anything at all for broken files
        raise FoveateError(_why(path, where, error)) from None
    if isinstance(found, datasets.DatasetDict):
        if path.is_dir() and all({"image", "audio", "video", "label"}.issuperset(rows.column_names) for rows in found.values()):
            written = 'a JSON list of {"image": "a.jpg", "question": "...", "answer": "..."} to ask, or of conversations to train on'
            told = _inside(path) or f". Write that to a file, {written}, and name the file"
            raise FoveateError(f"{path} holds pictures, but nothing that is asked or said about them{told}, with images for their folder")
        return dict(found)
    return {str(found.split or "train"): found}


def _why(path: Path, where: str | Path, error: Exception) -> str:
    if not os.path.exists(path):
        return f"{where} cannot be loaded: there is no file or folder {path.absolute()}, and the hub says: {_reason(error)}"
    for file in [path] if path.is_file() else sorted(path.rglob("*.parquet")):
        with file.open("rb") as opened:
            pointer = opened.read(40).startswith(b"version https://git-lfs")
        if pointer:
            return f"{path} was cloned without its large files, such as {file.name}: `git lfs pull` in its folder fetches them"
        if _is_empty(file):
            return f"{path} is empty: it has no rows" if file == path else f"{path}: {file.name} is empty; take it out of the folder"
    if path.is_dir() and "onfig name is missing" in str(error):
        return f"{path} has several configurations: say which with config=. {_reason(error)}"
    if path.is_dir():
        return (
            f"{path} is no data set that can be read: {_reason(error)}{_inside(path)}. A folder may hold parquet files, or be one that "
            "datasets.save_to_disk or foveate data scenes wrote"
        )
    return f"{path} cannot be read as a data set: {_reason(error)}"


def _inside(path: Path) -> str:
    """The files of a folder that may be meant, as a part of a message."""
    found = sorted(readable(file.name) for file in path.iterdir() if file.suffix in (".json", ".jsonl", ".parquet"))
    return f"; it holds {', '.join(found[:5])}: name one of them" if found else ""


def _is_empty(file: Path) -> bool:
    """Whether a parquet file has no rows, which the library does not say."""
    import pyarrow.parquet

    try:
        return bool(pyarrow.parquet.read_metadata(file).num_rows == 0)
    except Exception:  # it is broken, which the library does say
        return False


def _reason(error: Exception) -> str:
    """The library wraps errors; the innermost one tells what is wrong."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return readable(" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")


def _plain(value: Any, feature: Any) -> Any:
    """JSON that a column keeps as text, because its rows are not alike, is read; all else stays as it is."""
    if value is None:
        return None
    if type(feature).__name__ == "Json":
        return json.loads(value) if isinstance(value, str | bytes) else value
    if isinstance(feature, dict) and isinstance(value, dict):
        return {name: _plain(item, feature.get(name)) for name, item in value.items()}
    inner = getattr(feature, "feature", None)
    return [_plain(item, inner) for item in value] if inner is not None and isinstance(value, list) else value


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        digest.update(b"{%d" % len(value))
        for name, item in value.items():
            _feed(digest, name)
            _feed(digest, item)
    elif isinstance(value, list):
        digest.update(b"[%d" % len(value))
        for item in value:
            _feed(digest, item)
    else:
        content = value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
        digest.update(b"%s%d:" % (type(value).__name__.encode(), len(content)))
        digest.update(content)


def _length(turns: Any) -> int:
    """Characters of a conversation; 0 where it is none, which the check of samples says."""
    if isinstance(turns, dict):
        return sum(len(text) for text in turns.get("value") or [] if isinstance(text, str))
    texts = [turn.get("value") for turn in turns or [] if isinstance(turn, dict)] if isinstance(turns, list | None) else []
    return sum(len(text) for text in texts if isinstance(text, str))
