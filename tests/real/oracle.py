"""Answers to questions about real data, told from the records alone and in another way than they were made."""

from __future__ import annotations

import re
from typing import Any

from foveate.real.things import names

GRID = 384 / 4
THIRD = 384 / 3


def answers(question: str, record: dict[str, Any]) -> list[str]:
    """All that is right. AssertionError where the question has no one answer."""
    if record["kind"] == "scene":
        return _scene(question, record)
    return [_chart(question, record) if record["kind"] == "chart" else _page(question, record)]


def _of(record: dict[str, Any], name: str) -> dict[str, Any]:
    (thing,) = [thing for thing in record["things"] if thing["name"] == name]
    return dict(thing)


def _middle(thing: dict[str, Any]) -> tuple[float, float]:
    left, top, right, bottom = thing["box"]
    return (left + right) / 2, (top + bottom) / 2


def _scene(question: str, record: dict[str, Any]) -> list[str]:
    things = record["things"]
    if found := re.fullmatch(r"What is in the (top|bottom) (left|right)\?|What is in the middle\?", question):
        x, y = ({"left": 0, "right": 2}[found[2]], {"top": 0, "bottom": 2}[found[1]]) if found[1] else (1, 1)
        inside = [thing for thing in things if [int(edge // THIRD) for edge in _middle(thing)] == [x, y]]
        (thing,) = inside
        return _names(thing["name"])
    if found := re.fullmatch(r"What is (above|below|left of|right of) the (.+)\?", question):
        return _names(_neighbour(record, found[1], _of(record, found[2])))
    if found := re.fullmatch(r"(?:Is|Are) there (?:an? )?(.+)\?", question):
        return ["yes" if any(thing["name"] == found[1] for thing in things) else "no"]
    if found := re.fullmatch(r"How many (.+) are there\?", question):
        (name,) = [name for name in names().values() if name.number == "one" and name.many == found[1]]
        return [str(sum(thing["name"] == name.name for thing in things))]
    if found := re.fullmatch(r"In a 4x4 grid, where is the (.+)\?", question):
        column, row = (int(edge // GRID) + 1 for edge in _middle(_of(record, found[1])))
        return [f"row {row}, column {column}"]
    if found := re.fullmatch(r"What is the box of the (.+)\?", question):
        return [str([round(edge / 3.84) for edge in _of(record, found[1])["box"]])]
    if question == "What does the label say?":
        (label,) = record["labels"]
        return [label["text"]]
    found = re.fullmatch(r"What does the label under the (.+) say\?", question)
    assert found, question
    thing = _of(record, found[1])
    (label,) = [label for label in record["labels"] if 0 <= label["box"][1] - thing["box"][3] < 10 and _overlap(label, thing, 0) > 0]
    return [label["text"]]


def _names(name: str) -> list[str]:
    return list(names()[name].said)


def _overlap(one: dict[str, Any], other: dict[str, Any], axis: int) -> int:
    return min(one["box"][axis + 2], other["box"][axis + 2]) - max(one["box"][axis], other["box"][axis])


def _neighbour(record: dict[str, Any], side: str, thing: dict[str, Any]) -> str:
    """The one that a line from anywhere on that side of the thing meets first, whatever line."""
    axis, sign = {"above": (1, -1), "below": (1, 1), "left of": (0, -1), "right of": (0, 1)}[side]
    met: dict[str, int] = {}
    for line in range(thing["box"][1 - axis], thing["box"][3 - axis]):
        hits = []
        for other in record["things"]:
            if other["box"][1 - axis] <= line < other["box"][3 - axis] and sign * (_middle(other)[axis] - _middle(thing)[axis]) > 0:
                edge = other["box"][axis] - thing["box"][axis + 2] if sign > 0 else thing["box"][axis] - other["box"][axis + 2]
                hits.append((edge, other["name"]))
        if hits:
            met[min(hits)[1]] = min(met.get(min(hits)[1], 999), min(hits)[0])
    return min(met, key=lambda name: met[name])


def _page(question: str, record: dict[str, Any]) -> str:
    rows = record["rows"]
    if question == "What is the name of the shop?":
        return str(record["title"])
    if found := re.fullmatch(r"How many (.+) were bought\?", question):
        (row,) = [row for row in rows if row[0] in names() and names()[row[0]].many == found[1]]
        return str(row[1])
    if found := re.fullmatch(r"What is the amount for (.+)\?", question):
        (row,) = [row for row in rows if row[0] == found[1]]
        return str(row[2])
    if found := re.fullmatch(r"What is (.+) for (.+)\?", question):
        (row,) = [row for row in rows if row[0] == found[2]]
        return str(row[rows[0].index(found[1])])
    found = re.fullmatch(r"What is the (.+)\?", question)
    assert found, question
    if record["kind"] == "receipt" and found[1] in ("date", "time"):
        (row,) = [row for row in rows if re.fullmatch(r"\d+:\d\d", row[2])]
        return str(row[0] if found[1] == "date" else row[2])
    (row,) = [row for row in rows if row[0].rstrip(":").lower() == found[1].lower()]
    return str(row[-1])


def _chart(question: str, record: dict[str, Any]) -> str:
    bars = {bar["label"]: bar["value"] for bar in record["bars"]}
    assert len(bars) == len(record["bars"])
    if found := re.fullmatch(r"What is the value of (.+)\?", question):
        return str(bars[found[1]])
    best = (max if question == "Which bar is highest?" else min)(bars.values())
    (label,) = [label for label, value in bars.items() if value == best]
    return str(label)
