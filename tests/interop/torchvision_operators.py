"""Declares the two operators that importing torchvision insists on, and that its package of PyPI does not load beside a CPU build of torch.

`make serve-test` and `make timm` put this file into their environments, where a .pth file loads it at every start: vLLM imports models in
processes of its own. Nothing calls the operators.
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class Declaring(MetaPathFinder):
    """Finds nothing; when torchvision is looked for, the operators are declared."""

    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision" and Declaring.library is None:
            import torch

            Declaring.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                Declaring.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Declaring())
