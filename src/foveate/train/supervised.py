"""The head and the loss at supervised rows alone: of the others nobody asks for logits.

The model runs its own forward pass. In front of its head the states (B, N, D) are cut to the rows whose next token is supervised,
(1, R, D), and the loss gets that token of each as `shift_labels`. Whatever the model does to its logits one by one (capping, scaling, a
bias) and beside its loss (balancing experts) stays its own. Whether that comes to the same is found by trying it, `tried`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveate.data.collate import IGNORED
from foveate.errors import FoveateError

log = logging.getLogger(__name__)

CLOSE = 1e-2  # of the largest: what bfloat16 may round otherwise in a product of another shape; a wrong row is off by its whole size


def next_tokens(labels: Tensor) -> Tensor:
    """(B, N) labels -> the label of the token after each, IGNORED at the end of a row."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


class SupervisedRows:
    """Cuts the states in front of `head`, a model's output embeddings, to the supervised rows; None: all rows are computed."""

    def __init__(self, head: nn.Module | None) -> None:
        self.head = head

    @contextmanager
    def alone(self, inputs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """The arguments for a call of the model in which the head sees the supervised rows alone: `inputs` with `shift_labels` (1, R).

        The call's logits are (1, R, V), in the order of the rows in the batch. FoveateError if the head is not given states (B, N, D).
        """
        if self.head is None:
            yield inputs
            return
        following = next_tokens(inputs["labels"])
        rows = (following != IGNORED).flatten().nonzero()[:, 0]

        def cut(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            states: Tensor = args[0]
            if states.shape[:-1] != following.shape:
                raise FoveateError(f"the head is given states of shape {tuple(states.shape)} for labels of {tuple(following.shape)}")
            return (states.flatten(0, 1).index_select(0, rows.to(states.device))[None], *args[1:])

        handle = self.head.register_forward_pre_hook(cut)
        try:
            yield {**inputs, "shift_labels": following.flatten()[rows][None]}
        finally:
            handle.remove()

    def count(self, labels: Tensor) -> list[int | None]:
        """Rows of the head in each row of `labels` (B, N); None where that is all of them."""
        if self.head is None:
            return [None] * len(labels)
        return (next_tokens(labels) != IGNORED).sum(1).tolist()


def tried(model: Any, batch: Mapping[str, Tensor], scaled: bool, tell: bool = True) -> SupervisedRows:
    """What cuts the head of `model` to supervised rows, if on `batch` logits and losses are then what they are without; else what leaves it
    as it is, and says why once. `scaled`: whether its loss takes `num_items_in_batch`, by which it is tried as well. `tell`: whether to say
    it."""
    rows = SupervisedRows(model.get_output_embeddings())
    reason = "it has no output embeddings" if rows.head is None else _difference(model, rows, batch, scaled)
    if not reason:
        return rows
    if tell:
        log.warning("logits are computed for all tokens, not for the supervised ones alone: %s: %s", type(model).__name__, reason)
    return SupervisedRows(None)


def _difference(model: nn.Module, rows: SupervisedRows, batch: Mapping[str, Tensor], scaled: bool) -> str:
    """What keeps the model from giving the same at supervised rows alone, "" if nothing does."""
    training, wanted = model.training, (next_tokens(batch["labels"]) != IGNORED).to(batch["labels"].device)
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            for extra in ({}, {"num_items_in_batch": torch.tensor(3, device=wanted.device)})[: 1 + scaled]:
                whole = model(**batch, **extra)
                with rows.alone(batch) as given:
                    alone = model(**given, **extra)
                expected = whole.logits[wanted.to(whole.logits.device)]
                if alone.logits.shape[1] != len(expected):
                    return f"its head gave {alone.logits.shape[1]} rows of logits where {len(expected)} were asked for"
                if not (_close(alone.logits[0], expected) and _close(alone.loss, whole.loss)):
                    return "its logits or its loss depend on the other rows"
    except Exception as error:  # whatever a model of another make does not take
        return str(error) or type(error).__name__
    finally:
        model.train(training)
    return ""


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= CLOSE * expected.abs().max())
