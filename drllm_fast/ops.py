"""All ops. What each does, takes and refuses is said in `rows_ops`, `router_ops`, `attention_ops` and `linear_ops`,
which own their schemas; here the compiled kernels are loaded in front of the references."""

import torch

from drllm_fast import registration
from drllm_fast.attention_ops import ragged_attention
from drllm_fast.linear_ops import pack_linear, packed_linear
from drllm_fast.router_ops import router, router_windows
from drllm_fast.rows_ops import (
    active_tokens,
    gather_rms_norm,
    gather_rows,
    scatter_add_rows,
    scatter_rows,
    visit_rows,
)

__all__ = [
    "active_tokens",
    "gather_rms_norm",
    "gather_rows",
    "pack_linear",
    "packed_linear",
    "ragged_attention",
    "router",
    "router_windows",
    "scatter_add_rows",
    "scatter_rows",
    "visit_rows",
]

EXTENSION_ERROR: ImportError | None = None  # why drllm_fast._C is not loaded; None when it is
CUDA_EXTENSION_ERROR: ImportError | None = None  # the same for drllm_fast._C_cuda

try:
    import drllm_fast._C  # noqa: F401  registers the CPU kernels

    registration.cpu_kernels = True
except ImportError as error:
    EXTENSION_ERROR = error
try:
    if torch.version.cuda is None:  # what it links to is not there
        raise ImportError("this torch is built for the CPU only", name="drllm_fast._C_cuda")
    import drllm_fast._C_cuda  # noqa: F401  registers the CUDA kernels
except ImportError as error:
    CUDA_EXTENSION_ERROR = error
