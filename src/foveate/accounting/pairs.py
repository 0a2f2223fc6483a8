"""Pairs of query and key that need not be computed, since a rule of who sees whom hides them."""

from __future__ import annotations

from collections.abc import Sequence

from foveate.accounting.prompts import Prompt
from foveate.contract import Visibility, Workload
from foveate.reducers import Reducer
from foveate.reducers.base import acting, tokens_by_layer


def unseen(reducers: Sequence[Reducer], prompts: Sequence[Prompt], layers: int) -> list[list[int]]:
    """By decoder layer, of each prompt. Where several rules hold, what the one hides that hides most: they may hide the same."""
    found = [[0] * len(prompts) for _ in range(layers)]
    steps = [(site, reducer, stage) for site, reducer, stage in acting(reducers, layers) if isinstance(site, Visibility)]
    for row, prompt in enumerate(prompts if steps else ()):
        left = tokens_by_layer(reducers, prompt.images, layers)
        for site, reducer, stage in steps:
            for layer in filter(site.at, range(layers)):
                sizes = Workload(tuple(prompt.images), tuple(left[layer]), prompt.text, layers=layers)
                found[layer][row] = max(found[layer][row], reducer.unseen(sizes, stage))
    return found
