"""VCD, visual contrastive decoding: what is said of the picture, less what would be said of noise over it (Leng et al., arXiv 2311.16922).

    l + α (l - l')    where l >= log β + max l, elsewhere -inf        l': the logits of a pass that sees x' in the place of the picture x
    x' = sqrt(a) x + sqrt(1 - a) e,    a = product over t <= noise of (1 - b_t),    b_t = 1e-5 + (5e-3 - 1e-5) sigmoid(-6 + 12 t / 999)

on the pixels as the processor has made them, e of variance 1 and drawn once. a is 0.74 at step 500 and 0.08 at 999. Their scripts' settings
for LLaVA: alpha=1, beta=0.1, noise=500.

Read: the authors' code, and the paper's formula as they print it beside the code; not the paper. Where we differ: in the code that can be
read the second pass begins each token with the first's cache, which the authors call a slip of its publication; here it has its own. e
follows from `seed` and the picture, so that an answer does not depend on its batch. Beam search is refused.

It costs as much again: the tower, the prompt and each token a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from foveate.inference.contrast import Contrast
from foveate.inference.noise import STEPS, noised
from foveate.inference.strategies.contrasting import Contrasting


@dataclass(frozen=True)
class VCD(Contrasting):
    """Contrasts with noise over the picture; `noise`: steps of it, 0 to 999; `seed`: of the noise."""

    name: ClassVar[str] = "vcd"
    paper: ClassVar[str] = "2311.16922"
    noise: int = 500
    seed: int = 0

    def check(self) -> None:
        super().check()
        self.least(0, "noise", "seed")
        self.between(0, STEPS - 1, "noise")

    @property
    def contrast(self) -> Contrast:
        return Contrast(str(self), self.alpha, self.beta, partial(noised, step=self.noise, seed=self.seed))
