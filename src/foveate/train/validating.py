"""The loss on samples that are not trained on, as a stage goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from foveate.data.collate import IGNORED


def validate(trainer: Any) -> float:
    """Mean loss over the supervised tokens of the validation samples, in evaluation mode, under the reducer of the moment."""
    assert trainer.validation is not None
    loading, world, rank = trainer.validation.loading, trainer.args.world_size, trainer.args.process_index
    samples = range(len(loading.data))
    # Every process has as many batches: the last may begin again, at a sample that does not count.
    rows = range(rank, -(-len(samples) // world) * world, world)
    micro = trainer.args.per_device_train_batch_size
    batches = [[row % len(samples) for row in rows[start : start + micro]] for start in range(0, len(rows), micro)]
    loader: DataLoader[Any] = DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=loading,
        num_workers=trainer.args.dataloader_num_workers,
        generator=torch.Generator(),
    )
    model: Any = trainer.model_wrapped if trainer.divided else trainer.model
    called = trainer.called(model)
    sums = torch.zeros(2, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for number, batch in enumerate(loader, start=1):
            if number == len(batches) and rows[-1] >= len(samples):
                batch["labels"][-1] = IGNORED
            del batch["plans"], batch["sources"]
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            if trainer.stage.align is not None:
                total, found = trainer.stage.align(called, trainer._prepare_inputs(batch))
                sums += torch.tensor([float(total), found], dtype=torch.float64)
                continue
            with trainer.rows.alone(trainer._prepare_inputs(batch)) as given:
                loss = called(**given)["loss"]
            if count:
                sums += torch.tensor([float(loss) * count, count], dtype=torch.float64)
    model.train()
    if world > 1:
        sums = trainer.accelerator.reduce(sums.to(trainer.args.device), reduction="sum").cpu()
    return float(sums[0] / sums[1])
