"""`foveate real train`: a recipe on real parts, from nothing to a model that answers to its name.

What the recipe names is prepared, its data are made where they are not there, it is trained or gone on with, and the finished model is laid
into the cache, where `real:NAME` opens it. The folder of the run is not needed any more then.

Several processes (torchrun, accelerate launch) train together; the main one alone prepares and keeps.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from foveate.errors import FoveateError
from foveate.files import write
from foveate.machine import environment
from foveate.processes import processes
from foveate.real import MODELS, PREFIX, TRAINED, lay
from foveate.real.packages import PACKAGES
from foveate.real.prepare import prepare
from foveate.real.stock import FONTS, FREE, STYLES, open_stock
from foveate.real.write import write_real
from foveate.train import files
from foveate.train.recipe import load_recipe
from foveate.train.run import TIMEOUT
from foveate.train.run import main as train
from foveate.train.settings import Recipe

READER = "rapidocr"  # the package that judges whether a page is legible
LEFT = (files.MARK, "totals.json")  # what a run notes beside its model

CARD = """# {name}

{holds}. Trained by `{command}` of Foveate, on parts and pictures that packages of others carry:

{parts}

The pictures' licences are in licences.txt. What it can do and what it cannot stands in docs/real-parts.md.

    {environment}
"""


def main(path: Path, overrides: Sequence[str], styles: Sequence[str] = FREE) -> tuple[Path, str]:
    """What the command does. Returns the folder of the finished model, and in words under which name it is, if under any.

    FoveateError for what cannot be had, and for a recipe whose data are not where `foveate data real` would write them."""
    recipe = load_recipe(path, overrides)
    if unknown := parts(recipe) - MODELS.keys() - TRAINED.keys():
        raise FoveateError(f"{path}: no real part is called {', '.join(sorted(unknown))}; there are {', '.join((*MODELS, *TRAINED))}")
    state = processes(TIMEOUT)
    with state.main_process_first():  # the others find it done
        prepare(sorted(parts(recipe) & MODELS.keys()))
        make_data(data_folder(recipe), styles)
    final = train(path, overrides)
    if recipe.name not in TRAINED:
        return final, f"it has no name: {', '.join(PREFIX + name for name in TRAINED)} are kept for recipes that are called so"
    if changes := changed(recipe, load_recipe(path)):
        return final, f"it is not kept as {PREFIX}{recipe.name}, for it was trained otherwise than {path} says: {'; '.join(changes)}"
    if state.is_main_process:
        lay(recipe.name, partial(fill, recipe, final, data_folder(recipe)))
    return final, f"kept as {PREFIX}{recipe.name}"


def parts(recipe: Recipe) -> set[str]:
    """Names of real parts of the model, without the prefix."""
    model = recipe.model
    named = [model.text, model.checkpoint, *(model.vision if isinstance(model.vision, list) else [model.vision])]
    return {name.removeprefix(PREFIX) for name in named if name is not None and name.startswith(PREFIX)}


def data_folder(recipe: Recipe) -> Path:
    """The one folder that all stages read their files from."""
    found = {source.conversations.parent for stage in recipe.stages for source in stage.sources if source.conversations is not None}
    if len(found) != 1:
        told = ", ".join(sorted(map(str, found))) or "none"
        raise FoveateError(f"the recipe's data lie in one folder, which `foveate data real` can write; this one's are in {told}")
    return found.pop()


def make_data(folder: Path, styles: Sequence[str]) -> None:
    """Questions about real pictures, by the defaults of `foveate data real`, unless there are some already."""
    if (folder / "real.json").is_file():
        return
    prepare([*(STYLES[style] for style in styles if style in STYLES), *FONTS, "faker", READER])
    write_real(folder, open_stock(styles))


def changed(recipe: Recipe, written: Recipe) -> list[str]:
    """What makes another model of a recipe than what is written in its file."""
    now, before = (json.loads(one.model_dump_json()) for one in (recipe, written))
    return files.differences(before, now)


def fill(recipe: Recipe, final: Path, data: Path, folder: Path) -> None:
    """What `real:NAME` opens: the finished model, the recipe that it was trained by, and what it is made of."""
    for file in final.iterdir():
        if file.is_file() and file.name not in LEFT:
            shutil.copyfile(file, folder / file.name)
    shutil.copyfile(data / "licences.txt", folder / "licences.txt")
    write(folder / "recipe.json", recipe.model_dump_json(indent=1) + "\n")
    packages = [PACKAGES[MODELS[name].package] for name in sorted(parts(recipe) & MODELS.keys())]
    listed = "\n".join(f"- {package}: {package.holds}. {package.licence}" for package in dict.fromkeys(packages))
    own = TRAINED[recipe.name]
    card = CARD.format(name=PREFIX + recipe.name, holds=own.holds, command=own.command, parts=listed, environment=environment())
    write(folder / "README.md", card)


def tell(path: Path, overrides: Sequence[str], styles: Sequence[str]) -> None:
    """Run the command, and say where the model is."""
    final, said = main(path, overrides, styles)
    if processes().is_main_process:
        Console(file=sys.stdout).print(f"trained model: {final}\n{said}", soft_wrap=True, markup=False, highlight=False)
