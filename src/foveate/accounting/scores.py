"""What the reducers' own scores cost, and what cuts in the tower save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any

from foveate.accounting.dry_run import Arrived, encode, skeleton
from foveate.accounting.prompts import Calls, Prompt, reached
from foveate.accounting.stack import decoder, macs_of
from foveate.anatomy import blocks, read
from foveate.anatomy.config import vision_of
from foveate.contract import ClsAttention, ImageSize, ReceivedAttention, Signal, Workload
from foveate.probes.tower import TOWER_SIGNALS
from foveate.reducers import Reducer
from foveate.reducers.base import Step, acting, passing


def decided(
    config: Any, reducers: Sequence[Reducer], prompts: Sequence[Prompt], calls: Calls, seen: Sequence[Mapping[int, int]] = ()
) -> tuple[int, int, int]:
    """FLOPs that the reducers' scores take, FLOPs that cuts in the vision tower save it, and how many of these in blocks that a feature
    level depends on. seen: of each crop of the calls, where that is known, by block the units that were left in front of it."""
    steps = acting(reducers, len(decoder(config).linear)) if reducers else []
    inside = [step for step in steps if step[0].effect.place == "tower"]
    needs = [signal for step in steps if step not in inside for signal in step[0].needs if isinstance(signal, TOWER_SIGNALS)]
    scores = saved = below = Fraction(0)
    width, towers = 0, list[tuple[Fraction, Arrived]]()
    for call, share in calls if needs or inside else ():
        counted = encode(config, call, needs, blocks=bool(inside))
        scores, width = scores + share * counted.flops["scores"], counted.width
        towers += [(share, arrived) for arrived in counted.calls]
    whole = all(share == 1 for share, _ in towers) and len(seen) == sum(len(arrived.units) for _, arrived in towers)
    crops = iter(seen if whole else ())
    macs = [macs_of(layer, vision_of(config)) for layer in blocks(read(skeleton(config)).tower_of("image"))] if towers else []
    deepest = getattr(vision_of(reached(config)), "num_hidden_layers", None) if towers else None  # None: they all count
    for share, arrived in towers:
        left = list(islice(crops, len(arrived.units))) or [{}] * len(arrived.units)
        if not arrived.packed:  # rows of one call are as long as the longest
            left = [{block: max(of[block] for of in left) for block in left[0]}] * len(left)
        for units, known in zip(arrived.units, left, strict=True):
            spent, less = _in_tower(macs, inside, arrived, units, known)
            scores, saved, below = scores + share * spent, saved + share * sum(less), below + share * sum(less[:deepest])
    return round(scores + sum(_in_lm(config, reducers, prompt, width) for prompt in prompts if prompt.images)), round(saved), round(below)


def _in_tower(
    macs: Sequence[int], steps: Sequence[Step], arrived: Arrived, units: int, seen: Mapping[int, int]
) -> tuple[Fraction, list[Fraction]]:
    """FLOPs of the scores of one crop of so many units, and those that its cuts save each block: where a block attends within windows, all
    of them are taken to lose the same share. macs: of each block, a token's multiply-adds in its weights; seen: as in `decided`."""
    image, g, beside, width = ImageSize.whole(units), arrived.patches, arrived.beside, arrived.heads * arrived.width
    whole, left, score, saved = units * g + beside, units, Fraction(0), list[Fraction]()
    for block, (own, pairs) in enumerate(zip(macs, arrived.pairs, strict=False)):
        here, came = [step for step in steps if step[0].index == block], left * g + beside
        for _, reducer, stage in here:
            for signal in {signal for site, _, _ in here for signal in site.needs}:
                score += _asked(signal, came, arrived)
            score += reducer.score_flops(Workload((image,), (left,), beside, tower_width=arrived.width), stage)
            (left,) = reducer.count(Workload((image,), (left,)), stage)
        left = seen.get(block, left)
        n = left * g + beside
        saved.append(2 * (whole - n) * own + 4 * (whole**2 - n**2) * pairs * width)
    return score, saved


def _asked(signal: Signal, slots: int, arrived: Arrived) -> int:
    """FLOPs of what a reducer in the tower asks of the attention of the block before its own, which sees so many slots."""
    rows = 1 if isinstance(signal, ClsAttention) and arrived.cls else slots
    return 2 * rows * slots * arrived.heads * arrived.width if isinstance(signal, ClsAttention | ReceivedAttention) else 0


def _in_lm(config: Any, reducers: Sequence[Reducer], prompt: Prompt, tower_width: int) -> int:
    """FLOPs of the scores of one prompt in front of and inside the language model: of the tokens that were there, where that is known, else
    of those that may be there at most."""
    stack, text = decoder(config), config.get_text_config()
    counts = [[image.tokens for image in prompt.images]] * len(stack.linear)
    score = 0
    for site, reducer, stage in passing(reducers, prompt.images, counts, prompt.left):
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
