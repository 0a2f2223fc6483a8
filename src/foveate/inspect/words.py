"""Numbers and answers as people read them, in pages, pictures and tables."""

from __future__ import annotations

from foveate.world.questions import box_cells


def duration(seconds: float) -> str:
    """A time for people: 8.3 s, 2 min 05 s, 1 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def si(flops: float) -> str:
    """A number of FLOPs with three digits and a unit prefix: 1.24 PFLOP."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if flops < 999.5:
            return f"{flops:.3g} {prefix}FLOP"
        flops /= 1000
    return f"{flops:.3g} EFLOP"


def answer_text(answer: str) -> str:
    """An answer for people: a box as its rows and columns, both ends included, on the ruler; nothing as a dash."""
    box = box_cells(answer)
    if box is None:
        return answer or "–"
    return f"rows {box[0]} to {box[2] - 1}, columns {box[1]} to {box[3] - 1}"
