"""What a prompt and its answer have cost, from the record of the pass that read the prompt."""

from __future__ import annotations

from typing import Any

from foveate.accounting import Ledger, answered, observed
from foveate.engine.record import Record
from foveate.errors import FoveateError


def answer_cost(config: Any, seen: Record, new: int, dtype_bytes: int) -> Ledger | None:
    """The cost of a batch of prompts with answers of `new` tokens each, of which the last is not read; None where it is not known."""
    visual = [layout.visual.sum(1).tolist() for layout in seen.layouts]
    total = [layout.valid.sum(1).tolist() for layout in seen.layouts]
    try:
        after = observed(config, visual, total, mode="decode", new_tokens=new - 1, dtype_bytes=dtype_bytes)
        return answered(seen.ledger(config, dtype_bytes=dtype_bytes), after)
    except FoveateError:
        return None
