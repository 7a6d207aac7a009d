import os
import sys
from pathlib import Path

import pytest
import torch

# Triton reads this once, when it is imported: without a device its interpreter runs the kernels.
if not torch.cuda.is_available():
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parent))

from families import prompts, tiny  # noqa: E402


@pytest.fixture
def model():
    return tiny("llama")


@pytest.fixture
def row():
    return prompts([9])[0]
