"""What some families of models have and others do not, one such shape a file. Each says at its top whose it is and how it is told: by
arguments, attributes and parameters that are there, never by the name of a model.

A function `laid(media)` says how the tokens of each item of a call lie, None where the call is not of its shape; the first of `LAID` that
knows it is believed. `OVERHEARD` says what is remembered of calls of the model's own methods. All else answers questions of `Anatomy`.
"""

from foveate.anatomy.families import (
    asked,
    boxes,
    compression,
    crops,
    deepstack,
    frames,
    grids,
    marks,
    merger,
    mosaic,
    newlines,
    plans,
    pooling,
    positions,
    queries,
    shared_keys,
    shuffles,
    sizes,
    two_towers,
    weights,
    windows,
)

LAID = (grids.laid, boxes.laid, positions.laid, pooling.laid, frames.laid, sizes.laid, crops.laid)
OVERHEARD = {mosaic.PACKING: mosaic.packed, frames.POOLING: frames.pooled}

__all__ = [
    "LAID",
    "OVERHEARD",
    "asked",
    "boxes",
    "compression",
    "crops",
    "deepstack",
    "frames",
    "grids",
    "marks",
    "merger",
    "mosaic",
    "newlines",
    "plans",
    "pooling",
    "positions",
    "queries",
    "shared_keys",
    "shuffles",
    "sizes",
    "two_towers",
    "weights",
    "windows",
]
