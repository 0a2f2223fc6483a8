"""vLLM with the plug-in answers as `attach` does in transformers, token by token, from the same places of the same images.

`make serve-test`. Random checkpoints in float32. One engine for an architecture: what a request asks for differs from request to request.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

from foveate.integrations.vllm import overrides
from foveate.reducers import parse
from tests.interop.engine import LENGTH, SETTINGS, Asked, Told, failing, run
from tests.interop.served import MODELS, NEW, Reference, Request, requests

pytest.importorskip("vllm")

BUDGETS = (0.3, 0.1)
STATES = ("divprune", "uniform", "tome", "avgpool2d", "vcc:layer=0,positions=renumber")
RANDOM = "random:positions=renumber"


@dataclass
class Case:
    """A checkpoint, and of each reducer (as spelled) what transformers makes of the requests."""

    folder: Path
    reference: Reference
    given: list[Request]
    known: dict[str, tuple[list[list[int]], list[list[list[int]]]]]

    def of(self, spelling: str) -> tuple[list[list[int]], list[list[list[int]]]]:
        spelling = str(parse(spelling)[0]) if spelling != "none" else spelling
        if spelling not in self.known:
            self.known[spelling] = self.reference.answers(spelling, self.given)
        return self.known[spelling]

    def asked(self, **options: Any) -> list[Asked]:
        return [Asked(request.text(self.reference.served), request.images, options) for request in self.given]

    def check(self, told: Told, spelling: str) -> None:
        tokens, kept = self.of(spelling)
        assert not told.error, told.error
        assert told.tokens == tokens, spelling
        places = {tuple(image) for request in kept for image in request}
        assert {tuple(image) for reducer, image in told.kept if reducer == spelling} <= places


class Cases(dict[str, Case]):
    """Made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __missing__(self, name: str) -> Case:
        folder = self._folder / name
        folder.mkdir()
        torch.manual_seed(0)
        MODELS[name].build(folder)
        self[name] = Case(folder, Reference(MODELS[name], folder), requests(), {})
        return self[name]


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("served"))


def spelled(method: str, keep: float) -> str:
    return str(parse(method)[0].at(keep))


@pytest.mark.parametrize(
    ("name", "methods", "options"),
    [
        ("llava", ("visionzip", "fastervlm", *STATES, RANDOM), {}),
        ("qwen2_vl", STATES, {}),
        ("qwen2_5_vl", (*STATES, RANDOM), {"mm_device_do_normalize": False}),  # random choices follow the pixels as the model gets them
        ("qwen3_vl", STATES, {}),
        ("llava", ("hired", "fastervlm", "divprune", "tome", "uniform"), {"model_impl": "transformers"}),
    ],
    ids=["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava by transformers"],
)
def test_the_same_tokens_from_the_same_places(cases: dict[str, Case], name: str, methods: tuple[str, ...], options: dict[str, Any]) -> None:
    """In batches and alone, prefilled in pieces, with caches, several methods and budgets at once."""
    case = cases[name]
    wanted = [(method, keep) for method in methods for keep in BUDGETS]
    whole = [case.asked(foveate=method, foveate_keep=keep) for method, keep in wanted]
    mixed = [asked for batch in whole for asked in batch]
    alone = [[asked] for asked in case.asked(foveate=methods[0], foveate_keep=BUDGETS[1])]
    *each, together = run(case.folder, {"foveate": methods[0]}, [*whole, *alone, case.asked(), mixed], **options)
    for found, (method, keep) in zip(each, wanted, strict=False):
        case.check(found, spelled(method, keep))
        images = {tuple(image) for request in case.of(spelled(method, keep))[1] for image in request}
        assert {tuple(image) for _, image in found.kept} == images
    case.check(Told([tokens for one in each[len(wanted) : -1] for tokens in one.tokens]), spelled(methods[0], BUDGETS[1]))
    case.check(each[-1], methods[0])
    for i, (method, keep) in enumerate(wanted):  # on the same pictures
        case.check(Told(together.tokens[i * len(case.given) : (i + 1) * len(case.given)]), spelled(method, keep))
    assert sum(together.cached) > 0
    for spelling, places in together.kept:
        assert places in [image for request in case.of(spelling)[1] for image in request]


def test_attention_received_in_the_tower(cases: dict[str, Case]) -> None:
    case = cases["llava"]
    told = run(case.folder, {"foveate": "fopru"}, [case.asked(foveate_keep=keep) for keep in BUDGETS])
    for found, keep in zip(told, BUDGETS, strict=True):
        case.check(found, spelled("fopru", keep))


def test_positions_are_kept_on_a_model_that_counts_them(cases: dict[str, Case]) -> None:
    case = cases["llava"]
    hf = overrides("random", case.reference.model.config)
    assert sum(hf["text_config"]["rope_parameters"]["mrope_section"]) == 16
    methods = [(method, keep) for method in ("random", "divprune:positions=keep", "vcc:layer=0") for keep in BUDGETS]
    told = run(case.folder, hf, [case.asked(foveate=method, foveate_keep=keep) for method, keep in methods])
    for found, (method, keep) in zip(told, methods, strict=True):
        case.check(found, spelled(method, keep))


def test_without_the_key_two_budgets_would_meet(cases: dict[str, Case]) -> None:
    case = cases["llava"]
    batches = [case.asked(foveate_keep=keep) for keep in BUDGETS]
    two = [asked for asked in case.asked(foveate="uniform") if len(asked.images) == 2]
    *met, together = run(case.folder, {"foveate": "divprune"}, [*batches, two], keyless=True, max_num_batched_tokens=LENGTH)
    case.check(met[0], spelled("divprune", BUDGETS[0]))
    assert met[1].error or met[1].tokens != case.of(spelled("divprune", BUDGETS[1]))[0]
    assert together.kept == []  # the other method's


def test_without_the_setting_the_model_is_as_it_was(cases: dict[str, Case]) -> None:
    """Also of a version of vLLM that the plug-in does not know."""
    case = cases["llava"]
    told = run(case.folder, {}, [case.asked(), case.asked(foveate_keep=0.5)], version="0.99.1")
    case.check(told[0], "none")
    assert "the server was started without a reducer" in told[1].error


REQUESTS_REFUSED: dict[str, dict[str, Any]] = {
    "a share of the tokens in (0, 1]": {"foveate_keep": 0},
    "'foveate_kep' is not known": {"foveate_kep": 0.5},
    "it acts in the LM; the nearest that it can run is fastervlm": {"foveate": "fastv"},
    "which the server started with 'divprune' does not read": {"foveate": "fastervlm"},
    "the server's 'divprune' renumber": {"foveate": "random"},
    "unknown reducer 'divprun'": {"foveate": "divprun"},
}


def test_a_request_that_cannot_be_served_says_why_and_the_others_go_on(cases: dict[str, Case]) -> None:
    case = cases["llava"]
    batches = [case.asked(**options)[:1] for options in REQUESTS_REFUSED.values()]
    two = [asked for asked in case.asked(foveate="uniform:keep=0.1") if len(asked.images) == 2]
    *told, apart, after = run(case.folder, {"foveate": "divprune"}, [*batches, two, case.asked()])
    for found, words in zip(told, REQUESTS_REFUSED, strict=True):
        assert words in found.error
    assert apart.encoded == [1, 1]  # of 64 tokens each, where 48 are encoded at once, though all that is left of both are 12
    case.check(after, "divprune")


STARTS_REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vLLM cannot run 'fastv': it acts in the LM; the nearest that it can run is fastervlm:keep=0.5": ({"foveate": "fastv"}, {}),
    "vLLM runs one reducer": ({"foveate": "divprune+pyramiddrop"}, {}),
    "write 'random:positions=renumber', or add to hf_overrides": ({"foveate": "random"}, {}),
    "keep=0 is not possible": ({"foveate": "divprune:keep=0"}, {}),
    "a server is told by hf_overrides": ({"foveate": "divprune"}, {"mm_processor_kwargs": {"foveate_keep": 0.5}}),
    "serves by vllm <0.33,>=0.32, and vllm 0.99.1 is installed": ({"foveate": "divprune"}, {"version": "0.99.1"}),
}


def test_a_server_that_cannot_be_started_says_why_at_once(cases: dict[str, Case]) -> None:
    said = failing(cases["llava"].folder, list(STARTS_REFUSED.values()))
    for found, words in zip(said, STARTS_REFUSED, strict=True):
        assert words in found


def test_a_model_that_would_not_hear_of_the_setting_says_so_at_once(tmp_path: Path) -> None:
    """Of vLLM's own models those that the plug-in does not know; nothing is loaded to find that out, so there are no weights here."""
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision, text = CLIPVisionConfig(**small, image_size=64, patch_size=8), LlamaConfig(**small, vocab_size=99)
    (tmp_path / "next").mkdir()
    (tmp_path / "text").mkdir()
    LlavaNextConfig(vision_config=vision, text_config=text, architectures=["LlavaNextForConditionalGeneration"]).save_pretrained(
        tmp_path / "next"
    )
    text.architectures = ["LlamaForCausalLM"]
    text.save_pretrained(tmp_path / "text")
    for folder, name in (("next", "LlavaNextForConditionalGeneration"), ("text", "LlamaForCausalLM")):
        told, untold = failing(tmp_path / folder, [({"foveate": "divprune:keep=0.25"}, {}), ({}, {})])
        assert f"'divprune:keep=0.25' would have no effect: vLLM serves this model as {name}" in told
        assert "Start the server with --model-impl transformers" in told
        assert "foveate" not in untold  # it has no tokenizer, which is another matter


# ---- over HTTP

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
PORT = 18_713


@contextmanager
def server(folder: Path, overrides: dict[str, Any], log: Path) -> Iterator[str]:
    template = folder.parent / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "tiny"]
    command += ["--hf-overrides", json.dumps(overrides), "--dtype", "float32", "--enforce-eager", "--max-model-len", str(LENGTH)]
    command += ["--block-size", "32", "--max-num-batched-tokens", "48", "--port", str(PORT), "--limit-mm-per-prompt", '{"image": 2}']
    command += ["--chat-template", str(template), "--chat-template-content-format", "openai", "--trust-request-mm-kwargs"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **SETTINGS}, start_new_session=True)
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
                    break
                except (urllib.error.URLError, ConnectionError):
                    assert process.poll() is None, log.read_text()[-3000:]
                    time.sleep(1)
            yield f"http://127.0.0.1:{PORT}/v1/chat/completions"
        finally:
            process.terminate()
            process.wait(60)


def ask(url: str, request: Request, **options: Any) -> dict[str, Any]:
    """One request, pictures first, as an OpenAI client writes it."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in request.images]
    parts.append({"type": "text", "text": request.words})
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": NEW}
    body |= {"ignore_eos": True, "return_token_ids": True, "mm_processor_kwargs": options}
    sent = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        answer = urllib.request.urlopen(sent, timeout=120)
    except urllib.error.HTTPError as refused:
        return {"status": refused.code, "said": refused.read().decode()}
    return {"status": answer.status, "tokens": json.loads(answer.read())["choices"][0]["token_ids"]}


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_over_http(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["llava"]
    given = [request for request in case.given if not request.behind]
    with server(case.folder, {"foveate": "divprune:keep=0.25"}, tmp_path / "log") as url:
        asked: dict[str, dict[str, Any]] = {
            "divprune:keep=0.25": {},
            "divprune:keep=0.1": {"foveate_keep": 0.1},
            "tome:keep=0.3": {"foveate": "tome:keep=0.3"},
        }
        for spelling, options in asked.items():
            tokens, _ = case.of(spelling)
            wanted = [tokens[i] for i, request in enumerate(case.given) if not request.behind]
            assert [ask(url, request, **options).get("tokens") for request in given] == wanted, spelling
        refused = ask(url, given[0], foveate="fastv")
        assert refused["status"] == 400
        assert "the nearest that it can run is fastervlm" in refused["said"]
        assert ask(url, given[0])["status"] == 200
