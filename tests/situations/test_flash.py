"""Flash attention takes no mask of pairs: what it is handed after a cut must mean what SDPA's mask says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate import FoveateError
from tests.situations.models import GREEDY, inputs, mistral, qwen, text_backend
from tests.tiny import IMAGE, PATCHES, assembled, llava

CUTS = [
    "random:keep=0.25",
    "fastv:keep=0.25,layer=2",
    "pyramiddrop:keep=0.5",
    "sparsevlm:keep=0.3,layers=2",
    "schedule:keeps=2:0.25",
    "dart:keep=0.25,layer=2",
    "vcc:layer=2,stride=4",
    "divprune:keep=0.25",
    "tome:keep=0.5",
]
MAKERS = {"llava": llava, "foveate": assembled, "qwen2_5_vl": qwen}
ONE = [5, 6, 7] + [IMAGE] * PATCHES + [1, 2, 3]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
every_cut = pytest.mark.parametrize("reducer", CUTS)


def both(name: str, reducer: str, **call: Any) -> tuple[Tensor, Tensor]:
    found = []
    for backend in ("sdpa", "flash_stand_in"):
        model = text_backend(MAKERS[name](), backend)
        with foveate.attach(model, reducer), torch.no_grad():
            found.append(model(**call).logits)
    return found[0], found[1]


@every_cut
@pytest.mark.parametrize("name", MAKERS)
def test_one_row(name: str, reducer: str) -> None:
    sdpa, flash = both(name, reducer, **inputs(name, [ONE]))
    torch.testing.assert_close(sdpa, flash, **CLOSE)


@every_cut
@pytest.mark.parametrize("name", ["llava", "foveate"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_part(name: str, reducer: str, side: str) -> None:
    pad, model = 20, text_backend(MAKERS[name](), "flash_stand_in")
    alone = inputs(name, [ONE])
    fill, real = [0] * pad, [1] * len(ONE)
    ids, mask = (fill + ONE, fill + real) if side == "left" else (ONE + fill, real + fill)
    padded = {**alone, "input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}
    padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with foveate.attach(model, reducer), torch.no_grad():
        one, two = model(**alone).logits[0], model(**padded).logits[0]
    torch.testing.assert_close(one, two[pad:] if side == "left" else two[: len(ONE)], **CLOSE)


@every_cut
@pytest.mark.parametrize("second", [ONE, ONE[3:]], ids=["text first", "image first"])
@pytest.mark.parametrize("told", ["by positions", "by starts"])
def test_packed_samples_stay_apart(reducer: str, second: list[int], told: str) -> None:
    lengths = len(ONE), len(second)
    call: dict[str, Any] = inputs("llava", [ONE + second])
    call["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    call["use_cache"] = False
    sdpa, flash = both("llava", reducer, **call)
    torch.testing.assert_close(sdpa, flash, **CLOSE)
    if told == "by starts":
        starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        call |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": max(lengths), "max_length_k": max(lengths)}
        torch.testing.assert_close(both("llava", reducer, **call)[1], sdpa, **CLOSE)
    # Each of them is what it is alone.
    pixels, start = call["pixel_values"], 0
    for i, row in enumerate((ONE, second)):
        alone = both("llava", reducer, input_ids=torch.tensor([row]), pixel_values=pixels[i : i + 1])[1]
        torch.testing.assert_close(alone[0], flash[0, start : start + len(row)], **CLOSE)
        start += len(row)


@pytest.mark.parametrize("reducer", ["random:keep=0.5", "divprune:keep=0.5", "vcc:layer=2,stride=4"])
def test_a_window_that_would_reach_further_is_refused(reducer: str) -> None:
    call = inputs("llava", [ONE])
    model = text_backend(mistral(), "flash_stand_in")
    with foveate.attach(model, reducer), torch.no_grad(), pytest.raises(FoveateError, match="counts the sliding window"):
        model(**call)
    for window in (len(ONE), 64):  # no row ever looks so far back
        found = []
        for backend in ("sdpa", "flash_stand_in"):
            model = text_backend(mistral(window=window), backend)
            with foveate.attach(model, reducer), torch.no_grad():
                found.append(model(**call).logits)
        torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("reducer", ["fastv:keep=0.5,layer=3", "fastv:keep=0.5,layer=3,rows=all", "pyramiddrop:keep=0.5,stages=2"])
def test_scores_within_a_window(reducer: str) -> None:
    """What is kept before the window would reach too far: by the rows of a layer with a window, which are those of SDPA."""
    call, kept = inputs("llava", [ONE]), []
    for backend in ("sdpa", "flash_stand_in"):
        model = text_backend(mistral(window=12), backend)
        seen: list[Any] = []
        (method,) = foveate.reducers.parse(reducer)
        decide = type(method).reduce

        def noted(view: Any, stage: int = 0, seen: list[Any] = seen, method: Any = method, decide: Any = decide) -> Any:
            seen.append(decide(method, view, stage).map.representative)
            raise KeyError

        object.__setattr__(method, "reduce", noted)
        with foveate.attach(model, method), torch.no_grad(), pytest.raises(KeyError):
            model(**call)
        kept.append(seen[0])
    assert torch.equal(*kept)


@every_cut
@pytest.mark.parametrize("cache", [None, "static"])
def test_decoding(reducer: str, cache: str | None) -> None:
    """One row is padded: the library's own prefill with a cache of fixed length needs a mask to be right."""
    call, found = inputs("llava", [[0, 0, *ONE], [4, 4, *ONE]]), []
    mask = (call["input_ids"] != 0).long()
    for backend in ("sdpa", "flash_stand_in"):
        model = text_backend(llava(), backend)
        how: dict[str, Any] = {"max_new_tokens": 6, "cache_implementation": cache, "disable_compile": True, **GREEDY}
        with foveate.attach(model, reducer), torch.no_grad():
            found.append(model.generate(**call, attention_mask=mask, **how))
    assert torch.equal(*found)


@every_cut
def test_a_second_turn(reducer: str) -> None:
    call, found = inputs("llava", [ONE]), []
    more = inputs("llava", [[4, 9] + [IMAGE] * PATCHES + [8, 3]], seed=2)
    for backend in ("sdpa", "flash_stand_in"):
        model = text_backend(llava(), backend)
        with foveate.attach(model, reducer), torch.no_grad():
            cache = model(**call, use_cache=True).past_key_values
            found.append(model(**more, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(*found, **CLOSE)
