"""Reading the files of a model: tensors and nothing else, and one line of reason where they cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

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


def load_weights(loader: Any, source: str | Path, message: str, spare: Sequence[str] = (), **options: Any) -> Any:
    """A model from its folder or hub name, by an Auto class. FoveateError, with `message`, where it cannot be read, or where tensors of it
    are not in its files, which the library would leave random; `spare`: modules that nothing depends on, as their names begin."""
    with reading(message):
        model, seen = loader.from_pretrained(str(source), output_loading_info=True, **options)
    lacking = sorted(name for name in seen["missing_keys"] if not any(part.startswith(tuple(spare)) for part in name.split(".")))
    if lacking:
        more = f" and {len(lacking) - 3} others" if len(lacking) > 3 else ""
        raise FoveateError(
            f"{message}: its files lack {', '.join(lacking[:3])}{more}, which would be random; they are not whole, or not this model's"
        )
    return model


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
