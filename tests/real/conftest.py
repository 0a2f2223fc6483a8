"""How much the tests of real parts ask for."""

import pytest

PROMPTS = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--prompts", type=int, default=PROMPTS, help="prompts that SmolLM2 is asked; more than two try every method everywhere"
    )
