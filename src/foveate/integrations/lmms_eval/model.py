"""The model classes that lmms-eval loads: one for tasks that it hands over as messages, one for text with a list of images."""

from __future__ import annotations

import inspect
import time
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.model_utils.progress import make_progress
from loguru import logger

from foveate.data.chat import takes_videos
from foveate.data.clips import parse as sampling
from foveate.engine.attach import attach
from foveate.engine.run import Run
from foveate.errors import FoveateError, nearest
from foveate.inference import load_model, shrunk
from foveate.integrations.lmms_eval.answering import (
    Messages,
    Reply,
    answer,
    batches,
    check_template,
    conversation,
    cut,
    generation,
    media,
    question,
    spelling,
    whole,
)
from foveate.reducers import in_model, parse, saved_reducers, spell


class _Foveate(lmms):
    """A vision-language model that AutoModelForImageTextToText loads, with reducers attached.

    pretrained            a folder, a hub name or "asset:vlm"
    reduce                a reducer's spelling with colons for commas (fastv:keep=0.25:layer=3), "none" for the bare model; left out, what
                          the model was saved with, if anything
    dtype                 "auto" (as the weights are saved), "float32", "bfloat16" …
    device, device_map    default accelerate's device for this process; a device map, such as "auto", spreads the model over several
    batch_size            requests that are answered together
    max_new_tokens        for tasks that do not say
    attn_implementation   "eager", "sdpa", "flash_attention_2" …
    frames                which frames of videos are shown: a sampling, with colons for commas (rate:fps=1:most=32)

    FoveateError for unknown arguments and impossible ones, and for reducers that the model cannot take.
    """

    def __init__(
        self,
        pretrained: str = "",
        reduce: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int = 1024,
        attn_implementation: str | None = None,
        frames: str = "uniform:frames=8",
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            known = list(inspect.signature(_Foveate.__init__).parameters)[1:-1]
            raise FoveateError(
                f"--model_args: there is no argument {name!r}{nearest(name, known)}; known are "
                f"{', '.join(known)}. Options of a reducer are joined by colons there: reduce=fastv:keep=0.25:layer=3"
            )
        if not pretrained:
            raise FoveateError("--model_args: pretrained is missing: a model folder, a hub name or asset:vlm")
        if dtype != "auto" and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise FoveateError(f"dtype={dtype!r} is not possible; give auto, float32, bfloat16 or float16")
        self.batch_size, self.max_new_tokens = whole("batch_size", batch_size), whole("max_new_tokens", max_new_tokens)
        self.reducers = [] if reduce is None else parse(spelling(str(reduce)))  # what is wrong with them is said before loading
        self.frames = sampling(spelling(str(frames)))
        self.accelerator = Accelerator()
        options = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        options = {name: value for name, value in options.items() if value is not None}
        self.model, self.processor = load_model(pretrained, str(device or self.accelerator.device), **options)
        self.device = self.model.device
        if reduce is None:
            self.reducers = saved_reducers(self.model.config.name_or_path) or []
        check_template(self.processor)
        self.processor, self.before = shrunk(self.processor, self.reducers)  # reducers that make each image smaller
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        with self._attached():  # what does not work on this model is said before any data is loaded
            pass
        logger.info(f"foveate: {pretrained} with reducers {spell(self.reducers)}")

    def _attached(self) -> AbstractContextManager[Run | None]:
        try:
            return attach(self.model, in_model(self.reducers))
        except FoveateError:
            if self.reducers:
                raise
            return nullcontext()  # a model that takes no reducer still answers without

    @abstractmethod
    def _asked(self, request: Instance) -> Messages:
        """The request's conversation, as lmms-eval writes one."""

    @abstractmethod
    def _generation_kwargs(self, request: Instance) -> dict[str, Any]:
        """What its task says of generation."""

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        tasks = [self._generation_kwargs(request) for request in requests]
        keys = [(repr(sorted(task.items())), len(request.args[0])) for task, request in zip(tasks, requests, strict=True)]
        answers: dict[int, Reply] = {}
        bar = make_progress(total=len(requests), desc="Model Responding", disable=self.rank != 0)
        start = time.perf_counter()
        with torch.inference_mode(), self._attached() as run:
            for batch in batches(keys, self.batch_size):
                options = generation(tasks[batch[0]], self.max_new_tokens)
                given = self.before, self.frames, takes_videos(self.processor)
                asked = {number: conversation(self._asked(requests[number]), *given) for number in batch}
                for shown in {media(asked[number]) for number in batch}:  # processors want images in every row or in none
                    some = [number for number in batch if media(asked[number]) == shown]
                    found = answer(self.model, self.processor, run, [asked[number] for number in some], options)
                    answers.update(zip(some, found, strict=True))
                bar.update(len(batch))
        bar.close()
        _log(list(answers.values()), time.perf_counter() - start)
        found = [answers[number] for number in range(len(requests))]
        return [
            GenerationResult(cut(one.text, task.get("until")), TokenCounts(input_tokens=one.input_tokens, output_tokens=one.output_tokens))
            for one, task in zip(found, tasks, strict=True)
        ]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        # The harness documents a logarithm of a probability, but scores choices by the smallest number, as of a loss.
        raise NotImplementedError("foveate answers in words and does not rank given answers: choose the task's generate_until variant")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("foveate answers tasks of one round only")


class FoveateChat(_Foveate):
    """For requests (context, doc_to_messages, generation_kwargs, doc_id, task, split)."""

    is_simple = False

    def _asked(self, request: Instance) -> Messages:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return list(doc_to_messages(self.task_dict[task][split][doc_id]))

    def _generation_kwargs(self, request: Instance) -> dict[str, Any]:
        return dict(request.args[2])


class FoveateSimple(_Foveate):
    """For requests (context, generation_kwargs, doc_to_visual, doc_id, task, split)."""

    is_simple = True

    def _asked(self, request: Instance) -> Messages:
        context, _, doc_to_visual, doc_id, task, split = request.args
        return question(context, doc_to_visual(self.task_dict[task][split][doc_id]))

    def _generation_kwargs(self, request: Instance) -> dict[str, Any]:
        return dict(request.args[1])


def _log(answers: list[Reply], seconds: float) -> None:
    """Throughput, and visual tokens: in the log layer by layer, in the results' `throughput` as means over the requests with images."""
    generated = sum(one.output_tokens for one in answers)
    layers = [mean(counts) for counts in zip(*(one.visual_tokens for one in answers if one.visual_tokens), strict=True)]
    found = {"visual_tokens_first_layer": layers[0], "visual_tokens_all_layers": mean(layers)} if layers else {}
    if layers:
        logger.info(f"visual tokens of a request in each decoder layer: {' '.join(f'{count:g}' for count in layers)}")
    log_metrics(total_elapsed_time=seconds, total_gen_tokens=generated, avg_speed=generated / seconds, additional_metrics=found)
