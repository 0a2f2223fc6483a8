"""Trains the vision tower of the embedded world, without any language model.

The tower (CLIPVisionModel, 64 px, patch 8) is supervised densely: each patch names the thing on it (kind, colour, size, glyph), the
thing's box and whether its centre is here; [CLS] names the shapes, their number and the word. Pictures are of 64 px, later some of 128 px
with interpolated position embeddings, so that one tower serves both. Computed in bfloat16 (in float32 where a processor has no instructions
for it) on float32 masters, saved in float16. Same seed and steps, same batches.
"""

import math
import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from foveate.world.pictures import COLOURS, GLYPHS, KINDS, SHAPES, SIZES, WORDS, Scene, Split, labels, render, scene
from foveate.world.training import Optimiser, batches, say

PATCH, IMAGE = 8, 64
_PATCH_HEADS = {"kind": len(KINDS), "colour": len(COLOURS), "size": len(SIZES), "glyph": len(GLYPHS), "centre": 1, "box": 4}
_IMAGE_HEADS = {"pairs": len(COLOURS) * len(SHAPES), "count": 6, "word": len(WORDS) + 1}
_WEIGHTS = {"kind": 1.0, "colour": 1.0, "size": 0.5, "glyph": 1.0, "centre": 1.0, "box": 2.0, "pairs": 3.0, "count": 0.3, "word": 0.3}


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

    for i, data in enumerate(batches(make, steps, "tower")):
        hidden = _features(model, data["pixels"].to(model.dtype))
        loss = _tower_loss(heads[0](hidden[-1]), data) + 0.3 * _tower_loss(heads[1](hidden[-3]), data)
        optimiser.step(loss)
        if i % 250 == 249 or i == steps - 1:
            say(f"step {i + 1} of {steps}, loss {loss.item():.3f}:", score_tower(model, heads[0], IMAGE, held_out // 4))
    model.float()
    heads.float()
    optimiser.publish()
    for size in (IMAGE, IMAGE * 2):
        say(f"held out, {size} px:", score_tower(model, heads[0], size, held_out))
    say(f"held out, {IMAGE} px, level -3:", score_tower(model, heads[1], IMAGE, held_out, level=-3))
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
        hits["iou"] = iou(out["box"][on], data["box"][on]) >= 0.5
        for name, hit in hits.items():
            right.setdefault(name, []).append(hit.float())
    return {name: torch.cat(hit).mean().item() for name, hit in right.items()}


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Of boxes (N, 4) with boxes (N, 4): (N,)."""
    meet = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    return meet / ((a[:, 2:] - a[:, :2]).clamp(min=0).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - meet)
