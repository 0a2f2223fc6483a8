"""What `accelerate launch` starts in tests of sharded training: it trains recipes one after the other.

    accelerate launch ... -m tests.train.launched RECIPE ... [RECIPE@STAGE:STEP]

The last may be killed, -9 and in all processes, when it begins that step. Beside each recipe stands how its model was divided, RECIPE.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from foveate.train.run import main
from foveate.train.trainer import FoveateTrainer


def told(trainer: FoveateTrainer, model: torch.nn.Module) -> dict[str, Any]:
    return {
        "divided": trainer.divided,
        "model": type(model).__name__,
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "parameters": sorted({type(parameter).__name__ for parameter in model.parameters()}),
        "units": [name for name, module in model.named_modules() if isinstance(module, FSDPModule)],
    }


def run(recipe: Path, stage: str, step: str) -> None:
    train = FoveateTrainer.training_step

    def watched(self: FoveateTrainer, model: torch.nn.Module, *args: Any) -> torch.Tensor:
        if self.is_world_process_zero():
            recipe.with_suffix(".json").write_text(json.dumps(told(self, model)))
        if (self.stage.name, str(self.state.global_step)) == (stage, step):
            os.kill(os.getpid(), signal.SIGKILL)
        return train(self, model, *args)

    FoveateTrainer.training_step = watched  # type: ignore[method-assign,assignment]
    try:
        main(recipe)
    finally:
        FoveateTrainer.training_step = train  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for given in sys.argv[1:]:
        name, _, moment = given.partition("@")
        run(Path(name), *moment.partition(":")[::2])
