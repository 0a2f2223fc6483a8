"""The page of the committed outcomes, docs/conformance.md."""

from __future__ import annotations

from collections import Counter
from typing import Any

from foveate.errors import Reason
from foveate.reducers import METHODS
from tests.conformance.checks import CHECKS, MERGES, RECURS, TOWER
from tests.conformance.expected import REASONS, words

LETTERS = {str(reason): letter for letter, reason in zip("abcdefghijklnopq", Reason, strict=False)} | {MERGES: "m", RECURS: "r", TOWER: "t"}

TEXT = """# Conformance

Every reducer on every architecture, on tiny random checkpoints that are saved and loaded with the model's real processor. Written by
`make conformance` (torch {torch}, transformers {transformers}): {families} architectures and variants, {methods} reducers, {cells} cells of
{checks} checks; {passed} checks passed, {failed} failed, {na} do not apply, {bare} fail on the bare model already.

The checks: **1** keep-all: logits, loss, gradients and 8 generated tokens are the bare model's bit for bit, nothing stays on the model.
**2** batch: three prompts (one image, two images, none), padded on either side, are the three alone. **3** decoding: greedy steps with
the cache are the whole sequence run again with the same maps. **4** masking: dropping tokens is masking them out of the bare model.
**5** ledger: the tokens counted are those that the layers saw, and those predicted. **6** training: the loss is that of the caller's
labels, another answer changes no map, gradient checkpointing changes nothing.

✓ all six; where the tower's block attends within windows, scores are of the last one (`layer=-1`). A letter beside it: a check that does
not apply; a digit: a check that the bare model fails already. – the method cannot act on this model, for the reason given by the letter.
`pixelprune` acts inside the vision tower, and its line says which towers can be cut ([tower.md](tower.md)).
`downsample` acts on the image, before the processor, and has no cells. Those of `giraffe` are of its frames; its stretched positions are
tested beside them, on all architectures whose tokens have a time, a row and a column.

The outcomes are committed (`tests/conformance/expected.json`) and every run is compared with them: what serves has to go on serving, and
what refuses to refuse for its reason. Beside the cells, attention as methods see it is compared with each model's own eager attention,
and the predicted cost of every method's scores with what a counter sees.

{table}

{key}

## What does not apply, and how often

| reason | cells |
|---|---|
{reasons}

## Architectures that a reducer serves

| reducer | architectures | of |
|---|---|---|
{served}

## Checks that the bare model fails

{failing}
"""


def render(data: dict[str, Any]) -> str:
    """The page of what is committed."""
    families = sorted(data["cells"])
    methods = [method for method in METHODS if any(method in data["cells"][family] for family in families)]
    rows, served, reasons, counted = [], Counter[str](), Counter[str](), Counter[str]()
    for family in families:
        row = [family]
        for method in methods:
            if method not in data["cells"][family]:  # no run has come to it
                row.append("")
                continue
            found = words(data["cells"][family][method])
            row.append(_cell(found))
            served[method] += row[-1].startswith("✓")
            reasons.update({REASONS[word] for word in found.values() if word in REASONS})
            counted.update("na" if word in REASONS else word for word in found.values())
        rows.append("| " + " | ".join(row) + " |")
    head = "| | " + " | ".join(methods) + " |\n|---|" + "---|" * len(methods)
    bare = [(family, check, what) for family, checks in data["bare"].items() for check, what in checks.items()]
    return TEXT.format(
        **data["versions"],
        families=len(families),
        methods=len(methods),
        cells=sum(len(data["cells"][family]) for family in families),
        checks=len(CHECKS),
        passed=counted["ok"],
        failed=counted["failed"],
        na=counted["na"],
        bare=counted["bare"],
        table="\n".join([head, *rows]),
        key="; ".join(f"**{letter}** {reason}" for reason, letter in LETTERS.items()) + ".",
        reasons="\n".join(f"| {reason} | {count} |" for reason, count in reasons.most_common()),
        served="\n".join(
            f"| {_marked(method)} | {served[method]} | {sum(method in data['cells'][family] for family in families)} |"
            for method in methods
        ),
        failing="\n".join(f"- {family}, {check}: {what}" for family, check, what in sorted(bare)) or "None.",
    )


def _marked(method: str) -> str:
    return f"{method} (experimental)" if METHODS[method].experimental else method


def _cell(found: dict[str, str]) -> str:
    if "failed" in found.values():
        return "✗ " + " ".join(check for check, word in found.items() if word == "failed")
    letters = "".join(sorted({LETTERS[REASONS[word]] for word in found.values() if word in REASONS}))
    digits = "".join(str(i + 1) for i, word in enumerate(found.values()) if word == "bare")
    cannot = set(letters) - {LETTERS[MERGES], LETTERS[RECURS], LETTERS[TOWER]}
    return ("–" if cannot or "ok" not in found.values() else "✓") + letters + digits
