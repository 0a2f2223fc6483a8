"""The tests themselves reach no hub: not in this process, and not in one that they start."""

import os
import subprocess
import sys

import huggingface_hub.constants
import pytest


def test_the_hubs_library_is_offline() -> None:
    """It reads the environment once, when it is imported."""
    assert huggingface_hub.constants.HF_HUB_OFFLINE is True
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_model_of_the_hub_is_not_looked_for() -> None:
    from transformers import AutoConfig

    with pytest.raises(OSError, match="offline"):
        AutoConfig.from_pretrained("foveate-tests/there-is-no-such-model")


def test_what_a_test_starts_is_offline() -> None:
    words = [sys.executable, "-c", "import huggingface_hub.constants as c; print(c.HF_HUB_OFFLINE)"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "True\n"
