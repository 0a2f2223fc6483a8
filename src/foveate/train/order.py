"""Which samples stand in which batch: a pure function of (seed, stage, epoch, step), the same for any number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from foveate.errors import FoveateError

CHUNK = 50  # batches that are sorted by length together


def seed_of(*parts: object) -> int:
    """A 32-bit seed from a hash, so that neighbouring seeds, stages and epochs have nothing in common."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


def apportion(shares: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers in the ratio of the shares that add up to `total`, by largest remainders; of equal ones the first goes before."""
    exact = [share * total / sum(shares) for share in shares]
    found = [int(value) for value in exact]
    for place in sorted(range(len(shares)), key=lambda i: found[i] - exact[i])[: total - sum(found)]:
        found[place] += 1
    return found


class Order:
    """The samples of a stage as one long row: one permutation after the other, an epoch each, cut into batches of equal size.

    A batch at the seam of two epochs takes from both, so that every batch is full. `sizes`: lengths of the samples, to put samples of
    similar length into the same batch (which then leave the seam: an epoch is whole batches, filled up from its own beginning).
    `drawn`: where the samples are those of several sources, one behind the other, drawn by shares: (samples of the source, how many of
    them an epoch has). Each source goes through all its samples before one of them comes again.
    `budgets`: numbers of visual tokens of a view, of which one is drawn for each step.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        seed: int,
        stage: str,
        sizes: np.ndarray | None = None,
        drawn: Sequence[tuple[int, int]] | None = None,
        budgets: Sequence[int] = (),
    ) -> None:
        self.samples, self.batch_size, self.seed, self.stage = samples, batch_size, seed, stage
        self.sizes, self.drawn, self.budgets = sizes, drawn, budgets

    @lru_cache(maxsize=2)  # noqa: B019  an order lives as long as its stage
    def epoch(self, epoch: int) -> np.ndarray:
        # RandomState's stream is frozen by numpy's policy, Generator's is not.
        random = np.random.RandomState(seed_of(self.seed, self.stage, epoch))
        row = random.permutation(self.samples) if self.drawn is None else random.permutation(self._draw(epoch))
        if self.sizes is None:
            return row
        row = np.resize(row, -(-len(row) // self.batch_size) * self.batch_size)
        batches: list[np.ndarray] = []
        for start in range(0, len(row), CHUNK * self.batch_size):
            chunk = row[start : start + CHUNK * self.batch_size]
            chunk = chunk[np.argsort(self.sizes[chunk], kind="stable")]
            batches.extend(chunk.reshape(-1, self.batch_size))
        return np.concatenate([batches[i] for i in random.permutation(len(batches))])

    def _draw(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, source by source: of each the next ones of its own row of permutations."""
        assert self.drawn is not None
        found, first = [], 0
        for number, (samples, count) in enumerate(self.drawn):
            start = epoch * count
            rounds = range(start // samples, -(-(start + count) // samples))
            seeds = [seed_of(self.seed, self.stage, number, turn) for turn in rounds]
            row = np.concatenate([np.random.RandomState(seed).permutation(samples) for seed in seeds])
            found.append(first + row[start % samples :][:count])
            first += samples
        return np.concatenate(found)

    def batch(self, step: int) -> np.ndarray:
        """Samples of optimiser step `step`, over all processes: (batch_size,)."""
        first = step * self.batch_size
        period = len(self.epoch(0))
        found: list[np.ndarray] = []
        missing = self.batch_size
        while missing:
            epoch, at = divmod(first, period)
            part = self.epoch(epoch)[at : at + missing]
            found.append(part)
            first, missing = first + len(part), missing - len(part)
        return np.concatenate(found)

    def view_tokens(self, step: int) -> int | None:
        """The number that is drawn for optimiser step `step`, the same in all processes; None where the stage draws none."""
        return self.budgets[seed_of(self.seed, self.stage, "view_tokens", step) % len(self.budgets)] if self.budgets else None


Item = int | tuple[int, int]
"""The number of a sample; or it, and as how many visual tokens its views are asked for."""


class Items:
    """What a loader of data fetches for a sampler's items: they themselves, which are read where they are collated."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, item: Item) -> Item:
        return item


class ProcessBatches(Sampler[list[Item]]):
    """One process' micro-batches of all optimiser steps of a stage, in order."""

    def __init__(self, order: Order, steps: int, process: int, processes: int, accumulation: int) -> None:
        self.order, self.steps, self.process, self.processes, self.accumulation = order, steps, process, processes, accumulation

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[Item]]:
        for step in range(self.steps):
            mine, each = np.split(self.order.batch(step), self.processes)[self.process], self.order.view_tokens(step)
            for micro in np.split(mine, self.accumulation):
                yield micro.tolist() if each is None else [(number, each) for number in micro.tolist()]


def division(batch_size: int, micro_batch: int | None, processes: int, stage: str) -> tuple[int, int]:
    """(micro batch, accumulation) with batch_size = micro batch x accumulation x processes. FoveateError if that does not come out."""
    if batch_size % processes:
        raise FoveateError(f"stage {stage}: batch_size {batch_size} cannot be divided among {processes} processes")
    micro = micro_batch or batch_size // processes
    if batch_size % (micro * processes):
        raise FoveateError(
            f"stage {stage}: batch_size {batch_size} must be micro_batch {micro} x accumulation x {processes} processes, but {micro} x "
            f"{processes} = {micro * processes} does not divide it. Choose a micro_batch that divides {batch_size // processes}"
        )
    return micro, batch_size // (micro * processes)
