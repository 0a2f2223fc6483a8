"""vLLM serves models on fewer visual tokens: `vllm serve MODEL --hf-overrides '{"foveate": "divprune:keep=0.25"}'`.

A plug-in of vLLM's own kind: once foveate is installed beside vLLM, every process of a server calls `register`, which names classes and
imports none. Each is vLLM's own class with two parts in front of it: the processor makes room for the tokens that will be left, the model
leaves them. Without the setting they do what vLLM's own do. Of all other models the setting is refused, since nothing would hear it.
"""

from __future__ import annotations

from typing import Any

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "vllm.model_executor.models.llava",
    "Qwen2VLForConditionalGeneration": "vllm.model_executor.models.qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "vllm.model_executor.models.qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "vllm.model_executor.models.qwen3_vl",
    "TransformersMultiModalForCausalLM": "vllm.model_executor.models.transformers",
}
"""vLLM's own models that can be served reduced, and where they are. The last one runs all others, and these too, by transformers' code:
`--model-impl transformers`."""


def register() -> None:
    """Called by vLLM in each of its processes (entry point `vllm.general_plugins`)."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"{__name__}.classes:{name}")
    try:
        from foveate.integrations.vllm.unknown import watch
    except ImportError:  # a version of vLLM that the plug-in does not know, which has no such checks
        return
    watch(ModelRegistry.get_supported_archs() - ARCHITECTURES.keys())


def overrides(spelling: str, config: Any) -> dict[str, Any]:
    """`hf_overrides` for a reducer and a model's transformers configuration, with all that it takes: kept positions too.

    FoveateError for a reducer that vLLM cannot run.
    """
    from foveate.integrations.vllm import setting

    return setting.overrides(spelling, config)
