"""Foveate trains and runs vision-language models on fewer visual tokens."""

__version__ = "0.1.0"
