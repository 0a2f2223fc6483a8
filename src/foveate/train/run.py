"""A recipe from beginning to end: check everything, then train stage after stage, going on where an earlier run was.

Every stage but the first begins with the model folder that the one before it has saved, also when nothing was interrupted: a resumed
run and an uninterrupted one go through the same files and are the same run, to the last bit on a CPU.
"""

from __future__ import annotations

import errno
import json
import logging
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from foveate.anatomy import read
from foveate.data.collate import Collator
from foveate.data.features import FeatureStore
from foveate.data.library import image_plan
from foveate.errors import FoveateError
from foveate.evaluation.samples import Task
from foveate.files import write_json
from foveate.lock import locked
from foveate.machine import kept_memory
from foveate.processes import processes
from foveate.reducers import parse, save_reducers, save_weights, take_weights
from foveate.tokens import ImagePlan
from foveate.train import files
from foveate.train.account import Costs, Totals
from foveate.train.align import Align
from foveate.train.callbacks import Held, LetGo
from foveate.train.evaluating import BEST_NOTE, Examiner, best_note, open_tasks
from foveate.train.features import Wanted, look_through, open_features
from foveate.train.loading import Loading
from foveate.train.micro_batch import choose
from foveate.train.opening import Opened, open_model
from foveate.train.order import Items, division
from foveate.train.passes import passes_of
from foveate.train.progress import StageInfo
from foveate.train.recipe import load_recipe
from foveate.train.samples import (
    StageData,
    facts_of,
    make_collator,
    notes,
    open_data,
    open_renderer,
    order_of,
    report_notes,
    word_pieces,
)
from foveate.train.schedule import NONE, stage_steps
from foveate.train.settings import Recipe, Stage
from foveate.train.sharding import check_sharding
from foveate.train.stages import budgets_of, is_assembled, keep_of, read_config, walk
from foveate.train.stand_in import StandIn
from foveate.train.trainer import FoveateTrainer
from foveate.train.trials import check_machine, check_reporting, rehearse, training_arguments, try_packing, try_rows

log = logging.getLogger(__name__)
TIMEOUT = timedelta(hours=2)  # processes wait for each other while images are checked


def main(recipe_path: Path, overrides: Sequence[str] = ()) -> Path:
    """What `foveate train` does. Returns the folder of the finished model."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    return train(load_recipe(recipe_path, list(overrides)))


def train(recipe: Recipe) -> Path:
    """Run a recipe, or go on with it. Returns `<output>/final`: model, processor and, if the last step had a reducer, foveate.json."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    check_sharding(recipe)
    state = processes(TIMEOUT)
    final, plain = recipe.output / "final", json.loads(recipe.model_dump_json())
    new = files.compare(recipe.output, {"recipe": plain})
    if files.is_complete(final) and not new:
        return final
    with locked(recipe.output, state):
        try:
            run_stages(recipe, plain, state)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            raise FoveateError(f"{recipe.output}: {error.strerror}. What was complete stays: make room and give the same command") from None
    return final


def run_stages(recipe: Recipe, plain: dict[str, Any], state: PartialState) -> None:
    check_reporting(recipe)
    setups = list(walk(recipe, read_config))
    check_machine(recipe, setups[0].config, state)
    renderer = open_renderer(recipe)
    if renderer.end and state.is_main_process:
        log.warning("the chat template writes no token behind an answer: %s is put there, so that the model learns to stop", renderer.end)
    data = [open_data(recipe, setup, renderer, state) for setup in setups]
    tasks = open_tasks(recipe, state)
    facts = {stage.name: facts_of(found) for stage, found in zip(recipe.stages, data, strict=True)}
    files.compare(recipe.output, {"recipe": plain, "facts": facts})
    for setup in setups if state.is_main_process else []:
        for note in setup.cautions:
            log.warning("stage %s: %s", setup.stage.name, note)

    folders = [recipe.folder(index) / "model" for index in range(len(recipe.stages))]
    done = max((index for index, folder in enumerate(folders) if files.is_complete(folder)), default=-1)
    wanted = look_through(recipe, setups, data, state, done)
    state.wait_for_everyone()
    if state.is_main_process:  # what was refused so far binds no folder
        files.claim(recipe.output, {"recipe": plain, "facts": facts})
    for index in range(done + 1, len(folders)):
        previous = folders[index - 1] if index else None
        run_stage(recipe, index, data[index], wanted[index], tasks[index], previous, state, first=index == done + 1)
    if state.is_main_process:
        for folder in folders:
            files.drop_checkpoints(folder.parent)
        files.publish(folders[-1], recipe.output / "final")
    state.wait_for_everyone()


# ---- one stage -----------------------------------------------------------------------------------------------------------------------


def run_stage(
    recipe: Recipe,
    index: int,
    data: StageData,
    wanted: Wanted | None,
    tasks: Sequence[Task],
    previous: Path | None,
    state: PartialState,
    first: bool,
) -> None:
    stage, folder = recipe.stages[index], recipe.folder(index)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        files.clean(folder)
    state.wait_for_everyone()
    checkpoint = files.newest(folder)
    opened = open_model(recipe, index, previous)
    features = None if wanted is None else open_features(wanted, opened, state)
    micro = choose(recipe, index, data.train, opened, features, folder, state)
    trainer = make_trainer(recipe, index, data, opened, features, micro, state)
    if stage.evaluate is not None:
        trainer.ask(Examiner(stage.evaluate, tasks, opened.processor, folder, state))
    if first and not trainer.divided:  # what is sharded may have no room on one device
        rehearse(recipe, index, opened, state)
    if stage.kind != "align":
        trainer.rows = try_rows(opened, trainer.model_accepts_loss_kwargs)
    if stage.pack:
        trainer.packing = try_packing(stage, opened, trainer.costs)
    if stage.losses and not trainer.model_accepts_loss_kwargs:
        raise FoveateError(
            f"stage {stage.name}: `losses` are divided by a step's tokens, which {type(opened.model).__name__} does not take"
        )
    if state.is_main_process:
        done = 0 if checkpoint is None else files.step_of(checkpoint)
        trainer.progress.announce(done)
        earlier = {s.name for s in recipe.stages[:index]}
        trainer.log_file.keep(lambda row: row["stage"] in earlier or (row["stage"] == stage.name and row["step"] <= done))
    if checkpoint is None and previous is not None:
        trainer.totals = Totals(**json.loads((previous / "totals.json").read_text(encoding="utf-8")))
    with kept_memory(torch.device(state.device).type):  # not of the tower's batches before, which are larger than a step's
        trainer.run(checkpoint)
    if state.is_main_process:
        report_notes(recipe, stage, data.train.name, trainer.stage.steps * stage.batch_size)
    finish(recipe, index, previous, opened, trainer, folder)
    state.wait_for_everyone()


def make_trainer(
    recipe: Recipe, index: int, data: StageData, opened: Opened, features: FeatureStore | None, micro: int | None, state: PartialState
) -> FoveateTrainer:
    stage, samples = recipe.stages[index], data.train
    steps = stage_steps(len(samples), stage.batch_size, epochs=stage.epochs, steps=stage.steps)
    micro, accumulation = division(stage.batch_size, micro, state.num_processes, stage.name)
    anatomy = read(opened.model)
    # A Foveate model uses every trained parameter in every batch, unless scales of its bridge are left out of some; others have blocks of
    # the tower whose output they leave aside.
    config = opened.model.config
    foreign, budgets = not is_assembled(config), budgets_of(stage, config)
    arguments = training_arguments(recipe, index, steps, micro, accumulation, find_unused=foreign or bool(budgets))
    plan = image_plan(opened.processor) if foreign else config.plan_image(config.image_size, config.image_size)
    skipped, lost = notes(recipe, stage)
    held = None
    if stage.validation is not None and data.validation is not None:
        collator = make_collator(opened, stage.max_length, True, features)
        loading = Loading(data.validation, collator, stage.validation.on_bad_sample, skipped)
        held = Held(loading, stage.validation.every)
    order = order_of(recipe, stage, samples, budgets)
    again = order.drawn is not None or steps * stage.batch_size > len(samples)
    collator = make_collator(opened, stage.max_length, again, features)
    aligned = align_of(stage, data, opened, collator)
    trainer = FoveateTrainer(
        model=opened.model,
        args=arguments,
        train_dataset=Items(len(samples)),
        data_collator=Loading(samples, collator, samples.policy, skipped, lost if plan is None else None),
        order=order,
        stage=StageInfo(
            index=index,
            count=len(recipe.stages),
            name=stage.name,
            steps=steps,
            parts=stage.parts,
            layers=len(anatomy.layers),
            image=plan or ImagePlan.whole(1),
            bf16_copy=stage.precision == "bf16-copy",
            cached=features is not None,
            sources=samples.names,
            align=aligned,
            passes=passes_of(recipe, stage, steps),
        ),
        totals=Totals(),
        log_file=files.RunLog(recipe.output / "log.jsonl"),
        log_steps=recipe.log_steps,
        save_steps=stage.save_steps,
        costs=Costs(config, opened.trained, features is None, aligned is not None, aligned.contrasted if aligned is not None else None),
        rates=stage.rates,
        validation=held,
        stand_in=StandIn(opened.model, opened.processor) if foreign and state.num_processes > 1 else None,
    )
    if (keep := keep_of(stage)) is not None:
        trainer.add_callback(LetGo(keep))
    return trainer


def align_of(stage: Stage, data: StageData, opened: Opened, collator: Collator) -> Align | None:
    """The loss of a stage of kind align; None of other stages."""
    if stage.kind != "align":
        return None
    among = None
    if stage.contrast == "data":
        among = word_pieces([part.samples for part in data.train.parts] + ([] if data.validation is None else [data.validation]), collator)
        log.info("stage %s: the softmax goes over the %d word pieces of its data", stage.name, len(among))
    return Align(opened.model, opened.processor.tokenizer.all_special_ids, among)


def trains_any_budget(stage: Stage) -> bool:
    """Whether a reducer of the stage is a means of training only, and not what the model needs."""
    return any(loss.any_budget for loss in stage.terms)


def finish(recipe: Recipe, index: int, previous: Path | None, opened: Opened, trainer: FoveateTrainer, folder: Path) -> None:
    """Save the stage's model, whole and with LoRA merged into its weights."""
    weights = trainer.trained_weights() if trainer.divided else {}
    if not trainer.is_world_process_zero():
        return
    if trainer.divided:
        opened, kept = open_model(recipe, index, previous), getattr(trainer.model.config, "grown", None)
        assert {name for name, parameter in opened.model.named_parameters() if parameter.requires_grad} <= weights.keys()
        opened.model.load_state_dict(weights, strict=False)
        if is_assembled(opened.model.config):
            opened.model.config.grown = kept
    # What the model was trained with to the end is what it needs; several that take turns teach it to do with any of them, or none.
    ends_with = set(trainer.stage.parts[-1].cycle) if trainer.stage.parts else {NONE}
    if trains_any_budget(recipe.stages[index]):
        ends_with = {NONE}
    write_best(recipe, index, previous, folder)
    target = folder / "model"
    write_model(opened, recipe.stages[index].name, ends_with.pop() if len(ends_with) == 1 else NONE, target)
    (target / "totals.json").write_text(json.dumps(vars(trainer.totals)) + "\n", encoding="utf-8")
    files.mark(target)


def write_best(recipe: Recipe, index: int, previous: Path | None, folder: Path) -> None:
    """The best weights of a stage, if any were kept, as `<output>/best`, a whole model."""
    kept = files.newest_best(folder)
    if kept is None:
        return
    opened, note, target = open_model(recipe, index, previous), best_note(kept), recipe.output / "best"
    opened.model.load_state_dict(load_file(kept / SAFE_WEIGHTS_NAME), strict=False)
    if (keep := keep_of(recipe.stages[index])) is not None:
        opened.model.anneal_growth(keep.left(note["step"]))
    files.remove(target)
    write_model(opened, note["stage"], NONE if trains_any_budget(recipe.stages[index]) else note["reducer"], target)
    write_json(target / BEST_NOTE, note)
    files.mark(target)


def write_model(opened: Opened, stage: str, reducer: str, target: Path) -> None:
    """A stage's model and processor, whole and with LoRA merged into its weights, and the reducer that it needs."""
    model = opened.model
    if opened.tuner is not None:
        model = opened.tuner.merge_and_unload()
    bad = next((name for name, parameter in model.named_parameters() if not parameter.isfinite().all()), None)
    if bad is not None:
        raise FoveateError(f"stage {stage}: after its last step {bad} holds numbers that are not finite. Nothing was saved of it")
    model.requires_grad_(True)
    if is_assembled(model.config):
        model.config.always_run_vision = False
    if opened.use_cache is None:
        vars(model.config).pop("use_cache", None)
    else:
        model.config.use_cache = opened.use_cache
    weights = take_weights(model)
    model.save_pretrained(target)
    save_weights(weights, target, opened.weights)
    opened.processor.save_pretrained(target)
    if reducer != NONE:
        save_reducers(parse(reducer), target)
