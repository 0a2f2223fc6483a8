"""State of the call under way, apart for each thread: two threads may call one attached model at the same time."""

from __future__ import annotations

import threading
from typing import Any


class Live(threading.local):
    """Base of such state. Its attributes are what the calling thread has set; a copy or an unpickled one begins with none of them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
