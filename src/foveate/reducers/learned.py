"""What a method is that decides by weights of its own: a module, made for a model, trained with it or for it, and saved beside it.

    add_weights(model, parse("visionselector:keep=0.2"))    # makes them a part of the model: its optimiser, PEFT and FSDP find them
    foveate.attach(model, "visionselector:keep=0.2")        # decides by them, softly while they are trained
    save_weights(take_weights(model), folder)

Recipes do so by `train: {reducers: true}`. The file is `foveate.safetensors`, with `foveate.json` beside the model's weights, and `attach`
reads it there. A method has one set of weights in a model: all its settings share it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate.anatomy import Anatomy, read
from foveate.contract import View
from foveate.errors import FoveateError
from foveate.reducers.base import Reducer
from foveate.reducers.beside import beside

WEIGHTS_NAME = "foveate.safetensors"
_REGISTERED = "foveate_reducers"  # the decoder's attribute: a part of the model, and neither tower nor bridge


@dataclass(frozen=True)
class Learned(Reducer):
    """A method with weights. untrained: decide by those that training begins with, where the model has none: for a first try."""

    untrained: bool = field(default=False, kw_only=True)

    def check(self) -> None:
        super().check()
        if type(self.untrained) is not bool:
            raise FoveateError(f"{self.name}: untrained={self.untrained!r} is not possible; choose true or false")

    @staticmethod
    @abstractmethod
    def module(width: int, layers: int) -> nn.Module:
        """New weights for states of `width` values in a model of `layers` decoder layers, drawn from torch's generator."""

    def loss_weight(self, progress: float) -> float:
        """What its loss counts when a share `progress` in [0, 1) of the stage's steps is made."""
        return 1.0

    def while_trained(self) -> Self:
        """What acts in its place, as far as numbers of tokens go, while its weights are trained."""
        return self

    def weights(self, view: View) -> Any:
        """The module to decide by. FoveateError where the view has none."""
        if view.weights is not None:
            return view.weights
        if self.untrained and view.tokens is not None and view.layers is not None:
            return new_weights(type(self), view.tokens.shape[-1], view.layers)
        raise FoveateError(
            f"{self.name} decides by weights and the view has none: give View.of(tokens, weights=…), or {self.name}:untrained=true and "
            "View.of(tokens, layers=…)"
        )


def learned(reducers: Sequence[Reducer]) -> dict[str, type[Learned]]:
    """By name, the methods among the reducers that have weights."""
    return {reducer.name: type(reducer) for reducer in reducers if isinstance(reducer, Learned)}


def while_trained(reducers: Sequence[Reducer]) -> list[Reducer]:
    """What acts while the reducers' weights are trained, as far as numbers of tokens go."""
    return [reducer.while_trained() if isinstance(reducer, Learned) else reducer for reducer in reducers]


def new_weights(method: type[Learned], width: int, layers: int, seed: int = 0) -> nn.Module:
    """The weights that training begins with, the same at every call."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return method.module(width, layers)


# ---- on a model


def registered(anatomy: Anatomy) -> nn.ModuleDict | None:
    """The weights that are a part of the model, by method; None where it has none."""
    found = getattr(anatomy.decoder, _REGISTERED, None)
    return found if isinstance(found, nn.ModuleDict) else None


def add_weights(
    model: nn.Module, reducers: Sequence[Reducer], *, saved: Mapping[str, Tensor] | None = None, seed: int = 0
) -> nn.ModuleDict:
    """Makes the weights of these reducers a part of the model, in its precision, and returns all that it has now, by method.

    saved: those of a `foveate.safetensors`, as `saved_weights` reads them; what is not among them is new, drawn by `seed`.
    To be called before the optimiser, PEFT or FSDP see the model. FoveateError where saved ones do not fit the model.
    """
    anatomy = read(model)
    found = registered(anatomy) or nn.ModuleDict()
    for name, method in learned(reducers).items():
        if name not in found:
            module = _fitted(method, anatomy, saved or {}, f"the {WEIGHTS_NAME}") or new_weights(method, *_sizes(anatomy), seed)
            found[name] = module.to(next(anatomy.decoder.parameters())).train(anatomy.decoder.training)
    if len(found):
        setattr(anatomy.decoder, _REGISTERED, found)
    return found


def take_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Takes what `add_weights` has made a part of the model off it again, and returns it by method."""
    anatomy = read(model)
    found = registered(anatomy)
    if found is None:
        return {}
    delattr(anatomy.decoder, _REGISTERED)
    return dict(found.items())


@contextmanager
def lent_weights(model: nn.Module, reducers: Sequence[Reducer]) -> Iterator[None]:
    """A `with` block in which the model has weights of these reducers, new ones where it has none: to try what will be trained later."""
    before = dict((registered(read(model)) or nn.ModuleDict()).items())
    found = add_weights(model, reducers)
    try:
        yield
    finally:
        for name in found.keys() - before.keys():
            del found[name]
        if not before:
            take_weights(model)


def find_weights(anatomy: Anatomy, reducers: Sequence[Reducer], model: str | Path) -> dict[str, nn.Module]:
    """By method, what the reducers decide by: what is a part of the model, else what lies beside it, else new ones where they are to be
    untrained. model: its folder or name. FoveateError where there is nothing, or where what there is belongs to another model."""
    own: Any = registered(anatomy) or {}
    found: dict[str, nn.Module] = {}
    saved: Mapping[str, Tensor] | None = None
    for reducer in reducers:
        if not isinstance(reducer, Learned) or reducer.name in found:
            continue
        if reducer.name in own:
            found[reducer.name] = own[reducer.name]
            continue
        saved = (saved_weights(model) or {}) if saved is None else saved
        module = _fitted(type(reducer), anatomy, saved, f"the {WEIGHTS_NAME} of {model}")
        if module is None and reducer.untrained:
            module = new_weights(type(reducer), *_sizes(anatomy))
        if module is None:
            there = f"holds weights of {', '.join(_methods(saved))} only" if saved else "is not there"
            raise FoveateError(
                f"{reducer.name} decides by weights that are trained, and the {WEIGHTS_NAME} of {str(model) or 'the model'} {there}: train "
                f"them by a recipe's train: {{reducers: true}}, or try new ones by {reducer.name}:untrained=true"
            )
        found[reducer.name] = module.to(next(anatomy.decoder.parameters()).device).eval().requires_grad_(False)
    return found


# ---- in a file


def save_weights(weights: Mapping[str, nn.Module], folder: Path, more: Mapping[str, Tensor] | None = None) -> None:
    """Writes `foveate.safetensors`: weights by method, and `more` of a file that was read. Nothing where there are none."""
    own = {f"{name}.{key}": value.detach().cpu() for name, module in weights.items() for key, value in module.state_dict().items()}
    kept = {key: value for key, value in (more or {}).items() if key.partition(".")[0] not in weights}
    if own or kept:
        save_file({**kept, **own}, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def saved_weights(model: str | Path) -> dict[str, Tensor] | None:
    """What a model's `foveate.safetensors` holds, None where it has no such file. model: as in `saved_reducers`."""
    path = beside(model, WEIGHTS_NAME)
    if path is None:
        return None
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FoveateError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _fitted(method: type[Learned], anatomy: Anatomy, saved: Mapping[str, Tensor], where: str) -> nn.Module | None:
    """The method's module with the values that a file has for it; None where it has none. FoveateError where they do not fit."""
    own = {key.partition(".")[2]: value for key, value in saved.items() if key.partition(".")[0] == method.name}
    if not own:
        return None
    width, layers = _sizes(anatomy)
    module = new_weights(method, width, layers)
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    there = {key: tuple(value.shape) for key, value in own.items()}
    if there != wanted:
        raise FoveateError(
            f"{where} holds weights of {method.name} for another model: {_shapes(there)}, where this one, of {layers} decoder layers with "
            f"states of {width} values, has {_shapes(wanted)}"
        )
    for key, value in module.state_dict(keep_vars=True).items():
        value.data = own[key].clone()  # in the precision in which they were saved
    return module


def _sizes(anatomy: Anatomy) -> tuple[int, int]:
    return int(anatomy.text_config.hidden_size), len(anatomy.layers)


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key} {' x '.join(map(str, shape))}" for key, shape in sorted(shapes.items()))


def _methods(saved: Mapping[str, Tensor]) -> list[str]:
    return sorted({key.partition(".")[0] for key in saved})
