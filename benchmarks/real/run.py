"""What a model trained on real parts can do: each family of questions beside the best constant answer and grey pictures.

    foveate real train recipes/real/vlm.yaml
    python benchmarks/real/run.py                                  # real:vlm on all test splits of data/real
    python benchmarks/real/run.py --splits compositions style
    python benchmarks/real/run.py --table                          # table.md again

An interrupted run goes on where it was. A score is right from one half on: of the letters of a text (ANLS), of a box in common (IoU).
Intervals are Wilson's, 95 %: questions about one picture make them somewhat too narrow.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from foveate.errors import FoveateError
from foveate.evaluation.bench import bench
from foveate.evaluation.cells import Bench, load_bench
from foveate.files import write

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository: what the benchmarks share lies in benchmarks/

from benchmarks.real.tasks import Asked, asked, score  # noqa: E402


def table(found: Bench, files: list[Asked]) -> str:
    """A row a split and family, with what was asked on grey pictures beside it."""
    lines = [
        "| split | family | questions | right | 95 % | on grey pictures | the best constant answer | |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    there = {cell.task for cell in found.cells if cell.method == "none"}
    for one in files:
        if one.name not in there:
            continue
        constant = one.constant()
        own = score(found.bare(one.name), constant)
        grey = next((cell for cell in found.cells if cell.task == one.name and cell.method == "blind"), None)
        blind = "" if grey is None else f"{100 * score(grey, constant).accuracy:.1f} %"
        interval = f"{100 * own.low:.0f} to {100 * own.high:.0f}"
        cells = [one.split, one.family, str(own.n), f"{100 * own.accuracy:.1f} %", interval, blind, f"{100 * constant[1]:.1f} %"]
        lines.append(f"| {' | '.join(cells)} | {constant[0].replace('|', '/')} |")
    environment = found.meta["environment"].replace("\n", "; ")
    return "\n".join([*lines, "", f"`{found.meta['model']}`, bare, in {found.meta['dtype']}; {environment}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="real:vlm")
    parser.add_argument("--data", type=Path, default=Path("data/real"), help="what foveate data real has written")
    parser.add_argument("--splits", nargs="+", default=[], help="all of them unless given")
    parser.add_argument("--limit", type=int, help="questions of each file")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32", help="of the weights; bfloat16 is the faster one where the processor has it")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--work", type=Path, help="folder of the answers; runs/real/answers-NAME unless given")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the table")
    given = parser.parse_args()
    files = asked(given.data, given.splits)
    if not files:
        raise FoveateError(f"{given.data} has no questions for the splits {', '.join(given.splits) or 'of real.json'}")
    name = Path(given.model).name.replace(":", "-")
    work = given.work or Path("runs/real") / f"answers-{name}"
    if not given.table:
        options = {"baselines": False, "blind": True, "batch_size": given.batch_size, "limit": given.limit, "dtype": given.dtype}
        bench(given.model, [one.task for one in files], [], [1.0], work, **options)
    given.output.mkdir(parents=True, exist_ok=True)
    write(given.output / f"{name.removeprefix('real-')}.md", table(load_bench(work), asked(given.data)))


if __name__ == "__main__":
    main()
