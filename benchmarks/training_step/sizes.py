"""One pre-training step (forward and backward) at several numbers of visual tokens: time, peak memory and counted FLOPs.

    python benchmarks/training_step/sizes.py                                   # 0.5B shape, CPU
    python benchmarks/training_step/sizes.py --shape 7b --device cuda --dtype bfloat16

Random weights, real shapes: CLIP-L and a language model of the size of Qwen2-0.5B or Vicuna-7B. As in Chain-of-Sight, the bridge and LoRA
of rank 64 on every linear map of the language model are trained. 32, 80 and 336 tokens come from Chain-of-Sight at 224 px, 576 from
LLaVA's MLP at 336 px; 23 text tokens an image, the paper's mean. Every number of tokens runs in a process of its own, the numbers in turn
(A B C D A B C D …), so that a drift of the machine hits all alike. Ratios are to 576 tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config

from foveate.accounting import Trained, predict
from foveate.machine import environment
from foveate.model import FoveateConfig, FoveateForConditionalGeneration

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))  # the repository: what the benchmarks share lies in benchmarks/

from benchmarks.common import GRANTED, Usage, busy  # noqa: E402

IMAGE_TOKEN, TEXT = 5, 23
BRIDGES: dict[int, tuple[int, dict[str, Any]]] = {
    32: (224, {"kind": "chain_of_sight", "scales": [[16, 16], [4, 1]]}),
    80: (224, {"kind": "chain_of_sight", "scales": [[16, 16], [4, 4]]}),
    336: (224, {"kind": "chain_of_sight", "scales": [[16, 16], [8, 16], [2, 4]]}),
    576: (336, {"kind": "mlp"}),
}
MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = rf".*causal_lm.*\.({'|'.join(MAPS)})"
RANK = 64


def config(shape: str, tokens: int) -> FoveateConfig:
    size, bridge = BRIDGES[tokens]
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, image_size=size, patch_size=14
    )
    if shape == "0.5b":
        text: Any = Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        )
    else:
        text = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000)
    layers = [16, 23] if bridge["kind"] == "chain_of_sight" else [23]
    return FoveateConfig(
        vision_config=vision, text_config=text, bridge=bridge, vision_feature_layer=layers, image_token_id=IMAGE_TOKEN, image_size=size
    )


def build(shape: str, tokens: int, device: str, dtype: torch.dtype) -> Any:
    """The model with LoRA in place, tower and the rest of the language model frozen."""
    with torch.device(device):
        model = FoveateForConditionalGeneration(config(shape, tokens))
    model = model.to(dtype).train()
    peft = get_peft_model(model, LoraConfig(r=RANK, target_modules=TARGETS))
    for parameter in model.model.bridge.parameters():
        parameter.requires_grad_(True)
    return peft


def step(model: Any, shape: str, tokens: int, batch: int, device: str, dtype: torch.dtype) -> None:
    size, _ = BRIDGES[tokens]
    ids = torch.full((batch, tokens + TEXT), 7, device=device)
    ids[:, :tokens] = IMAGE_TOKEN
    labels = ids.masked_fill(ids == IMAGE_TOKEN, -100)
    pixels = torch.zeros(batch, 3, size, size, device=device, dtype=dtype)
    if device == "meta":  # placeholders cannot be counted without values: hand in embeddings of the same shape
        core = model.get_base_model()
        visual = torch.cat(core.model.get_image_features(pixels).pooler_output).view(batch, tokens, -1)
        embeds = torch.cat([visual, core.get_input_embeddings()(ids[:, tokens:])], 1)
        mask = torch.ones(batch, 1, tokens + TEXT, tokens + TEXT, dtype=torch.bool, device=device)  # ready-made: nothing is looked at
        core.model.causal_lm(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return
    model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def measure(shape: str, tokens: int, batch: int, device: str, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """Runs in a process of its own: seconds of each step after one warm-up, by the clock and of all threads,
    what share of its threads the machine granted meanwhile (None: not known), and the peak memory in bytes."""
    model = build(shape, tokens, device, dtype)
    gc.collect()
    seconds, cpu = [], []
    usage = Usage()
    for i in range(steps + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start, ran = time.perf_counter(), time.process_time()
        step(model, shape, tokens, batch, device, dtype)
        if device == "cuda":
            torch.cuda.synchronize()
        if i:
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - ran)
        else:
            usage = Usage()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"seconds": seconds, "cpu": cpu, "granted": usage.granted(), "peak_bytes": peak, "weight_bytes": weights}


def counted(shape: str, tokens: int, batch: int) -> int:
    """FLOPs of one step by torch's own counter, on the meta device."""
    model = build(shape, tokens, "meta", torch.float32)
    with FlopCounterMode(display=False) as counter:
        step(model, shape, tokens, batch, "meta", torch.float32)
    return counter.get_total_flops()


def predicted(shape: str, tokens: int, batch: int) -> int:
    trained = Trained(bridge=True, lora_rank=RANK, lora_targets=MAPS)
    return batch * predict(config(shape, tokens), text_tokens=TEXT, mode="train", trained=trained).total_flops


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=["0.5b", "7b"], default="0.5b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each number of tokens")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in each process")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    if given.one:
        print(json.dumps(measure(given.shape, given.one, given.batch, given.device, dtype, given.steps)))
        return
    own = [f"--{name}={getattr(given, name)}" for name in ("shape", "device", "dtype", "batch", "steps")]
    runs: dict[int, list[dict[str, Any]]] = {tokens: [] for tokens in BRIDGES}
    for i in range(given.rounds):
        for tokens in BRIDGES:
            print(f"round {i + 1} of {given.rounds}: {tokens} tokens", file=sys.stderr, flush=True)
            done = subprocess.run([sys.executable, __file__, *own, "--one", str(tokens)], check=True, capture_output=True, text=True)
            run = json.loads(done.stdout.splitlines()[-1])
            if run["granted"] is not None and run["granted"] < GRANTED:
                print(f"the machine granted {run['granted']:.0%} of what the threads wanted", file=sys.stderr, flush=True)
            runs[tokens].append(run)
    rows = []
    for tokens, found in runs.items():
        seconds = [s for run in found for s in run["seconds"]]
        rows.append(
            {
                "tokens": tokens,
                "image_size": BRIDGES[tokens][0],
                "seconds": seconds,
                "median_seconds": statistics.median(seconds),
                "median_cpu": statistics.median(s for run in found for s in run["cpu"]),
                "granted": [run["granted"] for run in found],
                "peak_bytes": max(run["peak_bytes"] for run in found),
                "weight_bytes": found[0]["weight_bytes"],
                "counted_flops": counted(given.shape, tokens, given.batch),
                "predicted_flops": predicted(given.shape, tokens, given.batch),
            }
        )
    name = f"{given.shape}-{given.device}-{given.dtype}"
    machine = environment() if given.device == "cpu" else f"{torch.cuda.get_device_name()}, {platform.system()}, torch {torch.__version__}"
    command = f"python benchmarks/training_step/sizes.py {' '.join(own)} --rounds {given.rounds}"
    report = {"command": command, "machine": machine, "transformers": transformers.__version__, "text_tokens": TEXT, "rows": rows}
    (HERE / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (HERE / f"{name}.md").write_text(table(report))
    print(table(report))


def table(report: dict[str, Any]) -> str:
    base = report["rows"][-1]
    lines = [
        f"`{report['command']}`",
        "",
        report["machine"],
        "",
        "| visual tokens | px | step, median s (min–max) | time ÷ 576 | peak memory GiB (weights) | memory ÷ 576 "
        "| counted TFLOPs | counted ÷ 576 | predicted ÷ 576 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        gib = 1024**3
        lines.append(
            f"| {row['tokens']} | {row['image_size']} | {row['median_seconds']:.2f} ({min(row['seconds']):.2f}–{max(row['seconds']):.2f}) "
            f"| {row['median_seconds'] / base['median_seconds']:.3f} | {row['peak_bytes'] / gib:.2f} ({row['weight_bytes'] / gib:.2f}) "
            f"| {row['peak_bytes'] / base['peak_bytes']:.3f} | {row['counted_flops'] / 1e12:.3f} "
            f"| {row['counted_flops'] / base['counted_flops']:.3f} | {row['predicted_flops'] / base['predicted_flops']:.3f} |"
        )
    if "median_cpu" in base:  # results of before have wall seconds only
        cpu = ", ".join(f"{row['median_cpu']:.2f}" for row in report["rows"])
        lines += ["", f"Seconds of all threads together, in which they ran, medians in the order of the rows: {cpu}."]
    for row in report["rows"]:
        lines += [line.replace("in round", f"at {row['tokens']} tokens in round") for line in busy(row)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
