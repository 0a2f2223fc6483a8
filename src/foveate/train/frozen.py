"""What a stage may do that reads the features of its tower from a cache."""

from __future__ import annotations

from typing import Any

from foveate.accounting.dry_run import skeleton
from foveate.anatomy import read
from foveate.contract import Noise
from foveate.errors import FoveateError
from foveate.model.configuration import FoveateConfig
from foveate.probes.tower import TOWER_SIGNALS
from foveate.reducers import parse
from foveate.reducers.base import acting
from foveate.train.settings import Stage


def check_features(stage: Stage, config: Any) -> None:
    """Of a stage that reads the features of its tower. FoveateError where the tower has to run, or is not one of ours."""
    if not isinstance(config, FoveateConfig):
        raise FoveateError(
            f"`features` needs a Foveate model, but the checkpoint is a {config.model_type} model, which may read of its tower what it "
            "likes; leave it out"
        )
    if stage.train.tower:
        raise FoveateError("`features` are those of a frozen tower, but this stage trains the tower; leave out one of the two")
    layers = len(read(skeleton(config)).layers)
    for spelled in dict.fromkeys(spelled for part in stage.parts for spelled in part.cycle):
        for site, reducer, _ in acting(parse(spelled), layers):
            looks = [type(signal).__name__ for signal in site.needs if isinstance(signal, TOWER_SIGNALS)]
            if site.effect.place == "tower":
                reason = "acts inside of the tower"
            elif looks:
                reason = f"looks at what happens inside of the tower ({', '.join(looks)})"
            elif any(isinstance(signal, Noise) for signal in site.needs):
                reason = "draws by the pixels of each image"
            else:
                continue
            raise FoveateError(f"{reducer} {reason}, but with `features` neither tower nor pixels are there; leave out one of the two")
