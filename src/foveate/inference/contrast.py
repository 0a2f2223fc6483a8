"""Contrasting decoding: what a model says of the next token, less what it says where it sees less. Two passes a token, each with its cache.

The rule, for the logits l of the model and l' of the second pass, which is shown another picture (the strategies say which):

    l + α (l - l')    where l >= log β + max l        elsewhere -inf

so that passes that say the same leave l as it was. The second pass goes along with `generate` as one of its `LogitsProcessor`s, as the
library's own classifier-free guidance does: greedy search, sampling, streamers and stopping criteria are the library's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessor

from foveate.accounting import Ledger, together
from foveate.anatomy import read
from foveate.engine.record import Record
from foveate.engine.run import RUN, Run
from foveate.errors import FoveateError
from foveate.inference.answering import Finite, Plain
from foveate.inference.costs import answer_cost
from foveate.reducers import Reducer

_NORMALISED = 1e-3  # of a row's log-sum-exp, at most: those are log-probabilities, as only beam search hands them to processors


def contrasted(scores: Tensor, other: Tensor, alpha: float, beta: float) -> Tensor:
    """(B, V) float32, the rule above; `other` are the second pass' logits."""
    bound = scores.amax(-1, keepdim=True) + (math.log(beta) if beta else -math.inf)
    found = scores + alpha * (scores - other)
    return found.masked_fill((scores < bound) | scores.isneginf(), -math.inf)


@dataclass(frozen=True)
class Contrast:
    """A second pass, and how much it counts.

    told      the method, as it is spelled
    alpha     how much the second pass counts; 0: there is none
    beta      the least share of the best token's probability with which a token may be said
    shown     what the second pass is given of the inputs of `generate`; None: the same
    reducers  what acts in it in the place of what is attached; None: what is attached
    """

    told: str
    alpha: float
    beta: float
    shown: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    reducers: tuple[Reducer, ...] | None = None

    def beside(self, model: nn.Module, inputs: Mapping[str, Any]) -> Beside:
        """The processor for one call `model.generate(**inputs, logits_processor=[…])`."""
        return Beside(self, model, inputs)


class Beside(LogitsProcessor):
    """The second pass beside one call of `generate` of an attached model, about the same prompts.

    `passes` are the records of the two, the second's as soon as a token was made; None where nothing was recorded. `run.last` stays the
    first pass'. FoveateError for what the second pass could not follow."""

    def __init__(self, contrast: Contrast, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        told, run = contrast.told, getattr(read(model).core, RUN, None)
        speaker = next((module for module in model.modules() if isinstance(module, GenerationMixin)), None)
        if run is None or speaker is None:
            raise FoveateError(
                f"{told} needs a model that generates, and an attachment: attach(model, None) where nothing is to be reduced"
                if speaker is not None
                else f"{told}: {type(model).__name__} has no generate; hand in the model around it, which has the head"
            )
        missing = [name for name in ("input_ids", "attention_mask") if not isinstance(inputs.get(name), Tensor)]
        if missing:
            raise FoveateError(
                f"{told} needs the {' and the '.join(missing)} that the processor has made: hand in all that generate is given"
            )
        if not any("pixel_values" in name and value is not None for name, value in inputs.items()):
            raise FoveateError(
                f"{told} contrasts what pictures show, and there are no pixel_values here: hand in pixels in place of features, and ask "
                "about text alone without it"
            )
        self.contrast, self.steps = contrast, 0
        self.passes: list[Record | None] = []
        self._run: Run = run
        self._model: Any = speaker
        self._inputs = inputs
        self._seen: Tensor | None = None
        self._given: dict[str, Any] = {}
        self._before = self._latest()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) contrasted scores of the token after `input_ids` (B, N)."""
        alpha, beta = self.contrast.alpha, self.contrast.beta
        if self._seen is None:
            self._check_prompts(input_ids)
            self.passes.append(self._noted(self._before))
        elif self._seen.shape != input_ids[:, :-1].shape or not torch.equal(self._seen, input_ids[:, :-1]):
            raise FoveateError(
                f"{self.contrast.told}: these tokens do not go on with those before. Beam search and assisted decoding try several ways to "
                "go on, of which the second pass has gone one: use greedy search or sampling, and a new processor for each call of generate"
            )
        if len(input_ids) > len(self._inputs["input_ids"]) and bool((scores.logsumexp(-1) < _NORMALISED).all()):
            raise FoveateError(
                f"{self.contrast.told} contrasts logits, and beam search adds up log-probabilities: use greedy search or sampling, with "
                "num_beams=1"
            )
        other = scores if not alpha else self._first(input_ids) if self._seen is None else self._next(input_ids)
        self._seen, self.steps = input_ids, self.steps + 1
        return contrasted(scores, other.to(scores.device), alpha, beta)

    @property
    def ledger(self) -> Ledger | None:
        """What both passes have cost so far, their caches being there at the same time; None where that is not known."""
        costs = self.costs
        known = [cost for cost in costs if cost is not None]
        return together(known) if known and len(known) == len(costs) else None

    @property
    def costs(self) -> list[Ledger | None]:
        """Of each pass by itself."""
        size = self._model.dtype.itemsize
        return [None if seen is None else answer_cost(self._run.config, seen, self.steps, size) for seen in self.passes]

    # ---- the second pass

    def _first(self, input_ids: Tensor) -> Tensor:
        """It reads the prompts: as `generate` prepares them, for as many sequences of each."""
        number = len(input_ids) // len(self._inputs["input_ids"])
        config = Plain(max_new_tokens=1, do_sample=number > 1, num_return_sequences=number, num_beams=1)
        kept, before = self._run.passes, self._latest()
        shown = self.contrast.shown
        inputs = dict(self._inputs) if shown is None else shown(self._inputs)
        with self._acting():
            logits, self._given = self._model.generate(**inputs, generation_config=config, custom_generate=_prefilled)
        self.passes.append(self._noted(before))
        if self._run.record == "last":
            self._run.passes = kept
        return Finite()(input_ids, logits)

    def _next(self, input_ids: Tensor) -> Tensor:
        """It reads the token that was made last."""
        with self._acting():
            given = self._model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **self._given)
            output = self._model(**given, return_dict=True)
        self._given = self._model._update_model_kwargs_for_generation(output, self._given)
        return Finite()(input_ids, _last(output))

    def _acting(self) -> AbstractContextManager[Any]:
        own = self.contrast.reducers
        return nullcontext() if own is None else self._run.instead(own)

    def _check_prompts(self, input_ids: Tensor) -> None:
        prompts = self._inputs["input_ids"].to(input_ids.device)
        number, rest = divmod(len(input_ids), len(prompts))
        if rest or not torch.equal(prompts.repeat_interleave(number, 0), input_ids):
            raise FoveateError(
                f"{self.contrast.told} was made for other prompts, of {tuple(prompts.shape)} tokens, than generate has begun with, "
                f"{tuple(input_ids.shape)}: give both the same inputs, without a kept cache"
            )

    # ---- what was recorded

    def _latest(self) -> Record | None:
        return self._run.passes[-1] if self._run.passes else None

    def _noted(self, before: Record | None) -> Record | None:
        """The last pass, if it came after `before`."""
        last = self._latest()
        return None if last is before else last


def _prefilled(model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **given: Any) -> Any:
    """In the place of a decoding loop: (B, V) logits of the first token, and what the next ones are to be given."""
    output = model(**model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **given), return_dict=True)
    return _last(output), model._update_model_kwargs_for_generation(output, given)


def _last(output: Any) -> Tensor:
    logits: Tensor = output.logits[:, -1].to(torch.float32)
    return logits
