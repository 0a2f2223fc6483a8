"""The trained part that `resampler` and `chain_of_sight` share: learnable queries that read the patches of their window.

Structure, biases and initial weights as described in Chain-of-Sight (Huang et al., arXiv 2407.15819) and found in the code of Skip-Vision
(arXiv 2503.21817), which shares authors with it; see `chain_of_sight.py`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.errors import FoveateError


class CrossAttentionBlock(nn.Module):
    """q + CrossAttention(q, context), then + MLP: pre-norm, no dropout, no self-attention among the queries, no positions."""

    def __init__(self, width: int, context_width: int, head_dim: int) -> None:
        super().__init__()
        check_heads(width, head_dim)
        self.head_dim = head_dim
        self.norm_query = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(context_width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, width)

    def forward(self, q: Tensor, context: Tensor) -> Tensor:
        """(N, queries, width) and (N, keys, context_width) -> (N, queries, width)."""
        query = self.to_q(self.norm_query(q)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        key, value = self.to_kv(self.norm_context(context)).unflatten(-1, (2, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        attended = attention(query, key, value).transpose(1, 2).flatten(2)
        q = q + self.proj(attended)
        return q + self.linear_2(F.gelu(self.linear_1(self.norm_mlp(q))))


def check_heads(width: int, head_dim: int) -> None:
    """FoveateError where heads of `head_dim` values do not fill the bridge's width."""
    if width % head_dim:
        raise FoveateError(f"head_dim {head_dim} does not divide the bridge width {width}; choose a divisor or another width")


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(N, heads, queries, width), and (N, heads, keys, width) twice, -> (N, heads, queries, width)."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:  # whose fused backward pass takes up to five times as long
        return (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


class MultiHead(nn.Module):
    """Attention of several heads, as lenses have it: linear maps in front and behind, nothing else."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(N, queries, width), and (N, keys, width) twice, -> (N, queries, width)."""
        maps = ((self.to_q, query), (self.to_k, key), (self.to_v, value))
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to, x in maps)
        attended: Tensor = self.proj(attention(q, k, v).transpose(1, 2).flatten(2))
        return attended


class WindowResampler(nn.Module):
    """Queries of their own for each window, and one block per feature level whose weights all windows share."""

    def __init__(self, windows: int, queries: int, levels: int, width: int, context_width: int, head_dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(windows, queries, width))
        self.blocks = nn.ModuleList(CrossAttentionBlock(width, context_width, head_dim) for _ in range(levels))

    def forward(self, contexts: list[Tensor]) -> Tensor:
        """One (B * windows, keys, context_width) per level, images outermost -> (B, windows * queries, width), window by window."""
        windows, queries, width = self.queries.shape
        q = self.queries.repeat(contexts[0].shape[0] // windows, 1, 1)
        for block, context in zip(self.blocks, contexts, strict=True):
            q = block(q, context)
        return q.reshape(-1, windows * queries, width)


def multiply_adds(windows: int, keys: int, queries: int, levels: int, width: int, context_width: int) -> int:
    """Multiply-adds of a `WindowResampler` for one image with `keys` patches a window: keys and values, q + proj + MLP, attention."""
    tokens = windows * queries
    return levels * (2 * windows * keys * context_width * width + 10 * tokens * width**2 + 2 * tokens * keys * width)


def reset_parameters(module: nn.Module) -> None:
    """Linear weights and queries: truncated normal, sigma 0.02, biases zero; LayerNorm: identity."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif isinstance(part, WindowResampler):
            nn.init.trunc_normal_(part.queries, std=0.02)
