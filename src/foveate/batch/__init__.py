"""Batch jobs: whole files of questions answered, and of pictures encoded, in blocks of rows that are finished or not there."""

from foveate.batch.answering import Job
from foveate.batch.encode import Embeddings, encode
from foveate.batch.generate import generate
from foveate.batch.parts import Done, told
from foveate.batch.tasks_on_vllm import OnVLLM

__all__ = ["Done", "Embeddings", "Job", "OnVLLM", "encode", "generate", "told"]
