"""Tensor parallelism gives each rank some of the heads: the ranks keep the same tokens as the whole model, and give the same logits."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

import foveate
from foveate.anatomy import read, tensor_parallel_group
from foveate.contract import AttentionRows
from tests.tiny import Batch, llava, prompt

RANKS = 2
REDUCERS = [
    "divprune:keep=0.5",  # looks at no head
    "fastv:keep=0.25,layer=2",
    "fastv:keep=0.25,layer=2,rows=all",
    "pyramiddrop:keep=0.5",
    "sparsevlm:keep=0.3,layers=2",
    "dart:keep=0.25,layer=2",
    "aim",
    "schedule:keeps=1:0.5/3:0.25",
]
Seen = dict[str, tuple[list[list[int]], Tensor]]


def seen(model: Any) -> Seen:
    """By reducer, the slots that each of its maps keeps, and the logits."""
    batch, found = Batch([prompt(1, [1, 2, 3]), prompt(1, [4])]), {}
    for reducer in REDUCERS:
        with foveate.attach(model, reducer) as run, torch.no_grad():
            logits = model(**batch.inputs, use_cache=False).logits
        found[reducer] = [m.representative.flatten().tolist() for m in run.last.maps.values()], logits
    return found


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo")
    config = DistributedConfig(tp_size=RANKS, tp_plan="auto")
    model = AutoModelForImageTextToText.from_pretrained(folder, distributed_config=config).eval()
    anatomy = read(model)
    groups = [tensor_parallel_group(layer.self_attn) for layer in anatomy.layers]  # type: ignore[arg-type]
    rows = torch.rand(1, 4, 5, 5, generator=torch.Generator().manual_seed(3)).softmax(-1)
    own = AttentionRows(rows[:, rank::RANKS], rows[:, rank::RANKS], 1.0, weights=rows[:, rank::RANKS], group=groups[0])
    torch.save(
        {
            "seen": seen(model),
            "sizes": [0 if group is None else group.size() for group in groups],
            "tower": tensor_parallel_group(anatomy.tower) is None,
            "row": own.row(torch.tensor([4])),
            "received": own.received(torch.tensor([[True, False, True, True, False]])),
            "keys": own.keys(),
        },
        Path(folder) / f"rank-{rank}.pt",
    )
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tensor-parallel")
    llava().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(worker, (port, str(folder)), RANKS, start_method="fork")  # all is imported already
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def whole() -> Seen:
    return seen(llava())


def test_the_heads_are_shared_out(ranks: list[dict[str, Any]]) -> None:
    """Else the tests below would prove nothing."""
    for rank in ranks:
        assert rank["sizes"] == [RANKS] * 4
        assert rank["tower"]


@pytest.mark.parametrize("reducer", REDUCERS)
def test_ranks_keep_what_the_whole_model_keeps(reducer: str, ranks: list[dict[str, Any]], whole: Seen) -> None:
    kept, logits = whole[reducer]
    for rank in ranks:
        found, own = rank["seen"][reducer]
        assert found == kept
        assert torch.allclose(own, logits, rtol=1e-3, atol=1e-4)


def test_means_and_keys_are_those_of_all_heads(ranks: list[dict[str, Any]]) -> None:
    weights = torch.rand(1, 4, 5, 5, generator=torch.Generator().manual_seed(3)).softmax(-1)
    all_heads = AttentionRows.of(weights)
    for rank in ranks:
        assert torch.allclose(rank["row"], all_heads.row(torch.tensor([4])))
        assert torch.allclose(rank["received"], all_heads.received(torch.tensor([[True, False, True, True, False]])))
        keys = torch.cat([weights[:, r::RANKS] for r in range(RANKS)], 1)
        assert torch.equal(rank["keys"], keys.transpose(1, 2).flatten(2))


def test_a_model_on_one_device_asks_nobody() -> None:
    assert tensor_parallel_group(llava()) is None
