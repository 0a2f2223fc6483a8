"""`foveate encode`: the pictures of a file -> what a reducer leaves of their embeddings, on disk, for engines that take embeddings and for
caches of training.

    OUT/index.json                each picture with its shard, each row with its pictures
    OUT/shards/000000.safetensors "<picture>.embeddings" (M, D), "<picture>.kept" (M,), "<picture>.positions" (M,) or (3, M)

A picture is named by the hash of its encoded bytes, so that it is there once for each block of rows that shows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from foveate.anatomy import Anatomy, read
from foveate.batch.answering import Job
from foveate.batch.parts import Alone, Done, Parts, carry_out, entry, failures
from foveate.contract import Noise
from foveate.data.conversations import Unusable
from foveate.data.pixels import open_image, outline
from foveate.errors import FoveateError
from foveate.files import write_json
from foveate.inference import Broken, answering, load_model, model_inputs, prompts
from foveate.probes.encoding import Encodings, Item
from foveate.processes import processes
from foveate.reducers import Reducer
from foveate.reducers.exporting import Reduced, exported, in_grid, reduce_embeddings
from foveate.tokens import Layout

INDEX, SHARDS = "index.json", "shards"


def encode(job: Job, out: str | Path, *, progress: bool = True) -> Done | None:
    """Writes what the job's reducer leaves of every picture of its data, see the module.

    The same call goes on where an interrupted one was. Started by `accelerate launch`, each process takes its share; None is returned in
    all but the main one.
    FoveateError for a reducer that is not exportable, with the reason and the nearest that is, and for what else is wrong with the job as
    a whole.
    """
    reducer = exported(job.reducing, "foveate encode")
    questions, folder = job.questions(), Path(out)
    parts = Parts(folder / SHARDS, len(questions), job.batch_size, ".safetensors")

    def work(blocks: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        encoder = Encoder(job, reducer, str(processes().device))
        for block in blocks:
            yield block, encoder(parts.rows(block))

    return carry_out(folder, lambda: {"job": "encode", **job.facts(questions)}, parts, work, partial(_indexed, folder, parts), progress)


class Stop(Exception):
    """The model has come to its language model."""


class Encoder:
    """A model up to its language model, and a reducer."""

    def __init__(self, job: Job, reducer: Reducer, device: str | None = None) -> None:
        self.model, self.processor = load_model(job.model, device, dtype=job.dtype)
        self.questions, self._reducer = job.questions(), reducer
        anatomy = read(self.model)
        if anatomy.weighs:
            raise FoveateError("the images of this model become weights of its decoder, which embeddings do not hold; use foveate generate")
        self._grid = hasattr(anatomy.core, "get_rope_index")  # its positions are places in a grid, which are never renumbered
        self._found: list[tuple[Item, Tensor]] = []
        self._alone = Alone()
        Encodings(anatomy, [*reducer.sites(1)[0].needs, Noise()], self._seen)
        anatomy.decoder.register_forward_pre_hook(partial(_stop, anatomy), with_kwargs=True)

    def __call__(self, rows: Sequence[int]) -> bytes:
        """A shard: the tensors of every picture of these rows, and what the index is to say of them."""
        shown: dict[str, Image.Image] = {}
        names: dict[str, str] = {}
        told: dict[int, list[str] | FoveateError] = {}
        for row in rows:
            try:
                question = self.questions[row]
                if question.clips:
                    raise Unusable("is about a clip, and embeddings are written of pictures; use foveate generate")
                pictures = question.pictures
                digests = [outline(picture).digest.hex() for picture in pictures]
                shown |= {digest: open_image(picture) for digest, picture in zip(digests, pictures, strict=True) if digest not in shown}
            except FoveateError as error:
                told[row] = error
                continue
            told[row] = digests
            names |= {digest: picture.name for digest, picture in zip(digests, pictures, strict=True)}
        found = dict(zip(shown, self._alone(self.reduced, list(shown.values())), strict=True))
        tensors: dict[str, Tensor] = {}
        images: dict[str, Any] = {}
        for digest, each in found.items():
            if not isinstance(each, FoveateError):
                left, tokens = each
                tensors |= {f"{digest}.{part}": value.cpu().contiguous() for part, value in left._asdict().items()}
                images[digest] = {"image": names[digest], "tokens": tokens, "kept": len(left.kept)}
        lines = [self._line(row, told[row], found) for row in rows]
        return save(tensors, metadata={"rows": json.dumps(lines), "images": json.dumps(images)})

    def _line(self, row: int, told: list[str] | FoveateError, found: Mapping[str, Any]) -> dict[str, Any]:
        wrong = next((found[d] for d in told if isinstance(found[d], FoveateError)), None) if isinstance(told, list) else told
        return entry(row, self.questions.name(row), {"images": told} if wrong is None else wrong)

    def reduced(self, images: Sequence[Image.Image]) -> list[tuple[Reduced, int]]:
        """Of each image what is left of it, and of how many tokens."""
        self._found = []
        texts = prompts(self.processor, [""] * len(images))
        inputs = model_inputs(self.processor, [[image] for image in images], texts).to(self.model.device, self.model.dtype)
        with answering(self.model):
            with suppress(Stop):
                self.model(**inputs)
            if len(self._found) != len(images):
                raise Broken(
                    f"a {self.model.config.model_type} model encodes {len(images)} images in {len(self._found)} pieces, with text between: "
                    "their embeddings do not say how they stand in a prompt; use foveate generate",
                )
            return [(self._reduce(item, features), len(item)) for item, features in self._found]

    def _reduce(self, item: Item, features: Tensor) -> Reduced:
        layout = Layout.item(item.kind, item.place)
        return reduce_embeddings(
            self._reducer, features, layout, item.values, key=item.key, positions=in_grid(layout) if self._grid else None
        )

    def _seen(self, modality: str, items: list[Item], features: list[Tensor]) -> None:
        self._found += zip(items, features, strict=True)


def _stop(anatomy: Anatomy, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if anatomy.injected(kwargs) is not None:
        raise Broken(
            "this model adds features between its decoder layers too (DeepStack), which embeddings do not hold; use foveate generate",
        )
    raise Stop


def _indexed(folder: Path, parts: Parts) -> Done:
    images: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for block in parts.blocks:
        with safe_open(parts.path(block), "pt") as shard:
            said = shard.metadata()
        rows += json.loads(said["rows"])
        images |= {digest: {"shard": parts.path(block).name, **told} for digest, told in json.loads(said["images"]).items()}
    write_json(folder / INDEX, {"images": images, "rows": rows})
    tokens, kept = (sum(of[count] for of in images.values()) for count in ("tokens", "kept"))
    return Done(folder / INDEX, len(rows), failures(rows), len(images), tokens, kept)


class Embeddings:
    """What `encode` has written into a folder, by the numbers of rows. FoveateError for a folder without a finished job."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        try:
            told = json.loads((self._folder / INDEX).read_text(encoding="utf-8"))
        except OSError:
            raise FoveateError(f"{folder} holds no embeddings (no {INDEX}): foveate encode writes it when all of them are there") from None
        self.images, self.rows = told["images"], told["rows"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> list[Reduced]:
        """Of each of the row's pictures. FoveateError with the reason for a row that failed."""
        told = self.rows[row]
        if "error" in told:
            raise FoveateError(f"{told['id']}: {told['error']}")
        return [self._read(digest) for digest in told["images"]]

    def _read(self, digest: str) -> Reduced:
        with safe_open(self._folder / SHARDS / self.images[digest]["shard"], "pt") as shard:
            return Reduced(*(shard.get_tensor(f"{digest}.{part}") for part in Reduced._fields))
