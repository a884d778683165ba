"""What several tests on a GPU ask of torch."""

import pytest
import torch


@pytest.fixture
def same_bits():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
