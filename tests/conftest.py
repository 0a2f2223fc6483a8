"""Fixtures that every test shares."""

import os

# No test may reach a hub: models and data are made on the spot. In front of the imports, since the hub's library reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

# No test is timed: a deadline would make a busy machine look like a fault.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models: a second thread costs more than it brings, and the tests run in several processes."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
