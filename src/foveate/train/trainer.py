"""The Hugging Face Trainer for one stage: our order of samples, the reducer of the moment, marked checkpoints, a log that goes on."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_callback import PrinterCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from foveate.data.conversations import SHOWN
from foveate.errors import FoveateError
from foveate.reducers import parse, visual_tokens
from foveate.reducers.learned import while_trained
from foveate.tokens import ImagePlan
from foveate.train import files
from foveate.train.account import Costs, Since, Totals
from foveate.train.bf16_copy import BFloat16Copy
from foveate.train.callbacks import Flow, Held
from foveate.train.evaluating import Examiner
from foveate.train.mixture import SourceLosses, told
from foveate.train.order import Order, ProcessBatches
from foveate.train.packing import Packing, attention_of
from foveate.train.passes import Passes
from foveate.train.progress import ProgressLine, StageInfo
from foveate.train.routers import OWN, Routers
from foveate.train.scheduled import ScheduleCallback
from foveate.train.sharding import ShardedTrainer
from foveate.train.stages import part_modules
from foveate.train.stand_in import StandIn
from foveate.train.supervised import SupervisedRows
from foveate.train.validating import validate

log = logging.getLogger(__name__)

PROGRESS = "progress.json"
NUMBERS = ("loss", "validation_loss", "tokens_per_image", "images", "images_per_s", "flops", "seconds")  # of the log, also for report_to


class FoveateTrainer(ShardedTrainer):
    """One stage. `model` is an ordinary transformers model (LoRA injected in place), never a wrapper."""

    def __init__(
        self,
        *,
        order: Order,
        stage: StageInfo,
        totals: Totals,
        log_file: files.RunLog,
        log_steps: int,
        save_steps: int,
        costs: Costs,
        rates: dict[str, float] | None = None,
        validation: Held | None = None,
        stand_in: StandIn | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.rows = SupervisedRows(None)  # until it has been tried
        self.packing: Packing | None = None
        self.remove_callback(PrinterCallback)
        self.order, self.stage, self.log_file, self.costs, self.passes = order, stage, log_file, costs, stage.passes
        self.totals, self.since = totals, Since()
        self.switch = ScheduleCallback(stage.parts, log=False, record=stage.passes is not None)
        self.progress = ProgressLine(
            stage, order.batch_size, self.visual_tokens if stage.align is None else lambda: [self.tokens_per_image]
        )
        self.add_callback(self.switch)
        self.rates, self.validation, self.stand_in = rates, validation, stand_in
        self.called: Callable[[Any], Any] = BFloat16Copy().of if stage.bf16_copy else lambda model: model
        self.visual = part_modules(self.model)
        self.routers = Routers(self.model, fill=self.args.world_size == 1 or not self.args.ddp_find_unused_parameters)
        seen = {*self.routers.all, *(parameter for module in self.visual for parameter in module.parameters())}
        self.trains_text = any(parameter.requires_grad and parameter not in seen for parameter in self.model.parameters())
        self.flow = Flow(log_steps, save_steps, stage.steps, validation)
        self.add_callback(self.flow)
        self.by_source = SourceLosses(len(stage.sources))
        self.examiner: Examiner | None = None
        self._seen = [0, 0]  # visual tokens and images so far, of the batches that came here
        self._reset()
        if self.is_world_process_zero():
            self.add_callback(self.progress)

    def ask(self, examiner: Examiner) -> None:
        """Let the model be asked while it is trained."""
        self.examiner, self.flow.ask_every = examiner, examiner.spec.every

    # ---- data

    def get_train_dataloader(self) -> Any:
        args = self.args
        batches = ProcessBatches(self.order, self.stage.steps, args.process_index, args.world_size, args.gradient_accumulation_steps)
        return DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            generator=torch.Generator(),  # the loader draws a seed for its workers; not from the stream that dropout draws from
        )

    def create_optimizer(self, model: Any = None) -> Any:
        """With a group of weights for each part of the model that has a learning rate of its own."""
        optimizer = super().create_optimizer(model)
        if self.rates is None:
            return optimizer
        part_of = {
            parameter: part for part, module in zip(("tower", "bridge"), self.visual, strict=True) for parameter in module.parameters()
        }
        part_of |= dict.fromkeys(self.routers.all, "reducers")
        groups = []
        for group in optimizer.param_groups:
            for part, rate in self.rates.items():
                own = [parameter for parameter in group["params"] if part_of.get(parameter, "lm") == part]
                groups.append({**group, "params": own, "lr": rate, "part": part})
        optimizer.param_groups[:] = [group for group in groups if group["params"]]
        return optimizer

    _rates_now: dict[str, float] = {}  # those of the optimiser step that was made last

    def _get_learning_rate(self) -> float:
        """The Trainer asks for it after an optimiser step, before the rates change."""
        if self.rates is not None:
            self._rates_now = {group["part"]: group["lr"] for group in self.optimizer.param_groups}
        rate: float = super()._get_learning_rate()
        return rate

    # ---- one step

    def _reset(self) -> None:
        """What this process has counted since the last time it was put together with the others'."""
        self._loss: Tensor | None = None
        self._terms: dict[str, Any] = {}  # what it is made of, where the stage has losses
        self._images = self._supervised = 0
        self._flops = 0.0
        self._clock = time.monotonic()

    @property
    def tokens_per_image(self) -> int:
        """The mean of the images seen so far."""
        visual, images = self._seen
        return max(1, round(visual / images)) if images else self.stage.image.visual

    def visual_tokens(self) -> list[int]:
        """Of such an image in each decoder layer, under the reducer of the moment."""
        if self.stage.align is not None:
            return [0] * self.stage.layers
        reducers = parse(self._passes[0][0])
        return visual_tokens(while_trained(reducers) if self.routers.trained else reducers, self.tokens_per_image, self.stage.layers)

    @property
    def _passes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The reducers of the step's passes: of those that are trained, and of those without gradient."""
        if self.passes is None:
            return (self.switch.current,), ()
        plan = self.passes.plan(max(self._micro[0], 0), self.switch.current)
        return plan.students, plan.teachers

    @property
    def _term_names(self) -> list[str]:
        """Of what the loss is made of, where that is told."""
        return [*([] if self.passes is None else self.passes.names), *([OWN] if self.routers.trained else [])]

    _micro = (-1, 0)  # the optimiser step under way, and micro-batches of it that were begun
    _step_images = 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        plans, sources = inputs.pop("plans"), inputs.pop("sources")
        if self.stage.sources:
            self.by_source.expect(inputs["labels"].to(self.args.device), sources)
        images = sum(map(len, plans))
        step, begun = self._micro
        if step != self.state.global_step:
            step, begun, self._step_images = self.state.global_step, 0, 0
        self._micro = step, begun + 1
        self._step_images += images
        self._images += images
        self._seen = [self._seen[0] + sum(plan.visual for row in plans for plan in row), self._seen[1] + images]
        self._supervised += int((inputs["labels"] >= 0).sum())
        self._flops += self._cost(inputs, plans)
        if self.packing is not None:
            inputs = self.packing(inputs, plans, self.switch.current)
        with attention_of(self.packing):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.stand_in is not None and self.trains_text and self.accelerator.sync_gradients:
            seen = self.accelerator.reduce(torch.tensor(self._step_images, device=self.args.device), reduction="sum")
            if not int(seen):  # one process would have no gradients of these parts in this step, and leave them as they are
                for module in self.visual:
                    module.zero_grad(set_to_none=True)
        if not loss.isfinite():
            batch = np.split(self.order.batch(step), self.args.world_size)[self.args.process_index]
            self._diverged(f"the loss is {loss.item()}", np.split(batch, self.args.gradient_accumulation_steps)[begun])
        self._loss = loss.double() if self._loss is None else self._loss + loss
        return loss

    def _cost(self, inputs: dict[str, Any], plans: Sequence[Sequence[ImagePlan]]) -> float:
        """FLOPs of a step on these inputs, whose rows have images that become `plans`."""
        lengths, (trained, teaching) = inputs["attention_mask"].sum(1).tolist(), self._passes
        heads = self.rows.count(inputs["labels"]) if self.passes is None else [None] * len(lengths)
        return sum(
            self.costs.of(reducers, tuple(row), length - sum(plan.tokens for plan in row), head, teaches)
            for passes, teaches in ((trained, False), (teaching, True))
            for reducers in passes
            for length, row, head in zip(lengths, plans, heads, strict=True)
        )

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        called = self.called(model)
        if self.stage.align is not None:
            return self.stage.align(called, inputs)[0] * self.args.world_size / self.order.batch_size
        if self.passes is not None:
            loss = self._several(self.passes, called, model, inputs, **kwargs)
        else:
            with self.rows.alone(inputs) as given:
                loss, outputs = self._call(called, given, *args, **{**kwargs, "return_outputs": True})
            if self.stage.sources:
                self.by_source.add(outputs["logits"], inputs["labels"])
        if (
            not {"pixel_values", "tower_features"} & set(inputs) and self.stand_in is None and not self.trains_text
        ):  # gradients of zero, not none at all
            loss = loss + sum((0.0 * parameter).sum() for parameter in model.parameters() if parameter.requires_grad)
        return loss

    def _call(self, called: Any, inputs: Mapping[str, Any], *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        """The Trainer's loss of a micro-batch and what the reducers add to it, and the model's outputs."""
        loss, outputs = super().compute_loss(called, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)
        whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None  # else the Trainer takes the mean of the micro-batches
        samples = self.order.batch_size / self.args.world_size if whole else len(inputs["labels"])
        own = self.routers.term(self.switch.run, self.state.global_step / self.stage.steps, samples)
        if own is not None:
            self._terms[OWN] = self._terms.get(OWN, 0.0) + own.detach().double() / (1 if whole else self.args.gradient_accumulation_steps)
        return (loss if own is None else loss + own.to(loss.device)), outputs

    def _several(self, passes: Passes, called: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The loss of a step of several passes, scaled as the Trainer scales that of one."""
        assert self.switch.run is not None
        forward = partial(self._call, called, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        plan = passes.plan(self.state.global_step, self.switch.current)
        whole = passes.whole(inputs["labels"], num_items_in_batch, self.args.world_size)
        terms = passes.terms(plan, self.switch.run, self.switch.current, model, whole, forward)
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + term.detach().double()
        return torch.stack(list(terms.values())).sum()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Before each optimiser step."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):  # a scaler leaves out such steps itself
            self._diverged("the gradients are not finite", self.order.batch(self.state.global_step))
        return norm

    def _diverged(self, what: str, items: np.ndarray) -> NoReturn:
        names = map(self.data_collator.data.name_of, items[:SHOWN])
        samples = ", ".join(names) + (", ..." if len(items) > SHOWN else "")
        raise FoveateError(
            f"stage {self.stage.name}, step {self.state.global_step + 1}: {what} (samples {samples}). The run stops here; its last "
            "complete checkpoint stays. Look at these samples, lower learning_rate, or set max_grad_norm; another `output` starts anew"
        )

    def _ask(self) -> dict[str, Any]:
        """What the log has of an evaluation; the weights are kept if they are the best so far."""
        assert self.examiner is not None
        with self.progress.beside("asking", self.examiner.questions) as tell:
            figures, seconds = self.examiner.examine(self.model, self.switch, tell)
        weights = {} if self.examiner.spec.keep_best is None else self.trained_weights()
        if self.is_world_process_zero():
            self.examiner.keep(figures, self.stage.name, self.state.global_step, self.switch.current, partial(self.write_weights, weights))
        return {"evaluation": figures, "evaluation_seconds": round(seconds, 3)}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the Trainer's own estimate walks over all modules in every step and knows nothing of fewer tokens

    # ---- logging

    def _gather(self) -> None:
        """Bring what the processes have counted into `totals` and `since`. Every process calls this at the same steps."""
        loss = torch.zeros((), dtype=torch.float64) if self._loss is None else self._loss.cpu()
        counted = torch.tensor([loss, self._images, self._supervised, self._flops, *self.by_source.take().flatten()], dtype=torch.float64)
        if self.args.world_size > 1:
            counted = self.accelerator.reduce(counted.to(self.args.device), reduction="sum").cpu()
            counted[0] /= self.args.world_size  # each process' loss is already scaled to the whole batch
        loss_sum, images, supervised, flops, *rest = counted.tolist()
        own = [rest[at : at + 3] for at in range(0, len(rest), 3)]
        before = self.since.sources or [[0.0] * 3] * len(own)
        self.since.sources = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(before, own, strict=True)]
        seconds = time.monotonic() - self._clock
        self.since.loss += loss_sum
        if names := self._term_names:
            terms = torch.tensor([float(self._terms.get(name, 0.0)) for name in names], dtype=torch.float64)
            if self.args.world_size > 1:
                terms = self.accelerator.reduce(terms.to(self.args.device), reduction="mean").cpu()
            for name, term in zip(names, terms.tolist(), strict=True):
                self.since.terms[name] = self.since.terms.get(name, 0.0) + term
        self.since.images += int(images)
        self.since.seconds += seconds
        self.since.steps = self.state.global_step - self._logged
        self.totals.images += int(images)
        self.totals.supervised += int(supervised)
        self.totals.flops = None if self.totals.flops is None or math.isnan(flops) else self.totals.flops + flops
        self.totals.seconds += seconds
        self._reset()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._gather()
            row = self._row(logs)
            if self.flow.validates(self.state.global_step):
                row["validation_loss"] = validate(self)
            if self.flow.asks(self.state.global_step):
                row |= self._ask()
            self._clock = time.monotonic()  # the seconds of the log are those of training
            self.progress.loss = row["loss"]
            if self.is_world_process_zero():
                self.log_file.append(row)
            self._logged, self.since = self.state.global_step, Since()
            numbers: dict[str, float] = {key: row[key] for key in NUMBERS if key in row}
            numbers |= {f"loss/{name}": own["loss"] for name, own in row.get("sources", {}).items() if own["tokens"]}
            numbers |= {f"{task}/{name}": value for task, own in row.get("evaluation", {}).items() for name, value in own.items()}
            numbers |= {f"loss_{name}": term for name, term in row.get("losses", {}).items()}
            per_layer = row["visual_tokens_per_layer"]
            logs = {**logs, **numbers, "visual_tokens_per_layer": sum(per_layer) / len(per_layer)}
        super().log(logs, start_time)

    def _row(self, logs: dict[str, float]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "stage": self.stage.name,
            "step": self.state.global_step,
            "loss": self.since.loss / max(self.since.steps, 1),
            "learning_rate": logs["learning_rate"] if self.rates is None else self._rates_now,
        }
        if self._term_names:
            row["losses"] = {name: term / max(self.since.steps, 1) for name, term in self.since.terms.items()}
        if isinstance(logs.get("grad_norm"), float):
            row["grad_norm"] = logs["grad_norm"]
        row |= {
            "images": self.totals.images,
            "images_per_s": round(self.since.images / max(self.since.seconds, 1e-9), 2),
            "supervised_tokens": self.totals.supervised,
            "tokens_per_image": self.tokens_per_image,
            "visual_tokens_per_layer": self.visual_tokens(),
        }
        if self.stage.sources:
            row["sources"] = told(self.stage.sources, self.since.sources)
        if self.totals.flops is not None:
            row["flops"] = self.totals.flops
        if self.stage.cached:
            row["tower"] = "from cache"
        if (grown := getattr(self.model.config, "grown", None)) is not None:
            row["growth_left"] = grown["left"]
        trained, teaching = self._passes
        if self.passes is not None:
            row["teachers"] = list(teaching)
        return row | {"seconds": round(self.totals.seconds, 3), "reducer": " | ".join(trained)}

    # ---- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of the weights only those that are trained (and buffers): the others are those of the model that the stage began with."""
        weights = self.trained_weights()
        if self.args.should_save:
            self.write_weights(weights, output_dir or str(self.args.output_dir))

    def write_weights(self, weights: Mapping[str, Tensor], output_dir: str) -> None:
        """Not by `save_pretrained`, which renames the weights of some models to an older spelling."""
        parameters = (name for name, _ in self.model.named_parameters() if name in weights)
        bad = next((name for name in parameters if not weights[name].isfinite().all()), None)
        if bad is not None:
            raise FoveateError(
                f"stage {self.stage.name}, step {self.state.global_step}: {bad} holds numbers that are not finite. No checkpoint was made; "
                "the one before stays; lower learning_rate, or set max_grad_norm"
            )
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        whole = {name: value.cpu().contiguous() for name, value in weights.items()}
        save_file(whole, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that are not trained are missing in a checkpoint, and that is right; one that the model does not know is not."""
        if load_result.unexpected_keys:
            raise FoveateError(f"the checkpoint holds weights that the model does not have, such as {load_result.unexpected_keys[0]}")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._gather()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            state = {"totals": asdict(self.totals), "since": asdict(self.since), "logged": self._logged, "seen": self._seen}
            state["divided"] = self.divided
            (folder / PROGRESS).write_text(json.dumps(state), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            files.mark(folder)
            files.rotate(folder.parent)

    # ---- the stage

    _logged = 0

    def run(self, checkpoint: Path | None) -> None:
        """Train to the end of the stage, from `checkpoint` if there is one."""
        if checkpoint is not None:
            state = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
            self.check_divided(checkpoint, state.get("divided", ""))
            self.totals, self.since, self._logged = Totals(**state["totals"]), Since(**state["since"]), state["logged"]
            self._seen = state.get("seen") or [int(count) for count in state.get("mean") or (0, 0)]  # its name in earlier versions
        try:
            self._reset()
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except FoveateError as error:  # from a process that loads data it comes with that process' traceback in its text
            raise FoveateError(str(error).rstrip().rpartition("foveate.errors.FoveateError: ")[2]) from None
        except UnpicklingError as error:  # torch's, of the optimizer's and the random state
            raise FoveateError(
                f"{checkpoint}: its state holds more than tensors, or is broken; nothing of it was run. Remove this folder: the same "
                "command then goes on from the checkpoint before it, or from the beginning of the stage"
            ) from error
        finally:
            self.progress.close()
            self.switch.detach()
