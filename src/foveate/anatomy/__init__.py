"""How a model of the library is read: where its images enter, where its layers are, what they attend to."""

from foveate.anatomy.reading import (
    MODALITIES,
    TESTED,
    Anatomy,
    attends,
    forget_reader,
    read,
    register_reader,
    tensor_parallel_group,
)

__all__ = ["MODALITIES", "TESTED", "Anatomy", "attends", "forget_reader", "read", "register_reader", "tensor_parallel_group"]
