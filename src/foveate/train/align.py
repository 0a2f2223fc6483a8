"""Stage kind `align`: the bridge learns to say what is in an image in the language model's own words, and no language model runs.

Of a sample, W are the different word pieces of its answers (a caption, or answers to questions) without the tokenizer's special tokens,
v_1 … v_T the visual tokens of all its images, and e_u the rows of the language model's input embeddings. Nobody knows which token ought to
say which word, so each word is sought in all of them, and the best token carries it (multiple instances, by log-sum-exp):

    p(u | t) = softmax over u of cos(v_t, e_u) / 0.07            over the whole vocabulary, or with `contrast: data` over all W of the data
    loss     = mean over w in W of -log( mean over t of p(w | t) ) + mean over t of log(|v_t| / r)²

with r the mean length of a row of the table: the cosine alone would leave the tokens' length open, and a language model that has met only
embeddings expects theirs. A batch's loss is the sum over its samples divided by its size; samples without image or words add nothing. Each
word counts once, however common it is. Over a vocabulary of tens of thousands the softmax is most of what such a stage takes; the data's
own words are often a few thousand of them.

Where rows say what is where in their image (`boxes: true`, `foveate.data.boxes`), W are the pairs of a box and a word piece of its name;
each is sought in the tokens of its box alone: those that stand for half of the box or more, and those of whose patches half or more lie in
it; where there are none, as of a line of small writing, those with at least half as much of it as the one that has most. A bridge whose
tokens all see the whole image seeks as without boxes.

The idea is Foveate's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from foveate.accounting import Ledger
from foveate.tokens import ImagePlan

TEMPERATURE = 0.07


class Align:
    """The loss of a stage of kind `align` for `model`, whose language model is frozen. ignored: ids that are no words; among: those that
    the softmax goes over, None: all that there are."""

    def __init__(self, model: Any, ignored: Sequence[int], among: Tensor | None = None) -> None:
        self.model, self.ignored = model, torch.tensor(sorted({*ignored, model.config.image_token_id}))
        self.among = None if among is None else self.wordly(among.unique())
        self._table: tuple[Tensor, Tensor] | None = None

    @property
    def contrasted(self) -> int | None:
        """How many words the softmax goes over; None: the whole vocabulary."""
        return None if self.among is None else len(self.among)

    def __call__(self, called: Any, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        """(sum of the samples' losses, how many have one). `called` is the model as the stage calls it."""
        labels, ids = inputs["labels"], inputs["input_ids"]
        given = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch", "boxes")}
        boxes = inputs.get("boxes") or [[]] * len(ids)
        output = called(**given, run="images")
        total, count = 0.0 * output.hidden_states[0].float().sum(), 0  # zero, with whatever takes part in a step without images
        if output.image_hidden_states is None:
            return total, count
        table, length = self.table()
        per_row = (ids == self.model.config.image_token_id).sum(1).tolist()
        for row, tokens in enumerate(output.image_hidden_states.float().split(per_row)):
            words, where = self.placed(boxes[row], len(tokens)) if boxes[row] else (self.words(labels[row]), None)
            if len(tokens) and len(words):
                total, count = total + loss(tokens, table, self.rows(words), length, where), count + 1
        return total, count

    def rows(self, words: Tensor) -> Tensor:
        """(W,) where in the table the words are."""
        return words if self.among is None else torch.searchsorted(self.among.to(words.device), words)

    def placed(self, boxes: Sequence[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
        """Of the boxes of an image and their word pieces, all pairs of both: (W,) int64 pieces, and (W, T) bool where they are sought."""
        config = self.model.config
        rows, columns = config.grid
        areas = torch.tensor(self.model.model.bridge.boxes((rows, columns))[:count], dtype=torch.float32)[:, [1, 0, 3, 2]]
        areas /= torch.tensor([columns, rows, columns, rows])
        pieces = [own for own, _ in boxes]
        where = torch.stack([members(areas, box.cpu()) for _, box in boxes])
        words = torch.cat(pieces)
        return words, where.repeat_interleave(torch.tensor([len(own) for own in pieces]), 0).to(words.device)

    def words(self, labels: Tensor) -> Tensor:
        """(W,) int64: the different word pieces of a row of labels (N,)."""
        return self.wordly(labels[labels >= 0].unique())

    def wordly(self, ids: Tensor) -> Tensor:
        return ids[~torch.isin(ids, self.ignored.to(ids.device))]

    @torch.no_grad()
    def table(self) -> tuple[Tensor, Tensor]:
        """(V, width) float32 embeddings of length 1 of the words that the softmax goes over, as the model looks them up, and the mean
        length of all that there are."""
        if self._table is None:
            embeddings = self.model.get_input_embeddings()
            rows = embeddings(torch.arange(embeddings.weight.shape[0], device=embeddings.weight.device)).float()
            some = rows if self.among is None else rows[self.among.to(rows.device)]
            self._table = normalize(some, dim=-1), rows.norm(dim=-1).mean()
        return self._table


def members(areas: Tensor, box: Tensor) -> Tensor:
    """(T,) bool: which tokens, that stand for `areas` (T, 4) of the picture, belong to a box (4,)."""
    sides = (torch.minimum(areas[:, 2:], box[2:]) - torch.maximum(areas[:, :2], box[:2])).clamp(min=0)
    common, own, whole = sides.prod(1), (areas[:, 2:] - areas[:, :2]).prod(1), (box[2:] - box[:2]).prod()
    found = 2 * common > (1 - 1e-4) * torch.minimum(own, whole)  # not less than half, but for rounding
    return found if found.any() else 2 * common > (1 - 1e-4) * common.max()


def loss(tokens: Tensor, table: Tensor, words: Tensor, length: Tensor | float, where: Tensor | None = None) -> Tensor:
    """The formula above, of one sample: `tokens` (T, width), `table` (V, width) of length 1, `words` (W,), `length` of an embedding,
    `where` (W, T) in which of the tokens each word is sought; None: in all."""
    sought = tokens if where is None else tokens[where.any(0)]
    with torch.autocast(tokens.device.type, enabled=False):
        logs = checkpoint(log_probability, normalize(sought, dim=-1), table, words, use_reentrant=False)  # no T x V is kept
    if where is None:
        missed = math.log(len(tokens)) - logs.logsumexp(0)
    else:
        missed = where.sum(1).log() - logs.masked_fill(~where[:, where.any(0)].T, -math.inf).logsumexp(0)
    return missed.mean() + (tokens.norm(dim=-1) / length).clamp(min=1e-6).log().square().mean()


def log_probability(tokens: Tensor, table: Tensor, words: Tensor) -> Tensor:
    """(T, W): log p(w | t)."""
    logits = tokens @ table.T / TEMPERATURE
    return logits[:, words] - logits.logsumexp(-1, keepdim=True)


def flops(ledger: Ledger, config: Any, images: Sequence[ImagePlan], words: int | None = None) -> dict[str, int]:
    """By part, what a stage of this kind takes of a ledger's; `head` is the product of the visual tokens with the table of so many words
    (None: of the whole vocabulary), and in training the one back to the tokens. Where boxes say which tokens are looked at, it is less."""
    text = config.get_text_config()
    product = 2 * sum(plan.visual for plan in images) * (text.vocab_size if words is None else words) * text.hidden_size
    left = {part: count if part in ("tower", "bridge") else 0 for part, count in ledger.flops.items()}
    return left | {"head": product * (2 if ledger.mode == "train" else 1)}
