"""Random data files and pictures: nothing but FoveateError comes of them, and every row is read or named as bad.

`python -m tests.situations.test_fuzz_data 2500` tries so many of each kind and says how long the slowest took.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.data.conversations import Conversations, find_bad
from foveate.data.pixels import PictureError, open_image
from foveate.errors import FoveateError
from foveate.evaluation.sources import world_samples
from foveate.evaluation.tasks import load_task

EXAMPLES = {"text": 150, "tables": 80, "pictures": 600}
ROWS, BROKEN = "rows", "broken"

texts = st.text(st.characters(exclude_categories=()), max_size=8)  # half surrogate pairs and NULs, too
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(["0.png", "torn.png", "no.png", "../x", "a/b", "/"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts | st.sampled_from(["bytes", "path", "from", "value"]), inner, max_size=3)
    ),
    max_leaves=6,
)
said = st.sampled_from(["<image>\nWhat?", "<image> or <image>?", "x", "", "<video>"]) | texts
turns = st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": said}), max_size=4)
talk = said.map(lambda text: [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}])
names = st.sampled_from(["0.png", "torn.png", "no.png", None])
row = st.fixed_dictionaries(
    {},
    optional={
        "id": texts | st.integers(),
        "image": names | values,
        "images": st.lists(names, max_size=2) | values,
        "conversations": talk | turns | values,
        "question": said | values,
        "answer": said | values,
        "video": values,
        "family": values,
    },
)
good = st.fixed_dictionaries({"image": st.just("0.png"), "conversations": talk, "question": st.just("What?"), "answer": said})
world = st.fixed_dictionaries(
    {"id": texts, "image": names, "family": st.sampled_from(["count", "reading", "x"]), "question": said, "answer": st.just("2") | texts}
)
held = st.one_of(
    st.lists(good, min_size=1, max_size=3), st.lists(world, min_size=1, max_size=3), st.lists(good | row | values, min_size=1, max_size=5)
)


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """A file with some bytes changed, or cut off, or more behind it."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        if changed:
            changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    end = draw(st.integers(0, len(changed)) | st.just(len(changed)))
    return bytes(changed[:end]) + draw(st.binary(max_size=4))


@st.composite
def data_files(draw: Any) -> tuple[str, bytes]:
    """(ending, content) of a file of JSON, whole or not."""
    rows, ending = draw(held), draw(st.sampled_from(["json", "jsonl"]))
    text = draw(st.sampled_from([json.dumps(rows), "\n".join(map(json.dumps, rows)), json.dumps(rows[0])]))
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16"])))
    if draw(st.booleans()):
        content = draw(damaged(content) | st.binary(max_size=30))
    return ending, content


@st.composite
def tables(draw: Any) -> bytes:
    """A parquet file, whole or not, of columns that pyarrow makes of anything."""
    count = draw(st.integers(0, 3))
    columns: dict[str, Any] = {}
    for name, kind in {
        "conversations": talk | turns,
        "image": names | st.binary(max_size=5),
        "question": said,
        "answer": said,
        "n": values,
    }.items():
        if draw(st.integers(0, 3)):
            try:
                columns[name] = pa.array(draw(st.lists(kind, min_size=count, max_size=count)))
            except (pa.ArrowException, ValueError, TypeError, OverflowError):
                columns[name] = pa.array(["x"] * count)
    out = io.BytesIO()
    try:
        pq.write_table(pa.table(columns), out)
    except pa.ArrowException:  # what is no table cannot be a file of one
        return b"PAR1"
    return draw(damaged(out.getvalue())) if draw(st.booleans()) else out.getvalue()


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "I;16B", "La", "RGBa"]
WIDTH = {"I;16": 2, "I;16B": 2, "I": 4, "F": 4}


@st.composite
def pictures(draw: Any) -> Any:
    """A picture of any mode, or a file of one, whole or not."""
    mode, (width, height) = draw(st.sampled_from(MODES)), (draw(st.integers(0, 9)), draw(st.integers(0, 9)))
    image = Image.new(mode, (width, height))
    size = len(image.tobytes()) if width * height else 0
    if size:
        image = Image.frombytes(mode, (width, height), np.random.default_rng(draw(st.integers(0, 99))).bytes(size))
    if draw(st.integers(0, 3)) == 0:
        return image
    kind = draw(st.sampled_from(["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "ICO", "PPM", "TGA", "JPEG2000", "AVIF"]))
    exif = Image.Exif()
    exif[0x0112] = draw(st.integers(0, 9))
    note = draw(st.sampled_from([exif.tobytes(), b"", b"Exif\0\0MM\0*"]))
    options = [{}, {"exif": note}, {"icc_profile": draw(st.binary(max_size=200))}, {"transparency": draw(st.integers(0, 255))}]
    out = io.BytesIO()
    try:
        image.save(out, kind, **draw(st.sampled_from(options)))
    except Exception:  # Pillow writes not every mode in every kind of file
        return out.getvalue()
    return draw(damaged(out.getvalue())) if draw(st.booleans()) else out.getvalue()


def pictures_in(where: Path) -> Path:
    where.mkdir()
    Image.new("RGB", (4, 4)).save(where / "0.png")
    (where / "torn.png").write_bytes((where / "0.png").read_bytes()[:40])
    return where


def read_whole(path: Path, images: Path) -> str:
    """Reads a file in every way; asserts that each row is trained on or named."""
    outcome = BROKEN
    try:
        data = Conversations.open(path, images)
    except FoveateError:
        pass
    else:
        outcome = ROWS
        bad = find_bad(data.source, None)
        known = {sample.index for sample in bad}
        assert len(known) == len(bad)
        assert all(sample.id and sample.reason and str(sample).encode() and "\n" not in str(sample) for sample in bad)
        for index in set(range(len(data))) - known:
            sample = data[index]
            assert sample.turns
            assert len(sample.images) == sum(text.count("<image>") for _, text in sample.turns)
        assert len(data.source.sizes()) == len(data)
        assert len(data.source.fingerprint) >= 16
    reads: dict[str, Callable[[], object]] = {"task": lambda: load_task(f"{path}:metric=exact,images={images}", progress=False)}
    if path.name == "test.json":
        reads["world"] = lambda: world_samples(path.parent)
    for name, read in reads.items():
        with suppress(FoveateError):
            read()
            outcome += f", {name}"
    return outcome


class Checks:
    """One method for each kind. `seen` counts what became of the examples, `slowest` is in seconds."""

    def __init__(self) -> None:
        self.work = Path(tempfile.mkdtemp())
        self.images = pictures_in(self.work / "images")
        self.seen: Counter[str] = Counter()
        self.slowest = 0.0

    def text(self, file: tuple[str, bytes]) -> None:
        path = self.work / f"test.{file[0]}"
        path.write_bytes(file[1])
        self.timed(lambda: read_whole(path, self.images))

    def tables(self, content: bytes) -> None:
        where = Path(tempfile.mkdtemp(dir=self.work))  # the datasets library remembers files by their names
        (where / "a.parquet").write_bytes(content)
        self.timed(lambda: read_whole(where / "a.parquet", self.images))

    def pictures(self, picture: Any) -> None:
        self.timed(lambda: self.shown(picture))

    @staticmethod
    def shown(picture: Any) -> str:
        try:
            image = open_image(picture)
        except PictureError as error:
            return "refused" if error.reason else "refused without a reason"
        assert image.mode == "RGB"
        assert min(image.size) > 0
        assert np.asarray(image).shape == (image.height, image.width, 3)
        return "shown"

    def timed(self, act: Callable[[], str]) -> None:
        start = time.perf_counter()
        self.seen[act()] += 1
        self.slowest = max(self.slowest, time.perf_counter() - start)


KINDS = {"text": data_files(), "tables": tables(), "pictures": pictures()}


def fuzz(kind: str, examples: int) -> Checks:
    checks = Checks()
    how = settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how(given(KINDS[kind])(lambda example: getattr(checks, kind)(example)))()
    return checks


@pytest.mark.parametrize("kind", KINDS)
def test_random_data(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = fuzz(kind, EXAMPLES[kind]).seen
    assert "refused without a reason" not in seen
    assert len(seen) > 1  # some are read, and some are not


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        tempfile.tempdir = scratch
        datasets.config.HF_DATASETS_CACHE = Path(scratch) / "cache"
        for kind in KINDS:
            found = fuzz(kind, int(sys.argv[1]))
            print(f"{kind}: {sum(found.seen.values())} examples, slowest {found.slowest:.2f} s, {dict(found.seen)}", flush=True)
