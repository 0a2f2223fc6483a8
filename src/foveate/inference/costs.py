"""What a prompt and its answer have cost, from the record of the pass that read the prompt."""

from __future__ import annotations

from typing import Any

from foveate.accounting import Ledger, answered, observed, together
from foveate.engine.record import Record
from foveate.errors import FoveateError


def answer_cost(config: Any, seen: Record, new: int, dtype_bytes: int) -> Ledger | None:
    """The cost of a batch of prompts with answers of `new` tokens each, of which the last is not read; None where it is not known."""
    visual = zip(*(layout.visual.sum(1).tolist() for layout in seen.layouts), strict=True)
    total = zip(*(layout.valid.sum(1).tolist() for layout in seen.layouts), strict=True)
    try:
        after = [
            observed(config, own, tokens, mode="decode", new_tokens=new - 1, dtype_bytes=dtype_bytes)
            for own, tokens in zip(visual, total, strict=True)
        ]
        return answered(seen.ledger(config, dtype_bytes=dtype_bytes), together(after))
    except FoveateError:
        return None
