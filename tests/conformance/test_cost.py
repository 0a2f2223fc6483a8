"""What is predicted from a configuration and a processor's outputs, what the ledger says, and what a counter sees: they agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import foveate
from foveate.accounting import predict
from foveate.accounting.counter import Counter
from foveate.errors import FoveateError, NotApplicable
from foveate.reducers import METHODS, parse
from tests.conformance.checks import Loaded, load
from tests.conformance.expected import differs_scores
from tests.conformance.family import families
from tests.conformance.test_conformance import REPRESENTATIVE, SETTINGS, by_the_last_block

REDUCERS = ("none", "random:keep=0.5", "uniform:keep=0.5,layer=2", "vcc:layer=1,stride=2+random:keep=0.5,layer=3")
# In order to decide, by what each method says of itself; and two that act together.
MULTIPLY = (*(text for method in METHODS.values() for text in method.multiplies), "cdpruner:keep=0.5+fastv:keep=0.5,layer=1")
# Methods that multiply nothing are held to it: a new one cannot forget its `score_flops`.
SCORED = (*MULTIPLY, *(setting for method, (setting, _) in SETTINGS.items() if not METHODS[method].multiplies))
PARTS = ("tower", "bridge", "lm_linear", "lm_attention", "head", "scores")
UNTOLD = {
    "gemma3n": "read the keys of earlier ones",
    "gemma4": "heads differ from layer to layer",
    "gemma4:small": "read the keys of earlier ones",
    "ernie4_5_vl_moe": "2 sets of experts",
    "ernie4_5_vl_moe:video": "2 sets of experts",
    "kimi_k25": "no attention heads of one width",
}
# Parts that the library computes in another way than is charged: every expert for every token, and a projector behind the features; logits
# of all tokens though only the last one's are asked for.
OTHERWISE = {
    "llama4": ("bridge", "lm_linear", "lm_attention"),
    "minicpmv4_6": ("head",),
    "qwen2_5_omni_thinker": ("head",),
    "qwen3_omni_moe_thinker": ("head",),
    "video_llama_3": ("head",),
    "video_llama_3:video": ("head",),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole", False)
        metafunc.parametrize("name", [name for name in families() if whole or name in (*REPRESENTATIVE, "qwen3_vl_moe")])


def eager(name: str) -> Loaded:
    """Attention and experts by plain products: a counter knows no grouped kernels."""
    loaded = load(name, "eager")
    if hasattr(loaded.model, "set_experts_implementation"):
        loaded.model.set_experts_implementation("eager")
    return loaded


@pytest.mark.parametrize("reducers", REDUCERS)
def test_predicted_is_the_ledger_and_what_a_counter_sees(name: str, reducers: str) -> None:
    loaded = eager(name)
    if name in UNTOLD:
        with pytest.raises(FoveateError, match=UNTOLD[name]):
            predict(loaded.model.config, inputs=loaded.singles[0])
        return
    for inputs in loaded.singles[:2]:  # one image, two images
        told = predict(loaded.model.config, inputs=inputs, reducers=parse(reducers), dtype_bytes=4)
        with foveate.attach(loaded.model, reducers) as run, Counter(loaded.model) as counted, torch.no_grad():
            loaded.model(**inputs, logits_to_keep=1)
        seen = run.last.ledger(loaded.model.config, dtype_bytes=4)
        assert told == seen
        assert list(told.visual_tokens) == run.last.visual_tokens
        assert list(told.total_tokens) == run.last.tokens
        for part in PARTS:
            if part not in OTHERWISE.get(name, ()):
                assert told.flops[part] == pytest.approx(counted.flops[part], rel=0.01), part


@pytest.mark.parametrize("reducers", SCORED)
def test_scores_are_told_as_a_counter_sees_them(
    name: str, reducers: str, record_property: Callable[[str, object], None], request: pytest.FixtureRequest
) -> None:
    record_property("scored", [name, reducers])
    word = "untold" if name in UNTOLD else scored(name, reducers)
    record_property("outcome", word)
    if request.config.getoption("--table", None) is None:
        assert not (wrong := differs_scores(name, reducers, word)), wrong
    if word != "ok":
        pytest.skip(word)


def scored(name: str, reducers: str) -> str:
    """The word for what comes of it: "ok", or the reason of a refusal. AssertionError where the cost is not what a counter sees."""
    try:
        try:
            _scored(name, reducers, reducers in MULTIPLY)
        except NotApplicable as refused:
            if not by_the_last_block(reducers, refused):
                raise
            _scored(name, f"{reducers},layer=-1", reducers in MULTIPLY)
    except NotApplicable as refused:
        return refused.reason.name
    return "ok"


def _scored(name: str, reducers: str, multiplies: bool) -> None:
    loaded = eager(name)
    for inputs in loaded.singles[:2]:
        with foveate.attach(loaded.model, reducers) as run, Counter(loaded.model) as counted, torch.no_grad():
            loaded.model(**inputs, logits_to_keep=1)
        told = predict(loaded.model.config, inputs=inputs, reducers=parse(reducers), dtype_bytes=4)
        seen = run.last.ledger(loaded.model.config)
        assert told.flops["scores"] == pytest.approx(seen.flops["scores"], rel=0.01)
        assert (counted.flops["scores"] > 0) == multiplies
        if reducers.startswith(("sparsevlm", "mmtok")):  # how much of the text rates, or is words, is known only after looking
            assert counted.flops["scores"] <= told.flops["scores"]
        else:
            assert told.flops["scores"] == pytest.approx(counted.flops["scores"], rel=0.01)
        if "tower" not in OTHERWISE.get(name, ()):
            assert seen.flops["tower"] == pytest.approx(counted.flops["tower"], rel=0.01)
            if any("pixels" in reducer.looks_at for reducer in parse(reducers)):  # how many stay is known only after looking
                assert told.flops["tower"] >= 0.99 * seen.flops["tower"]
            else:
                assert told.flops["tower"] == pytest.approx(seen.flops["tower"], rel=0.01)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_told_row_by_row(name: str, side: str) -> None:
    if name in UNTOLD:
        pytest.skip(UNTOLD[name])
    loaded = eager(name)
    reducers = "random:keep=0.5+uniform:keep=0.5,layer=2"
    told = predict(loaded.model.config, inputs=loaded.batch(side), reducers=parse(reducers))
    with foveate.attach(loaded.model, reducers) as run, torch.inference_mode():
        loaded.model(**loaded.batch(side))
    assert told == run.last.ledger(loaded.model.config)
