"""Trains the two small backbones of the embedded world from nothing: a vision tower without any language model, and a language model on
text alone. Scenes and documents are made while training goes on, so no data is stored.

    python -m foveate.world.backbones tower --out DIR --steps 6000
    python -m foveate.world.backbones lm --out DIR --steps 8000
"""

import argparse
from pathlib import Path

from foveate.world.language import train_lm
from foveate.world.tower import train_tower


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="foveate.world.backbones", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("which", choices=("tower", "lm"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    (train_tower if given.which == "tower" else train_lm)(given.out, given.steps, given.seed)


if __name__ == "__main__":
    main()
