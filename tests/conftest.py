import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from families import prompts, tiny  # noqa: E402


@pytest.fixture
def model():
    return tiny("llama")


@pytest.fixture
def row():
    return prompts([9])[0]
