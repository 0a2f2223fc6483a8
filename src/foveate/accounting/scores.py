"""What the reducers' own scores cost, and what cuts in the tower save."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from foveate.accounting.dry_run import encode, skeleton
from foveate.accounting.prompts import Calls, Prompt
from foveate.accounting.stack import decoder, stack_of
from foveate.anatomy import blocks, read
from foveate.anatomy.config import vision_of
from foveate.contract import ImageSize, Workload
from foveate.probes.tower import TOWER_SIGNALS
from foveate.reducers import Reducer
from foveate.reducers.base import Step, acting, passing


def decided(config: Any, reducers: Sequence[Reducer], prompts: Sequence[Prompt], calls: Calls) -> tuple[int, int]:
    """FLOPs that the reducers' scores take, and FLOPs that cuts in the vision tower save it."""
    steps = acting(reducers, len(decoder(config).linear)) if reducers else []
    needs = [signal for site, _, _ in steps for signal in site.needs if isinstance(signal, TOWER_SIGNALS)]
    scores = saved = Fraction(0)
    width = 0
    in_tower = any(site.effect.place == "tower" for site, _, _ in steps)
    for call, share in calls if needs or in_tower else ():
        counted = encode(config, call, needs, crops=in_tower)
        scores, width = scores + share * counted.flops["scores"], counted.width
        for crops, tokens, beside in counted.crops:
            spent, less = _in_tower(config, steps, tokens, beside, width)
            scores, saved = scores + share * crops * spent, saved + share * crops * less
    return round(scores + sum(_in_lm(config, reducers, prompt, width) for prompt in prompts if prompt.images)), round(saved)


def _in_tower(config: Any, steps: Sequence[Step], tokens: int, beside: int, width: int) -> tuple[int, int]:
    """FLOPs of the scores of one crop of `tokens` tokens, of which `beside` are no patches, and those that its cuts save."""
    tower = read(skeleton(config)).tower_of("image")
    stack = stack_of(blocks(tower), vision_of(config))
    image = ImageSize.whole(tokens - beside)
    left, score, saved = image.tokens, 0, 0
    for block, (macs, attention) in enumerate(zip(stack.linear, stack.attention_width, strict=True)):
        for site, reducer, stage in steps:
            if site.effect.place == "tower" and site.index == block:
                score += reducer.score_flops(Workload((image,), (left,), beside, tower_width=width), stage)
                (left,) = reducer.count(Workload((image,), (left,)), stage)
        n = left + beside
        saved += 2 * (tokens - n) * macs + 4 * (tokens**2 - n**2) * attention
    return score, saved


def _in_lm(config: Any, reducers: Sequence[Reducer], prompt: Prompt, tower_width: int) -> int:
    """FLOPs of the scores of one prompt in front of and inside the language model."""
    stack, text = decoder(config), config.get_text_config()
    counts = [[image.tokens for image in prompt.images]] * len(stack.linear)
    score = 0
    for site, reducer, stage in passing(reducers, prompt.images, counts):
        at, before = site.layer, max(0, site.layer - 1)
        if site.effect.place == "decoder":
            sizes = Workload(
                tuple(prompt.images),
                tuple(counts[at]),
                prompt.text,
                width=text.hidden_size,
                heads=text.num_attention_heads,
                query_width=stack.attention_width[before],
                keys=sum(counts[before]) + prompt.text,
                tower_width=tower_width,
                layers=len(counts),
            )
            score += reducer.score_flops(sizes, stage)
    return score
