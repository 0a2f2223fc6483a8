"""What an image becomes on its way into a language model: the crops that a vision tower sees, and the slots that their tokens fill."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.tokens.layout import Kind

WHOLE = (0.0, 0.0, 1.0, 1.0)
MARKS = ("newline", "separator")
"""The learned vectors that a model may put between visual tokens."""

Pair = tuple[int, int]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Canvas:
    """The ground that crops are cut from: the picture resized to `picture` pixels, with its upper left corner at `at`. Sizes are (width,
    height), places (left, top). `fill`: the grey of what the picture leaves free, 0 to 255."""

    size: Pair
    picture: Pair
    at: Pair = (0, 0)
    fill: int = 0


@dataclass(frozen=True)
class Crop:
    """A picture that the vision tower sees at once: an image, or a part of one.

    grid    (rows, columns) of the patches that the bridge reads; None where only the model's own processor knows
    tokens  visual tokens that the bridge makes of it
    box     (left, top, right, bottom) of what it shows, in shares of the image's width and height
    cells   (rows, columns) of its tokens, None where they are no raster
    kind    "overview" (the whole image), "tile", "detail" (a finer tile beside coarser ones) or "stride" (every few pixels of the whole)
    canvas  what it is cut from; None: the image itself, which is then resized whatever the crop's shape
    window  (left, top, right, bottom) of it in pixels of the canvas
    every   of the window's pixels every so many, in both directions
    lens    whether the tiling's lens makes that grid of the tower's patches, of this crop by itself
    """

    grid: Pair | None
    tokens: int
    box: tuple[float, float, float, float] = WHOLE
    cells: Pair | None = None
    kind: str = "overview"
    canvas: Canvas | None = None
    window: Box = (0, 0, 0, 0)
    every: int = 1
    lens: bool = False

    @classmethod
    def of(cls, canvas: Canvas, window: Box, kind: str, grid: Pair, tokens: int, cells: Pair | None, every: int = 1) -> Crop:
        """The crop that shows `window` of a canvas; its box is as much of it as the picture fills."""
        (w, h), (x, y) = canvas.picture, canvas.at
        left, right = (min(max((edge - x) / w, 0.0), 1.0) for edge in (window[0], window[2]))
        top, bottom = (min(max((edge - y) / h, 0.0), 1.0) for edge in (window[1], window[3]))
        return cls(grid, tokens, (left, top, right, bottom), cells, kind, canvas, window, every)

    @property
    def recipe(self) -> object:
        """All that its pixels depend on beside the image; equal to WHOLE for the image as it is."""
        return self.box if self.canvas is None else (self.canvas, self.window, self.every)

    @property
    def pixels(self) -> Pair:
        """(width, height) of what is cut from a canvas."""
        left, top, right, bottom = self.window
        return -(-(right - left) // self.every), -(-(bottom - top) // self.every)


@dataclass(frozen=True)
class Block:
    """Tokens of `rows` x `columns` crops from crop `first` on, laid side by side as the crops lie in the picture: one map of cells.

    A single crop whose tokens are no raster keeps their order, and takes none of what follows.

    window   (top, left, bottom, right) of the map, in cells, that is kept; None: all
    shape    (rows, columns) that the rest is scaled to, bilinearly; None: as it is
    newline  whether the learned newline stands after every row
    """

    first: int
    rows: int = 1
    columns: int = 1
    window: Box | None = None
    shape: Pair | None = None
    newline: bool = False


@dataclass(frozen=True)
class Mark:
    """A learned vector, one of MARKS."""

    name: str


@dataclass(frozen=True)
class Tag:
    """Ordinary text between visual tokens, which the tokenizer makes into as many tokens as it will."""

    text: str


Part = Block | Mark | Tag


@dataclass(frozen=True)
class ImagePlan:
    """One image as it enters the language model, before any reducer. An image that is seen whole, at one size, is its simplest case.

    crops  in the order in which the tower sees them
    marks  kinds of the tokens between and beside those of the crops, such as newlines
    size   (width, height) of the image in pixels; None where the plan is that of any image
    parts  what stands in the prompt, in order; (): the tokens of each crop in turn
    most   how many crops it might have had, 0: any number
    each   as how many visual tokens a crop was asked for, 0: as many as the bridge makes
    mosaic crops whose tokens stand nowhere in the prompt and are added to those that do, inside the language model (DeepStack)
    """

    crops: tuple[Crop, ...]
    marks: tuple[Kind, ...] = ()
    size: Pair | None = None
    parts: tuple[Part, ...] = ()
    most: int = 0
    each: int = 0
    mosaic: Block | None = None

    @classmethod
    def whole(cls, tokens: int, grid: tuple[int, int] | None = None, each: int = 0) -> ImagePlan:
        """The plan of an image that is one crop."""
        return cls((Crop(grid, tokens),), each=each)

    @classmethod
    def laid(cls, size: Pair, crops: tuple[Crop, ...], parts: tuple[Part, ...], mosaic: Block | None = None) -> ImagePlan:
        """The plan of an image of `size`; what stands in the prompt says which marks there are."""
        bare = cls(crops, (), size, parts)
        return cls(crops, (Kind.NEWLINE,) * bare._learned, size, parts, mosaic=mosaic)

    @property
    def visual(self) -> int:
        """Tokens of the crops, as many of them as enter the prompt."""
        if not self.parts:
            return sum(crop.tokens for crop in self.crops)
        return sum(self._cells(part)[2] for part in self.parts if isinstance(part, Block))

    @property
    def tokens(self) -> int:
        """Slots in the prompt, marks included: the placeholders that stand for the image. The text of tags is not among them."""
        return self.visual + len(self.marks)

    @property
    def given(self) -> tuple[int, int, int]:
        """(height, width, most), from which a model makes the same plan."""
        assert self.size is not None
        return self.size[1], self.size[0], self.most

    @property
    def cost(self) -> object:
        """What it costs hangs on: equal for images that are cut into the same crops, whatever their own size."""
        crops = tuple((crop.grid, crop.tokens, crop.cells, crop.kind, crop.pixels, crop.lens) for crop in self.crops)
        return crops, self.marks, self.size is None, self.parts, self.most, self.each, self.mosaic

    @property
    def tags(self) -> tuple[str, ...]:
        """Texts between the placeholders."""
        return tuple(part.text for part in self.parts if isinstance(part, Tag))

    @property
    def runs(self) -> tuple[int | str, ...]:
        """The prompt's part: how many placeholders follow one another, and the text between them."""
        found: list[int | str] = []
        for part in self.parts or (None,):
            if isinstance(part, Tag):
                found.append(part.text)
                continue
            count = self.tokens if part is None else 1 if isinstance(part, Mark) else sum(self._cells(part)[1:])
            if found and isinstance(found[-1], int):
                count += found.pop()  # type: ignore[operator]
            found.append(count)
        return tuple(found)

    @property
    def labels(self) -> tuple[int, ...]:
        """By what number reducers know each crop: the overview is 0, the others follow in their order; an only crop has none (-1)."""
        if len(self.crops) == 1:
            return (-1,)
        whole = [crop.kind == "overview" for crop in self.crops]
        others = iter(range(1 if any(whole) else 0, len(self.crops) + 1))
        return tuple(0 if own and i == whole.index(True) else next(others) for i, own in enumerate(whole))

    @property
    def _learned(self) -> int:
        blocks = [self._cells(part)[1] for part in self.parts if isinstance(part, Block)]
        return sum(blocks) + sum(isinstance(part, Mark) for part in self.parts)

    def _cells(self, block: Block) -> tuple[Pair | None, int, int]:
        """(rows, columns) that a block fills, None for one that is no raster; its newlines; its visual tokens."""
        crop = self.crops[block.first]
        if crop.cells is None:
            return None, 0, crop.tokens
        rows, columns = crop.cells[0] * block.rows, crop.cells[1] * block.columns
        if block.window is not None:
            rows, columns = block.window[2] - block.window[0], block.window[3] - block.window[1]
        rows, columns = block.shape or (rows, columns)
        return (rows, columns), rows * block.newline, rows * columns
