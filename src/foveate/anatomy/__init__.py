"""How a model of the library is read: where its images enter, how their tokens lie, where its layers are, what they attend to."""

from foveate.anatomy.layers import attends, feed_forward, grows, tensor_parallel_group
from foveate.anatomy.media import Arrangement, Boxes, Media, Patches
from foveate.anatomy.raster import Laid, places
from foveate.anatomy.reading import MODALITIES, TESTED, Anatomy, features_of, forget_reader, read, register_reader
from foveate.anatomy.tower import Extras, blocks, columns_of, extras_of
from foveate.anatomy.units import Crops, Units

__all__ = [
    "MODALITIES",
    "TESTED",
    "Anatomy",
    "Arrangement",
    "Boxes",
    "Crops",
    "Extras",
    "Laid",
    "Media",
    "Patches",
    "Units",
    "attends",
    "blocks",
    "columns_of",
    "extras_of",
    "features_of",
    "feed_forward",
    "forget_reader",
    "grows",
    "places",
    "read",
    "register_reader",
    "tensor_parallel_group",
]
