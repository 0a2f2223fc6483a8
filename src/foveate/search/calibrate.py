"""What methods are set by that need no training, only a look at a model and a few prompts.

    prompts = [processor(text=text, images=image, return_tensors="pt") for text, image in …]
    foveate.attach(model, vtw(model, prompts, eta=0.003))
    save_reducers([fitprune(model, prompts, tokens=0.5)], folder)     # beside the model's weights, where `attach(model)` reads it

Prompts are what the model is called with: with images, without answers, in batches of any size, on its device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from foveate.anatomy import read
from foveate.contract import Attention, AttentionRows, Cut, FromLayer, Site, View, Workload
from foveate.engine.attach import attach
from foveate.errors import FoveateError
from foveate.inference import answering, progress_bar
from foveate.reducers import VTW, FitPrune, GammaMoD, Reducer
from foveate.reducers.common import images, questions
from foveate.reducers.fitprune import received
from foveate.reducers.gammamod import arank
from foveate.tokens import TokenMap

Prompts = Sequence[Mapping[str, Any]]


def vtw(model: nn.Module, prompts: Prompts, *, eta: float = 0.003, first: int = 5, progress: bool = False) -> VTW:
    """VTW at the first decoder layer, from index `first` up, whose `divergences` are within `eta`; after the last layer they are."""
    return VTW.within(divergences(model, prompts, first=first, progress=progress), eta)


def divergences(model: nn.Module, prompts: Prompts, *, first: int = 5, progress: bool = False) -> dict[int, float]:
    """By decoder layer index from `first` up, how far the next token's distribution at the end of a prompt moves when its images are
    withdrawn in front of that layer: KL divergence from the whole model's, in nats, mean over prompts; 0 after the last layer."""
    layers = len(read(model).layers)
    if not 0 <= first < layers:
        raise FoveateError(f"first={first} is not possible; give a decoder layer index from 0 to {layers - 1}")
    found: dict[int, list[float]] = {layer: [] for layer in range(first, layers)}
    seen = False
    with answering(model), progress_bar(progress) as bar:
        task = bar.add_task("without images", total=len(prompts) * len(found))
        for prompt in prompts:
            whole = _next(model, prompt)
            for layer, values in found.items():
                with attach(model, VTW(layer=layer)) as run:
                    values += kl_div(_next(model, prompt), whole, reduction="none", log_target=True).sum(-1).tolist()
                    seen = seen or bool(run.passes)
                bar.advance(task)
    if not seen:
        raise _NO_IMAGES
    return {layer: fmean(values) for layer, values in found.items()} | {layers: 0.0}


def fitprune(
    model: nn.Module, prompts: Prompts, *, tokens: float, cost: Callable[[Sequence[float]], float] | None = None, progress: bool = False
) -> FitPrune:
    """FitPrune with the recipe that these prompts give for a budget: `tokens`, a share of the visual tokens, mean over the decoder layers.

    cost: what shares of the tokens, by layer, cost in place of their mean. FoveateError where not even one token an image is within the
    budget.
    """
    layers = len(read(model).layers)
    found: dict[tuple[int, int], list[tuple[Tensor, Tensor] | None]] = {}

    def note(prompt: int, layer: int, view: View, attention: AttentionRows) -> None:
        for question in questions("fitprune", view):
            cross, own = received(attention, question, view.layout)
            for image, (row, slots) in enumerate(images(view.layout)):
                if bool(question.about[row, slots[0]]):
                    found.setdefault((prompt, image), [None] * layers)[layer] = cross[row, slots].cpu(), own[row, slots].cpu()

    _watch(model, prompts, note, progress)
    return FitPrune.fitted(list(found.values()), tokens, cost)


def gammamod(model: nn.Module, prompts: Prompts, *, share: float, progress: bool = False, **options: Any) -> GammaMoD:
    """γ-MoD that routes a share of a model's decoder layers, those of lowest ARank on these prompts. options: its others."""
    return GammaMoD.of_ranks(aranks(model, prompts, progress=progress), share, **options)


def aranks(model: nn.Module, prompts: Prompts, *, progress: bool = False) -> dict[int, float]:
    """By decoder layer that attends, but for the first and the last, the rank of its attention maps, mean over heads and prompts."""
    found: dict[int, list[float]] = {}

    def note(prompt: int, layer: int, view: View, attention: AttentionRows) -> None:
        B, N = view.layout.shape
        maps = attention.rows(torch.arange(N, device=view.layout.valid.device).expand(B, N))
        for row, valid in enumerate(view.layout.valid):
            ranks = arank(maps[row][:, valid][..., valid]).float()
            found.setdefault(layer, []).append(float(attention.mean(ranks[None])))

    _watch(model, prompts, note, progress)
    return {layer: fmean(ranks) for layer, ranks in found.items() if layer}


_NO_IMAGES = FoveateError("none of the prompts has an image, so there is nothing to look at; give prompts with images")


def _next(model: nn.Module, prompt: Mapping[str, Any]) -> Tensor:
    """(B, vocabulary) float32 log-probabilities of the token that follows each row of a prompt."""
    logits: Tensor = model(**prompt, use_cache=False).logits
    mask = prompt.get("attention_mask")
    rows = torch.arange(len(logits), device=logits.device)
    last = torch.full_like(rows, -1) if mask is None else mask.cumsum(1).argmax(1)
    return logits[rows, last].float().log_softmax(-1)


def _watch(model: nn.Module, prompts: Prompts, note: Callable[[int, int, View, AttentionRows], None], progress: bool) -> None:
    """Runs a model on each prompt, and has the attention of every decoder layer that attends, but for the last, noted with the slots."""
    anatomy = read(model)
    layers = tuple(layer for layer in range(len(anatomy.layers) - 1) if not anatomy.recurrent(layer))
    seen = False
    with answering(model), progress_bar(progress) as bar:
        task = bar.add_task("attention", total=len(prompts))
        for number, prompt in enumerate(prompts):
            with attach(model, _Watch(layers=layers, note=partial(note, number))) as run:
                model(**prompt, use_cache=False)
                seen = seen or bool(run.passes)
            bar.advance(task)
    if not seen:
        raise _NO_IMAGES


@dataclass(frozen=True)
class _Watch(Reducer):
    """Keeps everything, and tells what it sees."""

    name: ClassVar[str] = "watch"
    paper: ClassVar[str] = "-"
    layers: tuple[int, ...] = ()
    note: Any = None

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(layer + 1, (Attention(layer),)) for layer in self.layers]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        layer = self.layers[stage]
        self.note(layer, view, view.signal(Attention(layer)))
        return Cut(TokenMap.identity(view.layout))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return list(work.arriving)
