"""What a bench run's prompts cost by prediction: from the model's configuration and the processor's outputs, no weight touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foveate.accounting import predict
from foveate.data.footage import opened
from foveate.errors import FoveateError
from foveate.evaluation.asking import Put, batches
from foveate.evaluation.samples import Sample, Task, picture
from foveate.inference import model_inputs, prepared, progress_bar, prompts, shrunk
from foveate.reducers import Reducer, parse, prepare

ASKED = 256  # at most so many questions of a task stand for all of them
_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """Of one prompt, mean over the questions: visual tokens (mean over decoder layers) and FLOPs of the prefill, tower included."""

    tokens: float
    flops: float


def predictions(config: Any, processor: Any, task: Task, spellings: Sequence[str], progress: bool) -> dict[str, Prediction | str]:
    """Of each reducer's spelling, or why there is none."""
    samples = asked(task)
    totals = dict.fromkeys(spellings, (0.0, 0.0))
    reasons: dict[str, str] = {}
    with progress_bar(progress) as bar:
        shown = bar.add_task(f"{task.name}, predicting costs", total=len(samples))
        for numbers in batches(samples, [picture(sample) for sample in samples], _BATCH):
            own = [samples[number] for number in numbers]
            plain = _inputs(processor, own, ())
            for spelling in spellings:
                if spelling in reasons:
                    continue
                reducers = parse(spelling)
                fitted, before = shrunk(processor, reducers)
                changes = fitted is not processor or any(type(part).prepare is not Reducer.prepare for part in before)
                try:
                    ledger = predict(config, inputs=_inputs(fitted, own, before) if changes else plain, reducers=reducers)
                except FoveateError as error:
                    reasons[spelling] = str(error)
                    continue
                tokens, flops = totals[spelling]
                layers = len(ledger.visual_tokens)
                totals[spelling] = tokens + sum(ledger.visual_tokens) / layers, flops + ledger.total_flops
            bar.advance(shown, len(own))
    n = len(samples)
    return {name: reasons.get(name) or Prediction(tokens / n, flops / n) for name, (tokens, flops) in totals.items()}


def _inputs(processor: Any, samples: Sequence[Sample], reducers: Sequence[Reducer]) -> Any:
    """What the processor makes of the samples' prompts, as they are asked in a run."""
    puts = [Put.of(processor, sample) for sample in samples]
    images = [[prepare(reducers, image) for image in opened(one.images)] for one in puts]
    clips = [[prepared(reducers, clip.open()) for clip in one.clips] for one in puts]
    texts = prompts(processor, [one.question for one in puts], [len(own) for own in images])
    return model_inputs(processor, images, texts, clips)


def asked(task: Task) -> Sequence[Sample]:
    """The questions that predictions are made for, evenly spaced."""
    return task.samples[:: -(-len(task.samples) // ASKED)]
