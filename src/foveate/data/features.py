"""Features of a frozen vision tower on disk: a picture is encoded once, for all epochs, stages and runs that ask the same of one tower.

A store is a folder FOLDER/KEY, where KEY is a hash of all that its features depend on beside the picture (`facts_of`). A picture is known
by a hash of its encoded bytes (`foveate.data.pixels.outline`), a crop of it by that and its box: then whoever reads features need not
decode and resize the picture, which often costs more than reading them. Two files of one picture in different formats are two entries.

    FOLDER/KEY/about.json              what the key is a hash of, for whoever finds the folder
    FOLDER/KEY/<random>.safetensors    features of some pictures, whole or not there
        images     (pictures, 16) uint8, digests
        sums       (pictures,) int64, CRC-32 of each picture's digest and features
        levels.N   (pictures, patches, width), for each feature level
        scales.N   (pictures, patches) float32, int8 alone: what the numbers of a patch are multiplied by

Any number of processes and runs may read and add at once: nobody writes where another does, and what two have written is kept once in
mind. A shard that is broken is removed as soon as that is seen, said in the log, and its pictures are encoded again by the next `fill`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import PIL
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from foveate.data.pixels import BACKGROUND, DEPTHS
from foveate.errors import FoveateError
from foveate.files import sync
from foveate.tokens import WHOLE

log = logging.getLogger(__name__)

Storage = Literal["exact", "half", "int8"]
Given = TypeVar("Given")

FORMAT = 1  # raised when shards, or pictures as `foveate.data.pixels` shows them, are not what they were
DIGEST = 16  # bytes
PIECE = 64  # patches that are turned from int8 at a time
SHARD, MOST = 2**27, 256  # bytes and pictures of a shard
ABANDONED = 3600.0  # seconds after which a file under way is taken for one that a kill has left
VOLATILE = (
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
)  # no feature depends on it


class Broken(Exception):
    """A shard that is not what was written."""


@dataclass(frozen=True)
class Shape:
    """What a tower makes of one picture: `levels` tensors (patches, width) of `dtype`."""

    levels: int
    patches: int
    width: int
    dtype: torch.dtype

    def stored(self, storage: Storage) -> torch.dtype:
        """The type of the numbers on disk. "half" is bfloat16 for bfloat16 and float16 for all others."""
        if storage == "int8":
            return torch.int8
        return torch.float16 if storage == "half" and self.dtype.itemsize > 2 else self.dtype

    def bytes_each(self, storage: Storage) -> int:
        """Bytes on disk of one picture."""
        scale = 4 if storage == "int8" else 0
        return self.levels * self.patches * (self.width * self.stored(storage).itemsize + scale) + DIGEST + 8

    def per_shard(self, storage: Storage) -> int:
        """How many pictures share a file."""
        return min(MOST, max(1, SHARD // self.bytes_each(storage)))

    def size(self, pictures: int, storage: Storage) -> int:
        """Bytes on disk of so many pictures, headers of shards included: at most that, but for what runs that overlap write twice."""
        shards = -(-pictures // self.per_shard(storage))
        return pictures * self.bytes_each(storage) + shards * (512 + 256 * self.levels)


# ---- keys ------------------------------------------------------------------------------------------------------------------------------


def crop_digest(picture: bytes, recipe: object) -> bytes:
    """16 bytes that stand for a crop of a picture, from the picture's own digest, which is that of the whole, and `Crop.recipe`."""
    return picture if recipe == WHOLE else hashlib.blake2b(picture + repr(recipe).encode(), digest_size=DIGEST).digest()


def facts_of(tower: nn.Module, layers: Sequence[int], image_size: int, image_processor: Any, precision: str) -> dict[str, Any]:
    """All that features depend on beside the picture: the tower's weights by their content, its configuration and attention, the hidden
    states that are read, the pixels that the processor makes of two fixed pictures, and the precision of the run.

    Asked for pixels, a processor answers for its settings, its code and the libraries below it alike."""
    config: Any = tower.config
    plain = {name: value for name, value in config.to_dict().items() if name not in VOLATILE}
    return {
        "format": FORMAT,
        "tower": [type(tower).__name__, json.loads(json.dumps(plain, default=str)), getattr(config, "_attn_implementation", None)],
        "weights": weights_digest(tower),
        "layers": list(layers),
        "image_size": image_size,
        "pictures": [PIL.__version__, BACKGROUND, list(DEPTHS)],
        "pixels": pixels_digest(image_processor),
        "precision": precision,
    }


def weights_digest(module: nn.Module) -> str:
    """A hash of all parameters and buffers, with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value.detach().cpu()))
    return digest.hexdigest()


def pixels_digest(image_processor: Any) -> str:
    """A hash of what an image processor makes of a small upright and a large wide picture of noise."""
    digest = hashlib.sha256()
    for number, (height, width) in enumerate(((61, 37), (700, 1009))):
        noise = np.random.RandomState(number).randint(0, 256, (height, width, 3), dtype=np.uint8)
        pixels = image_processor([Image.fromarray(noise)], return_tensors="pt")["pixel_values"]
        digest.update(f"{pixels.dtype} {tuple(pixels.shape)}\n".encode())
        digest.update(_bytes(pixels))
    return digest.hexdigest()


def _bytes(value: Tensor) -> Any:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy()


# ---- numbers ---------------------------------------------------------------------------------------------------------------------------


def pack(level: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Features (pictures, patches, width) as they are stored, and the scales (pictures, patches) of int8.

    int8 is symmetric: the largest number of a patch becomes 127, and each is off by at most half of a 127th of it. FoveateError for
    numbers that are not finite, or too large for float16."""
    if level.dtype == stored:
        return level, None
    if not level.isfinite().all():
        raise FoveateError("the tower gives features that are not finite (NaN or infinity), which only storage exact can keep")
    if stored != torch.int8:
        half = level.to(stored)
        if not half.isfinite().all():
            raise FoveateError(f"the tower gives features up to {level.abs().max():.4g}, too large for storage half: use exact or int8")
        return half, None
    scale = level.float().abs().amax(-1) / 127
    steps = level.float() / torch.where(scale > 0, scale, 1).unsqueeze(-1)
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def unpack(stored: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """Writes features as they were packed into `out`, of their shape and the tower's type."""
    if scale is None:
        out.copy_(stored)
        return
    for at in range(0, len(stored), PIECE):  # temporaries of many megabytes between smaller things would leave a heap in pieces
        out[at : at + PIECE] = stored[at : at + PIECE].float() * scale[at : at + PIECE].unsqueeze(-1)


def _sum(digest: bytes, parts: Iterable[Tensor | None]) -> int:
    found = zlib.crc32(digest)
    for part in parts:
        if part is not None:
            found = zlib.crc32(_bytes(part), found)
    return found


# ---- the store -------------------------------------------------------------------------------------------------------------------------


class FeatureStore:
    """Features by the digest of their picture. `facts`: what `facts_of` gave; a store of other facts, shape or storage is another folder.

    A store is a picture of the folder at one time: `refresh` sees what others have added since. It may be forked and pickled.
    FoveateError where the folder cannot be made."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], shape: Shape, storage: Storage = "exact") -> None:
        self.shape, self.storage = shape, storage
        about = {
            "storage": storage,
            "levels": [shape.levels, shape.patches, shape.width, str(shape.dtype).removeprefix("torch.")],
            "facts": dict(facts),
        }
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = folder / key
        try:
            if not (self.folder / "about.json").is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                put(self.folder / "about.json", json.dumps(about, indent=1).encode())
        except OSError as error:
            raise FoveateError(f"the folder for features {folder} cannot be written to: {error.strerror or error}") from None
        self._shards: list[str] = []
        self._index: dict[bytes, int] = {}  # place of the shard * MOST + row: small, as every data worker has a copy
        self._files: dict[str, Any] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._index

    def __len__(self) -> int:
        return len(self._index)

    def missing(self, digests: Iterable[bytes]) -> list[bytes]:
        """Those that are not there, each once, in their order."""
        return [digest for digest in dict.fromkeys(digests) if digest not in self._index]

    def refresh(self) -> None:
        """See shards that others have added and forget those that they have removed. Shards that are not whole are removed."""
        there = {path.name for path in self.folder.glob("*.safetensors")}
        for name in self._shards:
            if name and name not in there:
                self._forget(name)
        for name in sorted(there.difference(self._shards)):
            try:
                images = self._open(name).get_tensor("images")
            except Broken as error:
                self._drop(name, error)
                continue
            self._shards.append(name)
            first = (len(self._shards) - 1) * MOST
            self._index.update((row.tobytes(), first + number) for number, row in enumerate(images.numpy()))

    def batch(self, digests: Sequence[bytes]) -> Tensor:
        """(pictures, levels, patches, width) of some pictures, in the tower's type. KeyError for one that is not there; FoveateError for
        one that has been damaged since the store was checked."""
        found = torch.empty(len(digests), self.shape.levels, self.shape.patches, self.shape.width, dtype=self.shape.dtype)
        for levels, digest in zip(found, digests, strict=True):
            for level, (stored, scale) in zip(levels, self._stored(digest), strict=True):
                unpack(stored, scale, level)
        return found

    def add(self, digests: Sequence[bytes], levels: Sequence[Tensor]) -> None:
        """Write pictures with their levels (pictures, patches, width) as a shard of their own; it is on the disk when this returns.

        FoveateError for features of another shape, and for those that the storage cannot hold; OSError as of any writing."""
        if len(digests) > MOST:
            raise FoveateError(f"a shard of features holds {MOST} pictures at most, not {len(digests)}")
        wanted = (len(digests), self.shape.patches, self.shape.width)
        given = [(tuple(level.shape), level.dtype) for level in levels]
        if given != [(wanted, self.shape.dtype)] * self.shape.levels:
            raise FoveateError(f"features of {self.shape.levels} x {wanted} in {self.shape.dtype} were expected, found {given}")
        packed = [pack(level.detach().cpu(), self.shape.stored(self.storage)) for level in levels]
        tensors = {"images": torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST).copy())}
        sums = [_sum(digest, (part if part is None else part[row] for one in packed for part in one)) for row, digest in enumerate(digests)]
        tensors["sums"] = torch.tensor(sums, dtype=torch.int64)
        for number, (level, scale) in enumerate(packed):
            tensors[f"levels.{number}"] = level.contiguous()
            if scale is not None:
                tensors[f"scales.{number}"] = scale.contiguous()
        put(self.folder / f"{secrets.token_hex(8)}.safetensors", save(tensors))
        self.refresh()

    def check(self, digests: Iterable[bytes], progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read all shards that hold any of these pictures and remove those that are broken. `progress(done, total)` counts shards."""
        names = sorted({self._place(digest)[0] for digest in digests if digest in self._index})
        for done, name in enumerate(names, start=1):
            try:
                for row, image in enumerate(self._open(name).get_tensor("images").numpy()):
                    self._read(name, row, image.tobytes())
            except Broken as error:
                self._drop(name, error)
            progress(done, len(names))

    def sweep(self) -> None:
        """Remove files that were under way when a kill ended their process."""
        for path in self.folder.glob("*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
            except FileNotFoundError:  # whole now, or removed by another
                continue

    def _place(self, digest: bytes) -> tuple[str, int]:
        shard, row = divmod(self._index[digest], MOST)
        return self._shards[shard], row

    def _open(self, name: str) -> Any:
        """The shard, mapped into memory. Broken where its header is not that of a shard of this store or its length is another."""
        if name not in self._files:
            try:
                file = safe_open(self.folder / name, "pt")
                count = file.get_slice("images").get_shape()[0]
                found = {key: (file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
            except FileNotFoundError:
                raise Broken("it is gone") from None
            except SafetensorError as error:
                raise Broken(str(error)) from None
            if found != self._layout(count) or count > MOST:
                raise Broken("its header is another")
            self._files[name] = file
        return self._files[name]

    def _layout(self, count: int) -> dict[str, tuple[list[int], str]]:
        """Shapes and types of a shard's tensors, as safetensors names them."""
        types = {torch.int8: "I8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
        layout = {"images": ([count, DIGEST], "U8"), "sums": ([count], "I64")}
        for level in range(self.shape.levels):
            layout[f"levels.{level}"] = ([count, self.shape.patches, self.shape.width], types[self.shape.stored(self.storage)])
            if self.storage == "int8":
                layout[f"scales.{level}"] = ([count, self.shape.patches], "F32")
        return layout

    def _stored(self, digest: bytes) -> list[tuple[Tensor, Tensor | None]]:
        for again in (False, True):
            name, row = self._place(digest)
            try:
                return self._read(name, row, digest)
            except Broken as error:
                if again or (self.folder / name).is_file():
                    raise FoveateError(f"features {self.folder / name}: {error}. Start again: they are then made anew") from None
                self.refresh()  # another run has removed it, and may have made it anew
        raise AssertionError

    def _read(self, name: str, row: int, digest: bytes) -> list[tuple[Tensor, Tensor | None]]:
        """The levels of a picture and their scales, as they are stored."""
        file = self._open(name)

        def part(key: str) -> Tensor:
            value: Tensor = file.get_slice(key)[row]
            return value

        scales = [part(f"scales.{level}") if self.storage == "int8" else None for level in range(self.shape.levels)]
        stored = [(part(f"levels.{level}"), scale) for level, scale in enumerate(scales)]
        if _sum(digest, (value for one in stored for value in one)) != int(part("sums")):
            raise Broken(f"the checksum of picture {row} does not agree")
        return stored

    def _drop(self, name: str, error: Broken) -> None:
        if (self.folder / name).is_file():  # no other process was first
            log.warning("features %s are broken (%s): they are removed and made anew from the pictures", self.folder / name, error)
            (self.folder / name).unlink(missing_ok=True)
        self._forget(name)

    def _forget(self, name: str) -> None:
        self._files.pop(name, None)
        if name in self._shards:
            place = self._shards.index(name)
            self._shards[place] = ""
            self._index = {digest: number for digest, number in self._index.items() if number // MOST != place}


def put(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there, and on the disk when this returns, whoever else writes it at the same time."""
    temporary = path.with_name(f"{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


# ---- filling it ------------------------------------------------------------------------------------------------------------------------


def fill(
    store: FeatureStore,
    pictures: Mapping[bytes, Given],
    load: Callable[[Given], Tensor],
    encode: Callable[[Tensor], Sequence[Tensor]],
    batch: int = 32,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> int:
    """Encode what a store lacks of `pictures` (by their digests), after a check of what it has. Returns how many were encoded.

    load      a picture -> its pixels (channels, height, width); called from several threads
    encode    pixels (batch, channels, height, width) -> the levels (batch, patches, width)
    share     (rank, processes): each process does its part, and calls `store.refresh` when all have ended
    progress  is called with "checking" and shards, then with "encoding" and pictures

    A kill at any moment loses the shard under way alone. Pictures share a shard by their place in `pictures`, whatever is there already,
    so that a filling that was interrupted encodes the rest in the batches in which it would have."""
    rank, processes = share
    digests, rows = list(pictures), store.shape.per_shard(store.storage)
    chunks = [digests[start : start + rows] for start in range(0, len(digests), rows)][rank::processes]
    store.sweep()
    store.refresh()
    store.check((digest for chunk in chunks for digest in chunk), lambda done, total: progress("checking", done, total))
    done, encoded, total = 0, 0, sum(map(len, chunks))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        first = secrets.randbelow(max(1, len(chunks)))  # runs that fill a store at the same time begin at different places
        for chunk in [*chunks[first:], *chunks[:first]]:
            store.refresh()
            missing = store.missing(chunk)
            done += len(chunk) - len(missing)
            loading = [pool.submit(load, pictures[digest]) for digest in missing]
            made: list[Sequence[Tensor]] = []
            try:
                while loading:
                    now, loading = loading[:batch], loading[batch:]
                    made.append(encode(torch.stack([one.result() for one in now])))
                    progress("encoding", done := done + len(now), total)
            finally:
                for one in loading:
                    one.cancel()
            if missing:
                store.add(missing, [torch.cat(level) for level in zip(*made, strict=True)])
                encoded += len(missing)
            else:
                progress("encoding", done, total)
    return encoded
