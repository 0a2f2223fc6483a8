"""The Trainer of transformers, with a schedule of reducers: few visual tokens in the first steps, all of them in the last.

Labels stay as they are: what is cut is cut inside of the model, and the loss comes back at the caller's length. TRL's SFTTrainer takes the
same callback. For one reducer in all steps give it alone: `ScheduleCallback("fastv:keep=0.25,layer=2")`.
"""

import tempfile
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import foveate
from foveate.world import asset
from foveate.world.pictures import render, scene
from foveate.world.questions import conversation


def samples(count: int) -> list[dict[str, Any]]:
    """Pictures of the embedded world, each with one question and its answer."""
    scenes = [scene(number, "train") for number in range(count)]
    asked = [conversation(one)[0] for one in scenes]
    return [
        {"image": Image.fromarray(render(one, 64)), "question": it.question, "answer": it.answer}
        for one, it in zip(scenes, asked, strict=True)
    ]


def collate(processor: Any, batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Prompts with their answers, padded on the right; labels are -100 but for the answers and their end token."""
    prompts = []
    for sample in batch:
        content = [{"type": "image"}, {"type": "text", "text": f"\n{sample['question']}"}]
        prompts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    texts = [f"{prompt}{sample['answer']}{processor.tokenizer.eos_token}" for prompt, sample in zip(prompts, batch, strict=True)]
    images = [[sample["image"]] for sample in batch]
    inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    asked = processor(text=prompts, images=images, padding=True, padding_side="right", return_tensors="pt")["attention_mask"].sum(1)
    slot = torch.arange(inputs["input_ids"].shape[1])
    answer = (slot >= asked[:, None]) & (inputs["attention_mask"] == 1)
    return {**inputs, "labels": inputs["input_ids"].where(answer, -100)}


def main(folder: str) -> None:
    # shipped in half precision, in which an optimiser cannot take its small steps
    model = AutoModelForImageTextToText.from_pretrained(asset("vlm"), dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(asset("vlm"))
    arguments = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-4, logging_steps=1, save_strategy="no",
        report_to="none", remove_unused_columns=False, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    # as in LLaVolta: pooled heavily, then lightly, then not at all; evaluation in the middle of training sees all tokens
    schedule = foveate.ScheduleCallback(
        [("1/4", "vcc:layer=2,stride=8"), ("1/4", "vcc:layer=2,stride=2"), ("1/2", "none")], evaluation="none"
    )
    trainer = Trainer(model, arguments, lambda batch: collate(processor, batch), samples(16), callbacks=[schedule])
    with schedule:  # so that an exception leaves the model as it was, too
        trainer.train()
    for line in trainer.state.log_history:
        if "loss" in line:
            tokens = line["visual_tokens_per_layer"]
            print(f"step {line['step']}: {line['reducer']}, visual tokens of an image {tokens}, loss {line['loss']:.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
