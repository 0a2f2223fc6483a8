"""Three methods on a finished model, each for one call of `generate`, with what they left and what the model then answers."""

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate
from foveate.world import asset
from foveate.world.pictures import render, scene

model, processor = AutoModelForImageTextToText.from_pretrained(asset("vlm")), AutoProcessor.from_pretrained(asset("vlm"))
image = Image.fromarray(render(scene(27, "test"), 128))  # your own picture, and any VLM of the hub in the line above
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat number is printed?"}]}]
inputs = processor(text=processor.apply_chat_template(chat, add_generation_prompt=True), images=image, return_tensors="pt")

for reducers in ("none", "fastv:keep=0.25", "divprune:keep=0.25", "divprune:keep=0.5+pyramiddrop"):
    with foveate.attach(model, reducers) as run:
        answer = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    print(f"{reducers:30} {processor.decode(answer, skip_special_tokens=True):6} tokens in each layer: {run.last.visual_tokens}")
