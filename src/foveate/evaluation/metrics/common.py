"""What several metrics share: the plain form of an answer, checked options, and the interval of a share."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import NormalDist

from foveate.errors import FoveateError, nearest


def normalise(text: str) -> str:
    """Lower case, white space collapsed and stripped, one final full stop dropped. Nothing else: "two" is not "2"."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def one_of(metric: str, option: str, value: str, allowed: Iterable[str]) -> None:
    """FoveateError for an option's value that is not among the allowed ones."""
    allowed = list(allowed)
    if value not in allowed:
        raise FoveateError(f"metric {metric}: {option}={value}{nearest(value, allowed)}; choose one of {', '.join(allowed)}")


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, (low, high) in 0..1."""
    if not 0 <= correct <= n or n == 0:
        raise FoveateError(f"an interval needs 0 <= correct <= n and n > 0, got correct={correct}, n={n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
