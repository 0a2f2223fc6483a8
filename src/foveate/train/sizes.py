"""Bytes with units, as recipes have them and messages say them."""

from __future__ import annotations

import math
import re
from typing import Any

UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def read_bytes(value: Any) -> Any:
    """A text such as 20GB as a number of bytes; what is no text as it is. ValueError for another text."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise ValueError(f"a number of bytes, or one with a unit ({', '.join(filter(None, UNITS))}), such as 20GB")
    return int(float(found[1]) * units[found[2].lower()])


def written(size: int, up: bool = False) -> str:
    """Bytes in a unit that gives them two digits or more; rounded up where it is to be a limit."""
    unit = next((unit for unit in ("TB", "GB", "MB", "kB") if size >= 10 * UNITS[unit]), "kB")
    whole = size / UNITS[unit]
    return f"{math.ceil(whole) if up else round(whole)}{unit}"
