"""What it takes to count FLOPs: CPU milliseconds of the trainer for one more sample, whose image has another size than all before it.

    python benchmarks/accounting/run.py --old ../older/src         # beside another tree of this library

CLIP-L at 336 px and a 7B language model, on shapes alone; pictures of 60 sizes, one length of text each. `whole`: a model without a tiling,
for which all of them are alike. Each tree has a process of its own, one thread. Writes results.json and results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CASES = {
    "whole": (None, "none"),
    "whole, FastV": (None, "fastv:keep=0.5,layer=2"),
    "InternVL's tiles, at most 6": ("internvl:tiles=6", "none"),
    "InternVL's tiles, FastV": ("internvl:tiles=6", "fastv:keep=0.5,layer=2"),
    "anyres": ("anyres", "none"),
}


def work() -> None:
    """A tree's process: CPU milliseconds of each sample, by case."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig

    from foveate.accounting import Trained
    from foveate.model import FoveateConfig
    from foveate.train.account import Costs

    torch.set_num_threads(1)
    wide: dict[str, Any] = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24}
    text = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000)
    draw, found = random.Random(0), {}
    sizes = [(draw.randint(200, 1200), draw.randint(200, 1200)) for _ in range(60)]
    for name, (tiling, reducers) in CASES.items():
        vision = CLIPVisionConfig(**wide, image_size=336, patch_size=14)
        config: Any = FoveateConfig(
            vision_config=vision, text_config=text, bridge={"kind": "mlp"}, vision_feature_layer=[-2], image_token_id=5, tiling=tiling
        )
        costs, spent = Costs(config, Trained(bridge=True, lm=True)), []
        for number, size in enumerate(sizes):
            plan = config.plan_image(*size)
            begin = time.process_time()
            assert costs.of(reducers, (plan,), 100 + number, 20) > 0
            spent.append(1000 * (time.process_time() - begin))
        found[name] = spent
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--old", type=Path, help="src of another tree, measured beside this one")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work()
        return
    from foveate.files import write_json
    from foveate.machine import environment

    trees = {"old": given.old, "new": ROOT / "src"} if given.old else {"new": ROOT / "src"}
    report: dict[str, Any] = {"machine": environment(), "milliseconds": {}}
    for name, tree in trees.items():
        command = [sys.executable, __file__, "--work"]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tree.resolve())}, check=True, stdout=subprocess.PIPE, text=True)
        report["milliseconds"][name] = json.loads(done.stdout.splitlines()[-1])
    write_json(HERE / "results.json", report)
    (HERE / "results.md").write_text(table(report), encoding="utf-8")
    print(table(report))


def table(report: dict[str, Any]) -> str:
    spent = report["milliseconds"]
    lines = [
        f"`python benchmarks/accounting/run.py{' --old OLD/src' if 'old' in spent else ''}`",
        "",
        f"{report['machine']}. CPU ms a sample: the first, and the median and the sum of the others.",
        "",
        f"| | {' | '.join(f'{tree}: first | median | sum' for tree in spent)} |",
        f"|---|{'---:|' * 3 * len(spent)}",
    ]
    for case in CASES:
        cells = [case]
        for own in spent.values():
            first, *others = own[case]
            cells += [f"{first:,.0f}", f"{statistics.median(others):,.2f}", f"{sum(others):,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
