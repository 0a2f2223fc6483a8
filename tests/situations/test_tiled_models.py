"""The assembled model with each tiling: what it counts, sees, keeps, saves and decodes, alone and in ragged batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate
from foveate.accounting import predict
from foveate.data.collate import Collator, Fit
from foveate.data.conversations import Conversation
from foveate.errors import FoveateError
from foveate.inference.asking import ask, prompts
from foveate.model.assembly import from_backbones
from foveate.reducers import parse
from foveate.tilings import TILINGS
from foveate.tokens import Kind, wire
from foveate.train.run import main
from foveate.train.trainer import FoveateTrainer
from tests.train.tiny_training import save_backbones, save_samples

MLP: dict[str, Any] = {"kind": "mlp"}
POOL: dict[str, Any] = {"kind": "avg_pool2d", "pool": 2}
COS: dict[str, Any] = {"kind": "chain_of_sight", "scales": [[4, 2], [2, 1]], "width": 32, "head_dim": 16}
MADE = {  # tilings with bridges of one token a patch, of blocks, and of windows
    "whole:pad=true": POOL,
    "anyres": POOL,
    "anyres:grids=1x1..3x3,limit=1": MLP,
    "internvl:tiles=4": COS,
    "nvlm:tiles=3": POOL,
    "xcomposer:tiles=3": POOL,
    "minimonkey:tiles=4,fewest=2,coarse=3": COS,
    "leopard:budget=8": POOL,
    "bluelm": POOL,
    "s2:sizes=2": POOL,
    "native:most_tokens=9,least_tokens=2": POOL,
    "lrs": MLP,
    "idefics3:tiles=2": POOL,
    "xcomposer:tiles=2,first=tiles": COS,
    "deepstack:start=0,tiles=2": POOL,
    "slime:tiles=3,queries=3": MLP,
    "inf_llava:sides=2": COS,
}
LEDGERS = {  # of each kind of plan: what acts on it
    "anyres:grids=1x1..3x3,limit=1": ["hired:keep=0.5,unspent=give", "divprune:keep=0.5,scope=crop"],
    "xcomposer:tiles=3": ["divprune:keep=0.5"],
    "nvlm:tiles=3": ["fastv:keep=0.4,layer=1"],
    "s2:sizes=2": ["fastervlm:keep=3"],
    "native:most_tokens=9,least_tokens=2": ["random:keep=0.5"],
    "slime:tiles=3,queries=3": ["hired:keep=0.5,unspent=give"],
    "inf_llava:sides=2": ["fastervlm:keep=3"],
}


def drawn(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def samples() -> list[Conversation]:
    """A wide picture; a small and a high one; none; a long one."""
    shown = [[drawn(0, 80, 40)], [drawn(1, 20, 20), drawn(2, 31, 90)], [], [drawn(3, 130, 30)]]
    return [
        Conversation(i, f"s{i}", [("user", "<image>" * len(own) + "What?"), ("assistant", "This.")], own) for i, own in enumerate(shown)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tiled")
    save_backbones(found)
    return found


def assembled(folder: Path, tiling: str | None, bridge: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, processor = from_backbones(folder / "tower", folder / "lm", bridge, tiling=tiling)
    return model, processor


@pytest.fixture(scope="module", params=MADE)
def made(request: pytest.FixtureRequest, folder: Path) -> tuple[Any, Any]:
    return assembled(folder, request.param, MADE[request.param])


def texts(processor: Any, chosen: list[Conversation]) -> list[str]:
    messages = [[{"role": role, "content": text} for role, text in one.turns] for one in chosen]
    return [processor.tokenizer.apply_chat_template(one, tokenize=False) for one in messages]


def inputs(processor: Any, chosen: list[Conversation], side: str = "right", **more: Any) -> Any:
    given = [image for one in chosen for image in one.images]
    how: dict[str, Any] = {"padding": True, "padding_side": side, "return_tensors": "pt", "add_special_tokens": False}
    return processor(images=given or None, text=texts(processor, chosen), **how, **more)


def test_every_tiling_is_here() -> None:
    """OneVision is anyres with other grids and a limit, which is here."""
    assert {spelled.partition(":")[0] for spelled in MADE} == TILINGS.keys() - {"onevision"}


EXTREME = [(1, 4000), (4000, 1), (3, 3), (1, 1), (64, 64), (257, 257), (31, 127), (997, 1009), (199, 1), (2, 401)]


def test_placeholders_are_as_many_as_features_whatever_the_shape(made: tuple[Any, Any]) -> None:
    """Of squares, primes and slivers, alone and together in one prompt."""
    model, processor = made
    pictures = [drawn(number, *size) for number, size in enumerate(EXTREME)]
    if model.config.tiling.startswith("native"):
        for sliver in [one for one in pictures if max(one.size) > 200 * min(one.size)]:
            with pytest.raises(FoveateError, match="times as long as wide"):
                processor(images=[sliver], text="<image>", return_tensors="pt")
        pictures = [one for one in pictures if max(one.size) <= 200 * min(one.size)]
    for shown in [*([one] for one in pictures), pictures[:3]]:
        given = processor(images=shown, text="<image>" * len(shown), return_tensors="pt")
        slots = int((given["input_ids"] == processor.image_token_id).sum())
        with torch.inference_mode():
            features = model.get_image_features(pixel_values=given["pixel_values"], image_sizes=given["image_sizes"]).pooler_output
        assert [len(one) for one in features] == [processor.plan_image(one.height, one.width).tokens for one in shown] or len(shown) > 1
        assert slots == sum(len(one) for one in features)
        assert all(bool(one.isfinite().all()) for one in features)


def test_processor_and_collator_make_the_same(made: tuple[Any, Any]) -> None:
    _, processor = made
    chosen = samples()
    batch = Collator(processor, 9999)(chosen)
    own = inputs(processor, chosen)
    assert set(own) == set(batch) - {"labels"}
    assert all(torch.equal(own[name], batch[name]) for name in own)
    plans = [plan for one in chosen for plan in one.plans]
    assert (batch["input_ids"] == processor.image_token_id).sum().item() == sum(plan.tokens for plan in plans)
    assert len(batch["pixel_values"]) == sum(len(plan.crops) for plan in plans)
    # what is supervised are the answers, wherever tags have moved them to
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert processor.tokenizer.decode(ids[labels >= 0]) == "This.</s>"
    room = int(batch["attention_mask"].sum(1).max())
    for most, bad in ((room, 0), (room - 6, 1)):
        fits = Fit(Collator(processor, most).renderer, processor.plan_image, most, processor.share)
        assert sum(bool(fits(one.turns, [(i.height, i.width) for i in one.images])) for one in chosen) >= bad
        assert bad or all(not fits(one.turns, [(i.height, i.width) for i in one.images]) for one in chosen)


def test_features_are_as_many_as_placeholders(made: tuple[Any, Any]) -> None:
    model, processor = made
    for size in ((1, 190), (3, 3), (97, 101), (200, 2)):
        batch = inputs(processor, [Conversation(0, "s", [("user", "<image>What?"), ("assistant", "This.")], [drawn(0, *size)])])
        with torch.no_grad():
            found = model.get_image_features(batch["pixel_values"], image_sizes=batch["image_sizes"]).pooler_output
            model(**batch)
        assert len(found[0]) == int((batch["input_ids"] == processor.image_token_id).sum()) == processor.plan_image(*size[::-1]).tokens


def test_a_row_does_not_depend_on_its_batch_nor_its_padding(made: tuple[Any, Any]) -> None:
    model, processor = made
    chosen = samples()
    with torch.no_grad():
        right, left = (model(**inputs(processor, chosen, side)).logits for side in ("right", "left"))
        for row, one in enumerate(chosen):
            alone = model(**inputs(processor, [one])).logits[0]
            torch.testing.assert_close(right[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(left[row, -len(alone) :], alone, rtol=1e-4, atol=1e-5)


def test_decoding_is_running_it_again(made: tuple[Any, Any]) -> None:
    model, processor = made
    batch = inputs(processor, samples()[:2], "left")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    for reducer in ("none", "divprune:keep=0.5"):
        with foveate.attach(model, reducer):
            cached = model.generate(**batch, **options)
            again = model.generate(**batch, **options, use_cache=False) if reducer == "none" else cached
            beams = model.generate(**batch, **options, num_beams=2)
        assert torch.equal(cached, again)
        assert beams.shape[0] == 2


def test_a_saved_model_is_the_same(made: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = made
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, read = AutoModelForImageTextToText.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    assert (loaded.config.tiling, read.tiling) == (model.config.tiling, processor.tiling)
    before, after = inputs(processor, samples()), inputs(read, samples())
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(loaded(**after).logits, model(**before).logits)


def test_a_reducer_that_keeps_everything_changes_nothing(made: tuple[Any, Any]) -> None:
    model, processor = made
    batch = inputs(processor, samples())
    with torch.no_grad():
        bare = model(**batch).logits
        for reducer in ("random:keep=1.0", "divprune:keep=1.0"):
            with foveate.attach(model, reducer):
                assert torch.equal(model(**batch).logits, bare)
        with foveate.attach(model, "hired:keep=1.0"):  # which asks the tower
            if model.config.tiled.shapes:
                with pytest.raises(FoveateError, match="seen in several shapes"):
                    model(**batch)
            else:
                assert torch.equal(model(**batch).logits, bare)


def test_every_slot_has_its_place(made: tuple[Any, Any]) -> None:
    model, processor = made
    chosen = samples()
    with torch.no_grad(), foveate.attach(model, []) as run:
        model(**inputs(processor, chosen))
    layout, number = run.last.layouts[0], 0
    for row, one in enumerate(chosen):
        for image in one.images:
            plan = processor.plan_images([(i.height, i.width) for i in one.images])[one.images.index(image)]
            wired = wire(plan)
            mine = (layout.image[row] == number).nonzero()[:, 0]
            assert torch.equal(layout.kind[row, mine], wired.kind)
            assert torch.equal(layout.place[row, mine][:, 1:], wired.place)
            own = model.config.wire(plan).box[wired.kind == Kind.PATCH]
            assert int(own.min()) >= 0
            assert bool((own[:, 2] <= image.width).all())
            assert bool((own[:, 3] <= image.height).all())
            number += 1


@pytest.mark.parametrize(("tiling", "spelled"), [(tiling, spelled) for tiling, many in LEDGERS.items() for spelled in many])
def test_the_ledger_is_what_the_plans_predict(folder: Path, tiling: str, spelled: str) -> None:
    model, processor = assembled(folder, tiling, MADE[tiling])
    chosen, reducers = samples(), parse(spelled)
    batch = Collator(processor, 9999)(chosen)
    del batch["labels"]
    with torch.no_grad(), foveate.attach(model, spelled) as run:
        model(**batch)
    found = run.last.ledger(model.config)
    assert found == predict(model.config, inputs=batch, reducers=reducers)
    lengths = batch["attention_mask"].sum(1).tolist()
    left = [length - sum(plan.tokens for plan in one.plans) for length, one in zip(lengths, chosen, strict=True)]
    rows = [predict(model.config, images=one.plans, text_tokens=text, reducers=reducers) for one, text in zip(chosen, left, strict=True)]
    for name in ("visual_tokens", "total_tokens", "kv_bytes", "layer_flops"):
        assert getattr(found, name) == tuple(map(sum, zip(*(getattr(row, name) for row in rows), strict=True)))
    assert found.flops == {part: sum(row.flops[part] for row in rows) for part in found.flops}


def test_crops_are_scopes(folder: Path) -> None:
    """A budget per crop is kept by each tile, HiRED's by the whole image, its tiles where the picture has them."""
    model, processor = assembled(folder, "internvl:tiles=4", MLP)
    batch = inputs(processor, samples())
    counts: dict[str, list[list[int]]] = {}
    for spelled in ("divprune:keep=4,scope=crop", "divprune:keep=10", "random:keep=10", "hired:keep=10,unspent=give"):
        with torch.no_grad(), foveate.attach(model, spelled) as run:
            model(**batch)
        left = run.last.maps[0].target
        counts[spelled] = [
            [int((left.place[left.visual][:, :2] == torch.tensor([image, crop])).all(1).sum()) for crop in range(-1, 5)]
            for image in range(4)
        ]
    views = [len(plan.crops) for one in samples() for plan in processor.plan_images([(i.height, i.width) for i in one.images])]
    assert views == [3, 1, 4, 5]
    assert [[n for n in row if n] for row in counts["divprune:keep=4,scope=crop"]] == [[4] * count for count in views]
    for spelled in list(counts)[1:]:
        assert [sum(row) for row in counts[spelled]] == [10] * 4
    assert all(row[1] == 5 for row in counts["hired:keep=10,unspent=give"] if row[0] == 0)  # alpha = 1/2 of them in the overview


def test_what_the_tower_says_of_a_tile_is_where_the_tile_lies(folder: Path) -> None:
    """Scores of an unpadded map are the scores of the tiles that it was cut from, each in its place."""
    model, processor = assembled(folder, "anyres", MLP)
    chosen = [samples()[3]]
    batch = inputs(processor, chosen)
    plan = processor.plan_image(30, 130)
    with torch.no_grad():
        with foveate.attach(model, "fastervlm:keep=0.5,scope=image") as run:
            model(**batch)
        (layer,) = run.last.maps
        kept = run.last.maps[layer].target
        tower = model.model.vision_tower
        tower.set_attn_implementation("eager")
        seen = tower(batch["pixel_values"], output_attentions=True).attentions
        tower.set_attn_implementation("sdpa")
    scores = torch.cat([view[1:] for view in seen[-2].mean(1)[:, 0]])
    wired = wire(plan)
    own = torch.where(wired.kind == Kind.PATCH, scores[wired.source[:, 0].clamp(min=0)], -1.0)
    best = own.topk(int(kept.visual.sum())).indices.sort().values
    expected = wired.place[best]
    assert torch.equal(kept.place[kept.visual][:, 1:], expected)


def test_images_of_a_prompt_share_a_budget(folder: Path) -> None:
    model, processor = assembled(folder, "internvl:tiles=6,budget=4", POOL)
    free = assembled(folder, "internvl:tiles=6", POOL)[1]
    chosen = samples()[1:2] + samples()[3:]
    views = [len(inputs(of, chosen, budget=most)["pixel_values"]) for of, most in ((processor, None), (free, None), (free, 4))]
    assert views == [4 + 4, 5 + 5, 4 + 4]
    for of, most in ((processor, None), (free, 3)):
        batch = inputs(of, chosen, budget=most)
        with torch.no_grad():
            model(**batch)
        per_prompt = [sum(len(plan.crops) for plan in of.plan_images([(i.height, i.width) for i in one.images], most)) for one in chosen]
        assert sum(per_prompt) == len(batch["pixel_values"])
        assert max(per_prompt) <= (most or 4)
    with pytest.raises(FoveateError, match="2 images cannot share a budget of 1 views"):
        inputs(free, chosen, budget=1)


def test_a_smaller_view_by_the_downsampling_reducer(folder: Path) -> None:
    model, processor = assembled(folder, "anyres", MLP)
    with foveate.attach(model, "downsample:keep=0.25", processor=processor):
        batch = inputs(processor, samples())
        assert batch["pixel_values"].shape[-2:] == (16, 16)
        with torch.no_grad():
            model(**batch)


def test_asking_many_questions(folder: Path) -> None:
    model, processor = assembled(folder, "nvlm:tiles=3", POOL)
    shown = samples()[1].images
    answers = ask(model, processor, shown, [[0], [1, 0], [0]], prompts(processor, ["a", "b", "c"], [1, 2, 1]), 4)
    each = [processor.plan_image(image.height, image.width).tokens for image in shown]
    assert answers.placeholders == [each[0], sum(each), each[0]]


def test_scaling_on_scales_is_the_means_of_what_larger_sizes_see(folder: Path) -> None:
    model, processor = assembled(folder, "s2:sizes=2", MLP)
    picture = drawn(5, 40, 40)
    batch = inputs(processor, [Conversation(0, "s", [("user", "<image>What?"), ("assistant", "This.")], [picture])])
    core = model.model
    with torch.no_grad():
        crops = core.encode_crops(batch["pixel_values"])[:, 0]
        tiles = crops[1:].view(2, 2, 4, 4, -1).permute(0, 2, 1, 3, 4).reshape(8, 8, -1)
        pooled = tiles.view(4, 2, 4, 2, -1).mean((1, 3)).view(1, 16, -1)
        expected = core.bridge([crops[:1], pooled], (4, 4))[0]
        (found,) = core.get_image_features(batch["pixel_values"], image_sizes=batch["image_sizes"]).pooler_output
    torch.testing.assert_close(found, expected)
    assert core.bridge.levels == 2


def test_learned_marks_stand_where_the_plan_has_them(folder: Path) -> None:
    model, processor = assembled(folder, "xcomposer:tiles=3", POOL)
    batch = inputs(processor, samples()[:1])
    with torch.no_grad():
        (found,) = model.get_image_features(batch["pixel_values"], image_sizes=batch["image_sizes"]).pooler_output
    wired = wire(processor.plan_image(40, 80))
    marks = model.model.image_marks
    for number, vector in ((1, marks.newline), (2, marks.separator)):
        rows = found[wired.mark == number]
        assert len(rows)
        assert torch.equal(rows, vector.detach().expand_as(rows))


def test_a_tiling_is_changed(folder: Path) -> None:
    model, processor = assembled(folder, None, POOL)
    for tiling in ("internvl:tiles=3", "anyres", "xcomposer:tiles=2", None):
        model.set_tiling(tiling)
        processor.set_tiling(model.config.tiling)
        with torch.no_grad():
            model(**inputs(processor, samples()))
    assert model.model.image_marks is None


@pytest.mark.parametrize(
    ("tiling", "bridge", "said"),
    [
        ("slime:queries=3", POOL, "given 3 x 3 features of a tile, and cannot read them: pool 2 does not divide"),
        ("slime", COS, "given 12 x 12 features of a tile, and cannot read them: .* made for a grid of 4 x 4 patches"),
        ("inf_llava:budget=18", POOL, "take 19 views; a budget of 18 is less"),
        ("anyress", POOL, "unknown tiling 'anyress'"),
        (7, POOL, "a tiling is spelled"),
        ("native", COS, "made for a grid of 4 x 4 patches"),
        ("s2:sizes=2", {**MLP, "levels": 1}, "takes 1 feature levels but vision_feature_layer is .-2., at each of the 2 sizes of s2"),
    ],
)
def test_what_a_model_cannot_take(folder: Path, tiling: Any, bridge: dict[str, Any], said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        assembled(folder, tiling, bridge)


def test_what_a_call_cannot_be(folder: Path) -> None:
    model, processor = assembled(folder, "internvl:tiles=3", POOL)
    plain_model, plain = assembled(folder, None, POOL)
    batch = inputs(processor, samples())
    with pytest.raises(FoveateError, match="image_sizes says of 4 images that they become 12 views, but pixel_values holds 11"):
        model(**{**batch, "pixel_values": batch["pixel_values"][1:]})
    with pytest.raises(FoveateError, match="has no tiling; use the processor that belongs to it"):
        plain_model(**batch)
    with pytest.raises(FoveateError, match="a budget of 3 views was given, but the model has no tiling"):
        inputs(plain, samples(), budget=3)
    with pytest.raises(FoveateError, match="would change their number"):
        model.set_tiling("s2")


# ---- training ------------------------------------------------------------------------------------------------------------------------


def recipe(folder: Path, out: Path, tiling: str, **more: str) -> Path:
    """Two stages on the samples: seen whole first, then tiled."""
    path = out / "recipe.yaml"
    extra = "".join(f"    {name}: {value}\n" for name, value in more.items())
    path.write_text(f"""
name: t
output: {out}/out
model: {{vision: {folder}/tower, text: {folder}/lm, bridge: {{kind: avg_pool2d, pool: 2}}}}
log_steps: 1
workers: 0
stages:
  - &stage
    name: whole
    data: {{conversations: {out}/data.json, images: {out}/images}}
    train: {{bridge: true, lm: true}}
    steps: 1
    batch_size: 2
    learning_rate: 1.0e-3
    max_length: 400
    save_steps: 1
  - <<: *stage
    name: tiled
    tiling: "{tiling}"
    steps: 3
    reducers: [{{share: 1, reducer: "divprune:keep=0.5"}}]
{extra}""")
    return path


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForImageTextToText.from_pretrained(out / "out" / "final").state_dict())


@pytest.mark.parametrize(
    ("tiling", "learned", "kinds"),
    [
        ("anyres:budget=6", {"image_marks.newline"}, ("straight", "stopped", "cached")),
        ("slime:tiles=2,queries=2", {"image_marks.separator", "lens.readers.0.query"}, ("straight", "stopped")),
        ("inf_llava:sides=2", {"lens.enhancers.0.down_local.weight"}, ("straight", "stopped")),
    ],
)
def test_training_is_resumed_and_reads_features(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiling: str, learned: set[str], kinds: tuple[str, ...]
) -> None:
    """A stage that cuts images learns its marks and its lens; a run that was stopped in it, and one that reads the tower from a cache, come
    to the same."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    step = FoveateTrainer.training_step
    cached = {"features": f"{{cache: {tmp_path}/cache, at_most: 100MB}}"}
    found = {}
    for name in kinds:
        out, more = tmp_path / name, cached if name == "cached" else {}
        out.mkdir()
        save_samples(out, samples())
        path = recipe(folder, out, tiling, **more)
        if name == "stopped":

            def stopping(self: FoveateTrainer, *given: Any) -> torch.Tensor:
                if self.state.global_step == 2:
                    raise KeyboardInterrupt
                return step(self, *given)

            with monkeypatch.context() as patch:
                patch.setattr(FoveateTrainer, "training_step", stopping)
                with pytest.raises(KeyboardInterrupt):
                    main(path)
        main(path)
        found[name] = weights(out)
    assert {f"model.{name}" for name in learned} <= found["straight"].keys()
    for name, tensor in found["straight"].items():
        assert torch.equal(found["stopped"][name], tensor), name
        if "cached" in found:
            torch.testing.assert_close(found["cached"][name], tensor, msg=name)
    log = [json.loads(line) for line in (tmp_path / "straight" / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in log] == ["whole", "tiled", "tiled", "tiled"]
    assert log[-1]["flops"] > log[0]["flops"] * 4


@pytest.mark.parametrize(
    ("tiling", "said"),
    [
        ("slime:queries=3", "cannot read them: pool 2"),
        ("nonsense", "unknown tiling"),
        ("s2:sizes=2", "reads the maps of 1 sizes, s2:sizes=2 would"),
    ],
)
def test_what_a_recipe_cannot_say(folder: Path, tmp_path: Path, tiling: str, said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        main(recipe(folder, tmp_path, tiling))
