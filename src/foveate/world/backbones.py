"""Trains the two small backbones of the embedded world from nothing: a vision tower without any language model, and a language model on
text alone. Scenes and documents are made while training goes on, so no data is stored.

    python -m foveate.world.backbones tower --out DIR --steps 6000
    python -m foveate.world.backbones lm --out DIR --steps 8000

The tower (CLIPVisionModel, 64 px, patch 8) is supervised densely: each patch names the thing on it (kind, colour, size, glyph), the
thing's box and whether its centre is here; [CLS] names the shapes, their number and the word. Pictures are of 64 px, later some of 128 px
with interpolated position embeddings, so that one tower serves both. Computed in bfloat16 on float32 masters, saved in float16. Same seed
and steps, same batches.
"""

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from foveate.world.exercises import Piece, asked, exercise
from foveate.world.pictures import COLOURS, GLYPHS, KINDS, SHAPES, SIZES, WORDS, Scene, Split, labels, render, scene
from foveate.world.questions import FAMILIES, caption, conversation, parse_box
from foveate.world.text import build_tokenizer, document, prompt

PATCH, IMAGE = 8, 64
_PATCH_HEADS = {"kind": len(KINDS), "colour": len(COLOURS), "size": len(SIZES), "glyph": len(GLYPHS), "centre": 1, "box": 4}
_IMAGE_HEADS = {"pairs": len(COLOURS) * len(SHAPES), "count": 6, "word": len(WORDS) + 1}
_WEIGHTS = {"kind": 1.0, "colour": 1.0, "size": 0.5, "glyph": 1.0, "centre": 1.0, "box": 2.0, "pairs": 3.0, "count": 0.3, "word": 0.3}


# --- shared ---------------------------------------------------------------------------------------------------------------------------


class Optimiser:
    """AdamW with warm-up and a cosine, on float32 masters of a module whose weights are bfloat16.

    With `matrices` the weight matrices have Muon instead (Jordan et al. 2024; embeddings and norms keep AdamW), and the rate is constant
    until the last third of the steps, over which it falls to nothing.
    """

    def __init__(self, module: nn.Module, learning_rate: float, steps: int, weight_decay: float = 0.02, matrices: bool = False) -> None:
        self.weights = list(module.parameters())
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        module.to(torch.bfloat16)
        embeddings = {id(weight) for part in module.modules() if isinstance(part, nn.Embedding) for weight in part.parameters()}
        flat = [matrices and weight.ndim == 2 and id(weight) not in embeddings for weight in self.weights]
        rest = [master for master, muon in zip(self.masters, flat, strict=True) if not muon]
        self.adam = torch.optim.AdamW(rest, learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
        self.all: list[torch.optim.Optimizer] = [self.adam]
        if matrices:
            own = [master for master, muon in zip(self.masters, flat, strict=True) if muon]
            self.all.append(torch.optim.Muon(own, learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        warmup = max(1, steps // 30)

        def share(i: int) -> float:
            if matrices:
                return min(1.0, (i + 1) / warmup, max(0.0, 3 * (1 - i / steps)))
            return min(1.0, (i + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, i / steps))))

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(one, share) for one in self.all]

    def step(self, loss: Tensor) -> None:
        loss.backward()
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimiser, schedule in zip(self.all, self.schedules, strict=True):
            optimiser.step()
            schedule.step()
        self.publish()

    def save(self, path: Path, done: int) -> None:
        """Writes everything that `load` needs to go on after `done` steps, whole or not at all."""
        parts = [one.state_dict() for one in self._parts()]
        half = path.with_suffix(".half")
        half.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"done": done, "masters": self.masters, "parts": parts}, half)
        half.replace(path)

    def load(self, path: Path) -> int:
        """Takes up what `save` wrote, and says how many steps were done."""
        found = torch.load(path, weights_only=True)
        for master, saved in zip(self.masters, found["masters"], strict=True):
            master.copy_(saved)
        for one, saved in zip(self._parts(), found["parts"], strict=True):
            one.load_state_dict(saved)
        self.publish()
        return int(found["done"])

    def _parts(self) -> list[Any]:
        return [*self.all, *self.schedules]

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the masters into the module, in the module's own precision."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)


class Made(IterableDataset[Any]):
    """Batches made one after the other by `make(index)`, in a worker process beside the training."""

    def __init__(self, make: Any, steps: range) -> None:
        self.make, self.steps = make, steps

    def __iter__(self) -> Iterator[Any]:
        torch.set_num_threads(1)
        return (self.make(i) for i in self.steps)


def _batches(make: Any, steps: int, name: str, first: int = 0) -> Iterator[Any]:
    """The batches from the step `first` on, under a progress bar with an estimate of the time left."""
    loader = DataLoader(Made(make, range(first, steps)), batch_size=None, num_workers=1, prefetch_factor=8)
    return iter(track(loader, name, steps, first))


def _say(title: str, numbers: dict[str, float]) -> None:
    print(title, " ".join(f"{name} {number:.3f}" for name, number in numbers.items()), flush=True)


# --- tower ----------------------------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Linear read-outs of one level of the tower: `patches` (B, N, sum of _PATCH_HEADS), and of [CLS] where `whole`."""

    def __init__(self, width: int, whole: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patches = nn.Linear(width, sum(_PATCH_HEADS.values()))
        self.whole = nn.Linear(width, sum(_IMAGE_HEADS.values())) if whole else None

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        """hidden: (B, 1 + N, C) with [CLS] first."""
        hidden = self.norm(hidden)
        out = dict(zip(_PATCH_HEADS, self.patches(hidden[:, 1:]).float().split(list(_PATCH_HEADS.values()), -1), strict=True))
        if self.whole is not None:
            out |= dict(zip(_IMAGE_HEADS, self.whole(hidden[:, 0]).float().split(list(_IMAGE_HEADS.values()), -1), strict=True))
        return out


def tower_batch(scenes: list[Scene], size: int) -> dict[str, Tensor]:
    """Pixels as the processor gives them, (B, 3, size, size) in -1..1, and every label."""
    pictures = []
    for item in scenes:
        picture = Image.fromarray(render(item, 128))
        pictures.append(np.asarray(picture if size == 128 else picture.resize((size, size), Image.Resampling.BICUBIC)))
    dense = [labels(item, size // PATCH) for item in scenes]
    batch = {f.name: torch.from_numpy(np.stack([getattr(one, f.name) for one in dense])) for f in fields(dense[0])}
    colours = list(COLOURS)
    pairs = torch.zeros(len(scenes), _IMAGE_HEADS["pairs"])
    for row, item in enumerate(scenes):
        for thing in item.shapes:
            pairs[row, colours.index(str(thing.colour)) * len(SHAPES) + SHAPES.index(thing.name)] = 1
    word = [next((WORDS.index(t.name) + 1 for t in item.things if t.kind == "word"), 0) for item in scenes]
    batch |= {"pairs": pairs, "count": torch.tensor([len(item.shapes) for item in scenes]), "word": torch.tensor(word)}
    batch["pixels"] = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch


def _tower_loss(out: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(())
    for name, logits in out.items():
        target = batch[name]
        if name == "box":
            on = batch["kind"] > 0
            loss = F.l1_loss(logits[on], target[on]) * 4
        elif name == "centre":
            loss = F.binary_cross_entropy_with_logits(logits.squeeze(-1), target.float(), pos_weight=torch.tensor(8.0))
        elif name == "pairs":
            loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=torch.tensor(4.0))
        else:
            # Summed over what has the property and shared over the batch, so that a batch without writing gives zero, not NaN.
            loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="sum") / (target >= 0).sum().clamp(min=1)
        total = total + _WEIGHTS[name] * loss
    return total


def _features(model: CLIPVisionModel, pixels: Tensor) -> tuple[Tensor, ...]:
    size = pixels.shape[-1]
    return model(pixel_values=pixels, interpolate_pos_encoding=size != IMAGE, output_hidden_states=True).hidden_states


def train_tower(out: Path, steps: int, seed: int, batch: int = 32, learning_rate: float = 2e-3, held_out: int = 512) -> None:
    """Trains the tower and writes it with its image processor to `out`; scores it on `held_out` scenes at the end."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_act="gelu",
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        projection_dim=128,
        image_size=IMAGE,
        patch_size=PATCH,
    )
    # Eager attention's backward pass is nearly twice as fast as SDPA's at these sizes in bfloat16 on a CPU.
    model = CLIPVisionModel._from_config(config, attn_implementation="eager")
    _start_positions(model)
    # The last level and one in the middle both learn to tell: bridges that read several levels find something in each.
    heads = nn.ModuleList([Heads(config.hidden_size, whole=True), Heads(config.hidden_size, whole=False)])
    optimiser = Optimiser(nn.ModuleList([model, heads]), learning_rate, steps)

    def make(i: int) -> dict[str, Tensor]:
        # Small pictures alone at first: the tower learns shapes several times as fast from them.
        large = i >= 0.4 * steps and random.Random(f"{seed}/{i}").random() < 0.4
        return tower_batch([scene(f"tower/{seed}/{i}/{j}") for j in range(batch // 4 if large else batch)], IMAGE * 2 if large else IMAGE)

    for i, data in enumerate(_batches(make, steps, "tower")):
        hidden = _features(model, data["pixels"].bfloat16())
        loss = _tower_loss(heads[0](hidden[-1]), data) + 0.3 * _tower_loss(heads[1](hidden[-3]), data)
        optimiser.step(loss)
        if i % 250 == 249 or i == steps - 1:
            _say(f"step {i + 1} of {steps}, loss {loss.item():.3f}:", score_tower(model, heads[0], IMAGE, held_out // 4))
    model.float()
    heads.float()
    optimiser.publish()
    for size in (IMAGE, IMAGE * 2):
        _say(f"held out, {size} px:", score_tower(model, heads[0], size, held_out))
    _say(f"held out, {IMAGE} px, level -3:", score_tower(model, heads[1], IMAGE, held_out, level=-3))
    model.half().save_pretrained(out)
    square = {"height": IMAGE, "width": IMAGE}
    half = [0.5, 0.5, 0.5]
    CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False, image_mean=half, image_std=half).save_pretrained(out)


@torch.no_grad()
def _start_positions(model: CLIPVisionModel) -> None:
    """Sines and cosines of row and column as the first position embeddings: neighbours start out alike, at any resolution."""
    side = IMAGE // PATCH
    width = model.config.hidden_size // 4
    frequencies = math.pi * torch.logspace(0, math.log10(side), width)
    rows, cols = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    waves = [wave(axis.reshape(-1, 1) * frequencies) for axis in (rows, cols) for wave in (torch.sin, torch.cos)]
    model.embeddings.position_embedding.weight[1:] = 0.5 * torch.cat(waves, 1)
    nn.init.normal_(model.embeddings.patch_embedding.weight, std=(3 * PATCH**2) ** -0.5)


@torch.no_grad()
def score_tower(
    model: CLIPVisionModel, heads: nn.Module, size: int, count: int, level: int = -1, split: Split = "test"
) -> dict[str, float]:
    """Accuracy per head on held-out scenes: over patches that have the property; `shape` over patches with a thing on them, `pairs` and
    `objects` over whole pictures, `iou` the share of patches with a thing whose box reaches 0.5."""
    dtype = next(model.parameters()).dtype
    right: dict[str, list[Tensor]] = {}
    for start in range(0, count, 32):
        data = tower_batch([scene(f"held-out/{start + j}", split) for j in range(min(32, count - start))], size)
        out = heads(_features(model, data["pixels"].to(dtype))[level])
        hits = {}
        for name, logits in out.items():
            target = data[name]
            if name == "box":
                continue
            if name == "centre":
                hits["objects"] = ((logits.squeeze(-1) > 0) == (target > 0)).all(1)
            elif name == "pairs":
                hits[name] = ((logits > 0) == (target > 0)).all(1)
            else:
                hits[name] = (logits.argmax(-1) == target)[target >= 0]
        on = data["kind"] > 0
        hits["shape"] = out["kind"].argmax(-1)[on] == data["kind"][on]
        hits["iou"] = _iou(out["box"][on], data["box"][on]) >= 0.5
        for name, hit in hits.items():
            right.setdefault(name, []).append(hit.float())
    return {name: torch.cat(hit).mean().item() for name, hit in right.items()}


def _iou(a: Tensor, b: Tensor) -> Tensor:
    meet = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    return meet / ((a[:, 2:] - a[:, :2]).clamp(min=0).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - meet)


# --- language model -------------------------------------------------------------------------------------------------------------------


def lm_batch(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, Tensor]:
    """`input_ids` (B, T), right-padded, and `weights` (B, T): 1 on answers and their `</s>`, 1/10 on other text, 0 on padding."""
    ids = tokenizer(texts, padding=True, padding_side="right", pad_to_multiple_of=16, return_tensors="pt")["input_ids"]
    user, assistant = tokenizer.convert_tokens_to_ids(["<user>", "<assistant>"])
    # In an answer = more <assistant> than <user> still open: a turn is <user> question <assistant> answer.
    balance = (ids == assistant).long().cumsum(1) - (ids == user).long().cumsum(1)
    answer = (balance == 0) & ((ids == user).long().cumsum(1) > 0) & (ids != assistant)
    return {"input_ids": ids, "weights": torch.where(answer, 1.0, 0.1) * (ids != tokenizer.pad_token_id)}


def piece_batch(tokenizer: PreTrainedTokenizerFast, documents: list[list[Piece]]) -> dict[str, Tensor]:
    """The same of exercises: `weights` are 1 on what follows from the text before it, 1/10 on what does not."""
    rows = []
    for pieces in documents:
        ids = tokenizer([text for text, _ in pieces])["input_ids"]
        rows.append([(one, 1.0 if follows else 0.1) for own, (_, follows) in zip(ids, pieces, strict=True) for one in own])
    longest = -(-max(map(len, rows)) // 16) * 16
    padded = [row + [(tokenizer.pad_token_id, 0.0)] * (longest - len(row)) for row in rows]
    columns = torch.tensor(padded, dtype=torch.float64)
    return {"input_ids": columns[..., 0].long(), "weights": columns[..., 1].float()}


def lm_documents(tokenizer: PreTrainedTokenizerFast, key: str, count: int, most: int) -> dict[str, Tensor]:
    """`count` documents of a key in one batch, of half of them exercises: scenes have at most `most` objects in the others."""
    rng = random.Random(key)
    drawn = rng.choices(("exercise", "asked", "document"), (55, 35, 10), k=count)
    kinds = {f"{key}/{j}": kind for j, kind in enumerate(drawn)}
    plain = [asked(one) if kind == "asked" else document(one, most) for one, kind in kinds.items() if kind != "exercise"]
    drilled = [exercise(one) for one, kind in kinds.items() if kind == "exercise"]
    parts = [lm_batch(tokenizer, plain)] if plain else []
    parts += [piece_batch(tokenizer, drilled)] if drilled else []
    longest = max(part["input_ids"].shape[1] for part in parts)
    fill = {"input_ids": tokenizer.pad_token_id, "weights": 0.0}
    return {
        name: torch.cat([F.pad(part[name], (0, longest - part[name].shape[1]), value=value) for part in parts])
        for name, value in fill.items()
    }


def train_lm(
    out: Path,
    steps: int,
    seed: int,
    batch: int = 32,
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
        return lm_documents(tokenizer, f"lm/{seed}/{i}", batch, 2 if i < 0.05 * steps else 3 if i < 0.1 * steps else 5)

    for i, data in enumerate(_batches(make, steps, "lm", first), start=first):
        # Padding is on the right, where a causal model does not see it: no mask is needed.
        logits = model(input_ids=data["input_ids"], use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), data["input_ids"][:, 1:].flatten(), reduction="none")
        weights = data["weights"][:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        optimiser.step(loss)
        if (i + 1) % save_steps == 0 or i == steps - 1:
            _say(f"step {i + 1} of {steps}, loss {loss.item():.3f}:", score_lm(model, tokenizer, held_out // 8))
            optimiser.save(state, i + 1)
    model.float()
    optimiser.publish()
    _say("held out:", score_lm(model, tokenizer, held_out))
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    state.unlink(missing_ok=True)


@torch.no_grad()
def score_lm(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, float]:
    """Exact greedy answers per family on `count` described scenes that training has not seen (a box counts from IoU 0.5)."""
    asked = [(item, one) for item in (scene(f"held-out/{i}", "test") for i in range(count)) for one in conversation(item)]
    right: dict[str, list[bool]] = {family: [] for family in FAMILIES}
    for start in range(0, len(asked), 64):
        rows = asked[start : start + 64]
        texts = [prompt(caption(item), one.question) for item, one in rows]
        inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
        made = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for (_, one), said in zip(rows, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
            right[one.family].append(_right(said, one.answer, one.family))
    return {family: sum(hits) / max(1, len(hits)) for family, hits in right.items()}


def _right(said: str, answer: str, family: str) -> bool:
    if family != "locating":
        return said == answer
    found, true = parse_box(said), parse_box(answer)
    return found is not None and true is not None and bool(_iou(torch.tensor([found]), torch.tensor([true]))[0] >= 0.5)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="foveate.world.backbones", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("which", choices=("tower", "lm"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    (train_tower if given.which == "tower" else train_lm)(given.out, given.steps, given.seed)


if __name__ == "__main__":
    main()
