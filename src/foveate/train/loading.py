"""Numbers of samples -> a batch, also where a sample turns out bad in the middle of training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from foveate.data.collate import Collator
from foveate.data.conversations import Conversation, Conversations
from foveate.data.library import LibraryCollator
from foveate.errors import FoveateError
from foveate.train.mixture import Mixture
from foveate.train.order import Item

log = logging.getLogger(__name__)


class Loading:
    """What a data loader collates: items of `data`, read and made a batch by `collator`, which is asked for as many visual tokens of each
    view as items say beside their numbers.

    A batch has `plans`, what each image of each of its samples becomes, and `sources`, the number of each sample's source.

    What the check before training could not see is found here: an image that has gone, or one whose tokens are too many. By the policy
    "stop" that is a FoveateError that names the sample. By "skip" the sample is named in the log and in the file `skipped`, and the next
    one of its source stands in its place, so that a batch is always full. A function says the policy of an item. `lost`: where to note
    what `max_length` cuts, one line a sample, where that was not counted before.
    """

    def __init__(
        self,
        data: Conversations | Mixture,
        collator: Collator | LibraryCollator,
        policy: str | Callable[[int], str],
        skipped: Path,
        lost: Path | None = None,
    ) -> None:
        self.data, self.collator, self.policy, self.skipped, self.lost = data, collator, policy, skipped, lost

    def __call__(self, items: Sequence[Item]) -> Any:
        asked = {item[1] for item in items if isinstance(item, tuple)}
        numbers = [item[0] if isinstance(item, tuple) else item for item in items]
        collator = self._asking_for(asked.pop()) if asked else self.collator
        try:
            batch = self._batch(collator, [self.data[number] for number in numbers])
        except FoveateError:
            batch = self._batch(collator, [self._sound(number) for number in numbers])
        if self.lost is not None:
            cut: list[Any] = getattr(self.collator, "cut", [])
            _append(self.lost, "".join(f"{one.tokens} {one.of} {one.answers}\n" for one in cut))
            cut.clear()
        return batch

    def _asking_for(self, view_tokens: int) -> Collator:
        assert isinstance(self.collator, Collator)
        return self.collator.asking_for(view_tokens)

    def _batch(self, collator: Collator | LibraryCollator, samples: Sequence[Conversation]) -> dict[str, Any]:
        batch: dict[str, Any] = collator(samples)
        return batch | {"plans": [sample.plans for sample in samples], "sources": [sample.source for sample in samples]}

    def _sound(self, item: int) -> Conversation:
        """The sample, or the first one after it that can be used."""
        policy = self.policy if isinstance(self.policy, str) else self.policy(item)
        for number in range(len(self.data)):
            other = self.data.after(item, number)
            if number and other == item:
                break
            try:
                sample = self.data[other]
                self.collator([sample])
            except FoveateError as error:
                if policy == "stop":
                    raise FoveateError(f"{error}. Repair it, or set on_bad_sample: skip to go on without it") from None
                log.warning("skipped in training: %s", error)
                _append(self.skipped, " ".join(str(error).split()) + "\n")
            else:
                return sample
        raise FoveateError(f"{self.data.name}: no sample is left that can be trained on (list: {self.skipped})")


def _append(path: Path, text: str) -> None:
    if text:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
