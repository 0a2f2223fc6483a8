"""Clips for the tests of methods that compare frames: batches of them, ragged in every way, and a method run on one clip."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from foveate.contract import ClsAttention, ImageSize, ReceivedAttention, Signal, View, Workload
from foveate.engine.record import Record
from foveate.reducers.base import Reducer
from foveate.tokens import Kind, Layout, TokenMap
from tests.reducers.ragged import mapped

Shape = tuple[int, int, int]  # frames, rows, columns


@dataclass
class Clips:
    """Rows of clips with text around them, padded; the same rows one by one. `missing`: of each clip the (frame, row, column) it lacks."""

    view: View
    rows: list[Clips]

    @property
    def layout(self) -> Layout:
        return self.view.layout


def row_of(shapes: list[Shape], states: list[Tensor], missing: set[tuple[int, int, int]]) -> tuple[list[list[int]], Tensor]:
    """(image, frame, row, column) of each slot, -1s for text, and their states."""
    places, kept = [[-1, -1, -1, -1]], [torch.zeros(1, states[0].shape[-1] if states else 4)]
    for image, ((frames, rows, columns), x) in enumerate(zip(shapes, states, strict=True)):
        for f in range(frames):
            cells = [(r, c) for r in range(rows) for c in range(columns) if (f, r, c) not in missing]
            places += [[image, f if frames > 1 else -1, r, c] for r, c in cells]
            kept.append(torch.stack([x[f, r * columns + c] for r, c in cells]) if cells else x[:0, 0])
            places.append([-1, -1, -1, -1])  # as a timestamp behind every frame
            kept.append(torch.ones(1, x.shape[-1]))
    return places, torch.cat(kept)


def make(
    batch: list[list[Shape]], states: list[list[Tensor]], missing: set[tuple[int, int, int]] | None = None, left: bool = False
) -> Clips:
    made = [row_of(shapes, x, missing or set()) for shapes, x in zip(batch, states, strict=True)]
    singles = [Clips(_view([one], left), []) for one in made]
    return Clips(_view(made, left), singles)


def _view(made: list[tuple[list[list[int]], Tensor]], left: bool) -> View:
    N, width = max(len(places) for places, _ in made), made[0][1].shape[-1]
    B = len(made)
    place = torch.full((B, N, 5), -1)
    valid = torch.zeros(B, N, dtype=torch.bool)
    tokens = torch.full((B, N, width), 7.0)
    first = 0
    for b, (places, x) in enumerate(made):
        at = slice(N - len(places), N) if left else slice(0, len(places))
        cells = torch.tensor(places)
        image = torch.where(cells[:, 0] >= 0, cells[:, 0] + first, -1)
        place[b, at] = torch.stack([image, torch.full_like(image, -1), *cells[:, 1:].unbind(1)], 1)
        valid[b, at], tokens[b, at] = True, x
        first += int(cells[:, 0].max()) + 1
    visual = place[..., 0] >= 0
    kind = torch.where(visual, int(Kind.PATCH), int(Kind.TEXT))
    layout = Layout(kind, valid, torch.arange(N).expand(B, N), place, visual.to(torch.float32))
    # Attention that follows the states alone, so that a clip has the same whatever is beside it.
    signals: dict[Signal, Tensor] = {kind_(-1): tokens.sin().sum(-1) for kind_ in (ClsAttention, ReceivedAttention)}
    return View.of(tokens, layout=layout, signals=signals)


def film(shape: Shape, seed: int = 0, width: int = 6, still: float = 0.5) -> Tensor:
    """(F, P, width) states of which a share stands still from frame to frame, exactly."""
    F, P = shape[0], shape[1] * shape[2]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(F, P, width, generator=generator)
    stays = torch.rand(F, P, generator=generator) < still
    for f in range(1, F):
        x[f] = torch.where(stays[f][:, None], x[f - 1], x[f])
    return x


@st.composite
def batches(draw: st.DrawFn) -> Clips:
    """Clips of several lengths and sizes in a row and beside each other; some lack places in some frames."""
    shapes = st.tuples(st.sampled_from([1, 2, 3, 5, 6, 9]), st.integers(1, 4), st.integers(1, 4))
    batch = [draw(st.lists(shapes, min_size=1, max_size=2)) for _ in range(draw(st.integers(1, 2)))]
    seed = draw(st.integers(0, 999))
    still = draw(st.sampled_from([0.0, 0.6, 1.0]))
    states = [[film(shape, seed + 7 * b + i, still=still) for i, shape in enumerate(row)] for b, row in enumerate(batch)]
    missing = {(1, 0, 0), (2, 0, 1), (4, 1, 1)} if draw(st.booleans()) else set()
    missing = {at for at in missing if all(rows * columns > 1 for row in batch for _, rows, columns in row)}
    return make(batch, states, missing, left=draw(st.booleans()))


def alone(reducer: Reducer, x: Tensor, signal: Tensor | None = None) -> tuple[list[int], TokenMap]:
    """A method on one clip (F, P, D) without text: the survivors, by f * P + p, and the map. signal: (F, P) the tower's attention."""
    F, P, width = x.shape
    place = torch.full((1, F * P, 5), -1)
    place[..., 0] = 0
    if F > 1:
        place[0, :, 2] = torch.arange(F).repeat_interleave(P)
    place[0, :, 3], place[0, :, 4] = 0, torch.arange(P).repeat(F)
    layout = replace(Layout.sequence(torch.ones(1, F * P, dtype=torch.bool)), place=place)
    score = torch.zeros(1, F * P) if signal is None else signal.reshape(1, -1)
    view = View.of(x.reshape(1, F * P, width), layout=layout, signals={ClsAttention(-1): score, ReceivedAttention(-1): score})
    found = mapped(reducer.reduce(view))
    return found.representative[0].tolist(), found


def check(reducer: Reducer, batch: Clips) -> None:
    """What every method for videos holds: text stays, counts are kept to, and a row is what it is alone."""
    found = mapped(reducer.reduce(batch.view))
    for b, single in enumerate(batch.rows):
        source, target = single.layout, mapped(reducer.reduce(single.view)).target
        (prompt,) = Record(layouts=[source]).prompts
        work = Workload(tuple(prompt.images), tuple(image.tokens for image in prompt.images))
        said = reducer.count(work)
        left = [int((target.visual & (target.image == i)).sum()) for i in range(len(said))]
        if getattr(reducer, "scope", "image") == "sample":
            said, left = [sum(said)], [sum(left)]
        if reducer.exact(work):
            assert said == left
        assert all(0 <= b <= a for a, b in zip(said, left, strict=True)), (said, left)
        text = (source.valid & ~source.visual).sum()
        assert (target.valid & ~target.visual).sum() == text
        # The same map, wherever the row stands in the batch.
        rows = _edges(mapped(reducer.reduce(single.view)), 0), _edges(found, b)
        assert rows[0] == rows[1]


def _edges(token_map: TokenMap, row: int) -> list[tuple[tuple[int, ...], list[tuple[tuple[int, ...], float]]]]:
    """By target its place, and those of its sources with their weights; images counted from the row's first."""
    source = token_map.source
    first = int(torch.where(source.visual[row], source.image[row], 1 << 30).min())

    def name(slot: int) -> tuple[int, ...]:
        image, _, *rest = source.place[row, slot].tolist()
        return (image - first if image >= 0 else -1, *rest)

    out = []
    for m, representative in enumerate(token_map.representative[row].tolist()):
        if representative < 0 or not bool(source.visual[row, representative]):
            continue
        members = [int(s) for s in token_map.member[row, m] if s >= 0]
        at = token_map.member[row, m].tolist()
        weights = [1.0 if token_map.weight is None else float(token_map.weight[row, m, at.index(s)]) for s in members]
        out.append((name(representative), sorted(zip(map(name, members), [round(w, 9) for w in weights], strict=True))))
    return out


def size_of(frames: int, places: int) -> ImageSize:
    """A video of so many frames and tokens a frame."""
    return ImageSize((frames * places,), (places,) * frames)


def count(reducer: Reducer, frames: int, places: int) -> int:
    size = size_of(frames, places)
    (left,) = reducer.count(Workload((size,), (size.tokens,)))
    return left
