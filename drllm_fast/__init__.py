"""drllm-fast: dynamic layer routing (Dr.LLM) for pretrained decoder-only models, exact and without padding."""

from importlib.metadata import PackageNotFoundError, version

from transformers import PreTrainedModel

from drllm_fast.build_info import build_info
from drllm_fast.enable import disable_dynamic_routing, enable_dynamic_routing
from drllm_fast.generation import Sampling, generate
from drllm_fast.influence import StaticPolicy
from drllm_fast.loading import from_pretrained
from drllm_fast.policies import GivenPlan, PromptBatch, RoutingPolicy
from drllm_fast.routers import LayerRouters

try:
    __version__ = version("drllm-fast")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

PreTrainedModel.enable_dynamic_routing = enable_dynamic_routing
PreTrainedModel.disable_dynamic_routing = disable_dynamic_routing

__all__ = [
    "GivenPlan",
    "LayerRouters",
    "PromptBatch",
    "RoutingPolicy",
    "Sampling",
    "StaticPolicy",
    "__version__",
    "build_info",
    "disable_dynamic_routing",
    "enable_dynamic_routing",
    "from_pretrained",
    "generate",
]
