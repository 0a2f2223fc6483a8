"""Several samples laid end to end in one row, without seeing each other: less padding, the same losses and gradients.

Positions begin anew with each sample. From that alone the library's masks and Foveate's engine know where a sample ends: no token sees
another sample's, a reducer decides sample by sample, and the question of an image is looked for in its own sample. The first token of a
sample is nobody's next token. What is left over at the end of a row is one more sample, of padding.

Samples stay in their order, so that images stay in theirs, and rows are a pure function of the batch and of the reducer of the moment.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.data.collate import IGNORED

Rows = list[range]  # of samples, one after the other


@dataclass(frozen=True)
class Price:
    """What a row of n tokens costs in each decoder layer, n * token + n² * pair: arrays (layers,), in whatever unit."""

    token: np.ndarray
    pair: np.ndarray

    def __call__(self, lengths: np.ndarray, rows: Rows) -> float:
        """Of all rows, each of them as long as the longest. lengths: (samples, layers) int64, the samples' tokens as each layer meets them.

        Padding in front of the first layer goes through all layers."""
        laid = np.add.reduceat(lengths, [row.start for row in rows])
        longest = (laid + (laid[:, :1].max() - laid[:, :1])).max(0)
        return float(len(rows) * (longest * self.token + longest**2 * self.pair).sum())


def lay(lengths: Sequence[float], most: int) -> Rows:
    """Rows of at most `most` tokens, the samples as they come; a longer sample has a row to itself."""
    rows, start, filled = Rows(), 0, 0.0
    for at, length in enumerate(lengths):
        if at > start and filled + length > most:
            rows.append(range(start, at))
            start, filled = at, 0.0
        filled += length
    return [*rows, range(start, len(lengths))]


def even(lengths: Sequence[float], count: int) -> Rows:
    """At most `count` rows, the longest of them as short as can be."""
    ends = range(math.ceil(max(*lengths, sum(lengths) / count)), math.ceil(sum(lengths)))
    return lay(lengths, ends.start + bisect_left(ends, True, key=lambda end: len(lay(lengths, end)) <= count))


def cheapest(lengths: np.ndarray, price: Price) -> Rows:
    """The rows that cost least, among those that are even. lengths: (samples, layers), of which the mean over the layers is laid out."""
    mean = lengths.mean(1).tolist()
    return min((even(mean, count) for count in range(len(mean), 0, -1)), key=lambda rows: price(lengths, rows))


def packed(batch: Mapping[str, Tensor], rows: Rows, pad: int) -> dict[str, Any]:
    """A batch (samples, length), padded on the right, as rows of samples: `position_ids` (rows, tokens) in the place of
    `attention_mask`, and all else that has a number a token laid out likewise. `pad`: the token that fills what is left of a row.
    `use_cache` is False: the library looks for samples only where no past is kept."""
    shape, mask = batch["input_ids"].shape, batch["attention_mask"]
    lengths = mask.sum(1).tolist()
    size = len(rows), max(sum(lengths[row.start : row.stop]) for row in rows)
    along = {name: value for name, value in batch.items() if value.shape == shape and name != "attention_mask"}
    fill = {"input_ids": pad, "labels": IGNORED}
    new = {name: value.new_full(size, fill.get(name, 0)) for name, value in along.items()}
    positions = mask.new_zeros(size, dtype=torch.int64)
    for number, row in enumerate(rows):
        at = 0
        for sample in row:
            end = at + lengths[sample]
            for name, value in along.items():
                new[name][number, at:end] = value[sample, : end - at]
            new["labels"][number, at] = IGNORED
            positions[number, at:end] = torch.arange(end - at)
            at = end
        positions[number, at:] = torch.arange(size[1] - at)
    others = {name: value for name, value in batch.items() if name not in along and name != "attention_mask"}
    return {**others, **new, "position_ids": positions, "use_cache": False}
