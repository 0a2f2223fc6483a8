"""Packed samples: the losses and gradients of the padded batch, under every kind of reducer; rows, refusals, resuming after a kill."""

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import kill_resume
from tests.situations.models import media, mistral, qwen, text_backend
from tests.situations.runs import save_llava
from tests.tiny import IMAGE, PATCHES, Batch, assembled, llava, prompt
from tests.train import tiny_training
from tests.train.test_supervised_rows import over, step
from tests.train.tiny_training import RECIPE
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from foveate.accounting import Trained
from foveate.anatomy import read
from foveate.data.packing import Price, cheapest, even, lay, packed
from foveate.engine.attach import attach
from foveate.errors import FoveateError
from foveate.reducers import parse
from foveate.tokens import ImagePlan
from foveate.train.account import Costs
from foveate.train.by_sample import BLOCK, attend, causal, sample_by_sample
from foveate.train.packing import Packing, goes_by_sample, refuse
from foveate.train.run import main
from foveate.train.supervised import tried

PROMPTS = [prompt(1, [1, 2, 3]), prompt(2, [4, 5]), prompt(0, [6, 7, 8, 9]), prompt(1, [3]), prompt(1, [9, 8, 7, 6, 5, 4])]
REDUCERS = (
    "none",
    "vcc:layer=1,stride=4",
    "fastv:layer=2,keep=0.5",
    "pyramiddrop",
    "random:keep=0.5",
    "divprune:keep=0.5,positions=renumber",
    "divprune:keep=0.25",
    "visionzip:dominant=4,contextual=2",
)
LAYOUTS = ([range(5)], [range(2), range(2, 5)], [range(1), range(1, 4), range(4, 5)])
MODELS: dict[str, Callable[[], Any]] = {"foveate": assembled, "llava": llava}
TOLERANCE = 2e-5
Attention = Callable[[], AbstractContextManager[None]]


def batch_of(rows: list[list[int]] = PROMPTS) -> dict[str, Tensor]:
    batch = Batch(rows)
    return batch.inputs | {"labels": batch.labels()}


def same(model: Any, batch: dict[str, Tensor], rows: list[range], items: int = 7, attention: Attention = nullcontext) -> None:
    """Loss and gradients of a step on the batch as it is, and laid out in rows; both with the head at supervised rows."""
    head, scaled = tried(model, batch, True), {"num_items_in_batch": torch.tensor(items)}
    with head.alone(batch) as given:
        loss, gradients = step(model, model, {**given, **scaled})
    together = packed(batch, rows, 0)
    with head.alone(together) as given, attention():
        found, others = step(model, model, {**given, **scaled})
    torch.testing.assert_close(found, loss, rtol=TOLERANCE, atol=0)
    assert others.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=0, atol=TOLERANCE * largest, msg=name)


@pytest.mark.parametrize("rows", LAYOUTS, ids=["one row", "two", "three"])
@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_padded_batch(name: str, reducer: str, rows: list[range]) -> None:
    model, batch = MODELS[name]().train(), batch_of()
    with attach(model, parse(reducer)):
        same(model, batch, rows)


@pytest.mark.parametrize("reducer", ["none", "fastv:layer=2,keep=0.5"])
@pytest.mark.parametrize("attention", ["eager", "flash_stand_in"])
def test_with_other_attention(attention: str, reducer: str) -> None:
    """Flash attention finds the samples of one row by their positions."""
    model = assembled("eager" if attention == "eager" else "sdpa").train()
    if attention != "eager":
        text_backend(model, attention)
    with attach(model, parse(reducer)):
        same(model, batch_of(), LAYOUTS[0])


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", ["eager", "sdpa", "llava"])
def test_attention_that_goes_sample_by_sample(name: str, reducer: str) -> None:
    model, batch = (llava() if name == "llava" else assembled(name)).train(), batch_of()
    anatomy = read(model)
    before = anatomy.text_config._attn_implementation
    with attach(model, parse(reducer)):
        same(model, batch, LAYOUTS[0], attention=partial(sample_by_sample, anatomy))
    assert anatomy.text_config._attn_implementation == before


@pytest.mark.parametrize(
    ("maker", "reducers", "goes"),
    [
        (assembled, ["none", "vcc:layer=1,stride=4"], True),
        (llava, ["fastv:layer=2,keep=0.5"], True),
        (partial(over, "gemma2"), [], False),  # every second layer has a window
        (lambda: text_backend(llava(), "flash_stand_in"), [], False),  # which takes samples as they are
        (assembled, ["no-such-method"], False),
    ],
    ids=["foveate", "llava", "windows", "flash", "reducer"],
)
def test_who_goes_sample_by_sample(maker: Callable[[], Any], reducers: list[str], goes: bool) -> None:
    model = maker().train()
    assert goes_by_sample(model, batch_of(), 0, reducers) is goes
    assert model.training
    packing = Packing(None, model, Costs(model.config, Trained()), pad=0, by_sample=goes)
    plans = [[ImagePlan.whole(PATCHES, (4, 4))] * (row.count(IMAGE) // PATCHES) for row in PROMPTS]
    made = packing(batch_of(), plans, "none")
    assert len(made["input_ids"]) == 1 or not goes


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_plain_products_in_blocks_are_causal_attention(length: int, groups: int) -> None:
    shapes = [(2, heads, length, 8) for heads in (2 * groups, 2, 2)]
    generator = torch.Generator().manual_seed(length)
    given = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    alike = [states.detach().requires_grad_() for states in given]
    (query, key, value), (q, k, v) = given, alike
    found = causal(query, key, value, 0.3)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for made in (found, expected):
        made.backward(upstream)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(given, alike, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("name", "value"), [("softcap", 30.0), ("s_aux", torch.zeros(4))])
def test_what_eager_attention_does_beside_products_is_refused(name: str, value: Any) -> None:
    states, positions = torch.randn(1, 4, 6, 8), torch.tensor([[0, 1, 2, 0, 1, 0]])
    attending: Any = partial(attend, "eager", nn.Identity(), states, states, states, None, position_ids=positions)
    attending(**{name: None})
    with pytest.raises(FoveateError, match="sample by sample"):
        attending(**{name: value})


@pytest.mark.parametrize("given", ["a mask", "no positions", "a past"])
def test_one_row_with_its_positions_is_wanted(given: str) -> None:
    states, positions = torch.randn(1, 4, 6, 8), torch.tensor([[0, 1, 2, 0, 1, 0]])
    mask = torch.ones(1, 6) if given == "a mask" else None
    keys = torch.cat([states, states], 2) if given == "a past" else states
    with pytest.raises(FoveateError, match="sample by sample"):
        attend("sdpa", nn.Identity(), states, keys, keys, mask, position_ids=None if given == "no positions" else positions)


def test_windows_count_from_the_beginning_of_a_sample() -> None:
    model = mistral(window=8).train()
    same(model, batch_of(), LAYOUTS[0])


def test_the_first_token_of_a_sample_is_not_predicted_from_the_sample_before() -> None:
    batch = batch_of()
    batch["labels"] = torch.where(batch["attention_mask"] > 0, batch["input_ids"], -100)  # supervised from its first token on
    rows = [range(2), range(2, 5)]
    together = packed(batch, rows, 1)
    first = together["position_ids"] == 0
    assert (together["labels"][first] == -100).all()
    assert (together["labels"][:, 1:] >= 0).sum() == (batch["labels"][:, 1:] >= 0).sum()
    assert "attention_mask" not in together
    assert together["pixel_values"] is batch["pixel_values"]
    lengths = batch["attention_mask"].sum(1).tolist()
    assert together["input_ids"].shape == (2, max(sum(lengths[:2]), sum(lengths[2:])))
    assert (together["input_ids"] == IMAGE).sum() == (batch["input_ids"] == IMAGE).sum()


LENGTHS = st.lists(st.lists(st.integers(1, 60), min_size=2, max_size=2), min_size=1, max_size=12).map(
    lambda rows: np.array([sorted(row, reverse=True) for row in rows], dtype=np.int64)  # a reducer leaves less
)


@given(lengths=LENGTHS, most=st.integers(1, 200), pair=st.floats(0, 10))
def test_rows_have_every_sample_once_and_in_order(lengths: np.ndarray, most: int, pair: float) -> None:
    price, mean = Price(np.ones(2), np.full(2, pair)), lengths.mean(1).tolist()
    for rows in (lay(mean, most), even(mean, 2), cheapest(lengths, price)):
        assert [at for row in rows for at in row] == list(range(len(mean)))
        assert all(len(row) for row in rows)
    for row in lay(mean, most):
        assert len(row) == 1 or sum(mean[at] for at in row) <= most
    for count in range(1, len(mean) + 1):
        rows = even(mean, count)
        assert len(rows) <= count
        longest = math.ceil(max(sum(mean[at] for at in row) for row in rows))
        assert longest <= math.ceil(max(mean)) or len(lay(mean, longest - 1)) > count
        assert price(lengths, cheapest(lengths, price)) <= price(lengths, rows)


def test_rows_follow_the_reducer() -> None:
    """Images that leave few tokens behind share a row that would not hold them whole."""
    model = assembled()
    packing = Packing(60, model, Costs(model.config, Trained()), pad=0)
    batch, image = batch_of([prompt(1, [1, 2, 3])] * 4), ImagePlan.whole(PATCHES, (4, 4))
    plans = [[image]] * 4
    shapes = {spelled: tuple(packing(batch, plans, spelled)["input_ids"].shape) for spelled in ("none", "random:keep=0.25")}
    assert shapes == {"none": (2, 46), "random:keep=0.25": (1, 92)}
    one = Packing(10, model, Costs(model.config, Trained()), pad=0)(batch, plans, "none")
    assert "attention_mask" in one  # nothing fits: the batch as it was
    assert one["input_ids"] is batch["input_ids"]


def test_models_that_cannot_are_refused() -> None:
    rows = [prompt(1, [1, 2, 3]), prompt(1, [4, 5, 6]), prompt(1, [7])]
    batch = batch_of(rows)
    for model in (assembled(), llava(), mistral(), over("gemma2")):
        refuse(model, batch, 0)
    visual = {"mm_token_type_ids": (batch["input_ids"] == IMAGE).int()} | media("qwen2_5_vl", 3)
    with pytest.raises(FoveateError, match="m-RoPE"):
        refuse(qwen(), batch | visual, 0)
    torch.manual_seed(0)
    text: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    recurs = assembled()
    lfm2 = CONFIG_MAPPING["lfm2"](**text, num_key_value_heads=2, layer_types=["conv", "full_attention"], pad_token_id=0)
    recurs.model.causal_lm = AutoModelForCausalLM.from_config(lfm2)
    with pytest.raises(FoveateError, match="layers that recur along the row"):
        refuse(recurs.eval(), batch, 0)

    def blind(decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """As a model that makes its mask by itself."""
        return args, {**kwargs, "attention_mask": torch.ones(kwargs["inputs_embeds"].shape[:2], dtype=torch.int64)}

    leaks = assembled().train()
    leaks.get_decoder().register_forward_pre_hook(blind, with_kwargs=True)
    with pytest.raises(FoveateError, match="packed samples see each other"):
        refuse(leaks, batch, 0)
    assert leaks.training

    def strict(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if "attention_mask" not in kwargs:
            raise KeyError("attention_mask")

    stiff = llava()
    stiff.register_forward_pre_hook(strict, with_kwargs=True)
    with pytest.raises(FoveateError, match="does not take packed samples"):
        refuse(stiff, batch, 0)


def training(name: str) -> str:
    return RECIPE.replace("    batch_size: 4\n", f"    batch_size: 4\n    pack: {name}\n")


def rows_of(final: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("pack", ["true", "70"])
def test_a_run_has_the_losses_and_counts_of_one_that_pads(
    pack: str, recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, int]] = []
    packs = Packing.__call__

    def noting(self: Packing, inputs: Any, *more: Any) -> Any:
        made = packs(self, inputs, *more)
        shapes.append((len(inputs["input_ids"]), len(made["input_ids"])))
        return made

    monkeypatch.setattr(Packing, "__call__", noting)
    plain = [text.replace("{root}/lm", "{root}/lm-plain").replace("dropout: 0.1", "dropout: 0") for text in (RECIPE, training(pack))]
    logs = [
        rows_of(main(recipe_file(f"{name}-{pack}", text), ["log_steps=1"])) for name, text in zip(("padded", "packed"), plain, strict=True)
    ]
    assert any(rows < samples for samples, rows in shapes)
    for ours, theirs in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        for name in ("images", "supervised_tokens", "flops", "reducer", "visual_tokens_per_layer"):
            assert ours[name] == theirs[name]


def test_a_checkpoint_of_the_library_packs_too(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    text = RECIPE[: RECIPE.index("  - name: grow")].replace("train: {{bridge: true}}", "train: {{bridge: true, lm: true}}")
    text = text.replace("{root}/data", f"{tmp_path}/data").replace("{root}/images", f"{tmp_path}/images")
    text = text.replace(text[text.index("  vision") : text.index("log_steps")], f"  checkpoint: {save_llava(tmp_path / 'llava')}\n")
    tiny_training.save_data(tmp_path)
    more = ["log_steps=1", "stages.0.micro_batch=4", 'stages.0.reducers=[{share: 1, reducer: "fastv:layer=1,keep=0.5"}]']
    logs = [rows_of(main(recipe_file(f"llava-{pack}", text), [*more, f"stages.0.pack={pack}"])) for pack in ("false", "true", "90")]
    assert len(logs[0]) == 6
    for log in logs[1:]:
        assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in logs[0]], rel=1e-4)
        assert [row["flops"] for row in log] == [row["flops"] for row in logs[0]]


def test_killed_runs_that_pack_end_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_training, "RECIPE", training("true"))
    monkeypatch.setattr(kill_resume, "QUICK", ("1-grow: saving a checkpoint",))  # tests/train/test_kill.py has others
    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
    kill_resume.check(rounds=1, quick=True, folder=tmp_path)
    monkeypatch.undo()
    assert sum(": killed" in line for line in said) == 1, said
    assert "are the same to the last bit" in said[-1]
