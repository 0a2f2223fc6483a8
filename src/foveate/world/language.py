"""Trains the language model of the embedded world, on text alone.

Scenes are described in two ways. In words, a thing's properties are a token each, and what belongs together has to be found out first.
*Bound*, each thing is one token, whose embedding is the sum of those of its words and its place: what a vision tower and its bridge make
of a thing, so that a model which answers about such descriptions knows its tasks before it has seen a picture. Computed in bfloat16 (in
float32 where a processor has no instructions for it) on float32 masters, saved in float16. Same seed and steps, same batches.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from foveate.world.exercises import Piece, Talk, asked, crossed, exercise, plain
from foveate.world.pictures import Thing, scene
from foveate.world.questions import FAMILIES, at, conversation, ordered, parse_box, what
from foveate.world.text import build_tokenizer
from foveate.world.tower import iou
from foveate.world.training import Optimiser, batches, say

BOUND = 0.65  # share of the talks whose things are one token each
_WORDS = 5  # of a token in a batch at most, beside the column


def train_lm(
    out: Path,
    steps: int,
    seed: int,
    batch: int = 40,
    learning_rate: float = 2e-3,
    held_out: int = 300,
    save_steps: int = 250,
) -> None:
    """Trains the language model on documents and writes it with the tokenizer to `out`; scores it on `held_out` scenes at the end.

    Begun again with the same arguments it goes on with what `out`/state.pt holds, which is written every `save_steps` steps.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=512,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        # 1/sqrt(width). From the usual 0.02 attention stays flat at this width: no lookup was learnt in 110,000 documents.
        initializer_range=192**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    optimiser = Optimiser(model, learning_rate, steps, matrices=True)
    state = out / "state.pt"
    first = optimiser.load(state) if state.is_file() else 0

    def make(i: int) -> dict[str, Tensor]:
        # Few objects at first: short documents make cheap steps while the grammar is learnt.
        return documents(tokenizer, f"lm/{seed}/{i}", batch, 2 if i < 0.05 * steps else 3 if i < 0.1 * steps else 5)

    for i, data in enumerate(batches(make, steps, "lm", first), start=first):
        # Padding is on the right, where a causal model does not see it: no mask is needed.
        logits = model(inputs_embeds=embed(model, data["words"]), use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), data["input_ids"][:, 1:].flatten(), reduction="none")
        weights = data["weights"][:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        optimiser.step(loss)
        if (i + 1) % save_steps == 0 or i == steps - 1:
            for bound in (False, True):
                said = "bound" if bound else "in words"
                say(f"step {i + 1} of {steps}, loss {loss.item():.3f}, {said}:", score_lm(model, tokenizer, held_out // 8, bound))
            optimiser.save(state, i + 1)
    model.float()
    optimiser.publish()
    for bound in (False, True):
        say(f"held out, {'bound' if bound else 'in words'}:", score_lm(model, tokenizer, held_out, bound))
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    state.unlink(missing_ok=True)


def documents(tokenizer: PreTrainedTokenizerFast, key: str, count: int, most: int = 5) -> dict[str, Tensor]:
    """`count` documents of a key as one `batch`: plain ones of scenes of at most `most` objects, and talks, most of them bound."""
    rng = random.Random(key)
    kinds: list[Callable[[str], list[Piece] | Talk]] = [partial(plain, most=most), crossed, exercise, asked]
    drawn = rng.choices(kinds, (6, 14, 40, 40), k=count)
    return padded([tokens(tokenizer, kind(f"{key}/{number}"), rng.random() < BOUND) for number, kind in enumerate(drawn)])


Row = tuple[list[int], int, float]
"""A token of a document: the ids whose embeddings make it, the last a column's or the padding's; the id to be foretold; its weight."""


def tokens(tokenizer: PreTrainedTokenizerFast, document: list[Piece] | Talk, bound: bool = False) -> list[Row]:
    """A document's tokens: weights are 1 on what follows from the text before it, 1/10 on other text, 0 on things that are one token."""
    if isinstance(document, Talk) and not bound:
        document = document.words()
    rows: list[Row] = []
    if isinstance(document, Talk):
        rows += _written(tokenizer, [("<s><user>", False)])
        rows += [(ids, 0, 0.0) for thing in document.things for ids in bound_ids(tokenizer, thing)]
        document = list(document.pieces)
    return rows + _written(tokenizer, document)


def _written(tokenizer: PreTrainedTokenizerFast, pieces: Sequence[Piece]) -> list[Row]:
    ids = tokenizer([text for text, _ in pieces])["input_ids"]
    return [([one, 0], one, 1.0 if follows else 0.1) for own, (_, follows) in zip(ids, pieces, strict=True) for one in own]


def bound_ids(tokenizer: PreTrainedTokenizerFast, thing: Thing) -> list[list[int]]:
    """The ids whose embeddings make a thing's token, the column's last. Writing has a token for each of its own, as it lies on several
    patches of a picture."""
    row, column = tokenizer.convert_tokens_to_ids(at(thing).replace("><", "> <").split())
    _, *words = what(thing).split()
    ids = [tokenizer(f" {word}")["input_ids"] for word in words]
    if thing.kind == "shape":
        return [[*(one for own in ids for one in own), row, column]]
    kind, name = ids
    return [[kind[-1], one, row, column] for one in name]


def padded(documents: Sequence[list[Row]]) -> dict[str, Tensor]:
    """Documents as `words` (B, T, K), ids with the column's last, `input_ids` (B, T) and `weights` (B, T), padded on the right."""
    length = -(-max(map(len, documents)) // 16) * 16
    words = torch.zeros(len(documents), length, _WORDS + 1, dtype=torch.long)
    ids, weights = torch.zeros(len(documents), length, dtype=torch.long), torch.zeros(len(documents), length)
    for i, rows in enumerate(documents):
        for j, (parts, one, weight) in enumerate(rows):
            words[i, j, : len(parts) - 1] = torch.tensor(parts[:-1])
            words[i, j, -1], ids[i, j], weights[i, j] = parts[-1], one, weight
    return {"words": words, "input_ids": ids, "weights": weights}


def embed(model: LlamaForCausalLM, words_BTK: Tensor) -> Tensor:
    """Embeddings (B, T, D): of each token the sum of those of its ids, as long as the one of a single word. A column's is turned by half of
    the width, so that it is not taken for a row; the padding's id, 0, adds nothing."""
    table = model.get_input_embeddings().weight
    parts = F.embedding(words_BTK, table) * (words_BTK != 0).unsqueeze(-1)
    column = parts[..., -1, :].roll(table.shape[1] // 2, -1)
    count = (words_BTK != 0).sum(-1, keepdim=True).clamp(min=1)
    return (parts[..., :-1, :].sum(-2) + column) * count.to(table.dtype).rsqrt()


@torch.no_grad()
def score_lm(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, bound: bool = False) -> dict[str, float]:
    """Exact greedy answers per family on `count` described scenes that training has not seen (a box counts from IoU 0.5)."""
    asked = [(item, one) for item in (scene(f"held-out/{i}", "test") for i in range(count)) for one in conversation(item)]
    right: dict[str, list[bool]] = {family: [] for family in FAMILIES}
    for start in range(0, len(asked), 64):
        rows = asked[start : start + 64]
        talks = [Talk(tuple(ordered(item)), ((f"\n{one.question}<assistant>", False),)) for item, one in rows]
        whole = [tokens(tokenizer, talk, bound) for talk in talks]
        longest = max(map(len, whole))
        pad: Row = ([0, 0], 0, 0.0)
        made = padded([[pad] * (longest - len(own)) + own for own in whole])  # generation wants the padding on the left
        mask = torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for own in whole])
        given = embed(model, made["words"][:, :longest])
        answers = model.generate(inputs_embeds=given, attention_mask=mask, max_new_tokens=6, do_sample=False)
        for (_, one), said in zip(rows, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
            right[one.family].append(_right(said, one.answer, one.family))
    return {family: sum(hits) / max(1, len(hits)) for family, hits in right.items()}


def _right(said: str, answer: str, family: str) -> bool:
    if family != "locating":
        return said == answer
    found, true = parse_box(said), parse_box(answer)
    return found is not None and true is not None and bool(iou(torch.tensor([found]), torch.tensor([true]))[0] >= 0.5)
