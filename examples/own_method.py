"""A method of one's own, without a change to the package: the brightest tokens, by the norm of their states.

docs/adding-a-method.md has more: signals of the tower and of layers, several sites, options, and how a method becomes part of the package.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate
from foveate import BeforeLM, View
from foveate.contract import Site
from foveate.reducers.common import states
from foveate.reducers.ranker import Ranker
from foveate.world import asset
from foveate.world.pictures import render, scene


@dataclass(frozen=True)
class Loudest(Ranker):
    """Keeps `keep` (share or number) of each image's tokens, those of the largest norm."""

    name: ClassVar[str] = "loudest"
    paper: ClassVar[str] = "-"
    keep: float | int = 0.25

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM()]

    def score(self, view: View, stage: int = 0) -> torch.Tensor:
        return states(self.name, view).float().norm(dim=-1)


# on plain tensors: four patches and a word
view = View.of(torch.tensor([[[1.0], [4.0], [2.0], [3.0], [9.0]]]), text=1)
assert Loudest(keep=2).reduce(view).map.representative.tolist() == [[1, 3, 4]]

# on a model
model, processor = AutoModelForImageTextToText.from_pretrained(asset("vlm")), AutoProcessor.from_pretrained(asset("vlm"))
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat number is printed?"}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(text=prompt, images=render(scene(27, "test"), 128), return_tensors="pt")
with foveate.attach(model, Loudest(keep=0.5)) as run:
    model.generate(**inputs, max_new_tokens=4)
print(f"{run.last.visual_tokens[0]} of 64 tokens; patches that stay: {run.last.provenance(0).representative.tolist()[0][:8]} …")
