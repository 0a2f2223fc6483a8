"""What the trainings of the embedded world's two backbones share: an optimiser, and batches that are made while training goes on."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from foveate.machine import has_bfloat16


class Optimiser:
    """AdamW with warm-up and a cosine, on float32 masters of a module whose weights are bfloat16, or float32 where the processor has no
    instructions for it.

    With `matrices` the weight matrices have Muon instead (Jordan et al. 2024; embeddings and norms keep AdamW), and the rate is constant
    until the last third of the steps, over which it falls to nothing.
    """

    def __init__(self, module: nn.Module, learning_rate: float, steps: int, weight_decay: float = 0.02, matrices: bool = False) -> None:
        self.weights = list(module.parameters())
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        module.to(torch.bfloat16 if has_bfloat16("cpu") else torch.float32)
        embeddings = {id(weight) for part in module.modules() if isinstance(part, nn.Embedding) for weight in part.parameters()}
        flat = [matrices and weight.ndim == 2 and id(weight) not in embeddings for weight in self.weights]
        rest = [master for master, muon in zip(self.masters, flat, strict=True) if not muon]
        self.adam = torch.optim.AdamW(rest, learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
        self.all: list[torch.optim.Optimizer] = [self.adam]
        if matrices:
            own = [master for master, muon in zip(self.masters, flat, strict=True) if muon]
            self.all.append(torch.optim.Muon(own, learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        warmup = max(1, steps // 30)

        def share(i: int) -> float:
            if matrices:
                return min(1.0, (i + 1) / warmup, max(0.0, 3 * (1 - i / steps)))
            return min(1.0, (i + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, i / steps))))

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(one, share) for one in self.all]

    def step(self, loss: Tensor) -> None:
        loss.backward()
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimiser, schedule in zip(self.all, self.schedules, strict=True):
            optimiser.step()
            schedule.step()
        self.publish()

    def save(self, path: Path, done: int) -> None:
        """Writes everything that `load` needs to go on after `done` steps, whole or not at all."""
        parts = [one.state_dict() for one in self._parts()]
        half = path.with_suffix(".half")
        half.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"done": done, "masters": self.masters, "parts": parts}, half)
        half.replace(path)

    def load(self, path: Path) -> int:
        """Takes up what `save` wrote, and says how many steps were done."""
        found = torch.load(path, weights_only=True)
        for master, saved in zip(self.masters, found["masters"], strict=True):
            master.copy_(saved)
        for one, saved in zip(self._parts(), found["parts"], strict=True):
            one.load_state_dict(saved)
        self.publish()
        return int(found["done"])

    def _parts(self) -> list[Any]:
        return [*self.all, *self.schedules]

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the masters into the module, in the module's own precision."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)


class Made(IterableDataset[Any]):
    """Batches made one after the other by `make(index)`, in a worker process beside the training."""

    def __init__(self, make: Any, steps: range) -> None:
        self.make, self.steps = make, steps

    def __iter__(self) -> Iterator[Any]:
        torch.set_num_threads(1)
        return (self.make(i) for i in self.steps)


def batches(make: Any, steps: int, name: str, first: int = 0) -> Iterator[Any]:
    """The batches from the step `first` on, under a progress bar with an estimate of the time left."""
    loader = DataLoader(Made(make, range(first, steps)), batch_size=None, num_workers=1, prefetch_factor=8)
    return iter(track(loader, name, steps, first))


def say(title: str, numbers: dict[str, float]) -> None:
    print(title, " ".join(f"{name} {number:.3f}" for name, number in numbers.items()), flush=True)
