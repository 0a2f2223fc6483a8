"""In front of the processor: reducers that change the images themselves, and a processor that lets them.

with Preparing(processor, before_processor(reducers)):
    inputs = processor(images=…, text=…)        # also processor.apply_chat_template(…, tokenize=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL.Image import Image, new

from foveate.errors import FoveateError
from foveate.reducers.base import Reducer

_DEEP = 1024  # decoder layers: more than any model has, so that no method lacks layers for its stages


def before_processor(reducers: Sequence[Reducer]) -> list[Reducer]:
    """Those of the reducers that act on the image, in front of the processor."""
    return [reducer for reducer in reducers if any(site.effect.place == "image" for site in reducer.sites(_DEEP))]


def in_model(reducers: Sequence[Reducer]) -> list[Reducer]:
    """All others, and those that act in both places: what `attach` takes without a processor."""
    return [r for r in reducers if not (sites := r.sites(_DEEP)) or not all(site.effect.place == "image" for site in sites)]


def prepare(reducers: Sequence[Reducer], image: Image) -> Image:
    """What the reducers make of an image before the processor sees it, one after the other."""
    for reducer in reducers:
        image = reducer.prepare(image)
    return image


class Preparing:
    """From `install` to `remove` (or in a `with` block) every image that the processor is given is prepared first by the reducers.

    processor: that of a model, or an image processor alone. One that can be `resized` (Foveate's own, which makes all images one size)
        makes smaller images instead; with others that make all images one size the tokens stay as many as they were.

    Images may be PIL images, names of files as the library opens them, and arrays or tensors of bytes (uint8). Raises FoveateError for
    videos and arrays of other types, and for a processor that has no image processor or prepares its images already.
    """

    def __init__(self, processor: Any, reducers: Sequence[Reducer]) -> None:
        self.processor, self.reducers = processor, list(reducers)
        self._parts: list[Any] = []
        self._before: dict[str, Any] | None = None

    def install(self) -> Self:
        if not self.reducers:
            return self
        processor = self.processor
        images = processor if hasattr(processor, "preprocess") else getattr(processor, "image_processor", None)
        if images is None:
            raise FoveateError(
                f"{type(processor).__name__} has no image processor, so {_names(self.reducers)} cannot act before it; give the processor "
                "that makes the model's pixel_values"
            )
        if isinstance(images, _Prepared) or hasattr(processor, "_prepared_by"):
            raise FoveateError("the processor already prepares its images for another attachment; detach that one first")
        if hasattr(processor, "resized"):
            side = prepare(self.reducers, new("RGB", (processor.image_size, processor.image_size))).width
            self._before = dict(vars(processor))
            vars(processor).update(vars(processor.resized(side)) | {"_prepared_by": self})
            return self
        for part, mixed in ((images, _Prepared), (getattr(processor, "video_processor", None), _Refused)):
            if part is not None:
                _mix(part, mixed, self.reducers)
                self._parts.append(part)
        return self

    def remove(self) -> None:
        """Leaves the processor as it was. Does nothing the second time."""
        for part in self._parts:
            part.__class__ = part._own
        if self._before is not None:
            vars(self.processor).clear()
            vars(self.processor).update(self._before)
        self._parts, self._before = [], None

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


class _Mixed:
    """Comes in front of the class of a part of a processor. The class and not the instance changes: its attributes are what is saved."""

    _own: ClassVar[type]
    _reducers: ClassVar[list[Reducer]]

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._own, type(self).__bases__[0], self._reducers), vars(self)


class _Prepared(_Mixed):
    def preprocess(self, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("videos") is not None:
            raise _no_videos(self._reducers)
        own: Any = super()
        order = kwargs.pop("input_data_format", None)
        return own.preprocess(_each(self._reducers, own.fetch_images(images), order), *args, **kwargs)


class _Refused(_Mixed):
    def preprocess(self, *args: Any, **kwargs: Any) -> Any:
        raise _no_videos(self._reducers)


def _mix(part: Any, mixed: type[_Mixed], reducers: list[Reducer]) -> None:
    own = type(part)
    part.__class__ = type(own.__name__, (mixed, own), {"__module__": own.__module__, "_own": own, "_reducers": reducers})


def _again(own: Any, mixed: type[_Mixed], reducers: list[Reducer]) -> Any:
    """Where such a part is copied or unpickled."""
    part = own.__new__(own)
    _mix(part, mixed, reducers)
    return part


def _each(reducers: list[Reducer], images: Any, order: Any) -> Any:
    """Nested lists of images with each of them prepared; `order`: where arrays have their channels, None: as the library infers it."""
    if isinstance(images, list | tuple):
        return [_each(reducers, image, order) for image in images]
    if isinstance(images, np.ndarray | torch.Tensor) and images.dtype in (np.uint8, torch.uint8) and images.ndim == 3:
        from transformers.image_transforms import to_pil_image  # reducers know nothing of the library, until it hands in an array

        images = to_pil_image(images.cpu() if isinstance(images, torch.Tensor) else images, do_rescale=False, input_data_format=order)
    if not isinstance(images, Image):
        what = f"{type(images).__name__} of {images.dtype} and shape {tuple(images.shape)}" if hasattr(images, "dtype") else repr(images)
        raise FoveateError(
            f"{_names(reducers)} cannot prepare an image given as {what}; "
            "give PIL images, names of files, or arrays of bytes (uint8), one for each image"
        )
    return prepare(reducers, images)


def _no_videos(reducers: list[Reducer]) -> FoveateError:
    return FoveateError(f"{_names(reducers)} prepares images and no videos: leave it out, or give frames as images")


def _names(reducers: list[Reducer]) -> str:
    return " and ".join(reducer.name for reducer in reducers)
