"""By vLLM in this process, with the plug-in that reduces: vLLM itself decides which prompts of a block run together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, AutoProcessor, GenerationConfig
from vllm import LLM, SamplingParams

from foveate.batch.answering import Answerer, Job, Prompt
from foveate.data.chat import Renderer
from foveate.errors import FoveateError
from foveate.inference import begun, ends, read_answer
from foveate.integrations.vllm import overrides
from foveate.reducers import spell
from foveate.world import resolve


class Served(Answerer):
    """An engine of vLLM. `options`: what its `LLM` is given beside. FoveateError where it does not start."""

    def __init__(self, job: Job, options: Mapping[str, Any]) -> None:
        source = resolve(job.model)
        config = AutoConfig.from_pretrained(source)
        super().__init__(job, AutoProcessor.from_pretrained(source))
        given = overrides(spell(job.reducing), config) if job.reducing else {}
        try:
            self._engine = LLM(**{"model": source, "dtype": job.dtype, "hf_overrides": given, **options})
        except Exception as error:  # whatever vLLM finds wrong
            raise FoveateError(f"vLLM does not start with {job.model} and reducers {spell(job.reducing)}: {error}") from error
        try:
            own = GenerationConfig.from_pretrained(source)
        except OSError:  # it has no such file
            own = GenerationConfig.from_model_config(config)
        self._stops = ends(SimpleNamespace(generation_config=own), self.processor.tokenizer, Renderer(self.processor).end_id)

    def said(self, prompts: Sequence[Prompt]) -> list[tuple[str, bool]]:
        tokenizer = self.processor.tokenizer
        how = SamplingParams(temperature=0, max_tokens=self.job.max_new_tokens, stop_token_ids=self._stops, detokenize=False)
        asked: list[dict[str, Any]] = []
        for prompt in prompts:
            ids = tokenizer(prompt.text, add_special_tokens=not begun(tokenizer, prompt.text))["input_ids"]
            asked.append({"prompt_token_ids": ids} | ({"multi_modal_data": {"image": list(prompt.images)}} if prompt.images else {}))
        answers = self._engine.generate(asked, how, use_tqdm=False)
        said = [read_answer(tokenizer, list(one.outputs[0].token_ids), self._stops) for one in answers]
        return [(one.text, one.thinking) for one in said]
