"""Images of several crops, from the processor to the ledger: wide ones are seen as a left and a right half, the others whole."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

import foveate
from foveate.accounting import predict
from foveate.data.collate import Collator, Fit
from foveate.data.conversations import Conversation, Conversations, find_bad
from foveate.errors import FoveateError
from foveate.inference.asking import ask, prompts
from foveate.model import FoveateConfig, FoveateProcessor
from foveate.model.assembly import from_backbones
from foveate.reducers import parse, visual_tokens
from foveate.tokens import Crop, ImagePlan
from foveate.train.account import Costs
from foveate.train.run import main
from foveate.train.trainer import PROGRESS, FoveateTrainer
from tests.train.tiny_training import save_backbones, save_samples

HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
BRIDGES: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp"},
    "chain_of_sight": {"kind": "chain_of_sight", "scales": [[4, 4], [2, 1]], "width": 32, "head_dim": 16},
    "avg_pool2d": {"kind": "avg_pool2d", "pool": 2},
    "resampler": {"kind": "resampler", "queries": 4},
}
REDUCERS = ["none", "fastv:keep=0.3,layer=1", "fastv:keep=3,layer=1", "random:keep=0.5", "uniform:keep=0.25", "fastervlm:keep=5"]


def halved(whole: ImagePlan, height: int, width: int) -> ImagePlan:
    (crop,) = whole.crops
    return ImagePlan(tuple(Crop(crop.grid, crop.tokens, box) for box in HALVES)) if width > height else whole


class Halves(FoveateProcessor):
    def plan_image(self, height: int, width: int, budget: int | None = None) -> ImagePlan:
        return halved(super().plan_image(height, width), height, width)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("crops")
    save_backbones(found)
    return found


@pytest.fixture(scope="module", params=BRIDGES)
def made(request: pytest.FixtureRequest, folder: Path) -> tuple[Any, Halves]:
    torch.manual_seed(0)
    model, plain = from_backbones(folder / "tower", folder / "lm", BRIDGES[request.param])
    images: Any = CLIPImageProcessorPil.from_pretrained(folder / "tower")
    given: dict[str, Any] = {"bridge": plain.bridge, "patch_size": plain.patch_size, "image_size": plain.image_size}
    return model, Halves(images, plain.tokenizer, plain.chat_template, **given)


def drawn(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def samples() -> list[Conversation]:
    """A wide picture; a square one and a wide one; none; a high one."""
    shown = [[drawn(0, 40, 20)], [drawn(1, 20, 20), drawn(2, 61, 30)], [], [drawn(3, 20, 30)]]
    return [
        Conversation(i, f"s{i}", [("user", "<image>" * len(own) + "What?"), ("assistant", "This.")], own) for i, own in enumerate(shown)
    ]


def test_processor_and_collator_make_the_same(made: tuple[Any, Halves]) -> None:
    _, processor = made
    chosen = samples()
    batch = Collator(processor, 999)(chosen)
    assert batch["image_crops"].tolist() == [2, 1, 2, 1]
    messages = [[{"role": role, "content": text} for role, text in one.turns] for one in chosen]
    texts = [processor.tokenizer.apply_chat_template(one, tokenize=False) for one in messages]
    for images in ([one.images for one in chosen], [np.asarray(image) for one in chosen for image in one.images]):
        own = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
        assert set(own) == set(batch) - {"labels"}
        assert all(torch.equal(own[name], batch[name]) for name in own)
    left, right = (
        processor.image_processor(chosen[0].images[0].crop(box), return_tensors="pt") for box in ((0, 0, 20, 20), (20, 0, 40, 20))
    )
    assert torch.equal(batch["pixel_values"][:2], torch.cat([left["pixel_values"], right["pixel_values"]]))
    each = processor.plan_image(20, 20).tokens
    assert [[plan.tokens for plan in one.plans] for one in chosen] == [[2 * each], [each, 2 * each], [], [each]]
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [2 * each, 3 * each, 0, each]
    assert "image_crops" not in Collator(processor, 999)(chosen[2:])


def test_the_model_puts_the_crops_in_order(made: tuple[Any, Halves]) -> None:
    model, processor = made
    chosen = samples()
    batch = Collator(processor, 999)(chosen)
    with torch.no_grad():
        output = model(**batch)
        crops = model.get_image_features(batch["pixel_values"]).pooler_output
        images = model.get_image_features(batch["pixel_values"], batch["image_crops"]).pooler_output
        assert torch.equal(output.image_hidden_states, torch.cat(crops))
        assert [len(image) // len(crops[0]) for image in images] == [2, 1, 2, 1]
        assert torch.equal(torch.cat(images), torch.cat(crops))
        for row, one in enumerate(chosen):
            alone = Collator(processor, 999)([one])
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(model(**alone).logits[0], output.logits[row, :length], rtol=1e-4, atol=1e-5)
        for counts in ([2, 1, 2], [2, 2, 2, 1]):
            with pytest.raises(FoveateError, match=rf"image_crops counts {sum(counts)} crops, but pixel_values holds 6"):
                model(**{**batch, "image_crops": torch.tensor(counts)})


def test_crops_lie_as_single_images_do(made: tuple[Any, Halves]) -> None:
    """Rows and columns of a crop's tokens are those of the same picture alone, and an image is known by its pixels in any batch."""
    model, processor = made
    batch, single = Collator(processor, 999)(samples()), Collator(processor, 999)(samples()[3:])
    with torch.no_grad():
        with foveate.attach(model, []) as run:
            model(**batch)
        layout = run.last.layouts[0]
        with foveate.attach(model, []) as run:
            model(**single)
        alone = run.last.layouts[0]
        one = alone.place[0][alone.visual[0]][:, 3:]
        for row, crops in enumerate((2, 3, 0, 1)):
            place = layout.place[row][layout.visual[row]]
            assert torch.equal(place[:, 3:], one.repeat(crops, 1))
        kept = []
        for inputs, row in ((batch, 3), (single, 0)):
            with foveate.attach(model, "random:keep=0.5") as run:
                model(**inputs)
            cut = run.last.maps[0]
            kept.append(cut.representative[row][cut.target.visual[row]])
    assert torch.equal(*kept)


def test_generation_with_beams(made: tuple[Any, Halves]) -> None:
    model, processor = made
    chosen = samples()
    questions = prompts(processor, ["What?"] * 2, [1, 2])
    given = {"images": [chosen[0].images, chosen[1].images], "text": questions, "padding": True, "padding_side": "left"}
    inputs = processor(**given, return_tensors="pt", add_special_tokens=False)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    for beams in (1, 2):
        together = model.generate(**inputs, **options, num_beams=beams)
        with foveate.attach(model, []):
            assert torch.equal(model.generate(**inputs, **options, num_beams=beams), together)
    shared = ask(
        model, processor, [chosen[0].images[0], chosen[1].images[0]], [[0], [1, 0], [0]], prompts(processor, ["a", "b", "c"], [1, 2, 1]), 4
    )
    each = processor.plan_image(20, 20).tokens
    assert shared.placeholders == [2 * each, 3 * each, 2 * each]


@pytest.mark.parametrize("reducer", REDUCERS)
def test_the_ledger_is_what_the_plans_predict(made: tuple[Any, Halves], reducer: str) -> None:
    model, processor = made
    chosen, reducers = samples(), parse(reducer)
    batch = Collator(processor, 999)(chosen)
    with torch.no_grad(), foveate.attach(model, reducer) as run:
        model(**batch)
    found = run.last.ledger(model.config)
    assert found == predict(model.config, inputs=batch, reducers=reducers)
    lengths = batch["attention_mask"].sum(1).tolist()
    texts = [length - sum(plan.tokens for plan in one.plans) for length, one in zip(lengths, chosen, strict=True)]
    rows = [predict(model.config, images=one.plans, text_tokens=text, reducers=reducers) for one, text in zip(chosen, texts, strict=True)]
    for name in ("visual_tokens", "total_tokens", "kv_bytes", "layer_flops"):
        assert getattr(found, name) == tuple(map(sum, zip(*(getattr(row, name) for row in rows), strict=True)))
    assert found.flops == {part: sum(row.flops[part] for row in rows) for part in found.flops}


def test_a_plan_that_is_not_the_models_is_refused(made: tuple[Any, Halves]) -> None:
    model, processor = made
    (crop,) = processor.plan_image(20, 20).crops
    for wrong in (Crop(crop.grid, crop.tokens + 1), Crop(None, crop.tokens - 1)):
        with pytest.raises(FoveateError, match=f"makes {crop.tokens} visual tokens of what it sees at once, not {wrong.tokens}"):
            predict(model.config, images=[ImagePlan((crop, wrong))])


# ---- training ------------------------------------------------------------------------------------------------------------------------


def test_the_check_before_training_knows_the_size_of_each_picture(
    made: tuple[Any, Halves], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = made
    data = Conversations.open(save_samples(tmp_path, samples()), tmp_path / "images")
    collator = Collator(processor, 999)
    lengths = [int(collator([data[i]])["attention_mask"].sum()) for i in range(4)]
    for longest in sorted(set(lengths)):
        room = longest - 6 - 5  # an answer and the question may be cut off, no image
        wanted = [f"s{i}" for i in range(4) if lengths[i] - 11 > room]
        fits = Fit(collator.renderer, processor.plan_image, room)
        bad = find_bad(data.source, tmp_path / "checked.tsv", fits=fits)
        assert [one.id for one in bad if "would cut an image" in one.reason] == [name for name in wanted if name != "s2"]
        # by then their sizes are remembered
        monkeypatch.setattr("foveate.data.checked.shown_size", None)


@pytest.mark.parametrize("resumed", [False, True])
def test_training_counts_what_each_image_becomes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool) -> None:
    """Tokens, FLOPs and bad samples of a run on pictures of both kinds."""
    plain, own = FoveateConfig.plan_image, FoveateProcessor.plan_image
    monkeypatch.setattr(FoveateConfig, "plan_image", lambda self, height, width: halved(plain(self, height, width), height, width))
    monkeypatch.setattr(FoveateProcessor, "plan_image", lambda self, height, width: halved(own(self, height, width), height, width))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    save_samples(tmp_path, samples())
    (tmp_path / "recipe.yaml").write_text(f"""
name: t
output: {tmp_path}/out
model: {{vision: {folder}/tower, text: {folder}/lm, bridge: {{kind: mlp}}}}
log_steps: 1
workers: 0
stages:
  - name: s
    data: {{conversations: {tmp_path}/data.json, images: {tmp_path}/images, on_bad_sample: skip}}
    train: {{bridge: true, lm: true}}
    steps: 4
    batch_size: 1
    learning_rate: 1.0e-3
    max_length: 45
    save_steps: 2
    reducers: [{{share: 1, reducer: "random:keep=0.5"}}]
""")
    seen: list[tuple[tuple[ImagePlan, ...], float]] = []  # of each step the plans of its one sample, and what that cost
    counted, step = Costs.of, FoveateTrainer.training_step

    def noting(
        self: Costs, reducer: str, images: tuple[ImagePlan, ...], text: int, head: int | None = None, teaches: bool = False
    ) -> float:
        seen.append((images, counted(self, reducer, images, text, head, teaches)))
        return seen[-1][1]

    def stopping(self: FoveateTrainer, *given: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(Costs, "of", noting)
    if resumed:
        with monkeypatch.context() as patch:
            patch.setattr(FoveateTrainer, "training_step", stopping)
            with pytest.raises(KeyboardInterrupt):
                main(tmp_path / "recipe.yaml")
        del seen[2:]  # no checkpoint holds the third step
        (progress,) = (tmp_path / "out").rglob(PROGRESS)
        state = json.loads(progress.read_text())
        state["mean"] = [float(count) for count in state.pop("seen")]  # as earlier versions wrote it
        progress.write_text(json.dumps(state))
    main(tmp_path / "recipe.yaml")
    bad = (tmp_path / "out" / "bad-samples-s.txt").read_text()
    assert bad.startswith("s1: ")
    assert "1 x 16 + 1 x 32 of them visual; cutting it to max_length 45 would cut an image" in bad
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    tokens, images = ([of(row) for row, _ in seen] for of in (lambda row: sum(plan.visual for plan in row), len))
    assert sorted(tokens[:3]) == [0, 16, 32]
    for done, row in enumerate(log, start=1):
        assert row["images"] == sum(images[:done])
        mean = round(sum(tokens[:done]) / sum(images[:done])) if sum(images[:done]) else 16
        assert (row["tokens_per_image"], row["visual_tokens_per_layer"]) == (mean, visual_tokens(parse("random:keep=0.5"), mean, 2))
        assert row["flops"] == sum(flops for _, flops in seen[:done])
