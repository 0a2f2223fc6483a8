"""The results of run.py as a table and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.show import BARE, MIB, drawn, people, spread

from foveate.reducers import parse

GOAL = {1: 1.0, 8: 1.0, 32: 1.5}  # least requests/s over the bare model's, by clients, at this budget:
GOAL_KEEP = 0.25
OTHERS = 0.05  # share of the machine that others may take of a measurement


def of(report: dict[str, Any], clients: int, variant: str) -> list[dict[str, Any]]:
    """Of the rounds in which this and the bare model are measured."""
    cells = {(cell["round"], cell["variant"]): cell for cell in report["cells"] if cell["clients"] == clients}
    rounds = sorted({number for number, name in cells if name == variant} & {number for number, name in cells if name == BARE})
    return [cells[number, variant] for number in rounds]


def over(report: dict[str, Any], clients: int, variant: str, name: str) -> list[float]:
    """A number of the variant over the bare model's, within each round."""
    bare = {cell["round"]: cell for cell in of(report, clients, BARE)}
    return [cell[name] / bare[cell["round"]][name] for cell in of(report, clients, variant)]


def missed(report: dict[str, Any]) -> list[str]:
    """Where the goals at `GOAL_KEEP` are missed, by the median of the rounds, with what tells why."""
    found = []
    for variant in report["variants"]:
        if variant == BARE or parse(variant)[0] != parse(variant)[0].at(GOAL_KEEP):
            continue
        for clients, goal in GOAL.items():
            if not of(report, clients, variant):
                continue
            rate = statistics.median(over(report, clients, variant, "rate"))
            first = statistics.median(over(report, clients, variant, "ttft_p95"))
            if rate < goal or first >= 1:
                found.append(
                    f"`{variant}` at {people(str(clients))}: {rate:.2f} times the bare model's requests/s (goal {goal:g}), "
                    f"{first:.2f} times its TTFT p95; {_why(report, clients, variant)}"
                )
    return found


def _why(report: dict[str, Any], clients: int, variant: str) -> str:
    cpu = statistics.median(a["cpu"] / b["cpu"] for a, b in zip(of(report, clients, variant), of(report, clients, BARE), strict=True))
    allowed = f"its FLOPs would allow {report['flops'][BARE] / report['flops'][variant]:.2f}, " if report["flops"] else ""
    failed = sum(cell["failed"] for cell in of(report, clients, variant))
    busy = max(cell["others"] for cell in of(report, clients, variant) + of(report, clients, BARE))
    told = f"{allowed}a request takes {cpu:.2f} of the bare model's CPU seconds"
    told += f", {failed} requests failed" if failed else ""
    return told + (f", others took {busy:.0%} of the machine" if busy > OTHERS else "")


def table(report: dict[str, Any]) -> str:
    cells = report["cells"]
    rounds = len({cell["round"] for cell in cells})
    slower = missed(report)
    lines = [f"`{report['command']}`", "", f"{report['machine']}. {report['what']}; float32, random weights."]
    if cells:
        goals = ", ".join(f"{goal:g} at {people(str(clients))}" for clients, goal in GOAL.items())
        lines += [
            "",
            f"Rounds: {rounds}; every number is a median over them, with the smallest and the largest in parentheses if there are several.",
            "",
            f"**Goal, that at keep={GOAL_KEEP:g} requests/s are at least so many times the bare model's: {goals}; and TTFT p95 is lower: "
            + ("missed.**" if slower else "met.**"),
            *(["", *(f"- {case}" for case in slower)] if slower else []),
        ]
    for clients in report["settings"]["clients"]:
        lines += _under(report, clients)
    if cells:
        lines += ["", LEGEND]
        loud = [cell for cell in cells if cell["others"] > OTHERS]
        if loud:
            worst = max(cell["others"] for cell in loud)
            lines += ["", f"**The machine was busy**: in {len(loud)} of {len(cells)} measurements others took up to {worst:.0%} of it."]
        failed = {error for cell in cells for error in cell["errors"]}
        lines += ["", "Requests that failed:", "", *(f"- {error}" for error in sorted(failed))] if failed else []
    lines += _faults(report) + _memory(report)
    return "\n".join(lines) + "\n"


LEGEND = (
    "**Tokens**: of a prompt, as the server counted them, pictures, texts and the template. **FLOPs allow**: the bare model's FLOPs of a "
    "request with one picture over the variant's, predicted, tower included: what requests/s could rise by if nothing else took time. "
    "**TTFT**: from sending a request to its first token. **Inter-token**: between two tokens of an answer. **KV blocks**: the most that "
    "were in use at once, looked at twice a second, of those that there are. **Preempted**: requests that had to give up their KV blocks. "
    "**Cache hits**: share of prompt tokens found in the prefix cache, and of pictures in the processor's; no two pictures are alike. "
    "**CPU s**: of all of the server's processes, a request."
)


def _under(report: dict[str, Any], clients: int) -> list[str]:
    """The table of a number of clients."""
    if not of(report, clients, BARE):
        return []
    count = of(report, clients, BARE)[0]["completed"]
    head = ["variant", "tokens", "requests/s", "over bare", "FLOPs allow", "TTFT p50, s", "TTFT p95, s", "inter-token p50, ms"]
    head += ["inter-token p95, ms", "KV blocks", "preempted", "cache hits", "CPU s"]
    lines = ["", f"{people(str(clients))}, {count} requests a round:", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for variant in report["variants"]:
        own = of(report, clients, variant)
        if not own:
            continue
        flops = report["flops"]
        row = [
            f"*{variant}*" if variant == BARE else f"`{variant}`",
            f"{statistics.median(cell['prompt'] / max(1, cell['completed']) for cell in own):.0f}",
            _told([cell["rate"] for cell in own], 2),
            _told(over(report, clients, variant, "rate"), 2),
            f"{flops[BARE] / flops[variant]:.2f}" if flops else "–",
            *(_told([cell[name] for cell in own], 2) for name in ("ttft_p50", "ttft_p95")),
            *(_told([1000 * cell[name] for cell in own], 0) for name in ("itl_p50", "itl_p95")),
            f"{max(cell['kv_peak'] for cell in own):.0f} of {own[0]['kv_blocks']:.0f}",
            f"{sum(cell['preemptions'] for cell in own):.0f}",
            f"{_share(own, 'prefix')}, {_share(own, 'image')}",
            _told([cell["cpu"] / max(1, cell["completed"]) for cell in own], 2),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _told(values: Sequence[float], digits: int) -> str:
    return spread(list(values), digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


def _share(cells: Sequence[dict[str, Any]], name: str) -> str:
    asked = sum(cell[f"{name}_asked"] for cell in cells)
    return f"{sum(cell[f'{name}_hits'] for cell in cells) / asked:.0%}" if asked else "–"


def _faults(report: dict[str, Any]) -> list[str]:
    rows = [
        f"| {one['name']} | {one['wanted']} | {'yes' if one['good'] else '**no**'}: {one['seen']} |" for one in report.get("faults", [])
    ]
    return ["", "What goes wrong:", "", "| what | wanted | seen |", "|---|---|---|", *rows] if rows else []


def _memory(report: dict[str, Any]) -> list[str]:
    if "soak" not in report:
        return []
    told = report["soak"]
    looks = [(number, size / MIB) for number, size in told["memory"]]
    grown, middle = growth(looks), looks[len(looks) // 2]
    return [
        "",
        f"{told['requests']} small requests in {told['seconds'] / 60:.0f} minutes, {told['failed']} failed. Resident memory of the server: "
        f"{looks[0][1]:.0f} MiB after {looks[0][0]}, {middle[1]:.0f} MiB after {middle[0]}, {looks[-1][1]:.0f} MiB at the end; over the "
        f"second half it grows by {grown:.1f} MiB a thousand requests. The memory of the KV cache (1 GiB) and of the picture cache "
        "(0.1 GB) becomes resident when it is first used, so it grows by these at first.",
    ]


def growth(looks: Sequence[tuple[int, float]]) -> float:
    """Least squares through the second half of (requests, MiB): MiB a thousand requests."""
    half = looks[len(looks) // 2 :]
    if len(half) < 2:
        return 0.0
    slope = statistics.linear_regression([number for number, _ in half], [size for _, size in half]).slope
    return 1000 * slope


def draw(report: dict[str, Any], path: Path) -> None:
    """What `drawn` draws, of the numbers of clients at which the bare model is measured, and of what is measured at all of them."""
    clients = sorted(number for number in report["settings"]["clients"] if of(report, number, BARE))
    if not clients:
        return
    found = {
        variant: (
            [over(report, n, variant, "rate") for n in clients],
            [[cell["ttft_p95"] for cell in of(report, n, variant)] for n in clients],
        )
        for variant in report["variants"]
        if all(of(report, number, variant) for number in clients)
    }
    rounds = len({cell["round"] for cell in report["cells"]})
    drawn(found, clients, f"vLLM, {report['settings']['shape']}, CPU, float32, rounds: {rounds}").savefig(path, dpi=150)
