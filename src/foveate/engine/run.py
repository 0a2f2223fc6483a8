"""An attachment: its life, and what was seen under it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from torch import nn

from foveate.accounting import Ledger
from foveate.anatomy import Anatomy
from foveate.engine.driver import Driver
from foveate.engine.forward import ForwardPass
from foveate.engine.record import Record
from foveate.engine.replay import Replay, ReplayInTower
from foveate.engine.wiring import Wiring
from foveate.errors import FoveateError
from foveate.probes import hooks
from foveate.reducers import Preparing, Reducer

RUN = "_foveate_run"  # the attribute by which a model knows its attachment, and copies of it theirs


class Run:
    """An attachment: made by `attach`, ended by `detach` or by leaving the `with` block.

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
    ) -> None:
        self.anatomy = anatomy
        self.config = next((module.config for module in around if hasattr(module, "config")), None)
        self.reducers = list(reducers)
        self.record = record
        self.passes: list[Record] = []
        self._wiring = Wiring.of(self.reducers, anatomy)
        self._driver: Driver | None = None
        _forget_compiled()
        hooks.prepare()
        if self._wiring.acts or record != "none":
            self._driver = Driver(around, anatomy, self._wiring, self.reducers, self._done, shortcuts)
        setattr(anatomy.core, RUN, self)
        self._preparing = preparing
        try:
            preparing.install()
        except FoveateError:
            self.detach()
            raise

    def detach(self) -> None:
        """Leaves the model as it was. Does nothing the second time."""
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

    # ---- what was seen

    def _done(self, forward: ForwardPass) -> None:
        """A forward pass with images has gone through."""
        if self.record == "none":
            return
        seen = forward.record
        seen.reducers = [reducer for reducer in self.reducers if not isinstance(reducer, (Replay, ReplayInTower))]
        self.passes = [*self.passes, seen] if self.record == "all" else [seen]

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
            proportional = any(getattr(reducer, "proportional", False) for reducer, _ in self._wiring.tower[block])
            in_tower.append(ReplayInTower(block, tuple(call.maps.get(block) for call in seen.tower), proportional))
        return in_tower + seen.steps

    @property
    def ledger(self) -> Ledger:
        """Tokens, KV bytes and FLOPs of the last forward pass with images, as they really were."""
        return self.last.ledger(self.config)


def _forget_compiled() -> None:
    """Compiled code does not see hooks that come or go behind its back: what is compiled already is compiled anew."""
    if "torch._dynamo" in sys.modules:
        import torch

        torch._dynamo.reset()
