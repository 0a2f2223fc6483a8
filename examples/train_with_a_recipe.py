"""LLaVolta in small: a bridge between a ready tower and a ready language model, then both fine-tuned under fewer and fewer cuts.

    python examples/train_with_a_recipe.py [FOLDER]

A few steps only, to show the parts; recipes/pretraining/llavolta.yaml is the whole of it.
"""

import sys
import tempfile
from pathlib import Path

from foveate.train.recipe import load_recipe
from foveate.train.run import train
from foveate.world.scenes import write_world

RECIPE = """
name: small
output: {root}/run
workers: 0
model: {{vision: asset:tower, text: asset:lm, vision_feature_layer: [-1], bridge: {{kind: mlp}}}}
stages:
  - name: pretrain
    data: {{conversations: {root}/world/pretrain.json, images: {root}/world/images}}
    image_size: 64
    train: {{bridge: true}}
    steps: 4
    batch_size: 4
    learning_rate: 1.5e-3
  - name: finetune
    data: {{conversations: {root}/world/finetune.json, images: {root}/world/images}}
    image_size: 64
    train: {{bridge: true, lm: true}}
    steps: 6
    batch_size: 4
    learning_rate: 1.5e-3
    reducers:  # of each third of the steps
      - {{share: 1/3, reducer: "vcc:layer=1,stride=8"}}
      - {{share: 1/3, reducer: "vcc:layer=3,stride=2"}}
      - {{share: 1/3, reducer: none}}
"""


def main(root: Path) -> None:
    write_world(root / "world", train=24, test=4, seed=0, size=64, progress=False)
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=root))
    final = train(load_recipe(recipe))  # run again, it goes on where it was interrupted
    print(f"model, processor and what is needed to load them: {', '.join(sorted(path.name for path in final.iterdir()))}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
