"""How the papers count FLOPs: one function for each published convention, of the tokens in each decoder layer.

The same model at the same schedule differs by up to 2.5 times between papers, so two tables compare only where they count alike. These
functions put a number beside a published one, or check it. What Foveate itself reports is `foveate.accounting.predict`: a vector over
tower, bridge, linear maps, attention and head, with everything counted. `conventions()` lists what each counts. Papers that print FLOPs
without a formula that gives them (SparseVLM, ATP-LLaVA, LRS-VQA) are not here.

`visual` holds one entry for each decoder layer, the visual tokens that go through it: what `foveate.reducers.visual_tokens` says of any
reducer. `text` tokens go through every layer. `width` d, `mlp` m: the decoder's hidden size and its MLP's inner size; for LLaVA-1.5-7B
(32 layers) 4096 and 11008, for 13B (40 layers) 5120 and 13824. A layer with n tokens has, in multiply-adds,

    4nd² + 2n²d + c·n·d·m        c = 2: an MLP of two matrices, c = 3: a gated one, which is what these language models have
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from foveate.errors import FoveateError


def fastv(visual: Sequence[int], text: int, *, width: int, mlp: int) -> Fraction:
    """FastV (arXiv 2403.06764): multiply-adds, mean of the layers; text counted, two MLP matrices, no tower, no head.

    Verified: 7B and 13B tables at 576 visual and 36 text tokens, to 1 % (image tokens alone are cut, not (1 - R) of all as the text has
    it; layer 3 with 75 % cut to 1.2 %). The row of layer 0 with 90 % cut does not follow from it (14.8 G, printed 18.9).
    """
    return Fraction(_macs(_with_text(visual, text), 2, width, mlp), len(visual))


def divprune(visual: Sequence[int], text: int, *, width: int, mlp: int) -> int:
    """DivPrune's script (arXiv 2503.02175): multiply-adds, all layers; text counted, two MLP matrices, no tower, no head.

    Verified: full and reduced rows of LLaVA-1.5 7B and 13B at about 45 text tokens. The paper prints a minus sign before 2n²d, its script
    adds.
    """
    return _macs(_with_text(visual, text), 2, width, mlp)


def pyramiddrop(visual: Sequence[int], *, width: int, mlp: int) -> int:
    """PyramidDrop (arXiv 2410.17247): multiply-adds, all layers; visual tokens alone, three MLP matrices, no tower, no head.

    Verified: all rows of LLaVA-1.5-7B and LLaVA-NeXT-7B, FastV's rows in that paper, and VScan's table, which counts the same way at its
    mean number of tokens.
    """
    return _macs(_with_text(visual), 3, width, mlp)


def aim(visual: Sequence[int], text: int, *, width: int, mlp: int, kv_width: int | None = None) -> int:
    """AIM (arXiv 2412.03248): FLOPs, 2 per multiply-add, all layers; text counted, three MLP matrices, no tower, no head.

    `kv_width`: width of the keys under grouped-query attention; `width` unless given. About twice everybody else's numbers.
    Verified: LLaVA-1.5-7B (41 text tokens) and LLaVA-OneVision-7B (110) without AIM. AIM's own row comes out 0.9 % high (14.9 T, printed
    14.76) by our reading of its schedule; its settings for images are not published.
    """
    return 2 * _macs(_with_text(visual, text), 3, width, mlp, kv_width)


def mqt(visual: Sequence[int], text: int, *, width: int, mlp: int) -> int:
    """MQT-LLaVA (arXiv 2405.19315) prints no formula; this is the language model's prefill as `aim` counts it.

    Verified: nothing but the abstract's ratios, 2x at 256 and 8x at 16 tokens, at 64 text tokens. The paper's plot of TFLOPs does not
    follow from it: its small models cost more.
    """
    return aim(visual, text, width=width, mlp=mlp)


def eemllm(visual: Sequence[int], text: int, *, width: int, mlp: int, visual_update: str = "self") -> int:
    """EE-MLLM (arXiv 2408.11795) prints no formula; this is what its two readings need, counted as `aim` counts: text attends to all, and
    visual tokens have no query ("self": keys, values, output and MLP) or nothing but keys and values ("none").

    Verified: "self" at 4,900 visual and 256 text tokens takes 0.77 of `aim`, where a note on the paper says 24 % less.
    """
    own = 4 * width**2 + 3 * width * mlp
    seen = 3 * width**2 + 3 * width * mlp if visual_update == "self" else 2 * width**2
    return sum(2 * text * own + 2 * n * seen + 4 * text * (n + text) * width for n in visual)


def profiler(visual: Sequence[int], other: int = 0, *, width: int, mlp: int) -> int:
    """What a profiler reports that does not see fused attention: FLOPs, 2 per multiply-add, of the linear maps of all layers.

    `other`: FLOPs of all that does not change with the visual tokens (text, tower, head).
    Verified: the slope of LLaVolta's and p-MoD's numbers.
    """
    return 2 * sum(_with_text(visual)) * (4 * width**2 + 3 * width * mlp) + other


def llavolta_tflops(tokens: float) -> float:
    """LLaVolta (arXiv 2406.20092): TFLOPs of LLaVA-1.5-7B at `tokens` visual tokens summed over the 32 layers.

    A line through all printed points, to 0.01: the slope is `profiler`'s; the constant is fitted, and stands for text, tower and head.
    Video-LLaVA's numbers in that paper do not follow from it.
    """
    return 0.804 + 4.047e-4 * tokens


def pmod(visual: Sequence[int], other: int, *, width: int, mlp: int) -> int:
    """p-MoD (arXiv 2412.04449): `profiler` with the tokens of `pmod_tokens`.

    `other` is fitted to the paper's baselines: 8.38 T at 576 and 39.46 T at 2928 visual tokens, so 0.92 T and 1.54 T; with it the reduced
    rows follow.
    """
    return profiler(visual, other, width=width, mlp=mlp)


def pmod_tokens(per_image: int, layers: int = 32) -> list[int]:
    """p-MoD's schedule: visual tokens in each layer, of `per_image` in front of the first.

    The share is cos(pi l / (layers - 1)) / 2 + 1/2, at least 0.15, of tokens cut to an integer; layers above 0.85 keep all.
    """
    if layers < 2:
        raise FoveateError(f"p-MoD's schedule over {layers} layers: there must be at least 2")
    shares = [math.cos(math.pi * layer / (layers - 1)) / 2 + 0.5 for layer in range(layers)]
    return [per_image if share > 0.85 else int(per_image * max(share, 0.15)) for share in shares]


@dataclass(frozen=True)
class Convention:
    """What one paper counts: `factor` units per multiply-add. `name`: the function of this module, or of `foveate.accounting`."""

    name: str
    paper: str
    factor: int
    mlp: str
    attention_products: bool
    tokens: str
    scope: str


def conventions() -> tuple[Convention, ...]:
    """All of them, and last Foveate's own."""
    return (
        Convention("fastv", "2403.06764", 1, "2 matrices", True, "visual and text", "decoder layers, mean of them"),
        Convention("divprune", "2503.02175", 1, "2 matrices", True, "visual and text", "decoder layers"),
        Convention("pyramiddrop", "2410.17247", 1, "3 matrices", True, "visual", "decoder layers"),
        Convention("aim", "2412.03248", 2, "3 matrices", True, "visual and text", "decoder layers"),
        Convention("mqt", "2405.19315", 2, "3 matrices", True, "visual and text", "decoder layers; our reading"),
        Convention("llavolta_tflops", "2406.20092", 2, "3 matrices", False, "visual", "decoder layers, and a constant"),
        Convention("pmod", "2412.04449", 2, "3 matrices", False, "visual", "decoder layers, and a constant"),
        Convention("eemllm", "2408.11795", 2, "3 matrices", True, "visual and text", "decoder layers; our reading"),
        Convention("cost.predict", "-", 2, "as the model has", True, "visual and text", "tower, bridge, decoder layers, head, each apart"),
    )


def _macs(tokens: Sequence[int], matrices: int, width: int, mlp: int, kv_width: int | None = None) -> int:
    """Multiply-adds of decoder layers with so many tokens each."""
    kv = width if kv_width is None else kv_width
    return sum(n * (2 * width**2 + 2 * width * kv + matrices * width * mlp) + 2 * n * n * width for n in tokens)


def _with_text(visual: Sequence[int], text: int = 0) -> list[int]:
    """Tokens of each layer."""
    if not visual or min(*visual, text, 0) < 0:
        raise FoveateError(f"{list(visual)} visual and {text} text tokens: give one number for each decoder layer, none of them negative")
    return [n + text for n in visual]


def compression_ratio(tokens: Sequence[int] | Fraction | int, per_image: int, num_layers: int) -> Fraction:
    """LLaVolta's CR (arXiv 2406.20092, eq. 3): `layers * per_image / #Tokens`, #Tokens summed over the layers (or already a sum)."""
    total = Fraction(sum(tokens)) if isinstance(tokens, Sequence) else Fraction(tokens)
    if total <= 0:
        raise FoveateError(f"compression ratio of {total} visual tokens: there must be at least one left")
    return num_layers * per_image / total


def schedule_tokens(parts: Iterable[tuple[Fraction, Sequence[int]]]) -> Fraction:
    """Mean #Tokens of a schedule: the sum of share * (tokens summed over layers). The shares must add up to 1."""
    parts = list(parts)
    if (shares := sum((Fraction(share) for share, _ in parts), Fraction(0))) != 1:
        raise FoveateError(f"the shares of a schedule add up to {shares}, not to 1")
    return sum((Fraction(share) * sum(tokens) for share, tokens in parts), Fraction(0))
