"""Asking a model."""

from foveate.inference.answering import Broken, Said, answer, ends

__all__ = ["Broken", "Said", "answer", "ends"]
