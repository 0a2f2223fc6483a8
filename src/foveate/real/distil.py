"""A tower with attention: a plain ViT distilled from EfficientNet and PP-OCR's network, which have none (`foveate real tower`).

The student is a CLIPVisionModel of 12 layers, 192 wide with 3 heads, on pictures of 224 px in patches of 16: 5.5 million weights. It sees
views (a part of a picture, of random size and shape, as 224 x 224 px), and learns to say what the teachers make of the same view:

- each patch: EfficientNet's map of stride 16 (112 channels), and PP-OCR's four cells of the patch (4 x 384);
- each 2 x 2 patches, their mean: EfficientNet's last map (1280);
- [CLS]: the mean of that map.

Each is read by a layer norm and a linear map of its own from the last states, which are thrown away in the end. The teachers' channels are
standardised by what they are on `MEASURED` batches; the loss is the sum over the four of 1 - cosine, mean over places. A view is a function
of seed, step and place alone, so that a run that goes on is the run that was not interrupted.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from foveate.errors import FoveateError
from foveate.files import write, write_json
from foveate.real import TRAINED, lay, real
from foveate.real.convert import save_tower
from foveate.real.efficientnet import EfficientNetLite
from foveate.real.lcnet import LCNet

SIDE, PATCH = 224, 16
GRID = SIDE // PATCH
MEASURED = 16  # batches from which the spread of the teachers' channels is known
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
STUDENT = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768, "hidden_act": "gelu"}

CARD = """# real:vit

{holds}. {steps} steps of {batch} views of {pictures:,} pictures by `{command}` of Foveate: `foveate.real.distil` says how. What its
features are worth is measured by `foveate real retrieval`. The teachers are under Apache-2.0; the licences of the pictures are in the
licences.txt beside them.
"""


@dataclass(frozen=True)
class Settings:
    """Of a training; `pictures` is a digest of the files' names and sizes."""

    steps: int
    batch: int
    seed: int
    pictures: str


# ---- views


def files_of(folder: Path) -> list[Path]:
    """All pictures in a folder and those in it, by name. FoveateError where there are none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise FoveateError(
            f"there are no pictures in {folder}; make some with photographs among them: "
            "foveate data real data/real-all --styles fluent,twemoji,noto,photograph"
        )
    return found


def digest(files: Sequence[Path], folder: Path) -> str:
    told = "".join(f"{path.relative_to(folder)} {path.stat().st_size}\n" for path in files)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def view(image: Image.Image, rng: random.Random) -> Image.Image:
    """A part of a picture, from a twelfth of its area to all of it, as `SIDE` x `SIDE` pixels."""
    area = image.width * image.height * math.exp(rng.uniform(math.log(1 / 12), 0))
    shape = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = min(image.width, math.sqrt(area * shape)), min(image.height, math.sqrt(area / shape))
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


def views(files: Sequence[Path], settings: Settings, step: int) -> Tensor:
    """(batch, 3, SIDE, SIDE) in 0..1 of one step."""
    found = []
    for place in range(settings.batch):
        rng = random.Random(f"vit/{settings.seed}/{step}/{place}")
        with Image.open(files[rng.randrange(len(files))]) as image:
            found.append(np.asarray(view(image.convert("RGB"), rng)))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


# ---- teachers and student


class Teachers(nn.Module):
    """What is to be learnt of a view, by name: (batch, places, channels)."""

    def __init__(self, efficientnet: EfficientNetLite, ppocr: LCNet) -> None:
        super().__init__()
        self.efficientnet, self.ppocr = efficientnet.eval().requires_grad_(False), ppocr.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Of pixels in 0..1."""
        maps = self.efficientnet.maps((pixels - 127 / 255) / (128 / 255))
        stride = {strides[0]: features for features, strides in maps[:-1]}[PATCH]
        last = maps[-1][0].flatten(2).transpose(1, 2)
        read = self.ppocr((pixels - 0.5) / 0.5).last_hidden_state
        return {"detail": stride.flatten(2).transpose(1, 2), "letters": read, "things": last, "whole": last.mean(1, keepdim=True)}


class Student(nn.Module):
    """The ViT with a reader for each of `widths`, channels by name."""

    def __init__(self, widths: dict[str, int], **own: Any) -> None:
        super().__init__()
        config = CLIPVisionConfig(**STUDENT | {"image_size": SIDE, "patch_size": PATCH, "projection_dim": 192} | own)
        self.vit = CLIPVisionModel._from_config(config, attn_implementation="sdpa")
        width = config.hidden_size
        self.readers = nn.ModuleDict({name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out)) for name, out in widths.items()})
        with torch.no_grad():
            self.vit.embeddings.position_embedding.weight[1:] = places(config.image_size // config.patch_size, width)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Of pixels in 0..1, in the places that the teachers have."""
        states = self.vit(pixel_values=(pixels - 0.5) / 0.5).last_hidden_state
        side = math.isqrt(states.shape[1] - 1)
        patches = states[:, 1:]
        blocks = F.avg_pool2d(patches.transpose(1, 2).unflatten(2, (side, side)), 2).flatten(2).transpose(1, 2)
        seen = {"detail": patches, "letters": patches, "things": blocks, "whole": states[:, :1]}
        return {name: reader(seen[name]) for name, reader in self.readers.items()}


def places(side: int, width: int) -> Tensor:
    """(side², width): sines and cosines of row and column, small, as the positions begin: neighbours start out alike."""
    waves = math.pi * torch.logspace(0, math.log10(side), width // 4)
    rows, columns = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    angles = [axis.reshape(-1, 1) * waves for axis in (rows, columns)]
    return 0.1 * torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)


def spread(batches: Iterator[dict[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """By name, mean and standard deviation of each channel over some batches. A channel that never moves gets 1."""
    rows: dict[str, list[Tensor]] = {}
    for batch in batches:
        for name, found in batch.items():
            rows.setdefault(name, []).append(found.flatten(0, 1))
    whole = {name: torch.cat(parts) for name, parts in rows.items()}
    return {name: (x.mean(0), torch.where(x.std(0) > 1e-6, x.std(0), 1.0)) for name, x in whole.items()}


def loss(said: dict[str, Tensor], right: dict[str, Tensor], known: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """The sum over the names of 1 - cosine between what is said and the teacher's standardised channels, mean over places."""
    parts = []
    for name, found in said.items():
        mean, deviation = known[name]
        parts.append(1 - F.cosine_similarity(found, (right[name] - mean) / deviation, dim=-1).mean())
    return torch.stack(parts).sum()


# ---- training


class Run:
    """A training in a folder: what it has come to, and how it goes on."""

    def __init__(self, student: Student, settings: Settings, folder: Path) -> None:
        self.student, self.settings, self.path = student, settings, folder / "state.pt"
        decayed = [p for p in student.parameters() if p.ndim > 1]
        rest = [p for p in student.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
        self.known: dict[str, tuple[Tensor, Tensor]] = {}
        self.done, self.losses = 0, list[float]()

    def rate(self, step: int) -> float:
        """Share of the learning rate: a twentieth of the steps of warm-up, then half a cosine."""
        warm, steps = max(1, self.settings.steps // 20), self.settings.steps
        return min(1.0, (step + 1) / warm) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    def step(self, pixels: Tensor, right: dict[str, Tensor]) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = 1e-3 * self.rate(self.done)
        self.optimiser.zero_grad()
        total = loss(self.student(pixels), right, self.known)
        total.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimiser.step()
        self.done += 1
        self.losses.append(float(total.detach()))
        return self.losses[-1]

    def save(self) -> None:
        """Whole or not at all."""
        half = self.path.with_suffix(".half")
        state = {"settings": vars(self.settings), "done": self.done, "losses": self.losses, "known": self.known}
        torch.save(state | {"student": self.student.state_dict(), "optimiser": self.optimiser.state_dict()}, half)
        half.replace(self.path)

    def load(self) -> None:
        """Go on with what is in the folder. FoveateError where it was begun with other settings."""
        if not self.path.is_file():
            return
        found = torch.load(self.path, weights_only=True)
        before, now = found["settings"], vars(self.settings)
        if differs := [f"{name} {before[name]}, now {now[name]}" for name in now if before[name] != now[name]]:
            raise FoveateError(f"{self.path.parent} holds a training that was begun with {'; '.join(differs)}; name another --work")
        self.student.load_state_dict(found["student"])
        self.optimiser.load_state_dict(found["optimiser"])
        self.done, self.losses, self.known = found["done"], found["losses"], found["known"]


def distil(
    pictures: Path, steps: int, batch: int, seed: int, work: Path, teachers: Teachers | None = None, every: int = 50, progress: bool = True
) -> Path:
    """Trains the ViT and keeps it as real:vit; the folder is returned. The same call goes on where an interrupted one was, at most `every`
    steps before. FoveateError for a folder without pictures, and a `work` of other settings."""
    if steps < 1 or batch < 2:
        raise FoveateError(f"steps={steps}, batch={batch}: at least one step of two views is needed")
    files = files_of(pictures)
    settings = Settings(steps, batch, seed, digest(files, pictures))
    if teachers is None:
        efficientnet = EfficientNetLite.from_pretrained(real("efficientnet"), dtype=torch.float32)
        teachers = Teachers(efficientnet, LCNet.from_pretrained(real("ppocr"), dtype=torch.float32))
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    widths = {name: right.shape[-1] for name, right in teachers(views(files, settings, 0)).items()}
    run = Run(Student(widths), settings, work)
    run.load()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("looking", total=steps, completed=run.done)
        if not run.known:
            run.known = spread(teachers(views(files, settings, -1 - number)) for number in range(MEASURED))
        while run.done < steps:
            pixels = views(files, settings, run.done)
            found = run.step(pixels, teachers(pixels))
            if run.done % every == 0 or run.done == steps:
                run.save()
            bar.update(task, completed=run.done, description=f"loss {found:.3f}")

    def fill(folder: Path) -> None:
        save_tower(run.student.vit.eval(), folder, mean=0.5, std=0.5)
        told = CARD.format(holds=TRAINED["vit"].holds, command=TRAINED["vit"].command, steps=steps, batch=batch, pictures=len(files))
        write(folder / "README.md", told)
        write_json(folder / "losses.json", [round(one, 4) for one in run.losses], indent=None)

    return lay("vit", fill)


def tell(pictures: Path, steps: int, batch: int, seed: int, work: Path) -> None:
    """Run the command, and say where the tower is."""
    print(f"real:vit: {distil(pictures, steps, batch, seed, work)}")
