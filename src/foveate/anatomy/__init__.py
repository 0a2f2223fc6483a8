"""How a model of the library is read: where its images enter, where its layers are, what they attend to."""

from foveate.anatomy.reading import SLOT_METHODS, TESTED, Anatomy, attends, read, tensor_parallel_group

__all__ = ["SLOT_METHODS", "TESTED", "Anatomy", "attends", "read", "tensor_parallel_group"]
