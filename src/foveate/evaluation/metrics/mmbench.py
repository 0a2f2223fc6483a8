"""MMBench's circular evaluation (arXiv 2307.06281): a question counts if it is answered right however its options are rotated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from foveate.errors import FoveateError
from foveate.evaluation.metrics.choice import LETTERS, Choice, options_of
from foveate.evaluation.samples import Sample, by_group, percent

ROTATION = 10**6  # a rotated row's index is the question's plus a multiple of this


@dataclass(frozen=True)
class MMBench(Choice):
    """The rows of a question are told by their ids: index + k * 10^6 is a rotation of index. Where no row is, rotations are made."""

    rule: str = "mmbench"
    name = "mmbench"

    def arrange(self, samples: list[Sample]) -> list[Sample]:
        if not any(sample.id.isdecimal() and int(sample.id) >= ROTATION for sample in samples):
            return [rotated for sample in samples for rotated in rotations(sample)]
        rows: dict[str, list[Sample]] = {}
        for sample in samples:
            if not sample.id.isdecimal():
                raise FoveateError(f"the id {sample.id!r} is no number, so that it is not known which rows are rotations of one question")
            rows.setdefault(str(int(sample.id) % ROTATION), []).append(sample)
        for question, own in rows.items():
            wanted = len(options_of(own[0]))
            if wanted and len(own) != wanted:
                raise FoveateError(f"question {question} has {wanted} options but {len(own)} rows; give all, or other ids by id=row")
        question_of = {sample.id: question for question, own in rows.items() for sample in own}
        return [replace(sample, extra={**sample.extra, "question": question_of[sample.id]}) for sample in samples]

    def summary(self, samples: Sequence[Sample], predictions: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
        """`accuracy` is that of questions, `accuracy of rows` counts every rotation by itself."""
        whole: dict[str, list[float]] = {}
        one: dict[str, Sample] = {}
        for sample, score in zip(samples, scores, strict=True):
            whole.setdefault(sample.extra["question"], []).append(score)
            one[sample.extra["question"]] = sample
        right = [float(min(own) == 1) for own in whole.values()]
        groups = by_group("accuracy", [one[question] for question in whole], right)
        return {"accuracy": percent(right), "accuracy of rows": percent(scores), **groups}


def rotations(sample: Sample) -> list[Sample]:
    """A question once for each of its options, the k-th time with the options moved up by k places."""
    if "options" not in sample.extra or len(sample.extra["options"]) < 2:
        raise FoveateError(f"sample {sample.id} has no options to rotate: name their columns with options=, or give rotated rows")
    options = tuple(sample.extra["options"])
    truth = LETTERS.index(sample.answers[0])
    made = []
    for k in range(len(options)):
        extra = {**sample.extra, "options": options[k:] + options[:k], "question": sample.id}
        made.append(replace(sample, id=f"{sample.id}#{k}", answers=(LETTERS[(truth - k) % len(options)],), extra=extra))
    return made
