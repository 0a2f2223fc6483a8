"""Reading the files of a model: tensors and nothing else, and one line of reason where they cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from safetensors import SafetensorError

from foveate.errors import FoveateError

_LIBRARYS = (OSError, ValueError, ImportError, RuntimeError)  # the library says what is wrong
_BROKEN = (SafetensorError, EOFError, KeyError, TypeError)  # those who parse a file stumble


@contextmanager
def reading(message: str) -> Iterator[None]:
    """Within it the library reads a model, a processor or a tokenizer. FoveateError where it cannot: `message`, then the reason.

    Weights in the older format (.bin) are unpickled by torch, which refuses all but tensors and plain values before anything is run.
    """
    try:
        yield
    except _LIBRARYS as error:
        raise FoveateError(f"{message}: {_line(error)}") from error
    except UnpicklingError as error:
        more = "its weights (.bin) hold more than tensors, or are broken; nothing of them was run. Ask for a copy as safetensors"
        raise FoveateError(f"{message}: {more}") from error
    except _BROKEN as error:
        raise FoveateError(f"{message}: one of its files is broken or not whole ({type(error).__name__}: {_line(error)})") from error


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
