"""The report of a bench run: a folder made by hand whose numbers are known, and a run of the shipped model."""

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from foveate.errors import FoveateError
from foveate.evaluation.bench import bench
from foveate.evaluation.cells import Answer, Cell, load_bench, save_cell
from foveate.evaluation.tasks import load_task
from foveate.files import write_json
from foveate.inference import load_model
from foveate.report.bench import write_bench_report
from foveate.report.compared import Line, families, lines, middle, signed
from foveate.report.examples import _drawing
from foveate.report.frontier import Mark, add_legend, looks, pareto, printable

SCRIPT = "<script>alert(1)</script>"
BREAK = "\"'><img src=x onerror=alert(2)>"
EVIL = f"evil{SCRIPT}"  # a method
TASK = f"task</title></svg>{BREAK}"
WORDS = ("apple", "pear", "plum", f"fig{SCRIPT}")
N = 12  # pictures, with one question of each family


def folder_with_data(root: Path) -> str:
    """Twelve pictures, and about each of them one question on a fruit and one on a coin. Returns the task."""
    images = root / "images"
    images.mkdir(parents=True)
    rows = []
    for i in range(N):
        name = f"{i}{BREAK}.png"
        Image.new("RGB", (16, 12), (20 * i, 90, 200)).save(images / name)
        rows.append(
            {"id": f"fruit{i}{BREAK}", "image": name, "question": f"what is it? {SCRIPT}", "answer": WORDS[i % 4], "category": "fruit"}
        )
        rows.append({"id": f"coin{i}", "image": name, "question": "heads?", "answer": ("yes", "no")[i % 2], "category": f"coin{BREAK}"})
    (root / "data.json").write_text(json.dumps(rows))
    return f"{root / 'data.json'}:metric=exact,images={images},name={TASK}"


def cell(spec: str, method: str, keep: float, seed: int | None, wrong: set[int], **costs: Any) -> Cell:
    """Fruits are right but for those in `wrong`; of coins everyone says yes."""
    task = load_task(spec, progress=False)
    answers = []
    for sample in task.samples:
        number = int(re.findall(r"\d+", sample.id)[0])
        said = f"{BREAK}{SCRIPT}\0\ud800" if number in wrong else sample.answers[0]
        text = said if sample.id.startswith("fruit") else "yes"
        answers.append(Answer(sample.id, str(number), sample.group, text, task.metric.score(text, sample)))
    texts, scores = [answer.prediction for answer in answers], [answer.score for answer in answers]
    summary = task.metric.summary(task.samples, texts, scores)
    return Cell(TASK, method, keep, seed, f"{method}:keep={keep}", answers, summary=summary, **costs)


def flops(lm: float) -> dict[str, float]:
    return {"tower": 0.9e9, "bridge": 0.1e9, "lm_linear": lm, "lm_attention": 0.5e9, "head": 0.5e9}


@dataclass
class Made:
    folder: Path
    spec: str
    cells: list[Cell] = field(default_factory=list)

    def write(self, cells: list[Cell] | None = None, **meta: Any) -> Path:
        found = self.cells if cells is None else cells
        task = load_task(self.spec, progress=False)
        told = {"name": TASK, "spec": self.spec, "metric": "exact", "samples": 24, "data_hash": task.hash, "max_new_tokens": 16}
        about: dict[str, Any] = {
            "model": f"no/such/model{BREAK}",
            "model_hash": "a" * 64,
            "tasks": [told],
            "keep": [1, 0.5, 0.25],
            "seeds": 2,
            "command": f"foveate bench {SCRIPT}",
            "environment": f"a machine {BREAK}",
            "order": [one.name for one in self.cells],
        }
        write_json(self.folder / "bench.json", {**about, **meta})
        for one in found:
            save_cell(self.folder, one)
        return self.folder

    def report(self, **options: Any) -> str:
        return write_bench_report(self.folder, progress=False, **options).read_text(encoding="utf-8")


def make(folder: Path) -> Made:
    spec = folder_with_data(folder / "data")
    half: dict[str, Any] = {"visual_tokens": [32.0] * 4, "flops": flops(0.6e9), "kv_bytes": 3 * 2**20, "seconds": 75.0}
    few: dict[str, Any] = {"visual_tokens": [16.0] * 4, "flops": flops(0.2e9), "kv_bytes": 2**20, "seconds": 40.0}
    late: dict[str, Any] = {"visual_tokens": [64.0, 64.0, 32.0, 32.0], "flops": flops(1e9), "kv_bytes": 4 * 2**20, "seconds": 80.0}
    bare: dict[str, Any] = {"visual_tokens": [64.0] * 4, "flops": flops(2e9), "kv_bytes": 5.5 * 2**20, "seconds": 100.0}
    cells = [
        cell(spec, "none", 1.0, None, set(), **bare),
        *(cell(spec, "random", 0.5, seed, {0, 1, 2}, **half) for seed in (0, 1)),
        cell(spec, "random", 0.25, 0, set(range(6)), **few),
        cell(spec, "random", 0.25, 1, set(range(8)), **few),
        cell(spec, "divprune", 0.5, None, set(), **half),
        cell(spec, "divprune", 0.25, None, {11}, **few),
        cell(spec, EVIL, 0.5, None, set(range(6)), **late),
        cell(spec, EVIL, 0.25, None, set(range(N)), **late),
        *(Cell(TASK, "vcc", keep, None, "vcc", refused=f"no raster {BREAK}{SCRIPT}") for keep in (0.5, 0.25)),
    ]
    # One reducer string in two cells would be one file.
    cells[2:3] = [replace(cells[2], reducer="random:keep=0.5,seed=1")]
    made = Made(folder / "run", spec, cells)
    made.write()
    return made


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """To be spoilt by its test."""
    return make(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with its report, and the page."""
    made = make(tmp_path_factory.mktemp("whole"))
    return made.folder, made.report()


@pytest.fixture(scope="module")
def page(whole: tuple[Path, str]) -> "Page":
    return Page(whole[1])


class Page(HTMLParser):
    """Elements with their attributes, tables as lists of rows of texts, all text, and whether every element is closed in order."""

    VOID = {"meta", "br", "img", "input", "hr", "link"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.words: list[str] = []
        self.titles: list[str] = []
        self._cell: list[str] | None = None
        self._rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = []
            self.tables.setdefault(str(dict(attrs)["class"]), []).append(self._rows)
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th") and self._cell is not None:
            self._rows[-1].append(" ".join(" ".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._cell is not None:
            self._cell.append(data)
        if self.open and self.open[-1] == "title":
            self.titles.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def results(self) -> dict[tuple[str, str], list[str]]:
        """(keep, method without its sign) -> cells."""
        found, keep = {}, ""
        for row in self.tables["results"][0][1:]:
            if len(row) == 1:
                keep = row[0].removeprefix("keep ")
            else:
                found[keep, row[0].partition(" ")[2] if keep else row[0]] = row[1:]
        return found


# ---- what is in it -------------------------------------------------------------------------------------------------------------------


def test_numbers_of_the_cells_are_in_the_tables(page: Page) -> None:
    found = page.results()
    # Of the fruits only; the whole model 4 GFLOP, of which 3 GFLOP are the language model's.
    assert found["", "bare model"] == ["100.0 100.0–100.0", "", "", "", "64.0", "4 GFLOP", "100 %", "100 %", "5.5", "1 min 40 s"]
    assert found["0.5", "divprune"] == [
        *("100.0 100.0–100.0", "+0.0 +0.0 to +0.0", "1.000", "100.0"),
        *("32.0", "2.6 GFLOP", "65 %", "53 %", "3", "1 min 15 s"),
    ]
    assert found["0.25", "divprune"][0].split()[0] == "91.7"
    assert found["0.25", "divprune"][1].split()[0] == "−8.3"
    assert found["0.25", "divprune"][2:] == ["1.000", "91.7", "16.0", "2.2 GFLOP", "55 %", "40 %", "1", "40.0 s"]
    # Two seeds with 6 and 4 of 12 right: 10 of 24.
    assert found["0.25", "random 2 seeds"][0].split()[0] == "41.7"
    assert found["0.25", "random 2 seeds"][1].split()[0] == "−58.3"
    # McNemar: 6 lost and none gained, 2 / 2^6; then 12, 2 / 2^12.
    assert found["0.5", EVIL][2] == "0.031"
    assert found["0.25", EVIL][:4] == ["0.0 0.0–0.0", "−100.0 −100.0 to −100.0", "< 0.001", "0.0"]
    assert found["0.25", EVIL][4] == "48.0"


def test_seconds_of_a_busy_machine_are_left_out(made: Made) -> None:
    """Two seeds of random are equal work, one of which took twice the time of the other."""
    cells = [replace(one, seconds=150.0) if (one.method, one.keep, one.seed) == ("random", 0.5, 1) else one for one in made.cells]
    made.write(cells)
    page = Page(made.report())
    assert "equal work took unequal time (random at keep 0.5, 2 seeds: 75.0 to 150.0 s)" in page.text
    assert page.results()["", "bare model"][-1] == "5.5"  # KV is last now
    assert "1 min 40 s" not in page.text


def test_families_have_wilson_intervals_and_the_unlearnt_one_is_named(page: Page) -> None:
    half, quarter = page.tables["families"]
    assert half[0] == ["keep 0.5", "fruit n = 12", f"coin{BREAK} * n = 12"]
    assert half[1] == ["best constant answer", "25.0", "50.0"]
    # Wilson: 12 of 12 is 12/(12+z²) to 1; 6 of 12 is 0.2538 to 0.7462; 11 of 12 is 0.6461 to 0.9851.
    assert half[2] == ["bare model", "100.0 75.8–100.0", "50.0 25.4–74.6"]
    assert quarter[4][0].endswith(" divprune")
    assert quarter[4][1:] == ["91.7 64.6–98.5", "50.0 25.4–74.6"]
    assert "Not learnt, marked * and left out" in page.text
    assert f"coin{BREAK} (best constant answer: no)" in page.text


def test_what_the_run_says(page: Page) -> None:
    # At 0.5 divprune is better in 3 of 12 pictures, which (3/4)^12 = 3 % of all resamples miss; at 0.25 by (6 + 2/2 - 1) / 12.
    assert "at keep 0.5 none of 2; at keep 0.25 divprune (+50.0)." in page.text
    # Random has 32 tokens at most, EVIL 48.
    assert f"random with at least as many tokens: divprune at keep 0.25 (+50.0). Always with more tokens than random: {EVIL}." in page.text
    assert "still reaches the bare model is divprune at keep 0.25: −8.3 points" in page.text
    assert "for 55 % of the FLOPs, 16 of 64 visual tokens per layer." in page.text
    assert "cells are missing" not in page.text


def test_refused_methods_stand_with_their_reason(page: Page) -> None:
    assert f"vcc at keep 0.5, 0.25 no raster {BREAK}{SCRIPT}" in page.text.replace("0.25no", "0.25 no")
    assert not any("vcc" in row[0] for row in page.tables["results"][0])


def test_failures_show_question_truth_and_both_answers(page: Page) -> None:
    assert f"{TASK}: 6 of 12 questions scored lower than by the bare model, 0 higher." in page.text
    # The middle of two budgets is the larger; four of six are shown, and random's three.
    assert page.text.count("reduced:") == 4 + 3
    assert f"what is it? {SCRIPT}truth: apple" in page.text
    pictures = [attrs for tag, attrs in page.elements if tag == "img"]
    assert len(pictures) == 7
    assert pictures[0]["alt"] == f"fruit0{BREAK}"


# ---- what must not be in it ----------------------------------------------------------------------------------------------------------


def test_no_text_becomes_markup_and_nothing_is_loaded(whole: tuple[Path, str], page: Page) -> None:
    html = whole[1]
    assert page.open == []
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "foreignobject"} & {tag for tag, _ in page.elements}
    for tag, attrs in page.elements:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert value is not None
                assert value.startswith(("#", "data:image/")), (tag, value)
    assert SCRIPT not in html
    assert BREAK not in html
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", html))
    (policy,) = (attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'")
    ids = [attrs["id"] for _, attrs in page.elements if attrs.get("id")]
    assert len(ids) == len(set(ids))


def test_the_plots_are_whole_and_tell_their_values(whole: tuple[Path, str], page: Page) -> None:
    folder, html = whole
    found = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(found) == 2
    for text in found:
        tree = ElementTree.fromstring(text.replace("<svg", '<svg xmlns:xlink="x"', 1))
        titles = [title.text for title in tree.iter("title")]
        assert len(titles) == 1 + 6  # the bare model, three methods at two budgets
        assert "divprune, keep 0.25: 91.7 % (" in "".join(title or "" for title in titles)
        assert any((title or "").startswith(f"{EVIL}, keep 0.5: 50.0 % (") for title in titles)
        wanted = set(re.findall(r'href="#([^"]*)"', text)) | set(re.findall(r"url\(#([^)]*)\)", text))
        assert wanted <= {element.get("id") for element in tree.iter()}
    # Each method can be picked, and is named in the legend.
    assert [attrs["class"] for tag, attrs in page.elements if tag == "input" and "class" in attrs] == ["m0", "m1", "m2"]
    svg = ElementTree.parse(folder / "frontier.svg")
    assert EVIL in [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    with Image.open(folder / "frontier.png") as png:
        assert png.width > 1000


# ---- what is not at hand -------------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there_leaves_out_pictures_and_predictions(page: Page) -> None:
    assert "No pictures: the model cannot be loaded: no such model folder" in page.text
    assert "No predictions: the model cannot be loaded" in page.text
    bare = next(row for row in page.tables["cost"][0] if row[0] == "bare model")
    assert bare[1:] == ["–", "64.0", "–", "4 G", "–", "900 M", "100 M", "2 G", "500 M", "500 M"]


def test_changed_data_is_told_and_no_question_is_shown(made: Made) -> None:
    path = Path(made.spec.partition(":")[0])
    path.write_text(path.read_text().replace("heads?", "tails?"))
    page = Page(made.report())
    assert "the data has changed since: it has another hash" in page.text
    assert "tails?" not in page.text
    # Without the references no family can be left out: 18 of 24 right.
    assert page.results()["", "bare model"][0].split()[0] == "75.0"


def test_a_run_that_was_stopped_has_a_report_of_what_is_there(made: Made) -> None:
    for one in made.cells[5:7]:
        (made.folder / "cells" / f"{one.name}.json").unlink()
    second = {**load_bench(made.folder).meta["tasks"][0], "name": "not begun"}
    made.write([], tasks=[load_bench(made.folder).meta["tasks"][0], second])
    page = Page(made.report())
    assert "2 of 11 cells are missing; the same command goes on with them." in page.text
    assert "the bare model has not answered them yet: not begun." in page.text
    assert ("0.5", "divprune") not in page.results()


def test_nothing_but_the_bare_model(made: Made) -> None:
    for path in (made.folder / "cells").glob("*.json"):
        path.unlink()
    made.write(made.cells[:1])
    page = Page(made.report())
    assert "No method has finished yet" in page.text
    assert list(page.results()) == [("", "bare model")]


def test_without_random_nothing_is_said_about_it(made: Made) -> None:
    for path in (made.folder / "cells").glob("*random*.json"):
        path.unlink()
    assert "Without the random baseline the run cannot say" in Page(made.report()).text


def test_the_legend_stays_inside_however_long_its_names() -> None:
    names = {f"method{n}:positions=keep,scope=crop": look for n, look in enumerate(looks([str(n) for n in range(24)], []).values())}
    figure = Figure(figsize=(10.0, 3.5), layout="constrained")
    add_legend(figure, names, 6)
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 26
    figure.canvas.draw()
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert 0 <= box.y0 < box.y1 <= figure.bbox.height


def test_an_unknown_cost_leaves_out_its_plot(made: Made) -> None:
    made.write([replace(one, flops={}, kv_bytes=0.0) for one in made.cells])
    page = Page(made.report())
    assert "The FLOPs of this model cannot be told" in page.text
    assert page.results()["0.5", "divprune"][5:9] == ["–", "–", "–", "–"]
    assert sum(tag == "svg" for tag, _ in page.elements) == 1


def remove_bare(made: Made) -> None:
    (made.folder / "cells" / f"{made.cells[0].name}.json").unlink()


def remove_run(made: Made) -> None:
    (made.folder / "bench.json").unlink()


def remove_field(made: Made) -> None:
    write_json(made.folder / "bench.json", {"model": "m", "tasks": []})


def other_questions(made: Made) -> None:
    save_cell(made.folder, replace(made.cells[5], answers=made.cells[5].answers[1:]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_bare, "the bare model has not answered any task yet; run the same bench command"),
        (remove_run, "holds no bench run"),
        (remove_field, "bench.json lacks model_hash, order, command, environment"),
        (other_questions, "answered different questions"),
    ],
)
def test_what_is_no_run_is_an_error(made: Made, spoil: Callable[[Made], None], message: str) -> None:
    spoil(made)
    with pytest.raises(FoveateError, match=message):
        made.report()


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="holds no bench run"):
        write_bench_report(tmp_path)


# ---- a real run ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Page:
    model, processor = load_model("asset:vlm", "cpu")
    out = tmp_path_factory.mktemp("real")
    bench(model, ["scenes:count=3"], ["fastv"], [0.1], out, processor=processor, seeds=1, progress=False)
    html = write_bench_report(out, model=model, processor=processor, scenes=1, progress=False).read_text(encoding="utf-8")
    return Page(html)


def test_predictions_stand_beside_what_was_observed(real: Page) -> None:
    rows = real.tables["cost"][0][1:]
    assert [row[0].partition(" ")[2] for row in rows] == ["model", "random 0.1", "uniform 0.1", "downsample 0.1", "fastv 0.1"]
    for row in rows:
        assert row[1] == row[2]
        assert row[3].endswith(" M")
        assert abs(float(row[5].removesuffix(" %").replace("−", "-"))) <= 1
    assert [row[1] for row in rows] == [
        "64.0",
        "6.0",
        "6.0",
        "9.0",
        "25.3",
    ]  # FastV: two of six layers see all 64; downsampling: 3 x 3 patches


def test_a_run_on_smaller_pictures_is_predicted_on_those(tmp_path: Path) -> None:
    bench("asset:vlm", ["scenes:count=1"], ["fastv"], [0.5], tmp_path, image_size=32, baselines=False, progress=False)
    rows = Page(write_bench_report(tmp_path, scenes=0, progress=False).read_text(encoding="utf-8")).tables["cost"][0][1:]
    assert [row[1:3] for row in rows] == [["16.0", "16.0"], ["10.7", "10.7"]]
    for row in rows:
        assert abs(float(row[5].removesuffix(" %").replace("−", "-"))) <= 1


def test_kept_tokens_are_drawn(real: Page) -> None:
    drawn = [attrs for tag, attrs in real.elements if tag == "img" and str(attrs["alt"]).startswith("kept tokens: ")]
    assert len(drawn) == 1
    assert str(drawn[0]["src"]).startswith("data:image/png;base64,")


# ---- small things --------------------------------------------------------------------------------------------------------------------


def mark(cost: float, value: float) -> Mark:
    return Mark("m", cost, value, None, None, "")


def test_the_frontier_is_what_no_cheaper_one_reaches() -> None:
    marks = [mark(4, 90), mark(1, 50), mark(2, 50), mark(2, 70), mark(3, 60), mark(8, 90), mark(4, 80)]
    assert pareto(marks) == [mark(1, 50), mark(2, 70), mark(4, 90)]
    assert pareto([]) == []


def test_methods_look_apart_and_baselines_are_grey() -> None:
    found = looks(["random", "uniform", *map(str, range(20))], {"random", "uniform"})
    assert {look.colour for name, look in found.items() if look.baseline} == {"#8a8a8a"}
    assert len({(look.colour, look.sign) for look in found.values()}) == 22


def test_signed() -> None:
    assert [signed(value) for value in (1.25, -0.04, -3.0, 0.0)] == ["+1.2", "+0.0", "−3.0", "+0.0"]


def test_printable() -> None:
    assert printable("a\0b\ud800 é\u202e") == "a\ufffdb\ufffd é\ufffd"


def test_the_middle_budget() -> None:
    def at(*keeps: float) -> list[Line]:
        return [Line("m", keep, [], 0, 0, 0, None) for keep in keeps]

    assert middle(at(0.05, 0.5, 0.25, 0.11)) == 0.25
    assert middle(at(1, 0.05, 0.5, 0.25, 0.11)) == 0.25
    assert middle([]) is None


def test_families_without_data_count(made: Made) -> None:
    found = load_bench(made.folder)
    known = families(found.bare(TASK), None)
    assert [(family.name, family.n, family.majority, family.learnt) for family in known] == [
        ("fruit", 12, None, True),
        (f"coin{BREAK}", 12, None, True),
    ]
    bare, _ = lines(found, TASK, {"fruit"})
    assert (bare.value, bare.tokens, bare.lm_flops) == (100, 64, 3e9)


def test_drawings_of_many_colours_keep_rare_ones() -> None:
    """Words in orange, which say that an answer changed, over a picture of all shades."""
    figure = Figure(figsize=(4, 4), dpi=100)
    down, across = np.mgrid[0.7:1:64j, 0.7:1:64j]
    figure.add_axes((0, 0, 1, 0.9)).imshow(np.stack([down, across, np.full_like(down, 0.9)], -1))
    figure.text(0.05, 0.93, "purple", color="#b3400e")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    kept = io.BytesIO(base64.b64decode(_drawing(figure).partition(",")[2]))
    before, after = (np.asarray(Image.open(file).convert("RGB"), np.int64) - (0xB3, 0x40, 0x0E) for file in (drawn, kept))
    orange = np.abs(before).max(-1) < 24
    assert orange.sum() > 20
    assert (np.abs(after[orange]).max(-1) < 32).all()
