"""`foveate bench --engine vllm`: tasks put to vLLM, whose engine is started anew only for a method that the running one cannot take."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from foveate.batch.generate import check_installed
from foveate.cache_policies import CachePolicy
from foveate.data.chat import Renderer
from foveate.errors import FoveateError
from foveate.evaluation.asking import Answered, Asked, Engine, shown
from foveate.inference import Broken, warn_of_cut_thoughts
from foveate.integrations.vllm.setting import OPTION, RequestError, request_reducer
from foveate.reducers import Reducer, in_model, prepare
from foveate.reducers.exporting import exported

DTYPE = "float32"  # as bench loads models in transformers


class OnVLLM(Engine):
    """vLLM in this process, with the plug-in that reduces. What its caches leave to compute is not known, so that answers have no FLOPs.

    model    a folder, a hub name or an asset
    options  what vLLM's `LLM` is given beside; "dtype" among them stands in the place of float32
    FoveateError where vLLM is not installed, and where the model cannot be read.
    """

    name = "vllm"

    def __init__(self, model: str, options: Mapping[str, Any] | None = None) -> None:
        check_installed(self.name)
        from foveate.batch.on_vllm import Model

        given = dict(options or {})
        self.told = ["--engine", self.name, *(["--engine-options", json.dumps(given)] if given else [])]
        self.dtype, self.device = str(given.pop("dtype", DTYPE)), "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self._model = model, Model(model, given)
        self.processor = self._model.processor
        self._image = Renderer(self.processor).image_token_id
        self._layers = int(self._model.config.get_text_config().num_hidden_layers)
        self._running: list[Reducer] | None = None

    def check(self, reducers: Sequence[Reducer], cache: CachePolicy | None) -> None:
        if cache is not None:
            raise FoveateError(f"{cache} thins a cache of transformers, and vLLM has one of its own; leave out --engine, or --cache")
        if acting := in_model(reducers):
            exported(acting, "vLLM")

    def answered(
        self, asked: Asked, reducers: Sequence[Reducer], tell: Callable[[int], None], *, cache: CachePolicy | None, blind: bool
    ) -> Answered:
        samples, acting = asked.task.samples, in_model(reducers)
        if any(sample.clips for sample in samples):
            raise Broken(f"vLLM is asked about pictures so far, and {asked.task.name} asks about clips; leave out --engine")
        if hasattr(self.processor, "resized") and len(acting) < len(reducers):
            raise FoveateError(f"{type(self.processor).__name__} makes all images one size, and vLLM has one of its own: not served")
        setting = self._started(acting)
        found, start = Answered([""] * len(samples)), time.perf_counter()
        for batch in asked.batches:
            refs = dict.fromkeys(ref for number in batch for ref in samples[number].images)
            pictures = dict(zip(refs, (prepare(reducers, image) for image in shown(refs, blind)), strict=True))
            images = [[pictures[ref] for ref in samples[number].images] for number in batch]
            said = self._said([asked.prompts[number] for number in batch], images, asked.task.max_new_tokens, setting)
            for number, (one, prompt) in zip(batch, said, strict=True):
                left = prompt.count(self._image)
                found.texts[number] = one.text
                found.cut += one.thinking
                found.entered.append(left)
                found.visual.append((left,) * self._layers)
            found.totals.append([sum(found.entered[-len(batch) :])] * self._layers)
            found.ledgers.append(None)
            tell(len(batch))
        found.seconds = time.perf_counter() - start
        warn_of_cut_thoughts(found.cut, len(samples), asked.task.max_new_tokens)
        return found

    def _said(self, *asked: Any) -> Any:
        try:
            return self._model.said(*asked)
        except FoveateError:  # the method is not for this model, or these images
            raise
        except Exception as error:  # whatever vLLM finds wrong
            raise Broken(f"vLLM does not answer: {error}") from error

    def _started(self, reducers: list[Reducer]) -> dict[str, Any]:
        """What a request to the running engine sets to be answered so; another engine is started where none does."""
        if self._running is not None and bool(self._running) == bool(reducers):
            try:
                setting = {OPTION: str(reducers[0])} if reducers else {}
                request_reducer(self._running[0] if reducers else None, setting)
                return setting
            except RequestError:  # it needs other scores of the tower, or other positions
                pass
        self._running = None
        self._model.start(reducers, self.dtype)
        self._running = reducers
        return {}

    def close(self) -> None:
        self._model.stop()
