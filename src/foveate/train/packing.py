"""Packing in a training step: the rows that a micro-batch's samples are laid in, under the reducer of the moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.accounting import decoder
from foveate.anatomy import read
from foveate.data.packing import Price, cheapest, even, lay, packed
from foveate.engine.attach import attach
from foveate.errors import FoveateError
from foveate.reducers import parse
from foveate.tokens import ImagePlan
from foveate.train.account import Costs
from foveate.train.by_sample import BACKENDS, sample_by_sample

CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest logit, otherwise 5e-2: what another row may round otherwise


class Packing:
    """Lays the samples of a micro-batch end to end. `most`: tokens of a row; None takes the rows that cost least by the model's own FLOPs.

    Lengths are those after the reducer, a mean over the decoder layers. Flash attention takes one row, whose samples cost no more there
    than apart, and so does attention that goes `by_sample`.
    """

    def __init__(self, most: int | None, model: nn.Module, costs: Costs, pad: int, by_sample: bool = False) -> None:
        self.most, self.costs, self.pad = most, costs, pad
        self.anatomy, self.by_sample = read(model), by_sample
        self.one_row = by_sample or "flash" in str(self.anatomy.text_config._attn_implementation)
        self.price = price(costs.config)

    def __call__(self, inputs: Mapping[str, Tensor], plans: Sequence[Sequence[ImagePlan]], reducer: str) -> dict[str, Any]:
        """The batch whose samples have images that become `plans`, laid out; the batch itself where every sample has its own row."""
        whole = inputs["attention_mask"].sum(1).tolist()
        if self.one_row:
            rows = [range(len(whole))]
        else:
            lengths = np.array([self.lengths(reducer, tuple(row), n) for n, row in zip(whole, plans, strict=True)], dtype=np.int64)
            mean = lengths.mean(1).tolist()
            rows = cheapest(lengths, self.price) if self.most is None else even(mean, len(lay(mean, self.most)))
        return dict(inputs) if len(rows) == len(whole) else packed(inputs, rows, self.pad)

    def lengths(self, reducer: str, images: tuple[ImagePlan, ...], whole: int) -> Sequence[int]:
        """Tokens of a sample in each decoder layer, where they can be told; else its `whole` length."""
        ledger = self.costs.ledger(reducer, images, whole - sum(plan.tokens for plan in images))
        return [whole] * len(self.price.token) if ledger is None else ledger.total_tokens


def attention_of(packing: Packing | None) -> AbstractContextManager[None]:
    """Around forward and backward pass of what was laid out: how the decoder attends to it."""
    return sample_by_sample(packing.anatomy) if packing is not None and packing.by_sample else nullcontext()


def price(config: Any) -> Price:
    """FLOPs of a row of the language model; where they cannot be told, its slots."""
    try:
        stack = decoder(config)
    except FoveateError:
        layers = config.get_text_config().num_hidden_layers
        return Price(np.ones(layers), np.zeros(layers))
    return Price(2.0 * np.array(stack.linear), 4.0 * np.array(stack.attention_width))


def goes_by_sample(model: Any, batch: Mapping[str, Tensor], pad: int, reducers: Sequence[str]) -> bool:
    """Tries whether the model's attention can go sample by sample, also under these reducers."""
    anatomy, training = read(model), model.training
    windows = any(anatomy.window(layer) is not None for layer in range(len(anatomy.layers)))
    if anatomy.text_config._attn_implementation not in BACKENDS or windows:
        return False
    together = packed(batch, [range(len(batch["input_ids"]))], pad)
    try:
        refuse(model, batch, pad, partial(sample_by_sample, anatomy))
        with sample_by_sample(anatomy), torch.random.fork_rng(), torch.no_grad():
            for spelled in reducers:
                with attach(model.eval(), parse(spelled), record="none"):
                    model(**together)
    except Exception:  # whatever a model of another make does not take: its rows are masked then
        return False
    finally:
        model.train(training)
    return True


def refuse(model: Any, batch: Mapping[str, Tensor], pad: int, attention: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
    """Tries whether packed samples, under this `attention`, come to the same as padded ones in this model. FoveateError that says why they
    do not."""
    anatomy, seen = read(model), list[dict[str, Any]]()
    name, training = type(model).__name__, model.training
    if any(anatomy.recurrent(layer) for layer in range(len(anatomy.layers))):
        raise FoveateError(f"{name} has layers that recur along the row, from one sample to the next: leave out `pack`")
    call: Callable[..., Any] = model.eval()
    together = packed(batch, [range(len(batch["input_ids"]))], pad)
    handle = anatomy.decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            apart = call(**batch).logits
            with attention():
                joined = call(**together).logits
    except Exception as error:  # whatever a model of another make does not take
        raise FoveateError(f"{name} does not take packed samples ({error}): leave out `pack`") from error
    finally:
        handle.remove()
        model.train(training)
    positions = seen[0].get("position_ids")
    if positions is not None and positions.ndim == 3:
        raise FoveateError(
            f"{name} gives visual tokens positions of several axes (m-RoPE), which it finds sample by sample: leave out `pack`"
        )
    expected = apart[batch["attention_mask"].bool()]
    difference = float((joined[0, : len(expected)] - expected).abs().max() / expected.abs().max())
    if not difference <= CLOSE.get(expected.dtype, 5e-2):
        raise FoveateError(f"in {name} packed samples see each other: logits differ by {difference:.1g} of the largest: leave out `pack`")
