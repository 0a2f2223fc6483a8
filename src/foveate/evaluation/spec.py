"""The option language of tasks: `PATH[:option=value,...]`. A comma begins an option only where a name and "=" follow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields

from foveate.data.clips import parse
from foveate.data.conversations import IMAGES
from foveate.data.footage import CLIPS, FRAMES
from foveate.errors import FoveateError, nearest
from foveate.evaluation.metrics import METRICS, find, make
from foveate.evaluation.samples import Metric

ALL = {"name", "limit", "suffix", "max_new_tokens"}
COLUMNS: dict[str, tuple[str, ...]] = {
    "question": ("question",),
    "hint": (),
    "answer": ("answers", "answer"),
    "image": IMAGES,
    "video": CLIPS,
    "id": ("id", "question_id", "index"),
    "group": ("category",),
}
"""The options that name columns, with the columns that are looked for where none is named."""


def read_spec(spec: str) -> tuple[str, dict[str, str]]:
    where, *rest = re.split(r":(?=[a-z_]+=)", spec.strip(), maxsplit=1)
    given: dict[str, str] = {}
    for item in re.split(r",(?=\s*[a-z_]+=)", rest[0]) if rest else []:
        key, _, value = (part.strip() for part in item.partition("="))
        if key in given or not value:
            raise FoveateError(f"task {spec!r}: {key}= is {'there twice' if key in given else 'without a value'}")
        given[key] = value
    if not where:
        raise FoveateError(f"task {spec!r} names no data; a task is PATH[:option=value,...]")
    return where, given


def check_options(spec: str, given: Mapping[str, str], known: set[str]) -> None:
    for name in given:
        if name not in known:
            raise FoveateError(f"task {spec!r} has no option {name!r}{nearest(name, known)}; its options are {', '.join(sorted(known))}")


def whole(given: Mapping[str, str], name: str, least: int, default: int) -> int:
    if name not in given:
        return default
    if not given[name].isdecimal() or int(given[name]) < least:
        raise FoveateError(f"{name}={given[name]}: must be a whole number, at least {least}")
    return int(given[name])


def limit_of(given: Mapping[str, str]) -> int | None:
    return whole(given, "limit", 1, 0) or None


def frames_of(given: Mapping[str, str]) -> str:
    """The sampling of clips, whose options may stand between colons, since commas end an option: frames=rate:fps=2:most=16."""
    name, colon, options = given.get("frames", FRAMES).partition(":")
    return str(parse(name + colon + re.sub(r":(?=\w+=)", ",", options)))


def metric_of(spec: str, given: Mapping[str, str]) -> Metric:
    if "metric" not in given:
        raise FoveateError(f"task {spec!r}: say how answers are scored, with metric= one of {', '.join(METRICS)}")
    kind = find(given["metric"])
    own = {option.name for option in fields(kind)}
    known = ALL | set(COLUMNS) | {"metric", "images", "frames", "split", "config"} | own
    check_options(spec, given, known | {"options"} if kind.multiple_choice else known)
    return make(kind.name, {name: value for name, value in given.items() if name in own})
