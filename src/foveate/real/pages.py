"""Documents with known contents: receipts, filled-in forms and tables, as `Facts` and as pages of printed text in real fonts.

A page is a square of 384 px with text of 13 to 17 px. What may be asked of it is in `asked`: each question with its answer, which is
printed on the page, word for word.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from foveate.real.scenes import SIZE, Box, Rgb
from foveate.real.stock import Font, Stock, said

KINDS = ("receipt", "form", "table")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_COLUMNS = (("Price", "Stock", "Sold"), ("Mon", "Tue", "Wed"), ("Age", "Score", "Rank"), ("2019", "2020", "2021"))


@dataclass(frozen=True)
class Facts:
    """What a page says. `rows` are lines of cells, from the top; a cell of "" is empty."""

    kind: str
    title: str
    rows: tuple[tuple[str, ...], ...]
    asked: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Text:
    """One printed string: the box (left, top, right, bottom) in pixels is that of its ink."""

    text: str
    font: Font
    size: int
    box: Box


@dataclass(frozen=True)
class Page:
    """A document as it is printed."""

    facts: Facts
    texts: tuple[Text, ...]
    rules: tuple[Box, ...]
    paper: Box
    colours: tuple[Rgb, Rgb, Rgb]  # of what the paper lies on, of the paper, of the ink


# ---- contents ------------------------------------------------------------------------------------------------------------------------


def make_facts(rng: random.Random, stock: Stock, kind: str) -> Facts:
    """Contents of a document of a kind, with the stock's words and its names of things."""
    return _MAKERS[kind](rng, stock)


def _date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(2012, 2029)
    return rng.choice((f"{year}-{month:02d}-{day:02d}", f"{day} {_MONTHS[month - 1]} {year}", f"{month:02d}/{day:02d}/{year}"))


def _company(rng: random.Random, stock: Stock) -> str:
    name = rng.choice(stock.words.last)
    return rng.choice((f"{name} Market", f"{name} & {rng.choice(stock.words.last)}", f"{name} Ltd", f"{name} Store", f"{name} and Sons"))


def _goods(rng: random.Random, stock: Stock, count: int) -> list[str]:
    """Names of things that can be counted, no longer than 14 letters."""
    fit = [name for name in stock.countable if len(name) <= 14]
    return rng.sample(fit, min(count, len(fit)))


def _receipt(rng: random.Random, stock: Stock) -> Facts:
    goods = _goods(rng, stock, rng.randint(4, 7))
    numbers = [rng.randint(1, 9) for _ in goods]
    amounts = [number * rng.randint(20, 1500) for number in numbers]
    subtotal = sum(amounts)
    tax = round(subtotal * rng.choice((0.05, 0.07, 0.08, 0.1)))
    total = subtotal + tax
    paid = (total // 1000 + 1) * 1000
    shop, date, time = _company(rng, stock), _date(rng), f"{rng.randint(8, 21)}:{rng.randint(0, 59):02d}"
    lines = [(name, str(number), _money(amount)) for name, number, amount in zip(goods, numbers, amounts, strict=True)]
    rows = [
        (f"{rng.randint(1, 299)} {rng.choice(stock.words.streets)}", "", ""),
        (date, "", time),
        ("Item", "Qty", "Amount"),
        *lines,
        ("Subtotal", "", _money(subtotal)),
        ("Tax", "", _money(tax)),
        ("TOTAL", "", _money(total)),
        ("Cash", "", _money(paid)),
        ("Change", "", _money(paid - total)),
    ]
    asked = [("What is the total?", _money(total)), ("What is the date?", date), ("What is the name of the shop?", shop)]
    asked += [(f"How many {said(name).many} were bought?", number) for name, number, _ in lines]
    asked += [(f"What is the amount for {name}?", amount) for name, _, amount in lines]
    asked += [("What is the tax?", _money(tax)), ("What is the change?", _money(paid - total)), ("What is the time?", time)]
    return Facts("receipt", shop, tuple(rows), tuple(asked))


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def _form(rng: random.Random, stock: Stock) -> Facts:
    words = stock.words
    first, last, other = rng.choice(words.first), rng.choice(words.last), rng.choice(words.first)
    fields = {
        "First name": first,
        "Last name": last,
        "Street": f"{rng.randint(1, 299)} {rng.choice(words.streets)}",
        "City": rng.choice(words.cities),
        "Phone number": f"{rng.randint(200, 999)}-{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
        "Date of birth": _date(rng),
        "Member number": str(rng.randint(10000, 99999)),
        "E-mail": f"{first}.{last}@{rng.choice(words.common)}.com".lower(),
        "Employer": _company(rng, stock),
        "Contact": f"{other} {rng.choice(words.last)}",
        "Expiry date": _date(rng),
        "Amount paid": "$" + _money(rng.randint(500, 30000)),
    }
    chosen = [name for name in fields if rng.random() < 0.75]
    title = rng.choice(("Membership form", "Registration", "Order form", "Library card", "Visitor pass", "Application"))
    title = f"{rng.choice(words.cities)} {title}" if rng.random() < 0.3 else title
    asked = [(f"What is the {name[0].lower() + name[1:]}?", fields[name]) for name in chosen]
    return Facts("form", title, tuple((f"{name}:", fields[name]) for name in chosen), tuple(asked))


def _table(rng: random.Random, stock: Stock) -> Facts:
    columns = rng.choice(_COLUMNS)
    count = rng.randint(6, 10)
    people = columns[0] in ("Mon", "Age")
    heads = rng.sample(stock.words.first, min(count, len(stock.words.first))) if people else _goods(rng, stock, count)
    cells = [tuple(_cell(rng, column) for column in columns) for _ in heads]
    title = f"{rng.choice(stock.words.cities)} {rng.choice(('list', 'report', 'sheet', 'records'))}"
    rows = (("Name" if people else "Item", *columns), *((head, *cell) for head, cell in zip(heads, cells, strict=True)))
    asked = [(f"What is {column} for {row[0]}?", row[i]) for row in rows[1:] for i, column in enumerate(columns, start=1)]
    return Facts("table", title, rows, tuple(asked))


def _cell(rng: random.Random, column: str) -> str:
    if column == "Price":
        return _money(rng.randint(50, 9999))
    return str(rng.randint(1, 99) if column != "Stock" else rng.randint(1, 999))


_MAKERS: dict[str, Callable[[random.Random, Stock], Facts]] = {"receipt": _receipt, "form": _form, "table": _table}


# ---- layout --------------------------------------------------------------------------------------------------------------------------


def make_page(rng: random.Random, facts: Facts, fonts: Sequence[Font]) -> Page:
    """The facts, set in one of the fonts in a size in which they fit."""
    font, bold = rng.choice(fonts), rng.choice(fonts)
    size = rng.randint(13, 17)
    while True:
        width = min(SIZE - 24, max(_width(facts.title, bold, size + 3) + 24, *(_natural(facts, font, size))))
        pitch = min(size + 11, (SIZE - 44 - size) // (len(facts.rows) + 1))
        if (width < SIZE - 24 and pitch >= size + 3) or size == 13:
            break
        size -= 1
    paper_width = rng.randint(width, SIZE - 16)
    height = pitch * (len(facts.rows) + 1) + size + 24
    left, top = rng.randint(4, SIZE - 4 - paper_width), rng.randint(4, max(4, SIZE - 4 - height))
    paper = (left, top, left + paper_width, min(SIZE - 2, top + height))
    shade = rng.randint(238, 255)
    colours = (_shade(rng, 60, 200), (shade, shade, shade - rng.randint(0, 14)), _shade(rng, 5, 60))
    texts = [_text(facts.title, bold, size + 3, (paper[0] + paper[2]) // 2, top + 10, "middle")]
    rules: list[Box] = []
    for number, row in enumerate(facts.rows):
        y = top + 16 + size + pitch * number + pitch // 2
        for text, (x, align) in zip(row, _columns(facts, paper, font, size), strict=True):
            if text:
                texts.append(_text(text, font, size, x, y, align))
        if facts.kind == "form" or row[0] in ("Item", "Name", "Change") or (facts.kind == "table" and size > 14):
            rules.append((paper[0] + 10, y + size + 4, paper[2] - 10, y + size + 5))
    return Page(facts, tuple(texts), tuple(rules), paper, colours)


def _shade(rng: random.Random, low: int, high: int) -> Rgb:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _width(text: str, font: Font, size: int) -> int:
    return round(font.at(size).getlength(text))


def _widths(facts: Facts, font: Font, size: int) -> list[int]:
    """Of the widest cell of each column; lines with empty cells have room beside them."""
    full = [row for row in facts.rows if all(row)] or facts.rows
    return [max(_width(row[i], font, size) for row in full) for i in range(len(facts.rows[0]))]


def _natural(facts: Facts, font: Font, size: int) -> list[int]:
    """How wide the paper must be for the columns, and for each line."""
    gap = 14
    lines = [sum(_width(cell, font, size) + gap for cell in row if cell) + 24 for row in facts.rows]
    return [sum(_widths(facts, font, size)) + gap * len(facts.rows[0]) + 24, *lines]


def _columns(facts: Facts, paper: Box, font: Font, size: int) -> list[tuple[int, str]]:
    """Where the text of each column is aligned, and how: the first to the left; of forms the second too, others to the right."""
    widths = _widths(facts, font, size)
    first = (paper[0] + 12, "left")
    if facts.kind == "form":
        return [first, (paper[0] + 12 + widths[0] + 12, "left")]
    room = (paper[2] - 12 - first[0] - sum(widths)) / (len(widths) - 1)
    ends = [round(first[0] + sum(widths[: i + 1]) + room * i) for i in range(1, len(widths))]
    return [first, *((end, "right") for end in ends)]


def _text(text: str, font: Font, size: int, x: int, y: int, align: str) -> Text:
    """The text with its ink's box; `y` is the top of the line."""
    left, top, right, bottom = font.at(size).getbbox(text)
    shift = {"left": 0, "middle": -(right - left) // 2, "right": -(right - left)}[align]
    return Text(text, font, size, (round(x + shift), round(y + top), round(x + shift + right - left), round(y + bottom)))


# ---- drawing -------------------------------------------------------------------------------------------------------------------------


def render_page(page: Page) -> Image.Image:
    """The page as `SIZE` x `SIZE` pixels, RGB."""
    image = Image.new("RGB", (SIZE, SIZE), page.colours[0])
    draw = ImageDraw.Draw(image)
    draw.rectangle(_inside(page.paper), page.colours[1])
    for rule in page.rules:
        draw.rectangle(_inside(rule), (170, 170, 170))
    for text in page.texts:
        draw_text(draw, text, page.colours[2])
    return image


def draw_text(draw: ImageDraw.ImageDraw, text: Text, ink: Rgb) -> None:
    font = text.font.at(text.size)
    left, top, _, _ = font.getbbox(text.text)
    draw.text((text.box[0] - left, text.box[1] - top), text.text, ink, font)


def _inside(box: Box) -> Box:
    """The box as Pillow takes it, with its last pixels."""
    return box[0], box[1], box[2] - 1, box[3] - 1
