"""The checkpoint of a table: where it lies, how large it is, and how it comes onto this machine."""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig

from foveate.accounting import parameters
from foveate.errors import FoveateError
from foveate.inference import model_hash
from foveate.model.weights import reading
from foveate.world import resolve

_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_BYTES = 2  # of a parameter, as checkpoints of this size are saved


@dataclass(frozen=True)
class Checkpoint:
    """A model and the place where it lies: `folder` is None while it is only on the hub. `version`: commit, or hash of the files."""

    name: str
    revision: str | None
    folder: str | None
    version: str

    @property
    def told(self) -> str:
        return f"{self.name}, revision {self.revision}" if self.revision else self.name


def locate(name: str, revision: str | None = None) -> Checkpoint:
    """A folder, an "asset:" or "real:" name, or a hub model, which may not be here yet. FoveateError for a folder that is not there."""
    if ":" in name or Path(name).is_dir():
        return Checkpoint(name, None, name, model_hash(name))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FoveateError(f"no such model folder: {name}")
    revision = revision or "main"
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_FILES, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        folder = None
    if folder is None or not any(folder.glob("*.safetensors")):
        return Checkpoint(name, revision, None, "")
    return Checkpoint(name, revision, str(folder), folder.name)


def size(config: Any) -> int:
    """Bytes of the weights of a checkpoint with this configuration, at two bytes a parameter."""
    return _BYTES * sum(parameters(config).values())


def free() -> int:
    """Bytes that are free where the hub's cache lies, or will."""
    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_space(needed: int) -> None:
    """FoveateError where the hub's cache has no room for `needed` bytes."""
    if needed > (there := free()):
        raise FoveateError(
            f"the model takes {needed / 1e9:.1f} GB, but {HF_HUB_CACHE} has {there / 1e9:.1f} GB free; make room, or move the "
            "cache (HF_HOME)"
        )


def fetch(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, downloaded unless it is here. FoveateError, with the way out, where it cannot be had."""
    if checkpoint.folder is not None:
        return checkpoint
    name = checkpoint.told
    try:
        folder = snapshot_download(checkpoint.name, revision=checkpoint.revision, allow_patterns=_FILES)
    except GatedRepoError as error:
        raise FoveateError(f"{name}: its owners ask for an agreement; accept it on the hub and log in: hf auth login") from error
    except RevisionNotFoundError as error:
        raise FoveateError(f"{name}: the hub has no such revision") from error
    except RepositoryNotFoundError as error:
        raise FoveateError(f"{name}: the hub has no such model, or it is private (hf auth login)") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise FoveateError(
                f"{name}: the disk is full; make room and run the same command again, or move the cache (HF_HOME)"
            ) from error
        raise FoveateError(
            f"{name} is not in the cache and cannot be downloaded ({str(error).splitlines()[0]}); name a folder that has it: --model FOLDER"
        ) from error
    return Checkpoint(checkpoint.name, checkpoint.revision, folder, Path(folder).name)


def read_config(checkpoint: Checkpoint, told: dict[str, Any] | None) -> Any:
    """The configuration as the table tells it, else the checkpoint's own. FoveateError where that cannot be read."""
    if told is not None:
        return AutoConfig.for_model(**told)
    source = resolve(checkpoint.folder or checkpoint.name)
    with reading(f"cannot read the configuration of {checkpoint.told}"):
        return AutoConfig.from_pretrained(source, **({} if checkpoint.folder else {"revision": checkpoint.revision}))
