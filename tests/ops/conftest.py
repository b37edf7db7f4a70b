"""What tests of ops get: the same random numbers every time."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Samples of ops draw from the global generator."""
    torch.manual_seed(0)
