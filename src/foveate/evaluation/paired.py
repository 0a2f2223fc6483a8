"""A method against the bare model on the same questions: how much is lost, within which bounds, and whether it could be chance.

Pairs are what makes small differences visible: two accuracies of 500 questions are known to two points each, while of the questions that
only one of the two gets right there may be ten. Questions about one picture are not independent of each other, so intervals come from
drawing whole pictures anew (cluster bootstrap, Davison and Hinkley 1997, 3.8). McNemar's test takes them for independent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from foveate.errors import FoveateError
from foveate.evaluation.cells import Cell
from foveate.evaluation.metrics.common import normalise

RESAMPLES = 2000
SEED = 0
INTERVAL = 0.95
_AT_ONCE = 1 << 22  # pictures drawn in one piece

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """A method, with several seeds their mean, less the bare model.

    difference   of the mean scores, in -1..1; negative: the method loses
    low, high    95 % interval of the difference
    p            how likely at least such a difference is where there is none; `test`: "mcnemar" or "bootstrap"
    lost, gained questions on which the method scores lower, and higher, than the bare model
    loyalty      share of the answers that are the bare model's, right or wrong, but for case, white space and a full stop
    """

    difference: float
    low: float
    high: float
    p: float
    test: str
    lost: int
    gained: int
    loyalty: float


def compare(bare: Cell, cells: Sequence[Cell]) -> Paired:
    """`cells`: one method at one budget, a cell a seed. FoveateError where they do not answer the same questions."""
    if not cells:
        raise FoveateError(f"{bare.task}: there is no cell to compare with the bare model's")
    questions = [answer.id for answer in bare.answers]
    for cell in cells:
        if [answer.id for answer in cell.answers] != questions:
            raise FoveateError(f"{cell.task}: {cell.reducer} and the bare model answered different questions, so they cannot be compared")
    reference, scores = _scores(bare), np.mean([_scores(cell) for cell in cells], axis=0)
    difference = scores - reference
    low, high, p = bootstrap(difference, [answer.image for answer in bare.answers])
    lost, gained = int((difference < 0).sum()), int((difference > 0).sum())
    test = "bootstrap"
    if np.isin(reference, (0, 1)).all() and np.isin(scores, (0, 1)).all():
        p, test = mcnemar(lost, gained), "mcnemar"
    said = [normalise(answer.prediction) for answer in bare.answers]
    same = [normalise(answer.prediction) == text for cell in cells for answer, text in zip(cell.answers, said, strict=True)]
    return Paired(float(difference.mean()), low, high, p, test, lost, gained, sum(same) / len(same))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p of the exact test: of `lost + gained` questions that one of two gets right, `lost` or a less even number on either side,
    were both sides as likely (McNemar 1947)."""
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def bootstrap(difference: Scores, images: Sequence[str]) -> tuple[float, float, float]:
    """(low, high, p) of the mean of `difference`, (n,) one a question, when the `images` that they are about are drawn anew.

    The interval is between percentiles, p twice the share of resamples on the far side of 0. Deterministic.
    """
    _, image = np.unique(np.asarray(images), return_inverse=True)
    total, size = np.bincount(image, difference), np.bincount(image)
    random, count = np.random.default_rng(SEED), len(size)
    step = max(1, _AT_ONCE // count)
    parts = []
    for start in range(0, RESAMPLES, step):
        drawn = random.integers(0, count, (min(step, RESAMPLES - start), count))
        parts.append(total[drawn].sum(1) / size[drawn].sum(1))
    means = np.concatenate(parts).round(12)  # sums of thirds that cancel are 0, not nearly 0
    mean = float(difference.mean())
    tail = (1 - INTERVAL) / 2
    low, high = (float(bound) for bound in np.quantile(means, (tail, 1 - tail)))
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return min(low, mean), max(high, mean), min(1.0, 2 * (1 + beyond) / (1 + RESAMPLES))


def bootstrap_families(
    difference: Scores, images: Sequence[str], families: Sequence[str], counted: Sequence[str]
) -> tuple[float, float, float, float]:
    """(mean, low, high, p) of the mean over the families in `counted`, each counting the same, of `difference`, (n,) one a question, whose
    images and families run in parallel; as `bootstrap`, questions weighing what their family leaves to each."""
    asked = [i for i, family in enumerate(families) if family in counted]
    sizes = Counter(families[i] for i in asked)
    weight = np.array([len(asked) / (len(sizes) * sizes[families[i]]) for i in asked])
    weighed = difference[asked] * weight
    return float(weighed.mean()), *bootstrap(weighed, [images[i] for i in asked])


def _scores(cell: Cell) -> Scores:
    return np.array([answer.score for answer in cell.answers], dtype=np.float64)
