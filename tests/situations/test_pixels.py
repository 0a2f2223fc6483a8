"""Pictures as a viewer shows them, the same wherever they are opened."""

from __future__ import annotations

import io
import json
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from foveate.cli import main as command
from foveate.data import pixels
from foveate.data.conversations import Conversations, find_bad
from foveate.data.pixels import Held, PictureError, open_image, shown_size
from foveate.errors import FoveateError
from foveate.evaluation.tasks import load_task
from foveate.inspect import look
from foveate.integrations.lmms_eval import answering
from tests.command import refused

datasets.disable_progress_bars()

RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1))


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def seen(picture: Any) -> NDArray[np.int64]:
    image = open_image(picture)
    assert image.mode == "RGB"
    again = open_image(image)  # nothing is turned or converted twice
    assert again.tobytes() == image.tobytes()
    assert again.size == image.size
    return np.asarray(image).astype(int)


def grey(picture: Any) -> NDArray[np.int64]:
    found = seen(picture)
    assert (found == found[..., :1]).all()
    return found[..., 0]


# ---- orientation -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"lossless": True} if kind == "WEBP" else {}
    content = saved(Image.fromarray(noise(5, 9, 3)), kind, exif=exif, **more)
    (tmp_path / "a").write_bytes(content)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert shown.shape == ((9, 5, 3) if orientation > 4 else (5, 9, 3))
    for picture in (content, tmp_path / "a", Held(content, "a"), Image.open(io.BytesIO(content))):
        assert np.array_equal(seen(picture), shown)


def test_orientation_of_other_modes_and_of_broken_notes() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(grey(saved(Image.fromarray(RAMP), "PNG", exif=exif)), np.rot90(RAMP >> 8, -1))
    clear = Image.fromarray(noise(5, 9, 4))
    assert np.array_equal(seen(saved(clear, "PNG", exif=exif)), np.rot90(seen(saved(clear, "PNG")), -1))
    plain = Image.fromarray(noise(5, 9, 3))
    for note in (b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b""):
        assert np.array_equal(seen(saved(plain, "PNG", exif=note)), np.asarray(plain))


# ---- depth -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("shift", "bits"), [(0, 16), (1, 16), (3, 16), (4, 12), (8, 8)])
def test_deep_grey_keeps_its_steps(kind: str, shift: int, bits: int) -> None:
    """16-bit values by their upper byte, 12-bit data in such a file by the upper byte of twelve."""
    values = RAMP >> shift
    assert np.array_equal(grey(saved(Image.fromarray(values), kind)), values >> (bits - 8))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_deep_grey_in_every_byte_order(mode: str) -> None:
    stored = RAMP.astype({"I;16B": ">u2", "I": "<i4"}.get(mode, "<u2"))
    image = Image.frombytes(mode, (64, 48), stored.tobytes())
    assert np.array_equal(grey(image), RAMP >> 8)


@pytest.mark.parametrize(("low", "high"), [(-1000, 3000), (0, 70000), (-5, -1)])
def test_whole_numbers_of_another_range(low: int, high: int) -> None:
    values = np.linspace(low, high, 64).round().astype(np.int32)[None]
    expected = np.rint(255 * (values - low) / (high - low))
    for picture in (Image.fromarray(values), saved(Image.fromarray(values), "TIFF")):
        assert np.array_equal(grey(picture), expected)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.25, 0.5), (0, 255), (-3, 3), (1e-3, 1e6)])
def test_floating_point(low: float, high: float) -> None:
    values = np.linspace(low, high, 64).astype(np.float32)[None]
    expected = 255 * values if low >= 0 and high <= 1 else 255 * (values.astype(float) - values[0, 0]) / (values[0, -1] - values[0, 0])
    assert np.abs(grey(saved(Image.fromarray(values), "TIFF")) - expected).max() <= 0.51


@pytest.mark.parametrize(
    ("values", "reason"), [([0, np.nan], "not finite"), ([0, np.inf], "not finite"), ([7, 7], r"all its pixels are 7\.0")]
)
def test_values_without_a_range_are_refused(values: list[float], reason: str) -> None:
    with pytest.raises(PictureError, match=reason):
        open_image(Image.fromarray(np.array([values], np.float32)))


def test_white_is_zero_and_clear_grey() -> None:
    content = bytearray(saved(Image.fromarray(RAMP), "TIFF"))
    at = content.index(struct.pack("<HHI", 262, 3, 1))
    content[at + 8] = 0
    assert np.array_equal(grey(bytes(content)), 255 - (RAMP >> 8))
    clear = grey(saved(Image.fromarray(RAMP), "PNG", transparency=0))
    assert np.array_equal(clear, np.where(RAMP == 0, 255, RAMP >> 8))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_one_bit(kind: str) -> None:
    bits = noise(7, 13) > 127
    assert np.array_equal(grey(saved(Image.fromarray(bits), kind)), 255 * bits)


# ---- transparency ----------------------------------------------------------------------------------------------------------------------


def on_white(colour: NDArray[Any], alpha: NDArray[Any]) -> NDArray[np.float64]:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def close(found: NDArray[Any], expected: NDArray[Any], most: float = 1) -> bool:
    return found.shape == expected.shape and float(np.abs(found - expected).max()) <= most


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_alpha_is_laid_on_white(mode: str) -> None:
    whole = noise(9, 11, 4)
    whole[0, :, 3], whole[1, :, 3] = 0, 255
    if mode in ("LA", "La"):
        whole[..., 1] = whole[..., 2] = whole[..., 0]
    expected = on_white(whole[..., :3].astype(float), whole[..., 3])
    assert pixels.BACKGROUND == "white"
    image = Image.fromarray(whole) if mode != "La" and mode != "LA" else Image.fromarray(whole[..., [0, 3]], "LA")
    found = seen(image if mode in ("RGBA", "LA") else image.convert(mode))
    assert close(found, expected, 1 if mode in ("RGBA", "LA") else 3)
    assert (found[0] == 255).all()
    assert np.array_equal(found[1], whole[1, :, :3])
    if mode in ("RGBA", "LA"):
        for kind in ("PNG", "TIFF"):
            assert np.array_equal(seen(saved(image, kind)), found)


@pytest.mark.parametrize("clear", [5, bytes([255] * 5 + [0] + [128] * 250)])
def test_palettes_with_transparency(clear: Any) -> None:
    """One clear entry, or an alpha for each."""
    palette, index = noise(256, 3, seed=1), noise(12, 40)
    index[0, 0] = 5
    image = Image.fromarray(index, "P")
    image.putpalette(palette.tobytes())
    alpha = np.full(256, 255) if isinstance(clear, int) else np.frombuffer(clear, np.uint8)
    alpha = np.where(np.arange(256) == 5, 0, alpha)
    expected = on_white(palette[index].astype(float), alpha[index])
    assert close(seen(saved(image, "PNG", transparency=clear)), expected)
    assert (seen(saved(image, "PNG", transparency=clear))[0, 0] == 255).all()
    if isinstance(clear, int):
        assert close(seen(saved(image, "GIF", transparency=clear)), expected)


def test_other_ways_to_be_clear() -> None:
    ink = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (5, 2, 9, 8))
    paper = Image.new("RGB", ink.size, "white")
    paper.paste((0, 0, 0), (5, 2, 9, 8))
    shown = np.asarray(paper)
    pa = ink.convert("RGB").convert("P")
    pa.putalpha(ink.getchannel("A"))
    assert pa.mode == "PA"
    for picture in (ink, pa, saved(ink, "PNG"), saved(ink, "WEBP", lossless=True), saved(ink, "TIFF"), saved(ink, "ICO", sizes=[(20, 10)])):
        assert np.array_equal(seen(picture), shown)
    keyed = Image.new("RGB", (4, 4), (9, 8, 7))
    keyed.putpixel((1, 1), (1, 2, 3))
    found = seen(saved(keyed, "PNG", transparency=(9, 8, 7)))
    assert found[1, 1].tolist() == [1, 2, 3]
    assert found.sum() == 15 * 765 + 6
    assert grey(saved(Image.fromarray(np.array([[3, 4]], np.uint8)), "PNG", transparency=3)).tolist() == [[255, 4]]


# ---- colour ----------------------------------------------------------------------------------------------------------------------------


def profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2, made by hand."""
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"mine\0" + bytes(79), **tags}
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"lcms", 0x02100000, kind, space, pcs) + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">iii", *(round(x * 65536) for x in WHITE))
    return head + bytes(128 - len(head)) + table + body


WHITE = (0.9642, 1.0, 0.8249)  # D50
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])  # RGB -> XYZ, D50
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def xyz(values: Any) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(float(x) * 65536) for x in values))


def gamma(power: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(power * 256))


def matrix_profile(matrix: NDArray[Any], power: float) -> bytes:
    columns = {name + b"XYZ": xyz(matrix[:, i]) for i, name in enumerate((b"r", b"g", b"b"))}
    return profile(b"RGB ", b"XYZ ", {b"wtpt": xyz(WHITE), **columns, **{name + b"TRC": gamma(power) for name in (b"r", b"g", b"b")}})


def to_srgb(linear: NDArray[Any]) -> NDArray[np.float64]:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


ADOBE_RGB = matrix_profile(ADOBE, 563 / 256)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_adobe_rgb_is_brought_to_srgb(kind: str) -> None:
    values = noise(8, 8, 3)
    expected = to_srgb((values / 255) ** (563 / 256) @ ADOBE.T @ np.linalg.inv(SRGB).T)
    more = {"lossless": True} if kind == "WEBP" else {}
    content = saved(Image.fromarray(values), kind, icc_profile=ADOBE_RGB, **more)
    assert close(seen(content), expected, 2)
    assert np.abs(seen(content) - values).max() > 10
    clear = np.dstack([values, np.full((8, 8), 255, np.uint8)])
    assert np.array_equal(seen(saved(Image.fromarray(clear), kind, icc_profile=ADOBE_RGB, **more)), seen(content))


def test_profiles_that_change_nothing() -> None:
    """sRGB by its own numbers, a profile of another kind of colour, and none at all worth the name."""
    from PIL import ImageCms

    values = noise(8, 8, 3)
    theirs = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    wrong_kind = profile(b"GRAY", b"XYZ ", {b"wtpt": xyz(WHITE), b"kTRC": gamma(1.0)})
    for icc in (theirs, wrong_kind, b"nonsense", ADOBE_RGB[:200], b"\0" * 128):
        assert np.array_equal(seen(saved(Image.fromarray(values), "PNG", icc_profile=icc)), values)


def test_grey_and_palette_with_a_profile() -> None:
    values = np.arange(256, dtype=np.uint8)[None]
    linear = profile(b"GRAY", b"XYZ ", {b"wtpt": xyz(WHITE), b"kTRC": gamma(1.0)})
    assert close(grey(saved(Image.fromarray(values), "PNG", icc_profile=linear)), to_srgb(values / 255), 2)
    image = Image.fromarray(values, "P")
    palette = noise(256, 3)
    image.putpalette(palette.tobytes())
    direct = seen(saved(Image.fromarray(palette[None]), "PNG", icc_profile=ADOBE_RGB))
    assert np.array_equal(seen(saved(image, "PNG", icc_profile=ADOBE_RGB)), direct)


def printer() -> bytes:
    """CMYK -> Lab by a table with two points a channel: no ink is white, all else mixes linearly in Lab."""
    corners = []
    for number in range(16):
        c, m, y, k = ((number >> shift) & 1 for shift in (3, 2, 1, 0))
        light = 100 * (1 - k) * (1 - 0.3 * c) * (1 - 0.4 * m) * (1 - 0.1 * y)
        corners += [round(light * 255 / 100), 128 + round(40 * m - 20 * c), 128 + round(50 * y - 30 * c)]
    ramp = bytes(range(256))
    one = struct.pack(">9i", *(65536 * x for x in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + one + ramp * 4 + bytes(corners) + ramp * 3
    return profile(b"CMYK", b"Lab ", {b"wtpt": xyz(WHITE), b"A2B0": table})


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_printing_inks_with_and_without_a_profile(kind: str) -> None:
    from PIL import ImageCms

    icc = printer()
    more = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    image = Image.fromarray(np.repeat(np.repeat(noise(4, 4, 4), 8, 0), 8, 1), "CMYK")
    content = saved(image, kind, icc_profile=icc, **more)
    inks = Image.open(io.BytesIO(content)).convert("CMYK")
    there = ImageCms.profileToProfile(inks, ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert np.array_equal(seen(content), np.asarray(there))
    plain = seen(saved(image, kind, **more))
    assert close(plain, np.asarray(inks.convert("RGB")).astype(int), 3)
    assert np.abs(plain - seen(content)).max() > 20
    blank = Image.new("CMYK", (8, 8))
    assert (seen(saved(blank, kind, **more)) >= 254).all()


def test_other_colour_models() -> None:
    plain = np.repeat(np.repeat(noise(4, 4, 3), 4, 0), 4, 1)
    rgb = Image.fromarray(plain)
    for mode, most in (("YCbCr", 3), ("HSV", 8), ("LAB", 4), ("RGBX", 0)):
        assert close(seen(rgb.convert(mode)), np.asarray(rgb.convert(mode).convert("RGB")).astype(int), 0)
        if mode != "LAB":
            assert close(seen(rgb.convert(mode)), plain.astype(int), most)
    assert close(seen(saved(rgb.convert("LAB"), "TIFF")), seen(rgb.convert("LAB")), 0)
    assert close(seen(saved(rgb.convert("YCbCr"), "TIFF")), plain.astype(int), 3)


# ---- several frames --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_is_shown_and_that_is_said_once(kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(pixels, "_said", set())
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    with caplog.at_level(logging.WARNING):
        assert (seen(Held(content, "film")) == [255, 0, 0]).all()
        assert (seen(Held(content, "other")) == [255, 0, 0]).all()
        assert (seen(saved(frames[1], kind, **({"lossless": True} if kind == "WEBP" else {}))) == [0, 255, 0]).all()
    assert [record.getMessage() for record in caplog.records] == [
        "of pictures with several frames or pages the first one is shown, such as of film"
    ]


# ---- what cannot be shown --------------------------------------------------------------------------------------------------------------


def claims(width: int, height: int) -> bytes:
    """A tiny PNG file that says it is large."""
    raw = bytearray(saved(Image.new("1", (8, 8)), "PNG"))
    raw[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    return bytes(raw)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (claims(20_000, 20_000), "is a decompression bomb: more than Pillow's limit of 89478485 pixels; make it smaller"),
        (claims(10_000, 9_000), "is a decompression bomb"),  # where Pillow itself only warns
        (claims(2**31 - 1, 2**31 - 1), "is a decompression bomb|cannot be decoded"),
        (b"", "cannot be decoded: cannot identify image file"),
        (b"no picture", "cannot be decoded"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "cannot be decoded"),
        (saved(Image.fromarray(noise(64, 64, 3)), "PNG")[:2000], "cannot be decoded"),
        (saved(Image.fromarray(noise(64, 64, 3)), "JPEG")[:1000], "cannot be decoded"),
        (saved(Image.fromarray(noise(64, 64, 3)), "TIFF")[:1000], "cannot be decoded"),
        (saved(Image.fromarray(noise(64, 64, 3)), "WEBP")[:1000], "cannot be decoded"),
    ],
)
def test_what_cannot_be_shown_is_a_bad_sample(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "one", "image": "a.png", "conversations": turns}]))
    (bad,) = find_bad(Conversations.open(tmp_path / "rows.json", tmp_path).source, None)
    task = f"{tmp_path / 'rows.json'}:metric=exact,images={tmp_path}"
    for read in (
        lambda: (_ for _ in ()).throw(FoveateError(str(bad))),
        lambda: load_task(task, progress=False),
        lambda: open_image(content),
    ):
        with pytest.raises(FoveateError, match=reason):
            read()
    with pytest.raises(PictureError):
        shown_size(content)


def test_a_missing_file_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    nothing = f"is missing: there is no file {tmp_path}"
    for name, reason in {
        "a.png": f"{nothing}/a.png",
        "no/a.png": f"{nothing}/no/a.png, nor the folder {tmp_path}/no",
        "file/a.png": f"{nothing}/file/a.png, nor the folder {tmp_path}/file",
        ".": "is a folder or device",
    }.items():
        with pytest.raises(PictureError) as found:
            shown_size(Path(name))
        assert reason in found.value.reason
    with pytest.raises(PictureError, match=rf"cannot read the image a\.png: it is missing: there is no file {tmp_path}/a\.png"):
        open_image(Path("a.png"))


# ---- one function ----------------------------------------------------------------------------------------------------------------------


def files() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.fromarray(noise(12, 20, 3))
    return {
        "turned.jpg": saved(photo, "JPEG", exif=exif),
        "deep.png": saved(Image.fromarray(RAMP), "PNG"),
        "clear.png": saved(Image.fromarray(noise(12, 20, 4)), "PNG"),
        "adobe.png": saved(photo, "PNG", icc_profile=ADOBE_RGB),
        "float.tif": saved(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
        "ink.jpg": saved(Image.fromarray(noise(12, 20, 4), "CMYK"), "JPEG", exif=exif),
        "moving.webp": saved(photo, "WEBP", save_all=True, append_images=[Image.new("RGB", photo.size)], lossless=True),
    }


def harness(url: Any) -> Image.Image:
    (message,) = answering.conversation([{"role": "user", "content": [{"type": "image", "url": url}]}])
    return message["content"][0]["image"]


@pytest.mark.parametrize("name", files())
def test_everything_that_opens_pictures_sees_the_same(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    content = files()[name]
    (tmp_path / name).write_bytes(content)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": name, "conversations": turns}]))
    held = datasets.Dataset.from_list([{"image": {"bytes": content, "path": name}, "conversations": turns}])
    held.cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_list([{"image": content, "conversations": turns}]).save_to_disk(tmp_path / "saved")
    expected = seen(content)
    sights = {
        "training": Conversations.open(tmp_path / "rows.json", tmp_path)[0].images[0],
        "training, parquet": Conversations.open(tmp_path / "rows.parquet")[0].images[0],
        "training, arrow": Conversations.open(dataset=str(tmp_path / "saved"))[0].images[0],
        "look": look.open_image(tmp_path / name),
        "look, decoded": look.open_image(Image.open(tmp_path / name)),
        "lmms-eval": harness(str(tmp_path / name)),
        "lmms-eval, decoded by datasets": harness(datasets.Image().decode_example({"bytes": content, "path": None})),
    }
    for where in ("rows.json", "rows.parquet", "saved"):
        (sample,) = load_task(f"{tmp_path / where}:metric=exact,images={tmp_path}", progress=False).samples
        sights[f"bench, {where}"] = open_image(sample.images[0])
    for who, image in sights.items():
        assert image.mode == "RGB", who
        assert np.array_equal(np.asarray(image), expected), who


def test_a_reader_may_look_at_any_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line: what can be shown is drawn, and what cannot is one message."""
    paths = []
    for name, content in files().items():
        (tmp_path / name).write_bytes(content)
        paths.append(str(tmp_path / name))
    out = tmp_path / "look.png"
    with pytest.raises(SystemExit) as end:
        command(["look", "asset:vlm", *paths, "--ask", "What is there?", "--reduce", "divprune:keep=0.5", "--out", str(out)])
    assert end.value.code == 0
    assert Image.open(out).size > (100, 100)
    (tmp_path / "torn.jpg").write_bytes(files()["turned.jpg"][:200])
    message = refused(["look", "asset:vlm", str(tmp_path / "torn.jpg"), "--ask", "What is there?", "--reduce", "divprune:keep=0.5"], capsys)
    assert message.startswith(f"foveate: cannot read the image {tmp_path}/torn.jpg: it cannot be decoded: ")
    assert message.count("cannot") == 2


def test_boxes_belong_to_the_picture_as_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(saved(Image.fromarray(noise(12, 20, 3)), "JPEG", exif=exif))
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.jpg", "question": "Where?", "bbox": [2, 2, 10, 5]}]))
    options = "metric=iou,format=fractions,truth=pixels,corners=xywh,answer=bbox"
    task = load_task(f"{tmp_path / 'rows.json'}:{options},images={tmp_path}", progress=False)
    assert task.samples[0].extra["size"] == (12, 20)
