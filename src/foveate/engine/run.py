"""An attachment: its life, and what was seen under it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from foveate.accounting import Ledger
from foveate.anatomy import Anatomy
from foveate.cache_policies import CachePolicy
from foveate.engine.driver import Chosen, Driver
from foveate.engine.forward import ForwardPass
from foveate.engine.record import Record
from foveate.engine.replay import Recorded, ReplayInTower
from foveate.engine.wiring import Wiring
from foveate.errors import FoveateError
from foveate.probes import hooks
from foveate.reducers import Preparing, Reducer, before_processor, parse, spell

RUN = "_foveate_run"  # the attribute by which a model knows its attachment, and copies of it theirs
MOST = 8  # sets of reducers beside the attached one that stay wired at the same time
_WIRING = threading.Lock()  # of no model alone: a lock of its own could not be copied with it


class Run:
    """An attachment: made by `attach`, ended by `detach` or by leaving the `with` block.

    `cache` is the policy that thins the caches of the layers, None where there is none; it stays under `instead` too.

    Outputs keep the caller's length, hidden states of every level too (`output_hidden_states`): a dropped row carries the state of its
    nearest survivor before it, a merged row its group's. Attention maps (`output_attentions`) are of the slots that ran."""

    def __init__(
        self,
        around: list[nn.Module],
        anatomy: Anatomy,
        reducers: Sequence[Reducer],
        record: str,
        shortcuts: bool,
        preparing: Preparing,
        cache: CachePolicy | None = None,
    ) -> None:
        self.anatomy = anatomy
        self.config = next((module.config for module in around if hasattr(module, "config")), None)
        self.reducers, self.cache = list(reducers), cache
        self.record = record
        self.passes: list[Record] = []
        self._around, self._shortcuts = around, shortcuts
        self._chosen = Chosen()
        self._others: dict[Any, _Other] = {}
        self._made = 0
        self._losses: list[tuple[Reducer, Tensor]] = []
        hooks.prepare()
        self._driver = self._wired(self.reducers)
        setattr(anatomy.core, RUN, self)
        self._preparing = preparing
        try:
            preparing.install()
        except FoveateError:
            self.detach()
            raise

    def detach(self) -> None:
        """Leaves the model as it was. Does nothing the second time."""
        self._drop_others()
        if self._driver is not None:
            self._driver.remove()
            self._driver = None
        self._preparing.remove()
        if getattr(self.anatomy.core, RUN, None) is self:
            delattr(self.anatomy.core, RUN)
            _forget_compiled()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    # ---- other reducers for a while

    @contextmanager
    def suspended(self) -> Iterator[Self]:
        """A `with` block in which the attachment does nothing: calls of the model in this thread see all tokens and leave no record.

        The backward pass of a call may come after the block, recomputed activations included."""
        with self._choosing(None):
            yield self

    @contextmanager
    def instead(self, reducers: str | Reducer | Sequence[Reducer]) -> Iterator[Self]:
        """A `with` block in which these reducers act in the place of those attached, in calls of the model in this thread.

        What they do is recorded in `passes` as else. Hooks of the last few sets of reducers stay on the model, idle, until it is detached.
        Raises FoveateError for reducers that the model cannot take or that act on the images themselves, and on a detached run."""
        found = parse(reducers) if isinstance(reducers, str) else [reducers] if isinstance(reducers, Reducer) else list(reducers)
        if before_processor(found):
            raise FoveateError(f"{spell(found)!r} acts on the images, in front of the processor: it cannot take turns inside of the model")
        key = reducers if isinstance(reducers, str) else tuple(map(id, found))
        with _WIRING:
            if getattr(self.anatomy.core, RUN, None) is not self:
                raise FoveateError("the model has been detached: attach it again")
            if key not in self._others and len(self._others) >= MOST and not any(other.users for other in self._others.values()):
                self._drop_others()
            if key not in self._others:
                self._others[key] = _Other(found, self._wired(found, self._made + 1))
                self._made += 1
            other = self._others[key]
            other.users += 1
        try:
            with self._choosing(None if other.driver is None else other.driver.number):
                yield self
        finally:
            with _WIRING:
                other.users -= 1

    @contextmanager
    def _choosing(self, number: int | None) -> Iterator[None]:
        before, self._chosen.number = self._chosen.number, number
        try:
            yield
        finally:
            self._chosen.number = before

    def _wired(self, reducers: list[Reducer], number: int = 0) -> Driver | None:
        """The hooks for some reducers; None where they have nothing to do and nothing is recorded."""
        wiring = Wiring.of(reducers, self.anatomy, str(getattr(self.config, "name_or_path", "")), self.cache)
        _forget_compiled()
        if not wiring.acts and wiring.cache is None and self.record == "none":
            return None
        return Driver(self._around, self.anatomy, wiring, reducers, self._done, self._shortcuts, self._chosen, number)

    def _drop_others(self) -> None:
        """The last one first: each stands on the model as the one before has left it."""
        for other in reversed(self._others.values()):
            if other.driver is not None:
                other.driver.remove()
        self._others = {}

    # ---- what was seen

    def _done(self, forward: ForwardPass, reducers: list[Reducer]) -> None:
        """A forward pass with images has gone through."""
        self._losses = forward.losses
        if self.record == "none":
            return
        seen = forward.record
        seen.reducers = [reducer for reducer in reducers if not isinstance(reducer, Recorded)]
        acting = forward.wiring.tower.items()
        seen.proportional = {block for block, steps in acting if any(getattr(reducer, "proportional", False) for reducer, _ in steps)}
        self.passes = [*self.passes, seen] if self.record == "all" else [seen]

    def take_losses(self) -> list[tuple[Reducer, Tensor]]:
        """What reducers whose weights are trained add to the loss of the last forward pass, (B,) of each; once, whoever asks first."""
        taken, self._losses = self._losses, []
        return taken

    @property
    def last(self) -> Record:
        """The last forward pass that brought images; FoveateError if there was none or nothing is recorded."""
        if not self.passes:
            hint = ': attach with record="last"' if self.record == "none" else " yet"
            raise FoveateError(f"no forward pass with images was recorded{hint}")
        return self.passes[-1]

    @property
    def maps(self) -> list[Reducer]:
        """What was done in the last forward pass with images, to be done again: `attach(model, maps=run.maps)`."""
        seen = self.last
        in_tower: list[Reducer] = []
        for block in sorted({block for call in seen.tower for block in call.maps}):
            in_tower.append(ReplayInTower(block, tuple(call.maps.get(block) for call in seen.tower), block in seen.proportional))
        return in_tower + seen.steps

    @property
    def ledger(self) -> Ledger:
        """Tokens, KV bytes and FLOPs of the last forward pass with images, as they really were."""
        return self.last.ledger(self.config)


@dataclass
class _Other:
    """Reducers that act in some threads in the place of those attached, their hooks, and how many `with` blocks are in use of them."""

    reducers: list[Reducer]
    driver: Driver | None
    users: int = 0


def _forget_compiled() -> None:
    """Compiled code does not see hooks that come or go behind its back: what is compiled already is compiled anew."""
    if "torch._dynamo" in sys.modules:
        import torch

        torch._dynamo.reset()
