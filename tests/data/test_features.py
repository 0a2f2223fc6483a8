"""Features of pictures on disk: what is read is what was written, or it is made anew."""

from __future__ import annotations

import io
import logging
import math
import multiprocessing
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from tests.train.processes import dying, killed_in
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from foveate.data import features
from foveate.data.features import FeatureStore, Shape, Storage, crop_digest, facts_of, fill, pack, unpack
from foveate.data.pixels import Held, PictureError, outline, shown_size
from foveate.errors import FoveateError

SHAPE = Shape(levels=2, patches=6, width=8, dtype=torch.float32)


def pictures(count: int) -> dict[bytes, int]:
    return {number.to_bytes(16, "little"): number for number in range(count)}


def load(number: int) -> Tensor:
    return torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(number))


def encode(pixels: Tensor, shape: Shape = SHAPE) -> list[Tensor]:
    """A tower that gives each picture features of its own."""
    seeds = pixels.double().sum((1, 2, 3)).mul(1e6).long().tolist()
    each = [torch.Generator().manual_seed(abs(seed)) for seed in seeds]
    made = torch.stack([torch.randn(shape.levels, shape.patches, shape.width, generator=one) for one in each])
    return list(made.to(shape.dtype).unbind(1))


def never(pixels: Tensor) -> Sequence[Tensor]:
    raise AssertionError("the tower ran")


def filled(folder: Path, count: int = 10, storage: Storage = "exact", shape: Shape = SHAPE) -> FeatureStore:
    store = FeatureStore(folder, {}, shape, storage)
    assert fill(store, pictures(count), load, lambda pixels: encode(pixels, shape), batch=3) == count
    return store


def shards(store: FeatureStore) -> list[Path]:
    return sorted(store.folder.glob("*.safetensors"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "MOST", 4)


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


# ---- what is read is what was written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.usefixtures("small_shards")
def test_exact_storage_gives_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    shape = Shape(2, 6, 8, dtype)
    filled(tmp_path, shape=shape)
    store = FeatureStore(tmp_path, {}, shape)  # as another run finds it
    for digest, number in pictures(10).items():
        wanted = [level[0] for level in encode(load(number)[None], shape)]
        found = store.batch([digest])[0]
        assert [one.dtype for one in found] == [dtype] * 2
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert len(shards(store)) == 3


@pytest.mark.usefixtures("small_shards")
def test_a_batch_may_take_from_several_shards_and_twice_the_same(tmp_path: Path) -> None:
    store, numbers = filled(tmp_path), [9, 0, 5, 0]
    digests = list(pictures(10))
    found = store.batch([digests[number] for number in numbers])
    wanted = encode(torch.stack([load(number) for number in numbers]))
    assert torch.equal(found, torch.stack(wanted, 1))


def test_what_was_read_may_be_changed(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    (digest,) = pictures(1)
    before = store.batch([digest])[0][0].clone()
    store.batch([digest])[0][0].zero_()
    assert torch.equal(FeatureStore(tmp_path, {}, SHAPE).batch([digest])[0][0], before)


def unpacked(level: Tensor, stored: torch.dtype, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(level.shape, dtype=dtype)
    unpack(*pack(level, stored), out)
    return out


@given(st.integers(0, 10**6), st.floats(-6, 4), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=50)
def test_half_and_int8_err_no_more_than_they_say(seed: int, magnitude: float, dtype: torch.dtype) -> None:
    level = (torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed)) * 10**magnitude).to(dtype)
    level[0, 0] = 0
    shape = Shape(1, 5, 16, dtype)
    half = unpacked(level, shape.stored("half"), dtype)
    if dtype == torch.bfloat16:
        assert torch.equal(half, level)
    else:
        assert (half - level).abs().le(level.abs() * 2.0**-11 + 2.0**-25).all()
    whole = level.float()
    eight = unpacked(level, torch.int8)
    assert (eight - whole).abs().le(whole.abs().amax(-1, keepdim=True) / 127 * 0.5001).all()
    assert not eight[0, 0].any()


class Made(TorchDispatchMode):
    """The bytes of all tensors that anything makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
            self.bytes.append(made.nbytes)
        return made


@pytest.mark.parametrize("storage", ["exact", "half", "int8"])
def test_a_batch_is_the_one_large_thing_that_is_made_as_it_is_read(tmp_path: Path, storage: Storage) -> None:
    """Others beside it, freed one by one, leave a data worker's heap in pieces, and it grows without end."""
    patches, width = 8 * features.PIECE, 5
    shape = Shape(2, patches, width, torch.float32)
    store = FeatureStore(tmp_path, {}, shape, storage)
    digests = [bytes([number]) * features.DIGEST for number in range(3)]
    store.add(digests, [torch.randn(3, patches, width) for _ in range(2)])
    with Made() as made:
        whole = store.batch(digests)
    assert whole.shape == (3, 2, patches, width)
    assert made.bytes.count(whole.nbytes) == 1
    assert max(size for size in made.bytes if size != whole.nbytes) <= patches * width * shape.stored(storage).itemsize


@pytest.mark.parametrize("storage", ["half", "int8"])
@pytest.mark.usefixtures("small_shards")
def test_lossy_storage_goes_by_way_of_the_disk(tmp_path: Path, storage: Storage) -> None:
    filled(tmp_path, storage=storage)
    store = FeatureStore(tmp_path, {}, SHAPE, storage)
    for digest, number in pictures(10).items():
        wanted = [unpacked(level, SHAPE.stored(storage))[0] for level in encode(load(number)[None])]
        assert all(torch.equal(a, b) for a, b in zip(store.batch([digest])[0], wanted, strict=True))


@pytest.mark.parametrize(
    ("storage", "value", "reason"),
    [("half", 1e5, "too large for storage half"), ("half", math.inf, "not finite"), ("int8", math.nan, "not finite")],
)
def test_numbers_that_cannot_be_stored_are_refused(tmp_path: Path, storage: Storage, value: float, reason: str) -> None:
    store = FeatureStore(tmp_path, {}, SHAPE, storage)
    with pytest.raises(FoveateError, match=reason):
        fill(store, pictures(1), load, lambda pixels: [torch.full((1, 6, 8), value)] * 2)
    assert not list(store.folder.glob("*.tmp"))
    assert not shards(store)


def _given(made: list[Tensor], pixels: Tensor) -> list[Tensor]:
    return made


def test_a_tower_of_another_shape_is_refused(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, {}, SHAPE)
    for wrong in ([torch.zeros(1, 6, 8)], [torch.zeros(1, 6, 7)] * 2, [torch.zeros(1, 6, 8, dtype=torch.float64)] * 2):
        with pytest.raises(FoveateError, match="were expected"):
            fill(store, pictures(1), load, partial(_given, wrong))


@pytest.mark.parametrize("storage", ["exact", "half", "int8"])
@pytest.mark.parametrize("shape", [Shape(1, 16, 32, torch.float32), Shape(3, 64, 48, torch.bfloat16), SHAPE])
@pytest.mark.usefixtures("small_shards")
def test_the_size_is_known_before(tmp_path: Path, storage: Storage, shape: Shape) -> None:
    store = filled(tmp_path, 10, storage, shape)
    there = sum(path.stat().st_size for path in shards(store))
    assert 10 * shape.bytes_each(storage) < there <= shape.size(10, storage)
    assert shape.size(0, storage) == 0


# ---- keys ------------------------------------------------------------------------------------------------------------------------------


def tower(seed: int = 0, **changed: Any) -> CLIPVisionModel:
    torch.manual_seed(seed)
    given = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    return CLIPVisionModel(CLIPVisionConfig(**given, **changed)).eval()


def processor(**changed: Any) -> Any:
    return CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False, **changed)


def key(folder: Path, model: Any, layers: Sequence[int] = (1, 2), size: int = 16, pixels: Any = None, precision: str = "fp32") -> str:
    facts = facts_of(model, layers, size, pixels or processor(), precision)
    return FeatureStore(folder, facts, SHAPE).folder.name


def test_the_key_stays_with_what_features_depend_on(tmp_path: Path) -> None:
    model = tower()
    model.save_pretrained(tmp_path / "elsewhere")
    again = CLIPVisionModel.from_pretrained(tmp_path / "elsewhere")
    assert key(tmp_path, model) == key(tmp_path, tower()) == key(tmp_path, again) == key(tmp_path, tower(), pixels=processor())
    model.requires_grad_(False).train()
    assert key(tmp_path, model) == key(tmp_path, again)


def test_the_key_changes_with_all_that_features_depend_on(tmp_path: Path) -> None:
    touched = tower()
    with torch.no_grad():
        weight = dict(touched.named_parameters())["encoder.layers.0.mlp.fc1.weight"]
        weight[0, 0] = weight[0, 0].nextafter(torch.tensor(9.0))  # the last bit of one weight
    eager = tower()
    eager.set_attn_implementation("eager")
    keys = [
        key(tmp_path, tower()),
        key(tmp_path, touched),
        key(tmp_path, eager),
        key(tmp_path, tower(hidden_act="gelu")),
        key(tmp_path, tower().to(torch.bfloat16)),
        key(tmp_path, tower(), layers=(0, 2)),
        key(tmp_path, tower(), layers=(2, 1)),
        key(tmp_path, tower(), size=32),
        key(tmp_path, tower(), precision="bf16"),
        key(tmp_path, tower(), pixels=processor(image_mean=[0.5, 0.5, 0.5])),
        key(tmp_path, tower(), pixels=processor(resample=0)),
        FeatureStore(tmp_path, facts_of(tower(), (1, 2), 16, processor(), "fp32"), SHAPE, "half").folder.name,
    ]
    assert len(set(keys)) == len(keys)


def test_a_crop_is_known_by_its_picture_and_its_box() -> None:
    one, other = bytes(16), bytes([1] * 16)
    boxes = [(0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    found = [crop_digest(digest, box) for digest in (one, other) for box in boxes]
    assert found[0] == one
    assert {len(digest) for digest in found} == {16}
    assert len(set(found)) == 6


# ---- faults of the disk ----------------------------------------------------------------------------------------------------------------


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit of the header": lambda path: flip(path, 0.02),
    "the header's length": lambda path: flip(path, 0.0),
    "a bit in the middle": lambda path: flip(path, 0.6),
    "the last bit": lambda path: flip(path, 1.0),
    "half a file": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "nothing": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("storage", ["exact", "int8"])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.usefixtures("small_shards")
def test_a_damaged_shard_is_made_anew(tmp_path: Path, damage: str, storage: Storage, warnings_of: Callable[[], list[str]]) -> None:
    before = filled(tmp_path, storage=storage)
    wanted = before.batch(list(pictures(10)))
    broken = shards(before)[1]
    lost = sum(before._place(digest)[0] == broken.name for digest in pictures(10))
    sound = {path: path.stat().st_mtime_ns for path in shards(before) if path != broken}
    del before
    DAMAGE[damage](broken)
    store = FeatureStore(tmp_path, {}, SHAPE, storage)
    assert fill(store, pictures(10), load, encode, batch=3) == lost
    assert torch.equal(store.batch(list(pictures(10))), wanted)
    (said,) = warnings_of()
    assert str(broken) in said
    assert not broken.exists()
    assert {path: path.stat().st_mtime_ns for path in sound} == sound
    assert fill(FeatureStore(tmp_path, {}, SHAPE, storage), pictures(10), load, never) == 0
    assert len(warnings_of()) == 1


@pytest.mark.parametrize("place", [0.1, 0.3, 0.7, 0.95])
def test_damage_during_a_run_is_seen_when_it_is_read(tmp_path: Path, place: float) -> None:
    store = filled(tmp_path)
    (shard,) = shards(store)
    header = int.from_bytes(shard.read_bytes()[:8], "little") + 8
    with shard.open("r+b") as file:  # in place, as a disk does it, below the map that the store holds
        at = header + int(place * (shard.stat().st_size - header - 1))
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(FoveateError, match="Start again"):
        store.batch(list(pictures(10)))


def test_a_shard_that_another_run_has_made_anew_is_found(tmp_path: Path) -> None:
    store, other = filled(tmp_path), FeatureStore(tmp_path, {}, SHAPE)
    wanted = store.batch(list(pictures(10)))
    store = pickle.loads(pickle.dumps(store))  # as a data worker has it
    for shard in shards(store):
        shard.unlink()
    assert fill(other, pictures(10), load, encode) == 10
    assert torch.equal(store.batch(list(pictures(10))), wanted)


def test_a_picture_that_is_not_there_is_a_key_error(tmp_path: Path) -> None:
    store = filled(tmp_path, 3)
    (absent,) = store.missing([*pictures(4), *pictures(4)])
    with pytest.raises(KeyError):
        store.batch([absent])[0]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FoveateError, match=r"file cannot be written to: Not a directory"):
        FeatureStore(tmp_path / "file", {}, SHAPE)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    store = FeatureStore(tmp_path, {}, SHAPE)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        fill(store, pictures(3), load, encode)
    monkeypatch.undo()
    assert [path.name for path in store.folder.iterdir()] == ["about.json"]
    assert fill(store, pictures(3), load, encode) == 3


# ---- several at once, and kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
def test_two_stores_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    stores = [FeatureStore(tmp_path, {}, SHAPE) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda store: fill(store, pictures(40), load, encode, batch=3), stores))
    assert sum(done) >= 40
    whole = FeatureStore(tmp_path, {}, SHAPE)
    wanted = encode(torch.stack([load(number) for number in range(40)]))
    assert torch.equal(whole.batch(list(pictures(40))), torch.stack(wanted, 1))


@pytest.mark.usefixtures("small_shards")
def test_processes_share_the_work(tmp_path: Path) -> None:
    stores = [FeatureStore(tmp_path, {}, SHAPE) for _ in range(3)]
    done = [fill(store, pictures(22), load, encode, share=(rank, 3)) for rank, store in enumerate(stores)]
    assert done == [8, 8, 6]
    assert len(FeatureStore(tmp_path, {}, SHAPE)) == 22


def read_one(store: FeatureStore, digest: bytes, out: Any) -> None:
    out.put([level.tolist() for level in store.batch([digest])[0]])


def test_data_workers_read_it(tmp_path: Path) -> None:
    store, digest = filled(tmp_path), list(pictures(10))[7]
    wanted = [level.tolist() for level in store.batch([digest])[0]]
    context: Any = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    worker = context.Process(target=read_one, args=(store, digest, out))
    worker.start()
    assert out.get() == wanted
    worker.join()


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    store = filled(tmp_path, 5)
    fill(store, pictures(9), load, encode, batch=2, progress=lambda *now: told.append(now))
    assert told == [("checking", 1, 1), ("encoding", 7, 9), ("encoding", 9, 9)]


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_filling_encodes_the_rest_in_the_same_batches(tmp_path: Path) -> None:
    """A tower's last bits may depend on what shares a batch."""
    alone: list[tuple[int, float]] = []
    rest: list[tuple[int, float]] = []

    def noted(into: list[tuple[int, float]], limit: int) -> Callable[[Tensor], list[Tensor]]:
        def run(pixels: Tensor) -> list[Tensor]:
            if len(into) == limit:
                raise KeyboardInterrupt
            into.append((len(pixels), float(pixels.sum())))
            return encode(pixels)

        return run

    fill(FeatureStore(tmp_path / "a", {}, SHAPE), pictures(14), load, noted(alone, 99), batch=3)
    with pytest.raises(KeyboardInterrupt):
        fill(FeatureStore(tmp_path / "b", {}, SHAPE), pictures(14), load, noted(rest, 5), batch=3)
    fill(FeatureStore(tmp_path / "b", {}, SHAPE), pictures(14), load, noted(rest, 99), batch=3)
    assert set(rest) == set(alone)
    assert len(rest) <= len(alone) + 2  # those of the shard under way, again


def child(folder: Path, least: int) -> None:
    """Fills a store, with a shard for every four pictures, until there are so many of these."""
    store = FeatureStore(folder, {}, SHAPE)
    fill(store, pictures(400), load, dying(lambda: len(shards(store)) >= least, encode), batch=1)


@pytest.mark.usefixtures("small_shards")
def test_kill_and_go_on(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    reader = FeatureStore(tmp_path, {}, SHAPE)
    before = 0
    for least in (3, 8, 11):
        killed_in(child, tmp_path, least)
        reader.refresh()
        assert len(reader) >= max(before + 1, 4 * least)
        before = len(reader)
    assert before < 400
    (reader.folder / "0123456789abcdef.tmp").write_bytes(b"half a shard")
    os.utime(reader.folder / "0123456789abcdef.tmp", (0, 0))
    assert fill(reader, pictures(400), load, encode) == 400 - before
    assert not list(reader.folder.glob("*.tmp"))
    wanted = encode(torch.stack([load(number) for number in range(400)]))
    assert torch.equal(reader.batch(list(pictures(400))), torch.stack(wanted, 1))
    assert warnings_of() == []


# ---- outlines --------------------------------------------------------------------------------------------------------------------------


def saved(kind: str, turn: int, mode: str = "RGB") -> bytes:
    image, content = Image.new(mode, (24, 16)), io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    image.save(content, kind, exif=exif)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "MPO"])
@pytest.mark.parametrize("turn", range(10))
def test_an_outline_has_the_size_of_the_picture_as_it_is_shown(tmp_path: Path, kind: str, turn: int) -> None:
    content = saved(kind, turn)
    (tmp_path / "file").write_bytes(content)
    held, lying = outline(Held(content, "held")), outline(tmp_path / "file")
    assert held == lying
    assert (held.height, held.width) == shown_size(content) == ((24, 16) if 5 <= turn <= 8 else (16, 24))


RAW_EXIF = "\nexif\n      38\n" + (b"Exif\0\0" + b"II*\0\x08\0\0\0" + b"\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + b"\0" * 4).hex() + "\n"
XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(("name", "text"), [("Raw profile type exif", RAW_EXIF), ("XML:com.adobe.xmp", XMP)])
@pytest.mark.parametrize("packed", [False, True])
def test_an_orientation_noted_in_a_pngs_texts_is_seen(name: str, text: str, packed: bool) -> None:
    notes, content = PngInfo(), io.BytesIO()
    (notes.add_itxt if name.startswith("XML") else notes.add_text)(name, text, zip=packed)
    Image.new("RGB", (24, 16)).save(content, "PNG", pnginfo=notes)
    found = outline(Held(content.getvalue(), "held"))
    assert (found.height, found.width) == shown_size(content.getvalue()) == (24, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_an_outline_decodes_no_pixels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    Image.new("RGB", (24, 16)).save(content, kind)
    for of in (ImageFile.ImageFile, PngImageFile):
        monkeypatch.setattr(of, "load", lambda self: pytest.fail("was decoded"))
    assert outline(Held(content.getvalue(), "held"))[1:] == (16, 24)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_an_outline_asks_for_no_mode(mode: str) -> None:
    found = outline(Held(saved("PNG", 1, mode), "held"))
    assert (found.height, found.width) == (16, 24)


def test_an_outline_is_known_by_the_content(tmp_path: Path) -> None:
    for name, kind in (("a", "PNG"), ("b", "PNG"), ("c", "JPEG")):
        (tmp_path / name).write_bytes(saved(kind, 1))
    digests = [outline(tmp_path / name).digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 16


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_what_has_no_outline_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(PictureError, match=r"a\.png"):
        outline(tmp_path / "a.png")
