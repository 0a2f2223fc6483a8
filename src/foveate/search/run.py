"""`foveate search`: the schedule of visual tokens over a model's decoder layers that answers calibration questions best.

    OUT/search.json    what was asked
    OUT/trials.jsonl   every schedule that was tried, with its score: a line each, as soon as it is known
    OUT/foveate.json   the schedule that was found, as `load_reducers(OUT)` reads it

The same command goes on where a stopped search was: it takes the same way again, and what is in the file is not asked a second time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from foveate.accounting.predict import observed
from foveate.engine.keeping import Kept, keeping
from foveate.errors import FoveateError
from foveate.evaluation.asking import KEPT_BYTES, Asked, answered, limited
from foveate.evaluation.cells import Cell
from foveate.evaluation.samples import Task
from foveate.evaluation.tasks import load_task
from foveate.files import write_json
from foveate.inference import answering, loaded, model_hash, progress_bar, resized
from foveate.reducers import Reducer, save_reducers, spell
from foveate.reducers.base import SAVED_NAME
from foveate.reducers.common import meant
from foveate.reducers.schedule import Schedule
from foveate.search.costs import Counts, Prompt, flops_share, tokens_share
from foveate.search.gsearch import ROUNDS, gsearch, most_trials, within
from foveate.search.psigmoid import load_optuna, psigmoid

SEARCH, TRIALS = "search.json", "trials.jsonl"
METHODS = ("gsearch", "psigmoid")


@dataclass(frozen=True)
class Found:
    """A finished search.

    reducer        the schedule, written to OUT/foveate.json
    counts         visual tokens of an image in each decoder layer, for an image of the calibration questions' mean number
    score, bare    of the schedule and of the bare model: the task's headline figure, of several tasks the mean
    tokens, flops  share of the visual tokens, mean over layers, and of the FLOPs of the decoder layers; None where these are not known
    prompt         the calibration questions' mean prompt, for which costs are counted
    questions      that each schedule was asked; `trials`: schedules that were tried
    """

    reducer: Schedule
    counts: Counts
    score: float
    bare: float
    tokens: float
    flops: float | None
    prompt: Prompt
    questions: int
    trials: int


def search(
    model: Any,
    tasks: Sequence[str | Task],
    out: str | Path,
    *,
    processor: Any = None,
    tokens: float | None = None,
    flops: float | None = None,
    loss: float | None = None,
    method: str | None = None,
    signal: str = "attention",
    positions: str = "keep",
    trials: int = 40,
    samples: int | None = 300,
    seed: int = 0,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    image_size: int | None = None,
    progress: bool = True,
) -> Found:
    """Finds a schedule, and leaves it in `out`.

    model: a folder, hub name or "asset:" name (loaded in float32, or another `dtype`), or a loaded model together with its `processor`.
    tasks: what `load_task` reads, or Tasks; of each about `samples` questions are asked.
    One of three: `tokens`, the budget as a share of the visual tokens, mean over layers; `flops`, as a share of the decoder layers' FLOPs
    in the prefill; `loss`, points of the score that may be lost, while tokens are to be as few as possible.
    method: "psigmoid", for a budget the default, with so many `trials`; or "gsearch", which takes any of the three.
    signal, positions: what the schedule ranks by, and what becomes of positions, see `Schedule`. image_size: of all images, see `resized`.
    FoveateError for bad input, and for a folder with another search. What was tried stays.
    """
    method, limit = _aim(method, tokens, flops, loss)
    if method == "psigmoid":
        load_optuna()
    Schedule(keeps="1:0.5", signal=signal, positions=positions)  # refuses what is not possible before anything is loaded
    if min(trials, batch_size) < 1:
        raise FoveateError(f"trials={trials} and batch_size={batch_size} must be at least 1")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise FoveateError(f"{folder} is a file; name a folder for the search")
    asked = [limited(load_task(task, progress) if isinstance(task, str) else task, samples) for task in tasks]
    if not asked:
        raise FoveateError("a search needs at least one task to ask its questions")
    given, (model, processor, _) = model, loaded(model, processor, "search(model, …, processor=...)", device, dtype)
    processor = resized(processor, image_size)
    settings = {"method": method, "tokens": tokens, "flops": flops, "loss": loss, "signal": signal, "positions": positions, "seed": seed}
    data = [{"name": task.name, "samples": len(task.samples), "data_hash": task.hash} for task in asked]
    settings |= {"dtype": str(model.dtype).removeprefix("torch."), "image_size": image_size}
    _begin(folder, {"model_hash": model_hash(given), "tasks": data, **settings})
    with answering(model), keeping(model, Kept(KEPT_BYTES)), progress_bar(progress) as bar:
        trial = _Trials(model, processor, asked, batch_size, folder / TRIALS, bar)
        bare = trial([])
        prompt = Prompt(**bare["prompt"])
        shape = prompt.per_image, prompt.layers, 1 if signal == "attention" else 0
        cost = tokens_share(prompt) if flops is None else flops_share(model.config, prompt)
        most = trials if method == "psigmoid" else most_trials(*shape) * (ROUNDS if loss is None else 1)
        bar.update(trial.row, total=trial.questions * (1 + most))

        def scheduled(counts: Counts) -> list[Schedule]:
            return [Schedule.of_counts(counts, prompt.per_image, signal=signal, positions=positions)]

        def score(counts: Counts) -> float:
            return float(trial(scheduled(counts) if min(counts) < prompt.per_image else [])["score"])

        if method == "psigmoid":
            counts = psigmoid(score, cost, limit, *shape, trials=trials, seed=seed)
        elif loss is None:
            counts = within(score, bare["score"], cost, limit, *shape)
        else:
            counts = gsearch(lambda counts: score(counts) >= bare["score"] - loss, *shape)
        best = score(counts)
        bar.update(trial.row, completed=trial.questions * (1 + most))
    (reducer,) = scheduled(counts)
    save_reducers([reducer], folder)
    try:
        spent: float | None = float(flops_share(model.config, prompt)(counts))
    except FoveateError:
        spent = None
    spared = float(tokens_share(prompt)(counts))
    return Found(reducer, counts, best, bare["score"], spared, spent, prompt, trial.questions, len(trial.known) - 1)


def main(model: str, tasks: Sequence[str], out: Path, **options: Any) -> str:
    """The command: searches, and says what was found."""
    found = search(model, tasks, out, **options)
    flops = "" if found.flops is None else f" and {found.flops:.3g} of the decoder layers' FLOPs in the prefill"
    return (
        f"{found.reducer}\n"
        f"score {found.score:.2f} (bare model {found.bare:.2f}) on {found.questions} questions, {found.trials} schedules tried\n"
        f"{found.tokens:.3g} of the visual tokens, mean over layers{flops}\n"
        f"written to {out / SAVED_NAME}; foveate.reducers.load_reducers(Path({str(out)!r})) reads it"
    )


def _aim(method: str | None, tokens: float | None, flops: float | None, loss: float | None) -> tuple[str, Fraction]:
    """The way of searching, and the share that may be spent; FoveateError where what the search is to reach is not said, or cannot be."""
    budgets = {name: value for name, value in (("tokens", tokens), ("flops", flops)) if value is not None}
    if len(budgets) + (loss is not None) != 1:
        raise FoveateError(
            "a search needs one aim: tokens or flops, a share that may be spent, or loss, points of the score that may be lost"
        )
    for name, value in budgets.items():
        if not 0 < value < 1:
            raise FoveateError(f"{name}={value:g} is not possible; give a share between 0 and 1")
    if loss is not None and not loss >= 0:
        raise FoveateError(f"loss={loss:g} is not possible; give points >= 0")
    method = method or ("psigmoid" if budgets else "gsearch")
    if method not in METHODS:
        raise FoveateError(f"method={method!r} is not possible; choose {' or '.join(METHODS)}")
    if method == "psigmoid" and not budgets:
        raise FoveateError("psigmoid spends a budget: give tokens or flops in place of loss, or choose gsearch")
    return method, meant(next(iter(budgets.values()), 1.0))


def _begin(folder: Path, meta: dict[str, Any]) -> None:
    """Writes search.json; FoveateError where the folder holds another search."""
    path = folder / SEARCH
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            before.setdefault("dtype", "float32")  # searches of before there was a choice
            differs = [f"{name} (there {before.get(name)}, now {value})" for name, value in meta.items() if before.get(name) != value]
        except (ValueError, AttributeError) as error:
            raise FoveateError(f"{path} cannot be read: {error}; remove the folder, or choose another one") from error
        if differs:
            raise FoveateError(f"{folder} holds a search with another {'; another '.join(differs)}. Choose another folder")
    write_json(path, meta)


class _Trials:
    """What a model scores under reducers. Each is asked once, and what was said stays in a file over kills; half a line counts as none."""

    def __init__(self, model: Any, processor: Any, tasks: Sequence[Task], batch_size: int, path: Path, bar: Any) -> None:
        self.model, self.processor, self.path, self.bar = model, processor, path, bar
        self.asked = [Asked.of(processor, task, batch_size) for task in tasks]
        self.questions = sum(len(task.samples) for task in tasks)
        self.images = sum(len(put.images) + len(put.clips) for asked in self.asked for put in asked.puts)
        self.row = bar.add_task("", total=self.questions)
        self.known: dict[str, dict[str, Any]] = {}
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        try:
            self.known = {trial["reducer"]: trial for trial in map(json.loads, whole.splitlines())}
        except (ValueError, KeyError, TypeError) as error:
            raise FoveateError(f"{path} cannot be read: {error}; remove it, and the same command begins anew") from error

    def __call__(self, reducers: Sequence[Reducer]) -> dict[str, Any]:
        """score: mean of the tasks' headline figures; of the bare model also `prompt`, see `Prompt`."""
        name = spell(reducers)
        self.bar.update(self.row, description=f"schedule {len(self.known)}" if reducers else "bare model")
        if name in self.known:
            self.bar.advance(self.row, self.questions)
            return self.known[name]
        cells = []
        for asked in self.asked:
            empty = Cell(asked.task.name, name, 1.0, None, name)
            found = answered(self.model, self.processor, asked, reducers, partial(self.bar.advance, self.row))
            cells.append(found.cell(asked, empty))
        trial: dict[str, Any] = {"reducer": name, "score": fmean(cell.accuracy for cell in cells)}
        if not reducers:
            trial["prompt"] = asdict(_prompt(self.model, cells, self.images))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(trial) + "\n")
        self.known[name] = trial
        return trial


def _prompt(model: Any, cells: Sequence[Cell], images: int) -> Prompt:
    """The mean prompt of what the bare model was asked."""
    n = sum(len(cell.answers) for cell in cells)
    visual = sum(cell.visual_tokens[0] * len(cell.answers) for cell in cells) / n
    if not visual:
        raise FoveateError("none of the questions has an image, so there are no visual tokens to schedule")
    layers = len(cells[0].visual_tokens)
    text = None
    if all(cell.kv_bytes for cell in cells):
        one = observed(model.config, [0] * layers, [1] * layers, images=0, dtype_bytes=model.dtype.itemsize).kv_bytes
        text = round(sum(cell.kv_bytes * len(cell.answers) for cell in cells) / n / sum(one) - visual)
    return Prompt(layers, max(1, round(visual * n / images)), max(1, round(images / n)), text)
