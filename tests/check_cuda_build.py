"""Says whether an installation has the CUDA extension: loaded, and every kernel registered. Needs no GPU.

python tests/check_cuda_build.py
"""

import sys

from drllm_fast import build_info, ops
from drllm_fast.build_info import build_report

print(build_report())
wrong = [] if ops.CUDA_EXTENSION_ERROR is None else [f"not loaded: {ops.CUDA_EXTENSION_ERROR}"]
expected = {"router": "Triton", "ragged_attention": "Triton"}
for op in ("visit_rows", "gather_rows", "scatter_rows", "scatter_add_rows", "gather_rms_norm"):
    expected[op] = "CUDA C++"
for op, implementation in expected.items():
    runs = build_info()["ops"][op]["cuda"]
    if runs["implementation"] != implementation:
        wrong.append(f"{op}: {runs['implementation']}, since {runs['why']}")
sys.exit("\n".join(wrong) or None)
