"""A metric of one's own in a benchmark: how much of an answer is right, letter by letter, rather than whether all of it is."""

import tempfile
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path

from foveate.evaluation.bench import bench
from foveate.evaluation.samples import Metric, Sample
from foveate.evaluation.tasks import load_task


@dataclass(frozen=True)
class Letters(Metric):
    """Likeness to the most similar reference, 0 to 1."""

    name = "letters"
    figure = "likeness"  # what the headline is called

    def score(self, prediction: str, sample: Sample) -> float:
        return max(SequenceMatcher(None, prediction, answer).ratio() for answer in sample.answers)


def main(folder: Path) -> None:
    scenes = load_task("scenes:count=4", progress=False)  # four pictures of the embedded world with all of their questions
    task = replace(scenes, name="letters", metric=Letters())
    found = bench("asset:vlm", [task], ["divprune"], [1.0, 0.25], folder, baselines=False, limit=16, progress=False)
    for cell in found.cells:
        print(f"{cell.method:10} keep {cell.keep:g}: {cell.summary}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
