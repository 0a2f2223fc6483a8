"""Where scores come from. A signal is a small frozen description of what a reducer wants to know; whoever makes the View provides it.

`ClsAttention`, `ReceivedAttention`, `TowerKeys` are read in the vision tower and follow each token through the bridge to its slot;
`Attention` and `Keys` are read in a decoder layer; `Noise` needs the images alone. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.tokens import Layout, TokenMap

_CHUNK = 256  # words of an image that are hashed as one
BLOCK = 256  # query rows whose attention is held at once


@dataclass(frozen=True)
class Signal:
    """Base of all signals. What one says about slots that it does not apply to (text, for the tower's) has no meaning."""

    def compute(self, view: View) -> Any:
        raise FoveateError(f"{self} is not provided here: attach to a model that has it, or hand it in by View.of(..., signals={{...}})")


@dataclass(frozen=True)
class Noise(Signal):
    """(B, N) uniform scores from a hash of (seed, image content, place in the image): the same in every batch row, beam and resumed run."""

    seed: int = 0

    def compute(self, view: View) -> Tensor:
        if view.image_keys is None:
            raise FoveateError("random scores need the images' content keys: call the model with pixel_values, or View.of(image_keys=…)")
        image = view.layout.image.clamp(min=0)
        key = view.image_keys[image] ^ _mix(torch.full_like(image, self.seed) * 0x9E3779B1 + view.layout.rank_in_image)
        return (_mix(key) >> 8).to(torch.float32) / float(1 << 24)


@dataclass(frozen=True)
class ClsAttention(Signal):
    """(B, N) attention that the tower's [CLS] pays to each token in block `layer` (negative: index into the hidden states, so that -2 is
    the block whose output LLaVA takes), mean over heads, softmax over [CLS] and patches. A token made of several patches has their mean.
    In a tower without [CLS]: what `ReceivedAttention` gives."""

    layer: int = -2


@dataclass(frozen=True)
class ReceivedAttention(Signal):
    """(B, N) attention that each token receives in the tower's block `layer`, mean over heads and over all queries of its crop."""

    layer: int = -2


@dataclass(frozen=True)
class TowerKeys(Signal):
    """(B, N, h) keys of the tower's block `layer`, mean over heads; of a token made of several patches, their mean."""

    layer: int = -2


@dataclass(frozen=True)
class Attention(Signal):
    """The `AttentionRows` of decoder layer index `layer`: any of its rows, none of them computed before it is asked for."""

    layer: int


@dataclass(frozen=True)
class Keys(Signal):
    """(B, N, G * h) keys of decoder layer index `layer` after the rotary embedding, its key heads side by side."""

    layer: int


@dataclass(frozen=True)
class AttentionRows:
    """Softmax attention of one layer, computed only in the rows asked for. Legend: H heads, G key heads, h head width, K keys.

    query   (B, H, N, h) and key (B, G, K, h) as they enter the attention function: after norm and rotary embedding
    scale   what their product is multiplied with; `softcap` bounds it as tanh(x / softcap) * softcap where the model does
    mask    (B or 1, 1 or H, N, K) bool (True: may attend) or additive; None: with `causal` as a causal mask has it, the last query beside
            the last key, else every query sees every key

    Rows and columns are those of the layer, or, with `slots`, those of the slots that are left of them (`of_slots`): the softmax was over
    all keys, and stays so. Under tensor parallelism the heads here are this rank's own, and `group` are the ranks that share the others
    out: what is said of all heads (`mean`, `row`, `received`, `keys`) is asked of all of them, so every rank must ask.
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None = None
    softcap: float | None = None
    weights: Tensor | None = None
    slots: Tensor | None = None  # (B, M) int64: the query behind each slot; its key is `start` further on, behind what was cached before
    start: int = 0
    causal: bool = True
    valid: Tensor | None = None  # (B, <= K) bool: keys that are no padding; what lies beyond its width is no key at all
    window: int | None = None  # keys, the query's own among them, that a row reaches back to
    samples: Tensor | None = None  # (B or 1, N) int64: rows of one packed sample do not see another's keys
    group: Any = None  # a torch.distributed.ProcessGroup

    @classmethod
    def of(cls, weights_BHNK: Tensor) -> AttentionRows:
        """From a finished attention map, for tests and for use without a model."""
        empty = weights_BHNK.new_zeros(0)
        return cls(empty, empty, 1.0, weights=weights_BHNK.to(torch.float32))

    def rows(self, index_BR: Tensor) -> Tensor:
        """(B, H, R, K) attention of the rows `index_BR` (int64), head by head: `mean` makes one of them."""
        if self.slots is None:
            return self._rows(index_BR)
        found = self._rows(self.slots.gather(1, index_BR))
        return found.gather(3, (self.slots + self.start)[:, None, None].expand(-1, found.shape[1], found.shape[2], -1))

    def _rows(self, index_BR: Tensor) -> Tensor:
        if self.weights is not None:
            H, K = self.weights.shape[1], self.weights.shape[3]
            return self.weights.gather(2, index_BR[:, None, :, None].expand(-1, H, -1, K))
        B, H, N, h = self.query.shape
        G, K = self.key.shape[1], self.key.shape[2]
        R = index_BR.shape[1]
        q = self.query.gather(2, index_BR[:, None, :, None].expand(-1, H, -1, h)).to(torch.float32)
        logits = q.view(B, G, H // G, R, h) @ self.key.to(torch.float32)[:, :, None].transpose(-1, -2)
        logits = logits.view(B, H, R, K).mul_(self.scale)  # in place: new memory of this size costs more than the product
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.mask is None and self.causal:
            logits.masked_fill_(~self._seen(index_BR, N, K)[:, None], float("-inf"))
        elif self.mask is not None:
            mask = self.mask[..., :K].expand(B, -1, -1, -1)
            mask = mask.gather(2, index_BR[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
            low = torch.finfo(torch.float32).min
            logits = logits.masked_fill_(~mask, low) if mask.dtype == torch.bool else logits.add_(mask.to(torch.float32)).clamp_(min=low)
        return logits.softmax(-1)

    def _seen(self, index_BR: Tensor, N: int, K: int) -> Tensor:
        """(B, R, K) bool: the keys that some rows attend to where no mask says it."""
        keys, whole = torch.arange(K, device=index_BR.device), K if self.valid is None else self.valid.shape[1]
        own = index_BR[..., None] + (whole - N)  # the last query stands beside the last key that there is
        seen = keys <= own
        if self.window is not None:
            seen = seen & (keys > own - self.window)
        if self.valid is not None:
            there = torch.nn.functional.pad(self.valid.to(torch.bool), (0, K - whole))[:, None]
            seen = seen & (there | (keys == own))  # a row of padding sees itself: no row may see nothing
        if self.samples is not None:
            samples = self.samples.expand(index_BR.shape[0], -1)
            seen = seen & (samples.gather(1, index_BR)[..., None] == samples[:, None])
        return seen

    def under_flash(self, valid: Tensor | None, window: int | None, samples: Tensor | None) -> AttentionRows:
        """The same as flash attention computes it: causal by slots, without padding, within a window, packed samples apart."""
        return replace(self, mask=None, valid=valid, window=window, samples=samples)

    def of_slots(self, here: TokenMap, start: int = 0) -> AttentionRows:
        """The same in terms of the slots that `here` leaves of the layer's queries, whose keys begin at number `start`."""
        return replace(self, slots=here.representative.clamp(min=0), start=start)

    def mean(self, heads_BH: Tensor) -> Tensor:
        """(B, ...) mean over all heads of (B, H, ...), what was found for each head that is here."""
        own = heads_BH.mean(1)
        if self.group is None:
            return own
        own = own.contiguous()
        torch.distributed.all_reduce(own, group=self.group)
        return own / self.group.size()

    def keys(self) -> Tensor:
        """(B, K, G * h) float32 keys, all heads side by side."""
        own = self.key.to(torch.float32).transpose(1, 2).flatten(2).contiguous()
        if self.group is None:
            return own
        parts = [torch.empty_like(own) for _ in range(self.group.size())]
        torch.distributed.all_gather(parts, own, group=self.group)
        return torch.cat(parts, 2)

    def row(self, index_B: Tensor) -> Tensor:
        """(B, K) attention of one row a sample, mean over heads."""
        return self.mean(self.rows(index_B[:, None])[:, :, 0])

    def received(self, rows_BN: Tensor) -> Tensor:
        """(B, K) attention received from the rows where `rows_BN` (bool) is True, mean over heads and over those rows; 0 without any."""
        B = rows_BN.shape[0]
        total: Tensor | None = None
        for index in _blocks(rows_BN):
            part = self.mean(self.rows(index.clamp(min=0))) * (index >= 0)[..., None]
            total = part.sum(1) if total is None else total + part.sum(1)
        if total is None:
            keys = self.slots if self.slots is not None else self.key[0, 0] if self.weights is None else self.weights[0, 0].T
            return torch.zeros((B, keys.shape[1] if self.slots is not None else keys.shape[0]), device=rows_BN.device)
        return total / rows_BN.sum(1, keepdim=True).clamp(min=1)


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
    """

    layout: Layout
    tokens: Tensor | None = None
    image_keys: Tensor | None = None
    signals: dict[Signal, Any] = field(default_factory=dict)
    questions: tuple[Question, ...] | None = None
    first: View | None = None
    layers: int | None = None
    unknown: str = ""

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
        return cls(layout, tokens, image_keys, given, (Question.of(layout, layout.valid),), layers=layers)

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


def content_keys(images: Tensor | list[Tensor]) -> Tensor:
    """(I,) int64 hash of each image's content; images: (I, ...) pixels or a list of feature tensors. Never leaves the device."""
    keys = []
    for image in images:
        words = image.detach().to(torch.float32).flatten().view(torch.int32)
        if words.numel() > 4 * _CHUNK:  # sums over chunks first, each word by an odd factor of its own: integers, which wrap around
            words = torch.nn.functional.pad(words, (0, -words.numel() % _CHUNK)).view(-1, _CHUNK).to(torch.int64)
            factors = _mix(torch.arange(1, _CHUNK + 1, device=words.device)) | 1
            words = (words * factors).sum(1)
            words = words ^ (words >> 32)
        words = words.to(torch.int64)
        places = torch.arange(words.numel(), dtype=torch.int64, device=words.device)
        keys.append(_mix(_mix(words ^ _mix(places)).sum()))
    return torch.stack(keys) if keys else torch.zeros(0, dtype=torch.int64)


def _blocks(rows_BN: Tensor) -> Iterator[Tensor]:
    """(B, <= BLOCK) indices of the True entries of each row, padded with -1, block by block."""
    counts = rows_BN.sum(1)
    order = torch.argsort((~rows_BN).to(torch.int8), dim=1, stable=True)
    place = torch.arange(order.shape[1], device=order.device)
    order = torch.where(place < counts[:, None], order, -1)
    for start in range(0, int(counts.max()) if counts.numel() else 0, BLOCK):
        yield order[:, start : min(start + BLOCK, int(counts.max()))]


def _mix(x: Any) -> Tensor:
    """A 32-bit finaliser (xor-shift, multiply) on int64 tensors: integers only, so the same on every device."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)
