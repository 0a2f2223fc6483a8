"""Asking a model: loading it, writing its prompts, and its answers. What evaluates, looks, searches and serves asks through here."""

from foveate.inference.answering import Broken, Said, answer, answering, ends, read_answer
from foveate.inference.asking import Answers, ask, begun, marked, model_inputs, prepared, prompts, shrunk, warn_of_cut_thoughts
from foveate.inference.loading import checked_dtype, load_model, loaded, model_hash, resized, retiled
from foveate.inference.progress import progress_bar

__all__ = [
    "Answers",
    "Broken",
    "Said",
    "answer",
    "answering",
    "ask",
    "begun",
    "checked_dtype",
    "ends",
    "load_model",
    "loaded",
    "marked",
    "model_hash",
    "model_inputs",
    "prepared",
    "progress_bar",
    "prompts",
    "read_answer",
    "resized",
    "retiled",
    "shrunk",
    "warn_of_cut_thoughts",
]
