"""Precision `bf16-copy`: forward and backward pass in bfloat16, weights and optimiser in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class BFloat16Copy:
    """Calls a module on a bfloat16 copy of its floating-point parameters; gradients arrive at the parameters themselves in their own
    precision. Where autocast casts operation by operation and keeps activations in float32, this casts once a step, and what is not
    trained once for all steps."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._frozen: dict[str, tuple[int, Tensor]] = {}  # the version of the values, and their copy

    def __call__(self, **inputs: Any) -> Any:
        copies = {name: self._copy(name, parameter) for name, parameter in self.module.named_parameters()}
        return functional_call(self.module, copies, (), inputs)

    def _copy(self, name: str, parameter: Tensor) -> Tensor:
        if not parameter.is_floating_point():
            return parameter
        if parameter.requires_grad:
            return parameter.to(torch.bfloat16)
        version, copy = self._frozen.get(name, (-1, parameter))
        if version != parameter._version:  # counted by torch: values that were loaded since are copied again
            version, copy = self._frozen[name] = parameter._version, parameter.to(torch.bfloat16)
        return copy
