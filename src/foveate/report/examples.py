"""Examples in the report of a bench run: drawings of what the best methods keep, and questions that a method has lost."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL import Image

from foveate.data.clips import Clip
from foveate.data.footage import MARKER, VIDEO
from foveate.data.pixels import open_image
from foveate.errors import FoveateError
from foveate.evaluation.cells import Answer, Cell
from foveate.evaluation.samples import Sample
from foveate.inspect.look import look
from foveate.inspect.words import answer_text
from foveate.report.compared import RANDOM, Line, budgets, middle
from foveate.report.page import data_uri
from foveate.report.parts import Part, Source, at_budget, kind, shortened

FAILURES = 4  # shown of each method
METHODS = 2  # whose kept tokens are drawn, beside random
_THUMB = 240  # px
_DASH = "–"


def pictures_of(parts: Sequence[Part], source: Source, scenes: int, by_budget: bool = False) -> tuple[list[dict[str, str]], str]:
    """Drawings of what the best methods keep, and what is said above them: at the middle budget layer by layer, or at every budget what is
    left at the end, of questions that divide the methods at the smallest."""
    if scenes < 1:
        return [], "Not asked for."
    if source.model is None:
        return [], f"No pictures: {source.reason}."
    out: list[dict[str, str]] = []
    reasons: dict[str, None] = {}
    for part in parts:
        own = part.lines
        keep = min(budgets(own), default=None) if by_budget else middle(own)
        if part.task is None or keep is None:
            reasons[f"{part.name}: {part.reason or 'no method has finished'}"] = None
            continue
        chosen = _drawn(at_budget(own, keep))
        for sample in _telling(part, chosen)[: scenes - len(out)]:
            question = plain(sample)
            spelled = [line.method if by_budget else line.cells[0].reducer for line in chosen]
            try:
                figure = look(
                    source.model,
                    shown(sample),
                    question if sample.clips else sample.question,
                    spelled,
                    processor=source.processor,
                    keep=budgets(own) if by_budget else (),
                    per_layer=not by_budget,
                    max_new_tokens=part.task.max_new_tokens,
                )
            except FoveateError as error:
                reasons[str(error)] = None
                continue
            src = _drawing(figure)
            caption = f"{part.name}, {sample.id}" + ("" if by_budget else f", keep {keep:g}")
            out.append({"src": src, "alt": f"kept tokens: {shortened(question)}", "caption": caption})
    where = "what they leave at each budget" if by_budget else "in front of every layer at which the set changes"
    about = (
        f"Questions that the bare model answers rightly and the methods do not all alike, at the {'smallest' if by_budget else 'middle'} "
        f"budget: the {METHODS} best methods and random, {where}. Grey: dropped; outlined: merged."
    )
    if reasons:
        about += f" Not drawn: {'; '.join(reasons)}."
    return out, about


def shows(sample: Sample) -> bool:
    return bool(sample.images or sample.clips)


def shown(sample: Sample) -> list[Image.Image | Clip]:
    """What a sample is about, as `look` takes it: its pictures, or its first clip."""
    return [sample.clips[0].open()] if sample.clips and not sample.images else [open_image(ref) for ref in sample.images]


def plain(sample: Sample) -> str:
    """A question without markers."""
    text = sample.question.replace(MARKER, "")
    return (text.replace(VIDEO, "") if sample.clips else text).strip()


def _drawing(figure: Figure) -> str:
    """Few colours are enough for it, and a third of the bytes; rare ones among them, such as of the words that tell another answer."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return data_uri(Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE))


def _drawn(own: Sequence[Line]) -> list[Line]:
    """The most accurate methods that are no baselines, and random."""
    best = sorted((line for line in own if not kind(line)), key=lambda line: -line.value)[:METHODS]
    return best + [line for line in own if line.method == RANDOM]


def _telling(part: Part, chosen: Sequence[Line]) -> list[Sample]:
    """Samples with pictures that the bare model has right and not all methods: most divided first, families in turn, no picture twice."""
    rights = [{answer.id for answer in line.cells[0].answers if answer.score >= 0.5} for line in chosen]
    divided = []
    for place, answer in enumerate(part.bare.cells[0].answers):
        right = sum(answer.id in own for own in rights)
        if answer.score >= 0.5 and right < len(rights) and answer.group in part.counted and shows(part.samples[answer.id]):
            divided.append((-min(right, len(rights) - right), place, answer))
    turns: dict[str, int] = {}
    seen: set[str] = set()
    order = []
    for _, _, answer in sorted(divided, key=lambda entry: entry[:2]):
        if answer.image not in seen:
            seen.add(answer.image)
            turns[answer.group] = turns.get(answer.group, 0) + 1
            order.append((turns[answer.group], part.samples[answer.id]))
    return [sample for _, sample in sorted(order, key=lambda entry: entry[0])]


def about_failures(parts: Sequence[Part]) -> str:
    keeps = {f"{share:g}" for part in parts if (share := middle(part.lines)) is not None}
    keep = " or ".join(sorted(keeps)) or _DASH
    text = f"Questions that the bare model has right and the method, at keep {keep}, has wrong; families in turn."
    away = [f"{part.name}: {part.reason}" for part in parts if part.task is None]
    return text + (f" The questions of these tasks are not at hand, so only the answers are shown: {'; '.join(away)}." if away else "")


def failures_of(parts: Sequence[Part], method: str) -> list[tuple[str, str, list[dict[str, str]]]]:
    """The method's name, how much it lost and gained, and some of what it lost."""
    told: list[str] = []
    shown: list[dict[str, str]] = []
    for part in parts:
        keep = middle(part.lines)
        line = next((line for line in part.lines if line.method == method and line.keep == keep), None)
        if line is None or line.paired is None:
            continue
        n = sum(answer.group in part.counted for answer in part.bare.cells[0].answers)
        told.append(
            f"{part.name}: {line.paired.lost:,} of {n:,} questions scored lower than by the bare model, {line.paired.gained:,} higher."
        )
        lost = _lost(part.bare.cells[0], line.cells[0], part.counted)
        shown += [_failure(part, before, after) for before, after in lost[: FAILURES - len(shown)]]
    return [(method, " ".join(told), shown)] if told else []


def _lost(bare: Cell, cell: Cell, counted: set[str]) -> list[tuple[Answer, Answer]]:
    """What the bare model has right and the cell has wrong, groups in turn."""
    turns: dict[str, int] = {}
    found = []
    for before, after in zip(bare.answers, cell.answers, strict=True):
        if before.score >= 0.5 > after.score and before.group in counted:
            turns[before.group] = turns.get(before.group, 0) + 1
            found.append((turns[before.group], before, after))
    return [(before, after) for _, before, after in sorted(found, key=lambda entry: entry[0])]


def _failure(part: Part, before: Answer, after: Answer) -> dict[str, str]:
    sample = part.samples.get(before.id)
    src = ""
    if sample is not None and shows(sample):
        image = shown(sample)[0]
        image = image.frames[len(image) // 2] if isinstance(image, Clip) else image
        large = max(image.size) > _THUMB
        image.thumbnail((_THUMB, _THUMB), Image.Resampling.LANCZOS)
        src = data_uri(image, "JPEG" if large else "PNG")
    return {
        "id": before.id,
        "src": src,
        "question": shortened(plain(sample)) if sample else before.id,
        "truth": shortened(" / ".join(answer_text(answer) for answer in dict.fromkeys(sample.answers))) if sample else _DASH,
        "bare": shortened(answer_text(before.prediction)),
        "reduced": shortened(answer_text(after.prediction)),
    }
