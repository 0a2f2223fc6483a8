"""What enters a model: prompts with their images, and the calls that encode these, from a configuration and a processor's outputs."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from foveate.accounting.dry_run import encode, skeleton
from foveate.anatomy import read
from foveate.anatomy.config import channels_of, placeholders_of, sides_of, vision_of
from foveate.contract import ImageSize
from foveate.errors import FoveateError
from foveate.model.configuration import FoveateConfig
from foveate.probes.encoding import Encoded
from foveate.tokens import ImagePlan

Calls = Sequence[tuple[Encoded, Fraction]]
WAY_OUT = "give what its processor makes of the prompt: predict(config, inputs=...)"


@dataclass(frozen=True)
class Prompt:
    """The images and videos of one prompt, and how many tokens beside their patches (text, newlines).

    left  as in `foveate.reducers.base.passing`, where it was recorded what was left of the images
    """

    images: list[ImageSize]
    text: int
    left: Mapping[tuple[int, bool], Sequence[int]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(image.tokens for image in self.images) + self.text


def read_prompts(config: Any, inputs: Mapping[str, Any]) -> tuple[list[Prompt], list[Encoded]]:
    """Reads a processor's outputs by `config` alone: the prompts, and what is encoded. FoveateError where placeholders and images do not
    match."""
    inputs = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    anatomy = read(skeleton(config)) if any("pixel_values" in name for name in inputs) else None
    rows: list[list[ImageSize]] = [[] for _ in ids]
    calls: list[Encoded] = []
    for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if anatomy is None or inputs.get(pixels) is None:
            continue
        methods = {of: method for method, of in anatomy.encodings.items()}
        method = methods.get(modality, "get_image_features")
        names = inspect.signature(getattr(anatomy.core, method)).parameters
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        calls.append(Encoded.of(method, given if pixels in given else {**given, "pixel_values": inputs[pixels]}))
        items = encode(config, calls[-1]).items
        made = sum(image.tokens + others for image, others in items)
        found = (ids.eq(token).sum(1).tolist() for token in placeholders_of(config, modality))
        slots = next((at for at in found if any(at)), [0] * len(ids))
        if made != sum(slots):
            raise FoveateError(
                f"the prompts have {sum(slots)} {modality} placeholders, but the {len(items)} {modality}s make {made} visual tokens; "
                "use the processor that belongs to the model"
            )
        left = iter(items)
        for row, count in zip(rows, slots, strict=True):
            while count > 0:
                image, others = next(left, (ImageSize.whole(0), 0))
                made = image.tokens + others
                if made > count or made == 0:
                    raise FoveateError(f"a prompt has placeholders for {count} visual tokens where an image makes {made}")
                row.append(image)
                count -= made
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    return [Prompt(row, length - sum(image.tokens for image in row)) for row, length in zip(rows, lengths, strict=True)], calls


def image_tokens(config: Any) -> int:
    """Visual tokens that the model makes of one image, as in `predict`; 0 for a bare text config."""
    return sum(image.tokens for call, _ in encodings_of(config, None, None, 1) for image, _ in encode(config, call).items)


def reached(config: Any) -> Any:
    """The configuration of one of Foveate's own models without the tower's blocks above its deepest feature level: they run, but no visual
    token depends on them, and none of their weights gets a gradient. As it is where there are none, of a tower whose configuration does not
    count its blocks (convolutions), and of the library's models."""
    blocks = getattr(config.vision_config, "num_hidden_layers", None) if isinstance(config, FoveateConfig) else None
    if blocks is None:
        return config
    levels = [level if level >= 0 else blocks + 1 + level for level in config.vision_feature_layer]
    if max(1, *levels) == blocks:
        return config
    found = copy.deepcopy(config)
    found.vision_feature_layer, found.vision_config.num_hidden_layers = levels, max(1, *levels)
    return found


def image_shape(config: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) in pixels of one image, as in `predict`, and the (rows, columns) of its patches."""
    height, width = image_of(config, None, None).given["pixel_values"].shape[-2:]
    patch = sides_of(vision_of(config), "patch_size")
    if patch is None:
        raise FoveateError(f"the size of a patch is not in the configuration of a {config.model_type!r} model")
    return (height, width), (height // patch[0], width // patch[1])


def encodings_of(config: Any, image_size: int | None, grid: tuple[int, int] | None, images: int) -> Calls:
    """What encodes `images` images: one of them, that often."""
    return [(image_of(config, image_size, grid), Fraction(images))] if vision_of(config) is not None and images else []


def image_of(config: Any, image_size: int | None, grid: tuple[int, int] | None) -> Encoded:
    """The call that encodes one image. FoveateError where the configuration alone does not say what that is."""
    height, width = _pixels(config, image_size, grid)
    if isinstance(config, FoveateConfig) and config.tiling is not None:
        return plan_call(config, config.plan_image(height, width))
    call = _seen(config, 1, height, width)
    try:
        encode(config, call)
    except FoveateError as error:
        raise FoveateError(f"what becomes of {_an_image(config)} is not in its configuration ({error}); {WAY_OUT}") from error
    return call


def plan_call(config: Any, plan: ImagePlan) -> Encoded:
    """The call that encodes one image that becomes a plan of its own."""
    width, height = (max(crop.pixels[axis] for crop in plan.crops) for axis in (0, 1))
    call = _seen(config, len(plan.crops), height, width)
    return asking({"image_sizes": torch.tensor([plan.given])}, call, plan.each)


def asking(more: dict[str, Tensor], call: Encoded, each: int) -> Encoded:
    """A call that encodes one image, with `more` arguments, and asks for `each` tokens of its crops; 0: for all."""
    return Encoded(call.method, {**call.given, **more, **({"view_tokens": torch.tensor([each])} if each else {})})


def _seen(config: Any, crops: int, height: int, width: int) -> Encoded:
    shape = crops, channels_of(vision_of(config)), height, width
    return Encoded("get_image_features", {"pixel_values": torch.ones((1,) * 4, dtype=torch.bool).expand(shape)})


def _pixels(config: Any, image_size: int | None, grid: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of an image, of the tower's own size unless another is asked for."""
    vision, ours = vision_of(config), isinstance(config, FoveateConfig)
    patch = sides_of(vision, "patch_size") or (1, 1)
    own = sides_of(config if ours else vision, "image_size")
    wanted = (image_size, image_size) if image_size else (grid[0] * patch[0], grid[1] * patch[1]) if grid else own
    if wanted is None:
        raise FoveateError(f"the size of {_an_image(config)} is not in its configuration; {WAY_OUT}")
    if min(wanted) < min(patch):
        raise FoveateError(f"image size {min(wanted)} is smaller than one patch of {min(patch)} pixels")
    if own and [side // each for side, each in zip(wanted, patch, strict=True)] == [
        side // each for side, each in zip(own, patch, strict=True)
    ]:
        return own  # pixels that fill no patch are not seen
    if not ours:
        size, asked = (" x ".join(map(str, sides)) for sides in (own or ("?",), wanted))
        raise FoveateError(
            f"{_an_image(config)} is of {size} pixels; what its processor makes of one of {asked} is not in its configuration; {WAY_OUT}"
        )
    return wanted


def _an_image(config: Any) -> str:
    return f"an image of a {config.model_type!r} model"


def prompt_of(config: Any, calls: Calls, images: int, per_image: int | None, text: int) -> Prompt:
    """One sequence of images that are all alike; `per_image` goes before what they are by `calls`."""
    items = [item for call, _ in calls for item in encode(config, call).items]
    if per_image is not None or not items:
        return Prompt([ImageSize.whole(per_image or 0)] * images, text)
    return Prompt([image for image, _ in items] * images, text + images * sum(others for _, others in items))


def planned(config: Any, plans: Sequence[ImagePlan], text: int) -> tuple[Prompt, Calls]:
    """One sequence of images that become `plans` with `text` other tokens, and what encodes them. A crop whose grid is not known is what
    the configuration makes of an image. FoveateError where that is another number of tokens than the plan's."""
    tiled = [plan for plan in plans if plan.size is not None]
    if tiled and len(tiled) == len(plans):
        return _tiled(config, tiled, text)
    kinds = Counter((crop.grid, plan.each) for plan in plans for crop in plan.crops)
    calls = {kind: asking({}, image_of(config, None, kind[0]), kind[1]) for kind in kinds}
    made = {kind: prompt_of(config, [(call, Fraction(1))], 1, None, 0) for kind, call in calls.items()}
    sizes, text = [], text + sum(len(plan.marks) for plan in plans)
    for plan in plans:
        for crop in plan.crops:
            alone = made[crop.grid, plan.each]
            beside = crop.tokens - (alone.tokens - alone.text)
            if beside not in (0, alone.text):
                raise FoveateError(
                    f"by its configuration {_an_image(config)} makes {alone.tokens} visual tokens of what it sees at once, not "
                    f"{crop.tokens}; {WAY_OUT}"
                )
            text += beside
        sizes.append(ImageSize.joined([image for crop in plan.crops for image in made[crop.grid, plan.each].images]))
    return Prompt(sizes, text), [(calls[kind], Fraction(count)) for kind, count in kinds.items()]


def _tiled(config: Any, plans: Sequence[ImagePlan], text: int) -> tuple[Prompt, Calls]:
    """`planned` for images of a model with a tiling, each of which is encoded in one call."""
    counts = Counter(plans)
    calls = {plan: plan_call(config, plan) for plan in counts}
    made = {plan: encode(config, call).items[0] for plan, call in calls.items()}
    for plan, (image, beside) in made.items():
        if (image.tokens, beside) != (plan.visual, len(plan.marks)):
            raise FoveateError(
                f"by its configuration {_an_image(config)} becomes {image.tokens} visual tokens and {beside} marks, not {plan.visual} and "
                f"{len(plan.marks)}; {WAY_OUT}"
            )
    marks = sum(len(plan.marks) for plan in plans)
    return Prompt([made[plan][0] for plan in plans], text + marks), [(calls[plan], Fraction(count)) for plan, count in counts.items()]
