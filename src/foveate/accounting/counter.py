"""FLOPs as they happen: every matrix product that a model runs, by the part of the model in which it runs."""

from __future__ import annotations

from collections import Counter as Tally
from typing import Any, Self

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from foveate.anatomy import read
from foveate.probes.marker import listeners

_aten = torch.ops.aten
_FORMULAS = {  # the fused kernel of the CPU is missing in torch's own registry
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
}
_LINEAR = {_aten.mm, _aten.addmm, _aten.convolution, _aten._convolution}
PARTS = ("tower", "bridge", "lm_linear", "lm_attention", "head", "scores", "other")


class Counter(TorchDispatchMode):
    """Counts while it is entered; `flops` is by part:

    tower         the vision tower, with what it merges by itself
    bridge        the other parts beside the language model
    lm_linear     decoder layers: products with weights
    lm_attention  decoder layers: products of queries, keys and values, the full square even where a kernel does half of it
    head          the output embeddings
    scores        what attached reducers compute in order to decide
    other         everything between: rotary angles, recurrences

    The formulas are those of torch's own counter (2 per multiply-add, matrix products and convolutions only). It does not know kernels
    for grouped experts: load such a model with `experts_implementation="eager"`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flops: Tally[str] = Tally(dict.fromkeys(PARTS, 0))
        self._parts = parts_of(model)
        self._within: list[str] = ["other"]
        self._handles: list[Any] = []
        self._depth = 0

    def __enter__(self) -> Self:
        if not self._depth:  # it is entered again for what it decomposes
            for module, part in self._parts.items():
                self._handles.append(module.register_forward_pre_hook(lambda *_, part=part: self.enter(part)))
                self._handles.append(module.register_forward_hook(self.leave, always_call=True))
            listeners.append(self)
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        listeners.remove(self)

    def enter(self, part: str) -> None:
        self._within.append(part)

    def leave(self, *_: Any) -> None:
        self._within.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in _FORMULAS:
            with self:  # in inference mode a composite operator arrives in one piece
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        out = func(*args, **kwargs)
        if packet in _FORMULAS:
            part = self._within[-1]
            if part in ("lm", "recurrent"):
                part = "lm_linear" if packet in _LINEAR else "lm_attention" if part == "lm" else "other"
            self.flops[part] += _FORMULAS[packet](*args, **kwargs, out_val=out)
        return out


def parts_of(model: nn.Module) -> dict[nn.Module, str]:
    """The modules whose forward is a part, or a layer of the language model."""
    anatomy = read(model)
    parts = anatomy.visual | {layer: "recurrent" if anatomy.recurrent(i) else "lm" for i, layer in enumerate(anatomy.layers)}
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        parts[head] = "head"
    return parts


def parameters_of(model: nn.Module) -> dict[str, int]:
    """Parameters of tower, bridge and language model (its embeddings and head included)."""
    found = dict.fromkeys(("tower", "bridge"), 0)
    for module, part in parts_of(model).items():
        if part in found:
            found[part] += sum(p.numel() for p in module.parameters())
    return {**found, "lm": sum(p.numel() for p in model.parameters()) - sum(found.values())}
