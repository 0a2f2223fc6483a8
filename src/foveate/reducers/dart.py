"""DART: a few pivots, and the visual tokens that duplicate them least (arXiv 2502.11494). Reads no attention weights.

    pivots  by L1 norm of the keys of layer `layer` - 1, after rotary embedding, heads side by side: the first `visual_pivots` of the image
            and the first `text_pivots` of the text behind it
    picks   each pivot in turn takes the t remaining visual tokens whose states have the lowest cosine to its own
    kept    visual pivots and picks, in raster order, at their original positions; text pivots are text and stay anyway

Visual pivots pick first, by descending norm, then text pivots, by descending norm.

How many: `keep` is the number of tokens that stay, pivots included; what the visual pivots leave of it is shared evenly by all pivots, the
first ones taking the remainder (`rounding="exact"`). The code's t = floor(T / 8), so that 8 floor(T / 8) + 4 stay of a budget T (196 for
192), is `rounding="code"`; with a share it takes floor(N share / 8), its Qwen rule.

Where this differs from the authors' code (read as a vendored copy): the states are the layer's output as it is, without the language
model's final norm. That norm's division by the root mean square changes no cosine; its learned weights, which the code applies, do.
Pivots pick in the order above (theirs: the hash order of a Python set). Other images behind an image are no pivots of it, nor is the
answer in training (theirs: everything behind the image, batch 1). With fewer text pivots than asked for, the others pick their share, so
that the number that stays is always the same. The paper's own statement of the number and of a default budget is not in our reference;
keep=0.25 is this library's.

The L1 norm of a rotated key depends on its position: a prompt at other position ids (such as a forward call under left padding counts,
where none are handed in; `generate` hands them in) may keep other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.contract import Cut, FromLayer, Keys, Site, View, Workload, products
from foveate.errors import FoveateError
from foveate.reducers.base import Reducer
from foveate.reducers.common import OF, choose, images, integers, leaving, meant, questions
from foveate.tokens import TokenMap, budget


@dataclass(frozen=True)
class DART(Reducer):
    """Keeps `keep` of each image's tokens in front of decoder layer index `layer` (0-based, at least 1).

    rounding  "exact" or "code", see above
    of        whether a share is one of the tokens that arrive or of those that the image had in front of the first layer
    """

    name: ClassVar[str] = "dart"
    paper: ClassVar[str] = "2502.11494"
    looks_at: ClassVar[frozenset[str]] = frozenset({"text", "keys", "positions", "states"})
    examples: ClassVar[tuple[str, ...]] = ("dart:keep=0.5,layer=2",)
    keeps_all: ClassVar[tuple[str, ...]] = ("dart:keep=1.0,layer=2",)
    multiplies: ClassVar[tuple[str, ...]] = ("dart:keep=0.5,layer=1,text_pivots=1",)
    keep: float | int = 0.25
    layer: int = 2
    visual_pivots: int = 4
    text_pivots: int = 4
    rounding: str = "exact"
    of: str = "arriving"

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)
        choose(self, rounding=("exact", "code"), of=OF)
        integers(self, ", the keys of the layer before it are needed", layer=1)
        # Without a visual pivot an image that no text follows would have none at all.
        integers(self, visual_pivots=1, text_pivots=0)

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(self.layer, (Keys(self.layer - 1),))]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        layout, tokens = view.layout, view.tokens
        if tokens is None:
            raise FoveateError("dart: needs the tokens' states; make the view by View.of, or give View(tokens=…)")
        asked = questions(self.name, view)
        norm = view.signal(Keys(self.layer - 1)).abs().sum(-1)
        number = leaving(view, self._left)
        kept = torch.zeros_like(layout.visual)
        for b, visual in images(layout):
            text = next(q.text for q in asked if bool(q.about[b, visual[0]]))[b].nonzero()[:, 0]
            behind = text[text > visual[-1]]
            total = int(number[b, visual[0]])
            own = _first(norm[b, visual], min(self.visual_pivots, total))
            pivots = torch.cat([visual[own], behind[_first(norm[b, behind], self.text_pivots)]])
            picks = _picks(tokens[b, pivots].to(torch.float32), tokens[b, visual].to(torch.float32), own, total)
            kept[b, visual[picks]] = True
        return Cut(TokenMap.keep(layout, kept))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return work.leaving(self._left)

    def _left(self, arriving: int, original: int) -> int:
        base = original if self.of == "original" else arriving
        total = budget(self.keep, base)
        if self.rounding == "code" and total < base:
            pivots = self.visual_pivots + self.text_pivots
            t = self.keep // pivots if isinstance(self.keep, int) else int(meant(self.keep) * base / pivots)
            total = t * pivots + self.visual_pivots
        return min(arriving, total)

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        """Where at least `text_pivots` text tokens follow each image."""
        pairs = []
        for image, arriving in zip(sizes.images, sizes.arriving, strict=True):
            own = min(self.visual_pivots, self._left(arriving, image.tokens))
            pairs.append((own + min(self.text_pivots, sizes.text), arriving))
        return products(pairs, sizes.width)


def _first(score: Tensor, count: int) -> Tensor:
    """The `count` highest, in descending order, ties by the lower index."""
    return torch.argsort(score, descending=True, stable=True)[:count]


def _picks(pivots_PD: Tensor, states_LD: Tensor, own: Tensor, total: int) -> Tensor:
    """(L,) bool: `own` and, for each pivot in turn, the remaining states with the lowest cosine to it, `total` in all."""
    cosine = torch.nn.functional.normalize(pivots_PD, dim=-1) @ torch.nn.functional.normalize(states_LD, dim=-1).T
    kept = torch.zeros(len(states_LD), dtype=torch.bool, device=states_LD.device)
    kept[own] = True
    each, more = divmod(total - len(own), len(pivots_PD))
    for p in range(len(pivots_PD)):
        kept[_first((-cosine[p]).masked_fill(kept, float("-inf")), each + (p < more))] = True
    return kept
