"""A Llama decoder in plain loops over the tokens of one prompt: what methods that say who sees whom, and where, are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Pairs = Callable[[int, int, int], float]  # (layer, query, key) -> what is added to their product, -inf where the key is not seen


def embedded(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(N, D) what enters the decoder, the image's tokens among them."""
    found: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(kwargs["inputs_embeds"][0].detach()), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return found[0].double()


def causal(layer: int, query: int, key: int) -> float:
    return 0.0 if key <= query else float("-inf")


@torch.no_grad()
def decode(
    model: Any, x_ND: Tensor, positions: Sequence[float] | Tensor, added: Pairs = causal, held: Callable[[int, int], bool] | None = None
) -> Tensor:
    """(N, V) logits.

    positions  of each token, (N,), or of each of its frequencies, (N, h / 2)
    held       (layer, token) -> whether a token leaves a layer as it came to it
    """
    text, decoder = model.config.text_config, model.model.language_model
    H, G = text.num_attention_heads, text.num_key_value_heads
    h = text.hidden_size // H
    place = torch.as_tensor(positions, dtype=torch.float64)
    angles = (place[:, None] if place.ndim == 1 else place) * 10_000.0 ** (-torch.arange(0, h, 2, dtype=torch.float64) / h)
    turn = torch.polar(torch.ones_like(angles), angles)
    for number, layer in enumerate(decoder.layers):
        attention, before = layer.self_attn, x_ND
        y = norm(layer.input_layernorm, x_ND)
        q, k = (turned(project(part, y).view(len(y), -1, h), turn) for part in (attention.q_proj, attention.k_proj))
        v = project(attention.v_proj, y).view(len(y), G, h)
        mixed = torch.zeros(len(y), H, h, dtype=torch.float64)
        for i in range(len(y)):
            more = torch.tensor([added(number, i, j) for j in range(len(y))], dtype=torch.float64)
            for head in range(H):
                group = head * G // H
                mixed[i, head] = ((k[:, group] @ q[i, head]) / h**0.5 + more).softmax(0) @ v[:, group]
        x_ND = x_ND + project(attention.o_proj, mixed.flatten(1))
        x_ND = x_ND + feed_forward(layer, x_ND)
        if held is not None:
            x_ND = torch.stack([before[i] if held(number, i) else x_ND[i] for i in range(len(y))])
    return project(model.lm_head, norm(decoder.norm, x_ND))


def feed_forward(layer: Any, x_ND: Tensor) -> Tensor:
    y = norm(layer.post_attention_layernorm, x_ND)
    return project(layer.mlp.down_proj, torch.nn.functional.silu(project(layer.mlp.gate_proj, y)) * project(layer.mlp.up_proj, y))


def norm(module: Any, x_ND: Tensor) -> Tensor:
    return x_ND / (x_ND.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight.double()


def project(module: Any, x_ND: Tensor) -> Tensor:
    return x_ND @ module.weight.double().T


def turned(x_NHh: Tensor, turn_Nh: Tensor) -> Tensor:
    """The rotary embedding: value i and value i + h / 2 are a complex number."""
    half = x_NHh.shape[-1] // 2
    z = torch.complex(x_NHh[..., :half], x_NHh[..., half:]) * turn_Nh[:, None]
    return torch.cat([z.real, z.imag], -1)
