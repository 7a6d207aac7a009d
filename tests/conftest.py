import os
import sys
from pathlib import Path

for missing in os.environ.get("DRLLM_FAST_TESTS_WITHOUT", "").split():  # see test_without.py
    sys.modules[missing] = None

import pytest  # noqa: E402
import torch  # noqa: E402

# Triton reads this once, when it is imported: without a device its interpreter runs the kernels.
if not torch.cuda.is_available():
    assert sys.modules.get("triton") is None
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parent))

from families import prompts, tiny  # noqa: E402


@pytest.fixture
def model():
    return tiny("llama")


@pytest.fixture
def row():
    return prompts([9])[0]
