"""Training a model of the library in several processes, where one of them may get a batch without any image."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves

from foveate.anatomy import read


class StandIn:
    """Gives forward passes without images a blank one, whose features are multiplied by zero and added to the embeddings.

    The loss is the same to the last bit, and no process leaves out a module or a gradient that the others wait for. Foveate's own models
    do this by themselves.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        anatomy = read(model)
        core: Any = anatomy.core
        self.core = core
        made = processor.image_processor([Image.new("RGB", (64, 64))], return_tensors="pt")
        names = inspect.signature(core.get_image_features).parameters
        self.given = {name: value for name, value in made.items() if name in names}
        self.sees = True
        anatomy.core.register_forward_pre_hook(self._look, with_kwargs=True)
        anatomy.decoder.register_forward_pre_hook(self._add, with_kwargs=True)

    def _look(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.sees = kwargs.get("pixel_values") is not None

    def _add(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self.sees:
            return None
        embeddings = kwargs["inputs_embeds"]
        found = self.core.get_image_features(**{name: value.to(embeddings.device) for name, value in self.given.items()})
        features = tree_leaves(getattr(found, "pooler_output", found))
        zero = torch.stack([(x * 0.0).sum() for x in features if isinstance(x, torch.Tensor)]).sum()
        return args, {**kwargs, "inputs_embeds": embeddings + zero.to(embeddings.device, embeddings.dtype)}
