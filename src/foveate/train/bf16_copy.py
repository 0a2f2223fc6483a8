"""Precision `bf16-copy`: forward and backward pass in bfloat16, weights and optimiser in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm


class BFloat16Copy:
    """Calls modules on a bfloat16 copy of their floating-point parameters; gradients arrive at the parameters themselves in their own
    precision. Where autocast casts operation by operation and keeps activations in float32, this casts once a step, and what is not
    trained once for all steps. Lives as long as a stage, within which nothing changes frozen values past torch's count (`.data`)."""

    def __init__(self) -> None:
        self._frozen: dict[Tensor, tuple[int, Tensor]] = {}  # of a parameter the version of its values, and their copy

    def of(self, module: nn.Module) -> Callable[..., Any]:
        return partial(self._call, module)

    def _call(self, module: nn.Module, **inputs: Any) -> Any:
        return functional_call(module, {name: self._copy(parameter) for name, parameter in halved(module).items()}, (), inputs)

    def _copy(self, parameter: Tensor) -> Tensor:
        if parameter.requires_grad:
            return parameter.to(torch.bfloat16)
        version, copy = self._frozen.get(parameter, (-1, parameter))
        if version != parameter._version:  # values that were written since are copied again
            version, copy = self._frozen[parameter] = parameter._version, parameter.to(torch.bfloat16)
        return copy


def halved(module: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the parameters that the copy has in bfloat16: all of floating point but those of batch norms. These take bfloat16 beside
    statistics in float32, which training may go on with, if their weights are of the statistics' precision."""
    whole = {parameter for part in module.modules() if isinstance(part, _BatchNorm) for parameter in part.parameters()}
    return {name: parameter for name, parameter in module.named_parameters() if parameter.is_floating_point() and parameter not in whole}
