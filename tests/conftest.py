"""Fixtures that every test shares."""

import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def offline() -> None:
    """No test may reach a hub: models and data are made on the spot."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Tiny models: a second thread costs more than it brings, and the tests run in several processes.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
