"""What an image becomes is an object: several crops, marks between them, and images of one batch that become different things."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from foveate.accounting import predict
from foveate.accounting.prompts import planned
from foveate.data.collate import Collator
from foveate.data.conversations import Conversation
from foveate.model import FoveateConfig
from foveate.reducers import parse
from foveate.tokens import Crop, ImagePlan, Kind
from foveate.train.loading import Loading
from foveate.train.stages import part_modules
from tests.conformance.family import families
from tests.data.test_conversations import Processor

WHOLE = ImagePlan.whole(16, (4, 4))
WIDE = ImagePlan((Crop((4, 4), 16), Crop((4, 4), 16), Crop((2, 4), 8)), (Kind.NEWLINE, Kind.NEWLINE))
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = FoveateConfig(
    vision_config=CLIPVisionConfig(**SHAPE, image_size=32, patch_size=8, projection_dim=16),
    text_config=LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=64),
    bridge={"kind": "mlp"},
    image_token_id=1,
)


class Tiling(Processor):
    """Wide images become crops; the pixels do not matter here."""

    def __init__(self) -> None:
        super().__init__()
        self.plan_image = lambda height, width: WIDE if width > height else WHOLE


def sample(number: int, *sizes: tuple[int, int]) -> Conversation:
    images = [Image.new("RGB", size) for size in sizes]
    return Conversation(number, f"s{number}", [("user", "<image>" * len(images) + "What?"), ("assistant", "This.")], images)


SAMPLES = [sample(0, (40, 20)), sample(1, (20, 20), (40, 20)), sample(2)]


class Data(list[Conversation]):
    source = None


def test_a_plan_adds_up() -> None:
    assert (WHOLE.visual, WHOLE.tokens, len(WHOLE.crops)) == (16, 16, 1)
    assert (WIDE.visual, WIDE.tokens) == (40, 42)
    assert CONFIG.plan_image(480, 640) == WHOLE


def test_placeholders_are_those_of_each_image() -> None:
    collator = Collator(Tiling(), 999)
    batch = collator(SAMPLES)
    token = collator.renderer.image_token_id
    assert (batch["input_ids"] == token).sum(1).tolist() == [42, 16 + 42, 0]
    assert (batch["labels"] >= 0).sum(1).tolist() == [6] * 3  # the answers, whatever stands before them
    rows = batch["input_ids"][1]
    assert (rows == token).nonzero().flatten().diff().eq(1).all()


def test_an_image_that_would_be_cut_is_named_with_its_tokens() -> None:
    with pytest.raises(Exception, match=r"sample s1 has \d+ tokens, 1 x 16 \+ 1 x 42 of them visual; cutting it to max_length 50 would"):
        Collator(Tiling(), 50)([SAMPLES[1]])


def test_a_batch_carries_the_plans_of_its_rows(tmp_path: Path) -> None:
    batch = Loading(Data(SAMPLES), Collator(Tiling(), 999), "stop", tmp_path / "skipped")([1, 2, 0])  # type: ignore[arg-type]
    assert batch["plans"] == [[WHOLE, WIDE], [], [WIDE]]


@pytest.mark.parametrize("mode", ["prefill", "train"])
@pytest.mark.parametrize("reducers", ["none", "fastv:keep=0.5,layer=1", "random:keep=4"])
def test_whole_images_cost_what_that_many_images_cost(reducers: str, mode: Any) -> None:
    for count in (0, 1, 3):
        given: dict[str, Any] = {"text_tokens": 5, "reducers": parse(reducers), "mode": mode}
        assert predict(CONFIG, images=[WHOLE] * count, **given) == predict(CONFIG, images=count, **given)
        assert predict(CONFIG, images=[ImagePlan.whole(16)] * count, **given) == predict(CONFIG, images=count, **given)


def test_crops_cost_what_each_of_them_costs() -> None:
    parts = [predict(CONFIG, grid=crop.grid, images=1).flops for crop in WIDE.crops]
    found = predict(CONFIG, images=[WIDE], text_tokens=5)
    for part in ("tower", "bridge"):
        assert found.flops[part] == sum(flops[part] for flops in parts)
    assert (found.visual_tokens, found.total_tokens) == ((40,) * 2, (40 + 2 + 5,) * 2)


def test_a_mixed_prompt() -> None:
    prompt, calls = planned(CONFIG, [WHOLE, WIDE], 5)
    assert [image.crops for image in prompt.images] == [(16,), (16, 16, 8)]
    assert (prompt.text, prompt.tokens) == (7, 63)
    assert sorted(share for _, share in calls) == [Fraction(1), Fraction(3)]


@pytest.mark.parametrize(
    ("name", "tower", "bridge"),
    [
        ("video_llava", {"image_tower", "video_tower"}, {"multi_modal_projector"}),
        ("lighton_ocr", {"vision_encoder"}, {"vision_projection"}),
        ("deepseek_vl", {"vision_model"}, {"aligner"}),
        ("llava", {"vision_tower"}, {"multi_modal_projector"}),
        ("idefics3", {"vision_model"}, {"connector"}),
        ("foveate", {"vision_tower"}, {"bridge"}),
    ],
)
def test_tower_and_bridge_are_those_of_the_anatomy(name: str, tower: set[str], bridge: set[str], tmp_path: Path) -> None:
    if name == "video_llava":  # its processor wants torchvision
        model: Any = VideoLlavaForConditionalGeneration(
            VideoLlavaConfig(vision_config=CONFIG.vision_config, text_config=CONFIG.text_config)
        )
    else:
        families()[name].build(tmp_path)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    core = model.model
    for found, names in zip(part_modules(model), (tower, bridge), strict=True):
        assert {id(p) for p in found.parameters()} == {id(p) for name in names for p in getattr(core, name).parameters()}
