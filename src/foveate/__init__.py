"""Foveate trains and runs vision-language models (VLMs) on fewer visual tokens.

Importing it also makes its own models known to transformers' Auto classes.
"""

import foveate.model  # noqa: F401  # registers them
from foveate.engine.attach import attach
from foveate.engine.run import Run
from foveate.errors import FoveateError

__version__ = "0.1.0"
__all__ = ["FoveateError", "Run", "attach"]
