"""Images and prompts -> model inputs, with as many placeholders for each image as its plan has tokens."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import pad
from transformers import ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import get_image_size, infer_channel_dimension_format, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs

from foveate.errors import FoveateError
from foveate.model.configuration import NEEDS, Planning, read_tiling, read_view_tokens
from foveate.model.views import BridgeSight
from foveate.tilings import pixels as views
from foveate.tokens import WHOLE, ImagePlan

# Chat templates of language models take a message's content as text. This puts lists of parts into that form first; an image becomes the
# marker, on a line of its own where something follows, as in LLaVA's data.
FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string or not message['content'] -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set joined = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set joined.text = joined.text + 'IMAGE_MARKER' + ('' if loop.last else '\\n') -%}
{%- elif part['type'] == 'text' -%}
{%- set joined.text = joined.text + part['text'] -%}
{%- else -%}
{{- raise_exception('content of type ' + part['type'] + ' is not supported: only text and image') -}}
{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=joined.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""

# LLaVA-1.5's conversation format (arXiv 2310.03744), for tokenizers that bring no template.
LLAVA_V1 = """\
{%- if messages[0]['role'] == 'system' -%}
{{- messages[0]['content'] -}}{%- set messages = messages[1:] -%}
{%- else -%}
{{- "A chat between a curious user and an artificial intelligence assistant. " -}}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions." -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- ' USER: ' + message['content'] + ' ASSISTANT:' -}}
{%- else -%}
{{- ' ' -}}{%- generation -%}{{- message['content'] + (eos_token or '') -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""


class TiledImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """`budget`: views that the images of one prompt share; `view_tokens`: as how many visual tokens each view is asked for, one number or
    one for each image; `prompts`: how many of the images each prompt has."""

    budget: int | None
    view_tokens: int | list[int] | None
    prompts: list[int] | None


class FoveateProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Those of any processor, `budget` and `view_tokens`."""

    images_kwargs: TiledImagesKwargs


class FoveateProcessor(Planning, ProcessorMixin):
    """Tokenizer and image processor of a Foveate model.

    `plan_image` says what becomes of an image, and so how many placeholders its marker in a prompt becomes. Without a `tiling` it is seen
    whole, once, resized to `image_size` x `image_size` pixels, whatever its shape, without border, as Chain-of-Sight's code does. With one
    it is cut as the tiling says; the images of one prompt share its budget of views, or the `budget` of a call.
    A bridge that makes as many tokens as it is asked for (mqt, chain_of_sight) is asked for `view_tokens` of each view, those of a call or
    the processor's own; without either it makes all. What it was asked for is then said to the model, as `view_tokens` (images,).

    `pixel_values` (crops of all images, channels, height, width); with a tiling `image_sizes` (images, 3) says the height and width of each
    and how many views it may have had (0: any number). Views of several shapes lie in the upper left of their pixels.
    Where images become weights (the bridge vlora) nothing stands for one in the prompt, and `prompt_images` (prompts,) says how many images
    each prompt has.

    A subclass whose `plan_image` cuts images itself needs no tiling: `image_crops` (images,) then says how many crops each image has, and
    is left out where that is one. Its plans keep `each`.

    `chat_template` is used as it is; without one it is the tokenizer's own (or LLaVA-1.5's), led by a part that turns
    {"type": "image"} content into image markers.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        bridge: dict[str, Any] | None = None,
        patch_size: int = 14,
        image_size: int = 224,
        image_token: str = "<image>",
        tiling: str | None = None,
        view_tokens: int | None = None,
    ) -> None:
        if bridge is None:
            raise FoveateError('a FoveateProcessor needs the bridge of its model: {"kind": ..., arguments}')
        self.image_token = image_token
        self.image_token_id = require_token(tokenizer, image_token)
        self.patch_size = patch_size
        self.auto_map = {"AutoProcessor": f"{NEEDS}--foveate.FoveateProcessor"}  # without it AutoProcessor gives a tokenizer in its stead
        super().__init__(image_processor, tokenizer, chat_template=chat_template or default_template(tokenizer, image_token))
        self.set_tiling(tiling)
        self.view_tokens = read_view_tokens(view_tokens)
        self.set_bridge(bridge, image_size)

    valid_processor_kwargs = FoveateProcessorKwargs

    def set_tiling(self, tiling: str | None) -> None:
        """From now on images are cut so; None: they are seen whole."""
        read = read_tiling(tiling)
        self.tiling = None if read is None else str(read)

    def set_view_tokens(self, count: int | None) -> None:
        """From now on each view is asked for so many visual tokens; None: as many as the bridge makes."""
        self.view_tokens = self.asking_for(count).view_tokens

    def asking_for(self, count: int | None) -> Self:
        """A processor whose views become so many visual tokens. FoveateError where the bridge does not make so many of a view."""
        other = copy.copy(self)
        other.view_tokens = read_view_tokens(count)
        if self.tiled is None or not self.tiled.shapes:
            sight = other.sight()
            sight.made(sight.grid(sight.side, sight.side))
        return other

    def set_bridge(self, bridge: Mapping[str, Any], image_size: int) -> None:
        """From now on views are `image_size` pixels wide and high and become as many tokens as `bridge` makes of them."""
        if self.tiled is None or not self.tiled.shapes:
            sight = BridgeSight.of(bridge, image_size, self.patch_size, self.view_tokens)
            sight.made(sight.grid(image_size, image_size))  # what the bridge does not take is told now
        self.bridge, self.image_size = dict(bridge), image_size
        square = {"height": image_size, "width": image_size}
        resize = {"do_resize": True, "size": square, "crop_size": square, "do_center_crop": False, "do_pad": False, "do_convert_rgb": True}
        for name, value in resize.items():
            if hasattr(self.image_processor, name):
                setattr(self.image_processor, name, value)

    def sight(self, side: int | None = None) -> BridgeSight:
        return BridgeSight.of(self.bridge, side or self.image_size, self.patch_size, self.view_tokens)

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of a square image."""
        return self.plan_image(self.image_size, self.image_size).tokens

    def resized(self, image_size: int) -> Self:
        """A processor that makes images `image_size` pixels wide and high, rounded to whole patches; the model takes images of both.

        FoveateError where the bridge is bound to its grid."""
        patches = max(1, (2 * image_size + self.patch_size) // (2 * self.patch_size))
        other = copy.copy(self)
        other.image_processor = copy.deepcopy(self.image_processor)
        other.set_bridge(self.bridge, patches * self.patch_size)
        return other

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As any processor's, without the padding and truncation of the last call."""
        forget_last_call(self.tokenizer)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As any processor's; `budget`: how many views the images of one prompt may become together, the tiling's own unless given;
        `view_tokens`: as how many visual tokens each view is asked for, one number or one for each image in turn."""
        if (self.tiling is not None or self.weighs) and text is not None:
            texts = [text] if isinstance(text, str) else text
            kwargs["prompts"] = [one.count(self.image_token) for one in texts]
        return super().__call__(images=images, text=text, **kwargs)

    def _process_images(
        self,
        images: Any,
        budget: int | None = None,
        view_tokens: int | Sequence[int] | None = None,
        prompts: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, list[str]]:
        images = make_flat_list_of_images(images)
        sizes = [size_of(image, kwargs.get("input_data_format")) for image in images]
        each = self.counts_of(view_tokens, len(images))
        asked = {count: self if count == self.view_tokens else self.asking_for(count) for count in each}
        plans = list[ImagePlan]()
        for count in prompts or [1] * len(images):
            own = sizes[len(plans) : len(plans) + count]
            for size, most in zip(own, self.share(own, budget), strict=True):
                of = asked[each[len(plans)]]
                plans.append(of.plan_image(*size) if most is None else of.plan_image(*size, most))
        made = self.pixels(images, plans, **kwargs)
        if self.weighs and prompts is not None:
            made["prompt_images"] = list(prompts)
        return made, [self.written(plan) for plan in plans]

    def pixels(self, images: Sequence[Any], plans: Sequence[ImagePlan], **options: Any) -> dict[str, Any]:
        """What the model takes of images that become `plans`: `pixel_values`, and what says which crops belong together."""
        if self.tiling is None:
            return {**self.image_processor(cut(images, plans), **options), **crop_counts(plans), **token_counts(plans)}
        order, wanted = options.pop("input_data_format", None), options.pop("return_tensors", None)
        made = []
        for image, plan in zip(images, plans, strict=True):
            picture = image if isinstance(image, Image.Image) else to_pil_image(image, input_data_format=order)
            crops = views.cut(picture, plan, int(getattr(self.image_processor, "resample", None) or views.BICUBIC))
            made += [torch.as_tensor(np.asarray(x)) for x in self._processed(crops, options)]
        high, wide = (max(x.shape[axis] for x in made) for axis in (-2, -1))
        stacked = torch.stack([pad(x, (0, wide - x.shape[-1], 0, high - x.shape[-2])) for x in made])
        given = torch.tensor([plan.given for plan in plans])
        sizes = {"image_sizes": given if wanted == "pt" else given.tolist()}
        return {"pixel_values": stacked if wanted == "pt" else stacked.numpy(), **sizes, **token_counts(plans)}

    def _processed(self, crops: Sequence[Image.Image], options: Mapping[str, Any]) -> Any:
        """(channels, height, width) of each crop of one image; their size is the plan's."""
        left = {"do_resize": False, "do_center_crop": False} if hasattr(self.image_processor, "do_center_crop") else {"do_resize": False}
        return self.image_processor(list(crops), **{**options, **left})["pixel_values"]

    def written(self, plan: ImagePlan) -> str:
        """What stands for an image in the text: its placeholders, and the tags between them."""
        return "".join(run if isinstance(run, str) else self.image_token * run for run in plan.runs)

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        """Images may come flat (in the order of their markers) or as one list per prompt, which may be empty."""
        if images is not None and text is not None:
            check_rows(images, [text] if isinstance(text, str) else text, self.image_token)
        if isinstance(images, list | tuple):
            images = make_flat_list_of_images(images) if any(not isinstance(i, list | tuple) or i for i in images) else None
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        if text is not None and isinstance(text, list) and all(isinstance(t, str) for t in text):
            markers = sum(t.count(self.image_token) for t in text)
            given = 0 if images is None else len(make_flat_list_of_images(images))
            if markers != given:
                raise FoveateError(
                    f"the prompts hold {markers} {self.image_token} markers but {given} images were given: one for each image"
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        if image_sizes is None:
            return MultiModalData()
        plans = [self.plan_image(*size) for size in image_sizes]  # each as if it were alone
        return MultiModalData(num_image_tokens=[plan.tokens for plan in plans], num_image_patches=[len(plan.crops) for plan in plans])


def size_of(image: Any, channels: Any = None) -> tuple[int, int]:
    """(height, width) of a picture, or of an array whose `channels` are "channels_first" or "channels_last", found out unless told."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    height, width = get_image_size(image, channels or infer_channel_dimension_format(image, (1, 3, 4)))
    return height, width


def cut(images: Sequence[Any], plans: Sequence[ImagePlan]) -> list[Any]:
    """The crops of all images, in order, each as a picture of its own; an image that is seen whole is left as it is."""
    return [_part(image, crop.box) for image, plan in zip(images, plans, strict=True) for crop in plan.crops]


def _part(image: Any, box: tuple[float, float, float, float]) -> Any:
    if box == WHOLE:
        return image
    picture: Image.Image = image if isinstance(image, Image.Image) else to_pil_image(image)
    left, top, right, bottom = box
    return picture.crop(
        (round(left * picture.width), round(top * picture.height), round(right * picture.width), round(bottom * picture.height))
    )


def crop_counts(plans: Sequence[ImagePlan]) -> dict[str, list[int]]:
    """`image_crops`, as the model takes it, unless every image is one crop."""
    counts = [len(plan.crops) for plan in plans]
    return {} if set(counts) <= {1} else {"image_crops": counts}


def token_counts(plans: Sequence[ImagePlan]) -> dict[str, list[int]]:
    """`view_tokens`, as the model takes it, unless all images become as many tokens as the bridge makes."""
    if not any(plan.each for plan in plans):
        return {}
    return {"view_tokens": [plan.each or plan.crops[0].tokens for plan in plans]}


def forget_last_call(tokenizer: Any) -> None:
    """A fast tokenizer keeps the padding and the truncation of its last call, and would be saved with them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()


def require_token(tokenizer: Any, token: str) -> int:
    """The id of a token that the vocabulary must hold. FoveateError that says how to add it."""
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        raise FoveateError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no token {token!r}; "
            "from_backbones(..., add_image_token=True) adds it and a row for it to the embeddings"
        )
    return int(vocabulary[token])


def default_template(tokenizer: Any, image_token: str, given: str | None = None) -> str:
    """`given`, or the tokenizer's chat template, or LLaVA-1.5's, made to take {"type": "image"} content."""
    own = given or tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return FLATTEN.replace("IMAGE_MARKER", image_token) + (own or LLAVA_V1)


def check_rows(images: Any, texts: Any, marker: str) -> None:
    """Where images come as one list per prompt, each prompt must have its own number of markers."""
    if not isinstance(images, list | tuple) or not images or not all(isinstance(row, list | tuple) for row in images):
        return
    if len(images) != len(texts):
        raise FoveateError(f"{len(images)} lists of images were given for {len(texts)} prompts: one list for each prompt")
    for row, (given, text) in enumerate(zip(images, texts, strict=True)):
        if text.count(marker) != len(given):
            raise FoveateError(f"prompt {row} holds {text.count(marker)} {marker} markers but {len(given)} images were given for it")
