"""By vLLM in this process, with the plug-in that reduces: vLLM itself decides which prompts of a block run together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from PIL import Image
from transformers import AutoConfig, AutoProcessor, GenerationConfig
from vllm import LLM, SamplingParams

from foveate.batch.answering import Answerer, Job, Prompt
from foveate.data.chat import Renderer
from foveate.errors import FoveateError
from foveate.inference import Said, begun, ends, read_answer
from foveate.integrations.vllm import overrides
from foveate.model.weights import reading
from foveate.reducers import Reducer, spell
from foveate.world import resolve


class Model:
    """A model as vLLM serves it. `options`: what its `LLM` is given beside. FoveateError where it cannot be read.

    model      a folder, a hub name or an asset
    processor  of transformers
    config     of transformers
    """

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        self._name, self._source, self._options = model, resolve(model), options
        with reading(f"cannot read the configuration and the processor of a vision-language model from {self._source}"):
            self.config, self.processor = AutoConfig.from_pretrained(self._source), AutoProcessor.from_pretrained(self._source)
        try:
            own = GenerationConfig.from_pretrained(self._source)
        except OSError:  # it has no such file
            own = GenerationConfig.from_model_config(self.config)
        end = Renderer(self.processor).end_id
        self._stops = ends(SimpleNamespace(generation_config=own), self.processor.tokenizer, end)
        self._engine: Any = None

    def start(self, reducers: Sequence[Reducer], dtype: str) -> None:
        """Has an engine that reduces so. FoveateError where it does not start."""
        given = overrides(spell(reducers), self.config) if reducers else {}
        self.stop()
        try:
            self._engine = LLM(**{"model": self._source, "dtype": dtype, "hf_overrides": given, **self._options})
        except Exception as error:  # whatever vLLM finds wrong
            raise FoveateError(f"vLLM does not start with {self._name} and reducers {spell(reducers)}: {error}") from error

    def stop(self) -> None:
        if self._engine is not None:
            self._engine.llm_engine.engine_core.shutdown()  # an LLM has no end of its own
            self._engine = None

    def said(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], new: int, setting: Mapping[str, Any] | None = None
    ) -> list[tuple[Said, list[int]]]:
        """Greedy answers of at most `new` tokens to prompts as the template writes them, each with the tokens of its prompt as the model
        was given them, those of its images among them. `setting`: a request's own, `mm_processor_kwargs`."""
        tokenizer = self.processor.tokenizer
        how = SamplingParams(temperature=0, max_tokens=new, stop_token_ids=self._stops, detokenize=False)
        asked: list[dict[str, Any]] = []
        for text, own in zip(texts, images, strict=True):
            prompt: dict[str, Any] = {"prompt_token_ids": tokenizer(text, add_special_tokens=not begun(tokenizer, text))["input_ids"]}
            if own:
                prompt |= {"multi_modal_data": {"image": list(own)}} | ({"mm_processor_kwargs": dict(setting)} if setting else {})
            asked.append(prompt)
        answers = self._engine.generate(asked, how, use_tqdm=False)
        return [(read_answer(tokenizer, list(one.outputs[0].token_ids), self._stops), list(one.prompt_token_ids or ())) for one in answers]


class Served(Answerer):
    """An engine of vLLM for a job. FoveateError where it does not start."""

    films = False

    def __init__(self, job: Job, options: Mapping[str, Any]) -> None:
        self._model = Model(job.model, options)
        super().__init__(job, self._model.processor)
        self._model.start(job.reducing, job.dtype)

    def said(self, prompts: Sequence[Prompt]) -> list[tuple[str, bool]]:
        found = self._model.said([one.text for one in prompts], [one.images for one in prompts], self.job.max_new_tokens)
        return [(said.text, said.thinking) for said, _ in found]
