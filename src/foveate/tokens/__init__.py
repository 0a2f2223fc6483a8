"""Layout and TokenMap: what each slot of a batch of sequences is, and how one batch of slots becomes another. ImagePlan: what an image
becomes in it.

Shape legend, used as suffixes of tensor names everywhere in Foveate:

    B  sequences in the batch          D  hidden width
    N  slots before a map              E  sources of one target (padded with -1)
    M  slots after a map               I  images of the batch, in the order in which they were given
    L  visual tokens of one image      T  visual tokens kept of one image
"""

from foveate.tokens.image import MARKS, WHOLE, Block, Canvas, Crop, ImagePlan, Mark, Tag
from foveate.tokens.layout import PLACE, SCOPES, Kind, Layout
from foveate.tokens.map import TokenMap
from foveate.tokens.selection import budget, top
from foveate.tokens.wiring import Wiring, raster, stacks, wire

__all__ = [
    "MARKS",
    "PLACE",
    "SCOPES",
    "WHOLE",
    "Block",
    "Canvas",
    "Crop",
    "ImagePlan",
    "Kind",
    "Layout",
    "Mark",
    "Tag",
    "TokenMap",
    "Wiring",
    "budget",
    "raster",
    "stacks",
    "top",
    "wire",
]
