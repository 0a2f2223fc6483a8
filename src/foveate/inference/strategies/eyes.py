"""What a search asks of a model, which is little, and any model that Foveate opens answering it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from foveate.accounting import Ledger, answered, predict, read_prompts
from foveate.anatomy import features_of, read
from foveate.anatomy.config import sides_of
from foveate.contract import Attention, AttentionRows, Cut, Decision, FromLayer, Site, View, Workload
from foveate.data import conversations
from foveate.data.chat import Renderer
from foveate.engine.attach import attach
from foveate.engine.record import Record
from foveate.engine.run import RUN, Run
from foveate.errors import FoveateError
from foveate.inference.answering import answer, answering, next_logits
from foveate.inference.asking import model_inputs, shrunk
from foveate.inference.contrast import Contrast
from foveate.inference.costs import answer_cost
from foveate.reducers import Reducer, in_model, parse, prepare
from foveate.tokens import Layout, TokenMap

_SIDE = 336  # px that a tower sees at once, where nothing says it
_YES, _NO = ("yes", "Yes", "YES", " yes", " Yes"), ("no", "No", "NO", " no", " No")

Map = NDArray[np.float32]


@dataclass(frozen=True)
class Pass:
    """One call of a model.

    what    it was asked for, such as "exists" or "answer"; said: what it answered
    prompt  tokens of the prompt, visual ones among them, as they entered the language model; visual: those that entered its first layer
    new     tokens that were generated; 0 where an image was encoded and nothing asked
    ledger  its cost, answer included; None where the model's cost is not known
    beside  whether it goes along with the next one, token by token: its cache is there as long
    """

    what: str
    said: str | float
    prompt: int
    visual: int
    new: int
    ledger: Ledger | None
    seconds: float = 0.0
    beside: bool = False


class Eyes(Protocol):
    """What a search asks of a model. `inputs` are what `write` made, whatever that is.

    side    pixels that it sees at once, in each direction
    layers  decoder layers
    """

    side: int
    layers: int

    def write(self, views: Sequence[Image.Image], text: str) -> Any:
        """Views and a question as the model takes them."""

    def price(self, inputs: Any, new: int, layer: int | None = None) -> int:
        """FLOPs that it takes to read them and to answer with `new` tokens; with 0, to encode the views alone, as `feature` does; with a
        `layer`, to hear its attention, as `attended` does."""

    def confidence(self, inputs: Any) -> tuple[float, Pass]:
        """How sure it is of yes, 2 * (p(yes) - 1/2), where yes and no are all there is: -1 to 1."""

    def say(self, inputs: Any, new: int) -> tuple[str, Pass]:
        """Its answer of at most `new` tokens."""

    def contrasted(self, inputs: Any, new: int, contrast: Contrast) -> tuple[str, list[Pass]]:
        """As `say`, contrasted with a second pass; the passes in the order second, first."""

    def price_contrasted(self, inputs: Any, new: int, contrast: Contrast) -> int:
        """As `price`, of both passes."""

    def attended(self, inputs: Any, layer: int) -> tuple[list[Map], Pass]:
        """Of each view (rows, columns) attention that the last token of the prompt pays to it in a decoder layer, mean over heads."""

    def feature(self, inputs: Any) -> tuple[Map, Pass]:
        """(width,) mean of what the views are encoded to."""


@contextmanager
def opened(model: Any, processor: Any, reducers: str | Reducer | Sequence[Reducer] | None = None) -> Iterator[Eyes]:
    """A model as what a search asks, within a `with` block. `reducers` act on all that it is asked; unless given, those that are attached
    to it already, if any. FoveateError for both."""
    given = parse(reducers) if isinstance(reducers, str) else [reducers] if isinstance(reducers, Reducer) else list(reducers or [])
    run = getattr(read(model).core, RUN, None)
    with answering(model):
        if run is not None and not given:
            yield Opened(model, processor, run, run.reducers)
            return
        used, before = shrunk(processor, given)
        with attach(model, in_model(given)) as own:
            yield Opened(model, used, own, own.reducers, before)


class Opened:
    """A loaded model and its processor as `Eyes`."""

    def __init__(self, model: Any, processor: Any, run: Run, reducers: Sequence[Reducer], before: Sequence[Reducer] = ()) -> None:
        if run.record == "none":
            raise FoveateError('a search counts what it does: attach with record="last"')
        self.model, self.processor, self.run, self.reducers, self.before = model, processor, run, list(reducers), before
        self.tokenizer, self.renderer = processor.tokenizer, Renderer(processor)
        self.layers = len(run.anatomy.layers)
        self.side = _side_of(model, processor)
        self._yes, self._no = _answers(self.tokenizer)
        self._watches: dict[int, Watch] = {}

    def write(self, views: Sequence[Image.Image], text: str) -> Any:
        marks = (conversations.MARKER + "\n") * len(views)
        prompt = self.renderer.ask([("user", text if conversations.MARKER in text else marks + text)])
        shown = [[prepare(self.before, view) for view in views]]
        return model_inputs(self.processor, shown, [prompt]).to(self.model.device, self.model.dtype)

    def price(self, inputs: Any, new: int, layer: int | None = None) -> int:
        if not new:
            seen = predict(self.run.config, inputs=inputs)
            return seen.flops["tower"] + seen.flops["bridge"]
        return self._answering(inputs, new, self.reducers if layer is None else [self._watch(layer)])

    def price_contrasted(self, inputs: Any, new: int, contrast: Contrast) -> int:
        acting = self.reducers if contrast.reducers is None else contrast.reducers
        return self.price(inputs, new) + (self._answering(inputs, new, acting) if contrast.alpha else 0)

    def _answering(self, inputs: Any, new: int, acting: Sequence[Reducer]) -> int:
        seen = predict(self.run.config, inputs=inputs, reducers=acting)
        after = predict(self.run.config, inputs=inputs, reducers=acting, mode="decode", new_tokens=new - 1)
        return answered(seen, after).total_flops

    def confidence(self, inputs: Any) -> tuple[float, Pass]:
        logits = next_logits(self.model, self.tokenizer, inputs)[0]
        sure = torch.tanh((logits[self._yes].logsumexp(0) - logits[self._no].logsumexp(0)) / 2).item()
        return sure, self._counted(inputs, sure, 1)

    def say(self, inputs: Any, new: int) -> tuple[str, Pass]:
        [said] = answer(self.model, self.tokenizer, inputs, end=self.renderer.end_id, max_new_tokens=new)
        return said.text, self._counted(inputs, said.text, said.tokens)

    def contrasted(self, inputs: Any, new: int, contrast: Contrast) -> tuple[str, list[Pass]]:
        second = contrast.beside(self.model, inputs)
        how: dict[str, Any] = {"end": self.renderer.end_id, "processors": [second], "max_new_tokens": new}
        [said] = answer(self.model, self.tokenizer, inputs, **how)
        first, *more = (self._pass(seen, inputs, said.text, said.tokens) for seen in second.passes if seen is not None)
        return said.text, [*(replace(one, what="contrast", said="", beside=True) for one in more), first]

    def attended(self, inputs: Any, layer: int) -> tuple[list[Map], Pass]:
        watch = self._watch(layer)
        watch.heard.clear()
        with self.run.instead([watch]):
            next_logits(self.model, self.tokenizer, inputs)
        [(layout, scores)] = watch.heard
        return _maps(layout, scores), self._counted(inputs, "", 1)

    def _watch(self, layer: int) -> Watch:
        """One for each layer, since its hooks stay on the model."""
        return self._watches.setdefault(layer, Watch(layer))

    def feature(self, inputs: Any) -> tuple[Map, Pass]:
        if self.run.anatomy.weighs:
            raise FoveateError("this search compares visual tokens of views, and images of this model become weights of its decoder")
        _, calls = read_prompts(self.run.config, inputs)
        core: Any = self.run.anatomy.core
        with self.run.suspended():
            made = [getattr(core, call.method)(**{name: inputs.get(name, value) for name, value in call.given.items()}) for call in calls]
        found = torch.cat([part for one in made for part in features_of(one)]).to("cpu", torch.float32)
        seen = predict(self.run.config, inputs=inputs)
        none = tuple(0 for _ in seen.layer_flops)
        flops = {part: flops if part in ("tower", "bridge") else 0 for part, flops in seen.flops.items()}
        cost = Ledger("encode", none, none, none, none, none, flops)
        return found.mean(0).numpy(), Pass("", "", 0, 0, 0, cost)

    def _counted(self, inputs: Mapping[str, Any], said: str | float, new: int) -> Pass:
        """The pass that has just gone through, all of whose prompts have images."""
        return self._pass(self.run.last, inputs, said, new)

    def _pass(self, seen: Record, inputs: Mapping[str, Any], said: str | float, new: int) -> Pass:
        ledger = answer_cost(self.run.config, seen, new, self.model.dtype.itemsize)
        return Pass("", said, int(inputs["attention_mask"].sum()), seen.visual_tokens[0], new, ledger)


@dataclass(frozen=True)
class Watch(Reducer):
    """Keeps everything, and hears what attention the last token of the prompt pays in decoder layer index `layer`."""

    name: ClassVar[str] = "watch"
    paper: ClassVar[str] = "-"
    layer: int = 0
    heard: list[tuple[Layout, torch.Tensor]] = field(default_factory=list, compare=False)

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(self.layer + 1, (Attention(self.layer),))]

    def reduce(self, view: View, stage: int = 0) -> Decision:
        attention: AttentionRows = view.signal(Attention(self.layer))
        asking = (view.questions or ())[0].asking
        self.heard.append((view.layout, attention.row(asking)))
        return Cut(TokenMap.identity(view.layout))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return list(work.arriving)

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        return sizes.rows(1)


def _maps(layout: Layout, scores_BN: torch.Tensor) -> list[Map]:
    """Of each image of the one row the scores of its tokens as (rows, columns): of the whole image, where it was cut into crops too."""
    row, found = layout.place[0], []
    for image in sorted({int(i) for i in layout.image[0].tolist() if i >= 0}):
        own = (row[:, 0] == image) & layout.visual[0]
        own &= row[:, 1] == row[own][:, 1].min()  # the overview is crop 0, and of an image that is not cut there is no other
        cells, values = row[own][:, 3:], scores_BN[0][own]
        if not len(cells) or int(cells.min()) < 0:
            raise FoveateError("where in the picture a token of this model lies is not known, so its attention cannot lead a search")
        shape = [int(side) + 1 for side in cells.max(0).values]
        scored = np.zeros(shape, np.float32)
        scored[cells[:, 0].cpu(), cells[:, 1].cpu()] = values.cpu()
        found.append(scored)
    return found


def _side_of(model: Any, processor: Any) -> int:
    """Pixels that the vision tower sees at once, by the processor or the configuration; where neither says, those of CLIP-L."""
    for config in (processor, getattr(model.config, "vision_config", None)):
        if (sides := sides_of(config, "image_size")) is not None:
            return max(1, *sides)
    return _SIDE


def _answers(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that begin a yes, and those that begin a no, however written; what begins both is in neither."""
    yes, no = ({tokenizer.encode(form, add_special_tokens=False)[0] for form in forms} for forms in (_YES, _NO))
    if not yes - no or not no - yes:
        raise FoveateError(f"the tokenizer {tokenizer.name_or_path!r} begins yes and no with the same token, so neither can be read off")
    return sorted(yes - no), sorted(no - yes)
