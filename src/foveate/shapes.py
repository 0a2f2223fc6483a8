"""The library's own code run on shapes alone: what a tower and a bridge cost for given images, from a configuration and no weights.

A model is built on the meta device, where a tensor has a shape and no values. What depends on weights stays such a shape; what depends on
the images alone (grids, sizes, masks, empty tiles) is computed as ever, so that code that asks for its values goes its usual way: windows,
mergers and resamplers are counted as they run, with no formula for any of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForImageTextToText

from foveate.anatomy import read
from foveate.counting import Counter
from foveate.errors import FoveateError
from foveate.images import Encoded, Images
from foveate.tokens import Kind

_aten = torch.ops.aten
_models: dict[str, nn.Module] = {}
_counted: dict[tuple[str, str], tuple[dict[str, int], list[tuple[int, int]]]] = {}


def skeleton(config: Any) -> nn.Module:
    """The vision-language model of `config` without weights, once per configuration. FoveateError where the library knows no such model."""
    key = config.to_json_string(use_diff=False)
    if key not in _models:
        try:
            with torch.device("meta"), torch.inference_mode(False):  # it will serve outside of it as well
                model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32)
        except (ValueError, KeyError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise FoveateError(f"cannot build a {config.model_type!r} model without weights to read its cost: {reason}") from error
        _models[key] = model.eval()
    return _models[key]


def encode(config: Any, call: Encoded) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """FLOPs by part ("tower", "bridge", "other") of a call, and of each of its items how many tokens are patches and how many are not
    (newlines, [CLS]).

    FoveateError where the model's code wants values of what has only a shape.
    """
    with torch.inference_mode(False):
        return _encode(config, call)


def _encode(config: Any, call: Encoded) -> tuple[dict[str, int], list[tuple[int, int]]]:
    given = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in call.given.items()}
    key = config.to_json_string(use_diff=False), json.dumps([call.method, {name: _spelled(value) for name, value in given.items()}])
    if key not in _counted:
        model = skeleton(config)
        anatomy = read(model)
        core: Any = anatomy.core
        given = {name: _usable(name, value) if isinstance(value, Tensor) else value for name, value in given.items()}
        images = Images(anatomy, ())
        images.begin(None, {})
        try:
            with torch.no_grad(), Counter(model) as counted, _Shapes():
                getattr(core, call.method)(**given)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FoveateError(f"cannot count {call.method} of a {config.model_type!r} model on shapes alone: {reason}") from error
        finally:
            images.remove()
        patches = [(len(item), int((item.kind == Kind.PATCH).sum())) for item in images.encoded]
        _counted[key] = dict(counted.flops), [(found, length - found) for length, found in patches]
    return _counted[key]


def _usable(name: str, value: Tensor) -> Tensor:
    """A copy, since what was made in inference mode cannot be used outside; pixels as numbers again."""
    return value.float() if "pixel_values" in name and value.dtype == torch.bool else value.clone()


def _spelled(value: Any) -> Any:
    """Two calls that are spelled alike cost the same."""
    if not isinstance(value, Tensor):
        return repr(value)
    compact = value[(..., *[0 if step == 0 else slice(None) for step in value.stride()])]  # of a stand-in one value for each patch or tile
    digest = hashlib.sha256(compact.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    return [str(value.dtype), list(value.shape), digest]


class _Shapes(TorchDispatchMode):
    """Where a tensor without values takes part, the others lose theirs; where none does, everything is computed on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        without = any(leaf.is_meta for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta" if without else "cpu")
        if not without:
            return func(*args, **kwargs)
        if func._overloadpacket in (_aten.index, _aten.index_put):  # how many a mask picks must be known
            args = (args[0], [part for index in args[1] for part in _numbers(index)], *args[2:])
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


def _numbers(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the numbers of the rows (and columns) that it picks."""
    if index is None or index.is_meta or index.dtype != torch.bool:
        return [index]
    return list(index.nonzero().unbind(1))
