"""PriorTR: the tokens that the question looks at more than a token would that has not seen it (arXiv 2606.24156).

    P_n = attention of the asking row to token n;  Q_n = that of the null token, the first behind the image;  both in layer K - 1, mean over
    heads, over the tokens of one image alone, where each is made to sum to 1
    S_n = P_n log(P_n / Q_n);  keep the T largest S_n of the image, in raster order, at their original positions

The null token cannot see the question that follows it, so Q is what the model looks at whatever is asked. S may be negative. P is of the
prompt's last row (`rows="last"`) or the mean over all rows of text behind the image (`rows="all"`), as the code has both.

The null token is the first token of text behind the image, or, with `null=1`, the one behind that, as the authors take it for InternVL
(where `</img>` comes first). Newlines that belong to the image are none. Where the prompt has no text behind an image, P and Q are the
same row and all S are 0: the lowest raster indices stay.

Where this differs from the authors' code: the layers in front of `layer` keep all tokens in their caches, theirs are cut afterwards to
one length for all. With `rows="all"` they leave out the last row on Qwen's models, this never does. Theirs takes one image a prompt; here
each image has the null token and the rows behind it alone. The variant that gets Q from a second prefill, and heads by their maximum, are
not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.contract import Attention, AttentionRows, FromLayer, Site, View, Workload
from foveate.reducers.common import asked, choose, images, integers, questions
from foveate.reducers.ranker import Ranker
from foveate.tokens import Kind

EPSILON = 1e-10


@dataclass(frozen=True)
class PriorTR(Ranker):
    """Keeps `keep` of each image's tokens in front of decoder layer index `layer` (0-based, at least 1).

    rows  "last": P is of the asking row; "all": of all rows of the prompt's text behind the image, their mean
    null  how many tokens of text come between the image and the null token
    of    whether a share is one of the tokens that arrive or of those that the image had in front of the first layer
    """

    name: ClassVar[str] = "priortr"
    paper: ClassVar[str] = "2606.24156"
    looks_at: ClassVar[frozenset[str]] = frozenset({"text", "attention"})
    examples: ClassVar[tuple[str, ...]] = ("priortr:keep=0.5,layer=2", "priortr:keep=0.3,layer=1,rows=all,null=1")
    keeps_all: ClassVar[tuple[str, ...]] = ("priortr:keep=1.0,layer=2",)
    multiplies: ClassVar[tuple[str, ...]] = ("priortr:keep=0.5,layer=1",)
    keep: float | int = 0.25
    layer: int = 3
    rows: str = "last"
    null: int = 0
    of: str = "arriving"

    def check(self) -> None:
        super().check()
        choose(self, rows=("last", "all"))
        integers(self, ", the attention of the layer before it is needed", layer=1)
        integers(self, null=0)

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(self.layer, (Attention(self.layer - 1),))]

    def score(self, view: View, stage: int = 0) -> Tensor:
        attention: AttentionRows = view.signal(Attention(self.layer - 1))
        P = asked(self.name, view, lambda question: attention.row(question.asking)) if self.rows == "last" else None
        score = torch.zeros(view.layout.shape, device=view.layout.kind.device)
        for slots, null_B, behind in self._images(view):
            Q = attention.row(null_B)
            divergence = _divergence(attention.received(behind) if P is None else P, Q, slots)
            score = torch.where(slots, divergence, score)
        return score

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        """With rows="all" at most: as if all text came behind every image."""
        count = len(sizes.images)
        return sizes.rows(1 + count) if self.rows == "last" else count * sizes.rows(1 + sizes.text)

    def _images(self, view: View) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of the first image of each row, then the second, …: its slots (B, N) bool, its null token (B,), and the text behind it (B, N)
        bool, the asking row where there is none."""
        layout, several = view.layout, questions(self.name, view)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        turn = [0] * layout.shape[0]
        for b, image in images(layout):
            question = next(q for q in several if bool(q.about[b, image[0]]))
            text = (question.text[b] & (layout.kind[b] == Kind.TEXT)).nonzero()[:, 0]
            behind = text[text > image[-1]]
            if not len(behind):
                behind = question.asking[b : b + 1]
            if turn[b] == len(found):
                found.append((torch.zeros_like(layout.valid), question.asking.clone(), torch.zeros_like(layout.valid)))
            slots_BN, null_B, behind_BN = found[turn[b]]
            turn[b] += 1
            slots_BN[b, image] = behind_BN[b, behind] = True
            null_B[b] = behind[min(self.null, len(behind) - 1)]
        return found


def _divergence(P_BN: Tensor, Q_BN: Tensor, slots_BN: Tensor) -> Tensor:
    """(B, N) P log(P / Q) of what each row pays to the slots of one image."""
    P, Q = (torch.where(slots_BN, x, 0.0) for x in (P_BN, Q_BN))
    P, Q = (x / (x.sum(1, keepdim=True) + EPSILON) for x in (P, Q))
    return P * ((P + EPSILON) / (Q + EPSILON)).log()
