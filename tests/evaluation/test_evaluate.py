"""Evaluation of a tiny LLaVA: the answers do not depend on batching, known answers are scored as known, bad input is named."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from tokenizers.processors import TemplateProcessing

from foveate.engine.attach import attach
from foveate.errors import FoveateError
from foveate.evaluation.evaluate import Result, evaluate, print_result
from foveate.evaluation.sources import world_samples
from foveate.inference import ask, load_model, prompts


def answers(result: Result) -> dict[str, str]:
    return {row.id: row.prediction for row in result.rows}


def test_known_answers_are_scored_as_known(parrot: Any, processor: Any, world: Path) -> None:
    model, answer = parrot
    result = evaluate(model, world, processor=processor, progress=False)
    assert set(answers(result).values()) == {"".join(answer[1:-1])}
    assert list(result.families) == ["presence", "count", "reading", "locating"]
    assert {family: (score.n, score.correct) for family, score in result.families.items()} == {
        "presence": (3, 0),
        "count": (3, 0),
        "reading": (3, 0),
        "locating": (6, 3),
    }
    assert result.families["presence"].details["unparsed"] == 3
    assert result.families["locating"].majority_accuracy == 0.5
    assert result.mean == pytest.approx(0.5 / 4)
    assert result.visual_tokens == 16


@pytest.mark.parametrize("reducers", ["none", "vcc:layer=1,stride=4", "random:keep=0.5"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_do_not_depend_on_the_batch(model: Any, processor: Any, world: Path, batch_size: int, reducers: str) -> None:
    """Against plain one-question generation without padding or shared features."""
    result = evaluate(model, world, processor=processor, batch_size=batch_size, reducers=reducers, progress=False)
    assert result.reducers.startswith(reducers)
    assert result.layer_tokens == {"none": None, "vcc:layer=1,stride=4": [16, 4], "random:keep=0.5": [8, 8]}[reducers]
    assert len({row.prediction for row in result.rows if row.family == "count"}) == 3  # the answers do depend on the image
    for row in result.rows:
        with Image.open(world / "images" / row.image) as image:
            inputs = processor(images=image.convert("RGB"), text=f"<s><user><image>\n{row.question}<assistant>", return_tensors="pt")
        with torch.no_grad(), attach(model, reducers):
            output = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :].tolist()
        kept = output[: output.index(258)] if 258 in output else output
        assert row.prediction == processor.tokenizer.decode(kept).strip()


def pictures_seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The pixels of each later call of the tower, in the list that is returned."""
    seen: list[torch.Tensor] = []
    encode = model.model.vision_tower.forward

    def looking(pixels: torch.Tensor, **options: Any) -> Any:
        seen.append(pixels)
        return encode(pixels, **options)

    monkeypatch.setattr(model.model.vision_tower, "forward", looking)
    return seen


def test_each_image_is_encoded_once_in_a_batch(model: Any, processor: Any, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = pictures_seen(model, monkeypatch)
    evaluate(model, world, processor=processor, progress=False)
    assert [len(pixels) for pixels in seen] == [3]


def test_blind_shows_the_same_grey_picture_to_every_question(
    model: Any, processor: Any, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = pictures_seen(model, monkeypatch)
    result = evaluate(model, world, processor=processor, blind=True, progress=False)
    assert result.blind
    pixels = torch.cat(seen)
    assert torch.equal(pixels, pixels[:1].expand_as(pixels))
    assert pixels.amax((-1, -2)).equal(pixels.amin((-1, -2)))
    by_question: dict[str, set[str]] = {}
    for row in result.rows:
        by_question.setdefault(row.question, set()).add(row.prediction)
    assert all(len(said) == 1 for said in by_question.values())


def test_training_mode_is_restored(model: Any, processor: Any, world: Path) -> None:
    model.train()
    evaluate(model, world, processor=processor, limit=1, progress=False)
    assert model.training


def test_result_survives_its_file(parrot: Any, processor: Any, world: Path, tmp_path: Path) -> None:
    result = evaluate(parrot[0], world, processor=processor, progress=False)
    result.save(tmp_path / "deep" / "result.json")
    assert Result.load(tmp_path / "deep" / "result.json") == result


def test_printed_table_names_every_family(parrot: Any, processor: Any, world: Path) -> None:
    result = evaluate(parrot[0], world, processor=processor, blind=True, progress=False)
    console = Console(file=io.StringIO(), width=120)
    print_result(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in (*result.families, "majority", "grey images", "16 visual tokens per image", "12.5"):
        assert word in text


def test_limit_takes_the_families_in_turn(world: Path) -> None:
    assert [question.id for question in world_samples(world, 4)] == ["0-0", "0-1", "0-2", "0-4"]
    assert [question.group for question in world_samples(world, 4)] == ["presence", "count", "locating", "reading"]
    assert len(world_samples(world, 6)) == 6
    assert world_samples(world, 1000) == world_samples(world)


def test_not_a_number_is_an_error(model: Any, processor: Any, world: Path) -> None:
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(FoveateError, match="not finite"):
        evaluate(model, world, processor=processor, progress=False)


def test_corrupt_image_is_named(model: Any, processor: Any, world: Path) -> None:
    path = world / "images" / "test" / "000001.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FoveateError, match=r"cannot read the image .*000001\.png"):
        evaluate(model, world, processor=processor, progress=False)


def test_missing_image_is_named(world: Path) -> None:
    (world / "images" / "test" / "000002.png").unlink()
    with pytest.raises(FoveateError, match=r"1 image\(s\) are missing .* test/000002\.png"):
        world_samples(world)


def test_data_folder_must_hold_questions(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="no such data folder"):
        world_samples(tmp_path / "nowhere")
    with pytest.raises(FoveateError, match=r"has no test\.json"):
        world_samples(tmp_path)
    wrong = {"[]": "no questions", "{": "not JSON", "[3]": "row 0: expected an object", '[{"id": 3}]': "'id' must be a text"}
    for text, message in wrong.items():
        (tmp_path / "test.json").write_text(text)
        with pytest.raises(FoveateError, match=message):
            world_samples(tmp_path)


def test_unknown_family_is_named(world: Path) -> None:
    rows = json.loads((world / "test.json").read_text())
    rows[2]["family"] = "colour"
    (world / "test.json").write_text(json.dumps(rows))
    with pytest.raises(FoveateError, match="row 2: unknown family 'colour'"):
        world_samples(world)


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"max_new_tokens": 0}, {"limit": 0}])
def test_numbers_must_be_positive(change: dict[str, Any], model: Any, processor: Any, world: Path) -> None:
    with pytest.raises(FoveateError, match="at least 1"):
        evaluate(model, world, processor=processor, progress=False, **change)


def test_loaded_model_needs_its_processor(model: Any, world: Path) -> None:
    with pytest.raises(FoveateError, match="needs the processor"):
        evaluate(model, world, progress=False)


def test_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="no such model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FoveateError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FoveateError, match="cannot load a vision-language model"):
        load_model(tmp_path)


def test_result_file_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(FoveateError, match="not an evaluation result"):
        Result.load(tmp_path / "result.json")


def test_prompts_of_several_images_and_none(processor: Any) -> None:
    written = prompts(processor, ["what?", "<image> or <image>?", "what?", "which?"], [0, 2, 1, 2])
    assert written == [
        f"<s><user>{text}<assistant>" for text in ("what?", "<image> or <image>?", "<image>\nwhat?", "<image>\n<image>\nwhich?")
    ]
    assert prompts(processor, ["what?"]) == [written[2]]


def test_what_the_template_has_written_the_tokenizer_does_not_write_again(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = copy.deepcopy(processor)
    both.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    (text,) = prompts(both, ["what?"])
    seen = []

    def generate(**given: Any) -> torch.Tensor:
        seen.append(given["input_ids"].tolist())
        return given["input_ids"]

    monkeypatch.setattr(model, "generate", generate)
    for one in (processor, both):
        ask(model, one, [Image.new("RGB", (16, 16))], [[0]], [text], 1)
    assert seen[0] == seen[1]
    assert both.tokenizer("a")["input_ids"][0] == 257


def test_a_smaller_picture_is_fewer_tokens_where_all_pictures_are_made_one_size(world: Path) -> None:
    result = evaluate("asset:vlm", world, reducers="downsample:keep=0.25", limit=2, device="cpu", progress=False)
    assert (result.visual_tokens, result.layer_tokens) == (16, [16] * 6)
