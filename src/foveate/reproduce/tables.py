"""Published tables as data: what a paper prints, of which model, on which benchmarks, and how near a repetition has to come.

A table is one YAML file; `tables/shared.yaml` holds the models and benchmarks that several of them name. Fields are those of the classes
below. A number that the project's sources do not have is not in the file; what they have second-hand, from memory or not at all is marked
where it stands (`evidence`, `note`), and printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from foveate.errors import FoveateError, nearest
from foveate.reducers import parse

FOLDER = Path(__file__).parent / "tables"
SHARED = "shared"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Strict):
    """A checkpoint: hub name, folder or "asset:" name; the revision of a hub model; its configuration, for plans without a download."""

    name: str
    revision: str | None = None
    config: dict[str, Any] | None = None
    note: str = ""


class Column(_Strict):
    """A benchmark, as lmms-eval asks it.

    metric     keys of its results, which are added up; times `scale` they are in the paper's unit, as `tolerance` is
    questions  how many there are, and where that is from; what lmms-eval counts goes before it
    data       the data set on the hub that lmms-eval loads
    base       its task's YAML file, below lmms-eval's tasks or the table's own; with `changes` it becomes the task `task`
    judged     whether a difference is held against the tolerance; where the paper's protocol is not known it is only shown, as `note` says
    """

    task: str
    metric: list[str]
    scale: Positive = 1.0
    tolerance: Positive
    why: str
    questions: Annotated[int, Field(ge=1)] | None = None
    counted: str = ""
    data: str = ""
    base: str | None = None
    changes: dict[str, Any] = {}
    judged: bool = True
    note: str = ""


class Row(_Strict):
    """A method at a budget.

    budget    how many tokens the paper says; `tokens`: visual tokens in a decoder layer, mean over the layers, as Foveate counts them
    paper     the paper's numbers by column; evidence: where the project has them from, by the tags of `docs/reproduce.md`
    average   what the paper prints as its mean share of the full model, in %, over benchmarks that are not all asked here: never judged
    """

    reduce: str
    budget: str
    tokens: Positive
    evidence: str
    paper: dict[str, Finite] = {}
    average: Finite | None = None
    judged: bool = True
    note: str = ""


class Average(_Strict):
    """The mean over the columns of a row's share of the row `full`, in %."""

    full: str
    tolerance: Positive = 2.0
    why: str = ""
    judged: bool = True


class Table(_Strict):
    """A published table. `where`: its place in the paper. `left_out`: columns and rows of the paper that are not here, with the reason.

    text_tokens  of a prompt, for plans; text_from: where the number is from
    tasks        a folder of lmms-eval tasks beside the file
    """

    name: str
    title: str
    paper: str
    where: str
    model: Model
    dtype: str = "auto"
    text_tokens: Annotated[int, Field(ge=0)] = 0
    text_from: str = ""
    columns: Annotated[dict[str, Column], Field(min_length=1)]
    rows: Annotated[dict[str, Row], Field(min_length=1)]
    average: Average | None = None
    left_out: dict[str, str] = {}
    notes: list[str] = []
    tasks: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name, row in self.rows.items():
            for column in row.paper:
                if column not in self.columns:
                    raise ValueError(f"rows.{name}.paper: there is no column {column!r}{nearest(column, self.columns)}")
            try:
                parse(row.reduce)
            except FoveateError as error:
                raise ValueError(f"rows.{name}.reduce: {error}") from None
        if self.average is not None and self.average.full not in self.rows:
            raise ValueError(f"average.full: there is no row {self.average.full!r}{nearest(self.average.full, self.rows)}")
        for name, asked in self.columns.items():
            if asked.changes and asked.base is None:
                raise ValueError(f"columns.{name}.changes: name the task that is changed by base, the YAML file of it")
        return self

    @property
    def numbers(self) -> int:
        """How many numbers of the paper are judged."""
        judged = {name for name, column in self.columns.items() if column.judged}
        return sum(len(judged & row.paper.keys()) for row in self.rows.values() if row.judged)


def names() -> list[str]:
    """The shipped tables."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != SHARED)


def load_table(name: str) -> Table:
    """A shipped table by name, or one of your own by the path of its YAML file. FoveateError for what is not there or not a table."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if name not in names():
            raise FoveateError(
                f"there is no table {name!r}{nearest(name, names())}; there are {', '.join(names())}, or the path of a YAML file of "
                "your own"
            )
        path = FOLDER / f"{name}.yaml"
    raw, shared = _read(path), _read(FOLDER / f"{SHARED}.yaml")
    if isinstance(raw.get("model"), str):
        raw["model"] = _named(raw["model"], shared["models"], f"{path}: model")
    if isinstance(columns := raw.get("columns"), dict):
        raw["columns"] = {name: _column(column, shared["benchmarks"], f"{path}: columns.{name}") for name, column in columns.items()}
    if raw.get("tasks") is not None:
        raw["tasks"] = str((path.parent / str(raw["tasks"])).resolve())
    try:
        return Table.model_validate({**raw, "name": path.stem})
    except ValidationError as error:
        lines = (
            f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}".removeprefix(": ") for one in error.errors()
        )
        raise FoveateError("\n".join(f"{path}: {line}" for line in lines)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FoveateError(f"table {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except (YAMLError, ValueError) as error:
        raise FoveateError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise FoveateError(f"{path}: a table is a mapping with the keys {', '.join(Table.model_fields)}")
    return found


def _named(name: str, known: dict[str, Any], where: str) -> Any:
    if name not in known:
        raise FoveateError(f"{where}: {name!r} is not among the shared ones{nearest(name, known)}; there are {', '.join(known)}")
    return known[name]


def _column(column: Any, known: dict[str, Any], where: str) -> Any:
    """A column by the name of a shared benchmark, or one `like` it, or its fields."""
    if isinstance(column, str):
        return _named(column, known, where)
    if isinstance(column, dict) and "like" in column:
        return {**_named(str(column["like"]), known, where), **{key: value for key, value in column.items() if key != "like"}}
    return column
