"""Slow plain re-statements of the bridges' equations: numpy, float64, loops over images, windows, queries and heads, no shared code."""

import math

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]

erf = np.vectorize(math.erf)


def weights_of(module: torch.nn.Module, prefix: str = "") -> Weights:
    return {k.removeprefix(prefix): v.detach().double().numpy() for k, v in module.state_dict().items() if k.startswith(prefix)}


def layer_norm(x: Array, w: Weights, name: str) -> Array:
    centred = x - x.mean()
    return centred / math.sqrt((centred**2).mean() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Array, w: Weights, name: str, bias: bool = True) -> Array:
    assert (f"{name}.bias" in w) == bias
    return w[f"{name}.weight"] @ x + (w[f"{name}.bias"] if bias else 0.0)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))


def mlp(x: Array, w: Weights) -> Array:
    return linear(gelu(linear(x, w, "linear_1")), w, "linear_2")


def block(query: Array, patches: list[Array], w: Weights, head_dim: int) -> Array:
    """One query vector through one block: query + attention over the patches, then + MLP."""
    width = len(query)
    q = linear(layer_norm(query, w, "norm_query"), w, "to_q", bias=False)
    kv = [linear(layer_norm(patch, w, "norm_context"), w, "to_kv", bias=False) for patch in patches]
    attended = np.zeros(width)
    for head in range(width // head_dim):
        part = slice(head * head_dim, (head + 1) * head_dim)
        scores = [float(q[part] @ pair[:width][part]) * head_dim**-0.5 for pair in kv]
        shares = [math.exp(score) for score in scores]
        for share, pair in zip(shares, kv, strict=True):
            attended[part] += share / sum(shares) * pair[width:][part]
    query = query + linear(attended, w, "proj")
    return query + mlp(layer_norm(query, w, "norm_mlp"), w)


def chain_of_sight(features: list[Array], side: int, scales: list[tuple[int, int]], w: Weights, head_dim: int) -> Array:
    """features: per level (B, side * side, C) -> (B, tokens, D)."""
    images = []
    for image in range(features[0].shape[0]):
        tokens = []
        for scale, (window, queries) in enumerate(scales):
            for window_row in range(side // window):
                for window_column in range(side // window):
                    for n in range(queries):
                        token = w[f"resamplers.{scale}.queries"][window_row * (side // window) + window_column, n]
                        for level, x in enumerate(features):
                            patches = [
                                x[image, row * side + column]
                                for row in range(window_row * window, (window_row + 1) * window)
                                for column in range(window_column * window, (window_column + 1) * window)
                            ]
                            prefix = f"resamplers.{scale}.blocks.{level}."
                            inner = {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}
                            token = block(token, patches, inner, head_dim)
                        tokens.append(linear(layer_norm(token, w, "norm"), w, "proj"))
        images.append(tokens)
    return np.array(images)


def window_merge(y: torch.Tensor, grid: tuple[int, int], window: int) -> torch.Tensor:
    """The exact inverse of `window_partition`."""
    rows, columns = grid
    y = y.reshape(-1, rows // window, columns // window, window, window, y.shape[-1])
    return y.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, y.shape[-1])
