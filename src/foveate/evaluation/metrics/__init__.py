"""The metrics: what `metric=` of a task may say. All work offline, none asks another model.

A metric's headline is 100 x the mean of the samples' scores, but for scenes (each family counts the same) and mmbench (whole questions).

| metric | for | right is | options |
|---|---|---|---|
| exact | anything with short answers | equal but for case, white space and one final full stop | |
| vqa | VQAv2, OK-VQA; TextVQA, VizWiz | agreement with ten people, 0 to 1 | `variant=official`, `both`, `evalai` |
| gqa | GQA | equal but for case and punctuation | |
| pope | POPE | the yes or no in the answer | `parse=llava`, `strict`, `words` |
| mme | MME | the yes or no in the answer; accuracy+ and score beside | |
| choice | ScienceQA, AI2D, SEED, others | the letter in the answer | `rule=generic` and others, `answer_is=letter`, `index` |
| mmbench | MMBench | the letter, in all rotations of the options | those of choice; `rule=mmbench` |
| mmstar | MMStar | the letter | those of choice; `rule=mmstar` |
| anls | DocVQA, InfoVQA | likeness by edit distance; below one half 0 | `length=raw`, `collapsed` |
| relaxed | ChartQA | a number within 5 %, else equal but for case | |
| ocrbench | OCRBench | holds the reference | `formulas=GROUP` |
| iou | RefCOCO and its kin | IoU >= 0.5 | `format=` (must be said), `truth=`, `corners=xyxy`, `xywh` |
| scenes | the embedded world | by family, see `foveate.evaluation.metrics.scenes` | |

The first of the values is taken where none is said. Rules of choice: `generic` (the most telling place), `leading` (ScienceQA, AI2D),
`first` (SEED), `mmstar`, `mmbench`. What the values mean stands in each metric's class, and of boxes in `foveate.evaluation.metrics.iou`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from foveate.errors import FoveateError, nearest
from foveate.evaluation.metrics.anls import Anls
from foveate.evaluation.metrics.choice import Choice
from foveate.evaluation.metrics.exact import Exact, Gqa
from foveate.evaluation.metrics.iou import Iou
from foveate.evaluation.metrics.mmbench import MMBench
from foveate.evaluation.metrics.mmstar import MMStar
from foveate.evaluation.metrics.ocrbench import OCRBench
from foveate.evaluation.metrics.relaxed import Relaxed
from foveate.evaluation.metrics.scenes import Scenes
from foveate.evaluation.metrics.vqa import Vqa
from foveate.evaluation.metrics.yes_no import Mme, Pope
from foveate.evaluation.samples import Metric

_ALL: tuple[type[Metric], ...] = (Exact, Vqa, Gqa, Pope, Mme, Choice, MMBench, MMStar, Anls, Relaxed, OCRBench, Iou, Scenes)
METRICS: dict[str, type[Metric]] = {metric.name: metric for metric in _ALL}


def find(name: str) -> type[Metric]:
    """The metric of a name; FoveateError if there is none."""
    if name not in METRICS:
        raise FoveateError(f"unknown metric {name!r}{nearest(name, METRICS)}; there are {', '.join(METRICS)}")
    return METRICS[name]


def make(name: str, options: Mapping[str, str]) -> Metric:
    """The metric of a name with its options; FoveateError for an option or a value that it does not have."""
    metric = find(name)
    known = [field.name for field in fields(metric)]
    for option in options:
        if option not in known:
            raise FoveateError(f"metric {name} has no option {option!r}{nearest(option, known)}; it has {', '.join(known) or 'none'}")
    return metric(**options)
