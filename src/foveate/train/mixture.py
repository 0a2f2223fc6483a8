"""The samples of several sources as one data set, source by source, and the loss that each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from foveate.data.collate import IGNORED
from foveate.data.conversations import Conversation, Conversations
from foveate.data.pixels import Picture
from foveate.errors import FoveateError
from foveate.train.order import apportion


@dataclass(frozen=True)
class Part:
    """One source: its samples, what becomes of one that turns out bad, and its share of what is drawn (None: as large as it is)."""

    name: str
    samples: Conversations
    policy: str
    share: Fraction | None


class Mixture:
    """Map-style data set of all sources' samples. What messages call a sample names its source, where there are several."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part.samples) for part in parts])

    @property
    def name(self) -> str:
        return ", ".join(part.samples.name for part in self.parts)

    @property
    def names(self) -> list[str]:
        """Of the sources, where there are several."""
        return [part.name for part in self.parts] if len(self.parts) > 1 else []

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, item: int) -> tuple[int, int]:
        """The number of an item's source, and its place there."""
        number = int(np.searchsorted(self._ends, item, side="right"))
        return number, int(item - self._ends[number] + len(self.parts[number].samples))

    def __getitem__(self, item: int) -> Conversation:
        number, own = self.place(item)
        sample = self.parts[number].samples[own]
        return replace(sample, index=int(item), id=self._named(number, sample.id), source=number)

    def _named(self, number: int, sample: str) -> str:
        return f"{sample} ({self.parts[number].name})" if self.names else sample

    def name_of(self, item: int) -> str:
        """What messages call a sample."""
        number, own = self.place(item)
        return self._named(number, self.parts[number].samples.name_of(own))

    def pictures(self, item: int) -> list[Picture]:
        number, own = self.place(item)
        return self.parts[number].samples.pictures(own)

    def after(self, item: int, number: int) -> int:
        """The sample `number` places further on in the same source, from its beginning again after its last one."""
        source, own = self.place(item)
        return item - own + self.parts[source].samples.after(own, number)

    def policy(self, item: int) -> str:
        return self.parts[self.place(item)[0]].policy

    def show(self, how: Any) -> None:
        """From here on samples have what `how` makes of their pictures."""
        for part in self.parts:
            part.samples.show = how

    def sizes(self) -> np.ndarray:
        """What stands for the length of each sample where lengths are compared: (samples,)."""
        return np.concatenate([part.samples.source.sizes()[part.samples.index] for part in self.parts])

    def drawn(self) -> list[tuple[int, int]] | None:
        """Of each source (samples, how many of them are drawn in as many draws as there are samples in all); None where no source has a
        share. FoveateError for a share that comes to none."""
        shares = [part.share for part in self.parts if part.share is not None]
        if not shares:
            return None
        counts = apportion(shares, len(self))
        if 0 in counts:
            part = self.parts[counts.index(0)]
            raise FoveateError(
                f"data: the share of {part.name} ({part.share} of {sum(shares)}) is not one sample of an epoch of {len(self):,}; raise it, "
                "or leave the source out"
            )
        return [(len(part.samples), count) for part, count in zip(self.parts, counts, strict=True)]


class SourceLosses:
    """What each source's samples have come to since it was last asked: sums of their tokens' losses, supervised tokens and samples.

    The losses are those of the forward pass that is trained on, read off its logits. However that lays the samples out, their supervised
    tokens stay in order."""

    def __init__(self, sources: int) -> None:
        self.sums = torch.zeros(sources, 3, dtype=torch.float64)

    def expect(self, labels: Tensor, sources: Sequence[int]) -> None:
        """The batch that comes next: (samples, positions), and the number of each sample's source."""
        self._samples = torch.tensor(sources, device=labels.device)
        samples, positions = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        self._tokens, self._targets = self._samples[samples], labels[samples, positions + 1]

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """What the model made of it: (rows, positions, vocabulary) with the labels (rows, positions), or the logits of what comes before a
        supervised token alone, (1, tokens, vocabulary)."""
        logits = logits.detach()
        known = logits[:, :-1][labels[:, 1:] != IGNORED] if logits.shape[:2] == labels.shape else logits[0]
        losses = cross_entropy(known.float(), self._targets, reduction="none").double()
        new = torch.zeros_like(self.sums, device=losses.device)
        new[:, 0].index_add_(0, self._tokens, losses)
        new[:, 1].index_add_(0, self._tokens, torch.ones_like(losses))
        new[:, 2].index_add_(0, self._samples, torch.ones_like(self._samples, dtype=torch.float64))
        self.sums = self.sums.to(new.device) + new

    def take(self) -> Tensor:
        """The sums (sources, 3), which begin again at nothing."""
        sums, self.sums = self.sums.cpu(), torch.zeros(self.sums.shape, dtype=torch.float64)
        return sums


def told(names: Sequence[str], sums: Sequence[Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Of each source the mean loss over its supervised tokens (None without any), their number, and that of its samples."""
    return {
        name: {"loss": loss / tokens if tokens else None, "tokens": int(tokens), "samples": int(samples)}
        for name, (loss, tokens, samples) in zip(names, sums, strict=True)
    }
