"""What a table takes before anything runs: prompts, tokens, FLOPs, and the time that follows from a rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.accounting import image_tokens, predict
from foveate.errors import FoveateError
from foveate.inspect.words import duration, si
from foveate.reducers import parse, visual_tokens
from foveate.reproduce.harness import Measured
from foveate.reproduce.tables import Table

TYPICAL = 100.0
"""TFLOP/s that times are shown for where nothing else is known: declared, not measured."""


@dataclass(frozen=True)
class Cost:
    """Of a row: visual tokens in a decoder layer, mean over the layers, and FLOPs of a prompt with one picture; None, with the reason,
    where they cannot be told."""

    tokens: float | None
    flops: int | None
    reason: str = ""


@dataclass(frozen=True)
class Rate:
    """FLOPs a second, and where the number is from."""

    flops: float
    source: str


def costs(table: Table, config: Any) -> dict[str, Cost]:
    """Of each row, from the configuration alone."""
    found = {}
    for name, row in table.rows.items():
        reducers = parse(row.reduce)
        try:
            counts = visual_tokens(reducers, image_tokens(config), config.get_text_config().num_hidden_layers)
            flops = predict(config, text_tokens=table.text_tokens, reducers=reducers).total_flops
            found[name] = Cost(sum(counts) / len(counts), flops)
        except FoveateError as error:
            found[name] = Cost(None, None, str(error))
    return found


def prompts(table: Table, column: str, limit: int | None, seen: int | None = None) -> int | None:
    """How many questions a column asks; `seen`: as lmms-eval counted them before. None where it is not known."""
    whole = seen if seen is not None else table.columns[column].questions
    return whole if limit is None else min(limit, whole) if whole is not None else limit


def measured_rate(cost: Mapping[str, Cost], cells: Iterable[tuple[str, Measured]], source: str) -> Rate | None:
    """From cells that have run (row, what was measured): the prompts' FLOPs over the seconds of answering. None where either is missing."""
    flops, seconds = 0, 0.0
    for row, cell in cells:
        one = cost[row].flops
        if one is not None and cell.seconds:
            flops, seconds = flops + one * cell.questions, seconds + cell.seconds
    return Rate(flops / seconds, source) if seconds else None


def declared(tflops: float | None) -> Rate:
    if tflops is None:
        return Rate(TYPICAL * 1e12, "declared, not measured: give your machine's by --tflops, or measure it by --probe")
    return Rate(tflops * 1e12, "declared by --tflops")


def lines(
    table: Table, cost: Mapping[str, Cost], todo: Sequence[tuple[str, str]], counts: Mapping[str, int | None], rate: Rate
) -> list[str]:
    """The plan of the cells (row, column) that are to run, as lines of text."""
    head = ("row", "budget", "tokens", "a prompt", "prompts", "in all", "time")
    body, total, unknown = [head], 0.0, False
    for name, row in table.rows.items():
        asked = [counts[column] for at, column in todo if at == name]
        if not asked:
            continue
        one, number = cost[name], sum(count or 0 for count in asked)
        unknown |= None in asked or one.flops is None
        flops = (one.flops or 0) * number
        total += flops
        tokens = "–" if one.tokens is None else f"{one.tokens:g}"
        each, whole = ("–", "–") if one.flops is None else (si(one.flops), si(flops))
        spent = "–" if one.flops is None else duration(flops / rate.flops)
        body.append((name, row.budget, tokens, each, f"{number:,}{'+' if None in asked else ''}", whole, spent))
    if len(body) > 2:
        body.append(("", "", "", "", "", si(total), duration(total / rate.flops)))
    widths = [max(len(line[at]) for line in body) for at in range(len(head))]
    out = [
        "  ".join(word.ljust(width) if at < 2 else word.rjust(width) for at, (word, width) in enumerate(zip(line, widths, strict=True)))
        for line in body
    ]
    reasons = dict.fromkeys(one.reason for one in cost.values() if one.reason)
    about = [f"tokens: visual ones in a decoder layer, mean over the layers; a prompt has {table.text_tokens} text tokens"]
    about[0] += f" ({table.text_from})" if table.text_from else ""
    about += [f"time: at {rate.flops / 1e12:.4g} TFLOP/s ({rate.source}), the prompts alone; decoding, pictures and loading come on top"]
    from_memory = {name for name, column in table.columns.items() if "M" in column.counted} & {column for _, column in todo}
    about += [f"numbers of questions from memory [M]: {', '.join(sorted(from_memory))}"] if from_memory else []
    about += ["what is not known counts as nothing"] if unknown else []
    return [line.rstrip() for line in out] + about + [f"no cost: {reason}" for reason in reasons]
