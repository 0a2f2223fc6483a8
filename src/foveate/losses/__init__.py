"""Losses over several passes of one model in a step, one file each, one line below each. Recipes find a loss by it."""

from __future__ import annotations

from foveate.losses.base import Loss as Loss
from foveate.losses.base import Seen as Seen
from foveate.losses.base import Step as Step
from foveate.losses.base import Whole as Whole
from foveate.losses.plan import Plan as Plan
from foveate.losses.plan import check_together as check_together
from foveate.losses.plan import plan_step as plan_step
from foveate.reducers.spelling import listed, read

# The losses by the dates of their papers. A line both exports a loss and lists it.
# isort: off
from foveate.losses.matryoshka import Matryoshka as Matryoshka
from foveate.losses.mdist import MDist as MDist
from foveate.losses.rdist import RDist as RDist
from foveate.losses.epic import EPIC as EPIC
from foveate.losses.dualspeed import DualSpeed as DualSpeed
# isort: on

LOSSES: dict[str, type[Loss]] = listed(globals(), Loss)


def parse_loss(text: str) -> Loss:
    """The loss of a spelling such as "epic:alpha=0.4"."""
    return read(text, "loss", LOSSES)
