"""The state of a call belongs to the call: two threads on one attached model, interrupts, copies, pickles."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch

import foveate
from foveate.probes.layer import WatchedConfig
from tests.situations.models import GREEDY, MODELS, inputs
from tests.tiny import IMAGE, PATCHES, llava

METHODS = ["none", "divprune:keep=0.25", "fastv:keep=0.25,layer=2", "random:keep=0.3", "vcc:layer=2,stride=4", "pyramiddrop:keep=0.5"]
TOWER = ["fastervlm:keep=0.25", "visionzip:dominant=0.5,contextual=0.25,layer=-1"]
ONE = [5, 6, 7] + [IMAGE] * PATCHES + [1, 2, 3]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reducer", METHODS + TOWER)
def test_two_threads_on_one_model(name: str, reducer: str) -> None:
    model, wrong = MODELS[name](), []
    jobs = [inputs(name, [ONE], seed) for seed in (1, 2)]

    def answer(job: dict[str, Any]) -> Any:
        with torch.no_grad():
            return model.generate(**job, max_new_tokens=3, **GREEDY)

    with foveate.attach(model, reducer) as run:
        expected = [answer(job) for job in jobs]
        start = threading.Barrier(2)

        def work(i: int) -> None:
            start.wait()
            for _ in range(4):
                try:
                    if not torch.equal(answer(jobs[i]), expected[i]):
                        wrong.append("another answer")
                except Exception as error:
                    wrong.append(repr(error))

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(run.passes) == 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reducer", ["fastv:keep=0.5,layer=2", "pyramiddrop:keep=0.5", "divprune:keep=0.5"])
@pytest.mark.parametrize("where", ["tower", "watched layer", "last layer", "head"])
def test_an_interrupt_leaves_nothing_behind(name: str, reducer: str, where: str) -> None:
    model, call = MODELS[name](), inputs(name, [ONE])
    layers = model.model.language_model.layers
    tower = model.model.visual if name == "qwen2_5_vl" else model.model.vision_tower
    part = {"tower": tower, "watched layer": layers[1].mlp, "last layer": layers[-1].self_attn, "head": model.get_output_embeddings()}[
        where
    ]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        bare = model(**call).logits
        with foveate.attach(model, reducer):
            expected = model(**call).logits
            for outermost in (model, model.model):
                hook = part.register_forward_hook(interrupt)
                if where != "head" or outermost is model:
                    with pytest.raises(KeyboardInterrupt):
                        outermost(**call)
                hook.remove()
                assert torch.equal(model(**call).logits, expected)
                outermost(**call)
            text = model(input_ids=torch.tensor([[5, 6, 7]])).logits
        assert torch.equal(model(input_ids=torch.tensor([[5, 6, 7]])).logits, text)
        assert torch.equal(model(**call).logits, bare)
    assert not any(isinstance(getattr(m, "config", None), WatchedConfig) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reducer", ["fastv:keep=0.5,layer=2", "divprune:keep=0.5", "vcc:layer=2,stride=4"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_an_attached_model_is_copied_whole(name: str, reducer: str, how: str) -> None:
    model, call = MODELS[name](), inputs(name, [ONE])

    def copied(thing: Any) -> Any:
        if how == "torch.save":
            buffer = io.BytesIO()
            torch.save(thing, buffer)
            return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        return copy.deepcopy(thing) if how == "deepcopy" else pickle.loads(pickle.dumps(thing))

    with torch.no_grad():
        with foveate.attach(model, reducer) as run:
            other = copied(model)  # before the first call: the library's own hooks of a call that captures outputs cannot be pickled
            outputs = model(**call, use_cache=True)
            record, cache = copied(run.last), copied(outputs.past_key_values)
            assert record.visual_tokens == run.last.visual_tokens
            new = torch.tensor([[4]])
            going_on = model(input_ids=new, past_key_values=outputs.past_key_values).logits
            assert torch.equal(model(input_ids=new, past_key_values=cache).logits, going_on)
            assert torch.equal(other(**call).logits, outputs.logits)
        assert torch.equal(other(**call).logits, outputs.logits)  # its attachment is its own
        getattr(other.model, "_foveate_run").detach()  # noqa: B009
        assert torch.equal(other(**call).logits, model(**call).logits)


def test_an_attached_model_saves_its_own_configuration(tmp_path: Any) -> None:
    for reducer in ("fastv:keep=0.5,layer=2", "fastervlm:keep=0.5", "none"):
        model = llava()
        with foveate.attach(model, reducer):
            model.save_pretrained(tmp_path / "attached")
            model.config.text_config.save_pretrained(tmp_path / "text")
        model.save_pretrained(tmp_path / "bare")
        assert (tmp_path / "attached/config.json").read_text() == (tmp_path / "bare/config.json").read_text()
        assert "watched" not in (tmp_path / "text/config.json").read_text()
