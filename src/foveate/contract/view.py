"""View: what a reducer may look at, made by the engine or from plain tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.contract.signals import Signal
from foveate.tokens import Layout


@dataclass(frozen=True)
class Question:
    """What is asked about some of the images of each row. A sequence may ask several: an image after an earlier answer, packed samples.

    about   (B, N) bool: the visual slots that it is about
    prompt  (B, N) bool: the slots up to the one that asks, of the same sample; never those of the answer
    asking  (B,) int64: the last slot of the prompt, whose next token is the first of the answer
    text    (B, N) bool: the text of the prompt
    """

    about: Tensor
    prompt: Tensor
    asking: Tensor
    text: Tensor

    @classmethod
    def of(cls, layout: Layout, prompt_BN: Tensor, about_BN: Tensor | None = None) -> Question:
        """From the slots of the prompt, the last of which asks; about all images or some."""
        slot = torch.arange(layout.shape[1], device=prompt_BN.device)
        about = layout.visual if about_BN is None else about_BN
        return cls(about, prompt_BN, torch.where(prompt_BN, slot, 0).max(1).values, prompt_BN & (layout.image < 0))


@dataclass(frozen=True)
class View:
    """What a reducer may look at.

    layout      the arriving slots, text and padding too
    tokens      (B, N, D) their states
    questions   what is asked about the images; together they are about every visual slot
    unknown     why there are no questions, where that cannot be known
    image_keys  (I,) int64 content hash of each image
    first       the view in front of the first decoder layer, for what is decided once on the embeddings; None: this is it
    layers      decoder layers of the model
    weights     the module that the reducer decides by, where it is one that learns
    """

    layout: Layout
    tokens: Tensor | None = None
    image_keys: Tensor | None = None
    signals: dict[Signal, Any] = field(default_factory=dict)
    questions: tuple[Question, ...] | None = None
    first: View | None = None
    layers: int | None = None
    unknown: str = ""
    weights: nn.Module | None = None

    @property
    def trained(self) -> bool:
        """Whether the weights are being trained: what has no gradient when it is decided hard is then to be decided softly."""
        return self.weights is not None and self.weights.training and any(p.requires_grad for p in self.weights.parameters())

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        *,
        layout: Layout | None = None,
        grid: tuple[int, int] | None = None,
        text: int | Tensor = 0,
        image_keys: Tensor | None = None,
        signals: dict[Signal, Any] | None = None,
        layers: int | None = None,
        weights: nn.Module | None = None,
    ) -> View:
        """A view of plain tensors: one image a row, `tokens` (B, L, D), followed by `text`, the states (B, T, D) of the question or how
        many there are (these are the last of `tokens` then). grid: (rows, columns) of the image. With a layout, `tokens` are all slots.
        Signals of tokens alone, (B, L), are padded with zeros for the text."""
        if isinstance(text, Tensor):
            tokens, text = torch.cat([tokens, text], 1), text.shape[1]
        B, N = tokens.shape[:2]
        if layout is None:
            visual = torch.arange(N, device=tokens.device).expand(B, N) < N - text
            layout = Layout.sequence(visual, grids=None if grid is None else [grid] * B)
        given = dict(signals or {})
        for signal, value in given.items():
            if isinstance(value, Tensor) and value.shape[1] != N:
                given[signal] = torch.cat([value, value.new_zeros((B, N - value.shape[1], *value.shape[2:]))], 1)
        return cls(layout, tokens, image_keys, given, (Question.of(layout, layout.valid),), layers=layers, weights=weights)

    def asked_at(self, slot_B: Tensor) -> View:
        """The same where the prompt of each row ends at a slot: what follows is the answer, which a method does not look at."""
        slot = torch.arange(self.layout.shape[1], device=slot_B.device)
        return replace(self, questions=(Question.of(self.layout, self.layout.valid & (slot <= slot_B[:, None])),))

    def signal(self, signal: Signal) -> Any:
        """What the signal says of the arriving slots, in float32."""
        if signal not in self.signals:
            self.signals[signal] = signal.compute(self)
        value = self.signals[signal]
        return value.to(torch.float32) if isinstance(value, Tensor) else value
