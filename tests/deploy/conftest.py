"""What tests of the service share."""

import pytest

from support.serving import quick_model


@pytest.fixture(scope="session")
def model():
    """A small Mask2Former."""
    return quick_model()
