"""vLLM's classes with Foveate's parts in front of them, each made when vLLM first asks for it by name."""

from __future__ import annotations

import importlib
from typing import Any

from vllm.multimodal import MULTIMODAL_REGISTRY

from foveate.integrations.vllm import ARCHITECTURES
from foveate.integrations.vllm.model import ReducingModel
from foveate.integrations.vllm.processor import ReducingProcessor


def __getattr__(name: str) -> Any:
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = reducing(getattr(importlib.import_module(ARCHITECTURES[name]), name))
    return made


def reducing(base: Any) -> Any:
    """The class of a model that reduces its images where it is told to."""
    own = base._processor_factory
    # Of transformers' code the class itself looks at its bases, and takes the first for one of its own.
    bases = base.__bases__ if ".transformers" in base.__module__ else (base,)

    def processor(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
        kind = type(own.processor(info, dummy_inputs, **kwargs))
        return type(kind.__name__, (ReducingProcessor, kind), {"__module__": __name__})(info, dummy_inputs, **kwargs)

    model = type(base)(base.__name__, (ReducingModel, *bases), {"__module__": __name__})
    return MULTIMODAL_REGISTRY.register_processor(processor, info=own.info, dummy_inputs=own.dummy_inputs)(model)
