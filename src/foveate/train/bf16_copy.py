"""Precision `bf16-copy`: forward and backward pass in bfloat16, weights and optimiser in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call


class BFloat16Copy:
    """Calls a module on a bfloat16 copy of its floating-point parameters; gradients arrive at the parameters themselves in their own
    precision. Where autocast casts operation by operation and keeps activations in float32, this casts once a step."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, **inputs: Any) -> Any:
        copies = {name: p.to(torch.bfloat16) if p.is_floating_point() else p for name, p in self.module.named_parameters()}
        return functional_call(self.module, copies, (), inputs)
