import json
import subprocess
import sys

import pytest
import torch

from drllm_fast import ops
from drllm_fast.build_info import build_info, build_report

CUDA_OPS = {"visit_rows", "gather_rows", "scatter_rows", "scatter_add_rows", "gather_rms_norm"}
ROW_OPS = {"active_tokens", *CUDA_OPS}


def test_what_it_says_is_what_runs():
    info = build_info()
    assert json.loads(json.dumps(info)) == info
    assert torch.__version__.startswith(info["versions"]["torch"])  # with or without what it is built for
    assert info["cuda"]["torch_built_for"] == torch.version.cuda
    assert info["ops"].keys() >= ROW_OPS
    loaded = ops.EXTENSION_ERROR is None
    assert info["extension"]["loaded"] is loaded
    assert info["planner"]["implementation"] == ("C++" if loaded else "Python")
    for name in ROW_OPS:
        assert info["ops"][name]["cpu"]["implementation"] == ("C++" if loaded else "reference")
        on_cuda = name in CUDA_OPS and ops.CUDA_EXTENSION_ERROR is None
        assert info["ops"][name]["cuda"]["implementation"] == ("CUDA C++" if on_cuda else "reference")
    if torch.version.cuda is None:
        said = "the CUDA extension is not loaded: this torch is built for the CPU only"
        assert {info["ops"][name]["cuda"]["why"] for name in ROW_OPS} == {said}


def test_report_has_every_fact():
    info, report = build_info(), build_report()
    for name, found in info["versions"].items():
        assert f"{name:14}{found or 'not installed'}" in report
    assert f"planner       {info['planner']['implementation']}, {info['planner']['why']}" in report
    for name in ROW_OPS:
        assert report.count(f"op {name} ") == 2


HIDDEN = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
"""
TRITON = """
import sys
{before}
import torch
torch.version.cuda = {cuda!r}
from drllm_fast.build_info import build_info
assert "drllm_fast.router_kernel" not in sys.modules
print(build_info()["ops"]["router"]["cuda"])
"""


@pytest.mark.parametrize(
    ("cuda", "before", "expected"),
    [
        ("13.0", "", {"implementation": "Triton", "why": "a kernel is registered for CUDA"}),
        ("13.0", HIDDEN, {"implementation": "reference", "why": "triton is not installed"}),
        (None, "", {"implementation": "reference", "why": "torch is CPU only"}),
    ],
    ids=["registered", "no triton", "no cuda"],
)
def test_triton_is_registered_where_it_can_run(cuda, before, expected):
    """And the kernel, and with it Triton, is not imported before it runs."""
    if expected["implementation"] == "Triton":
        pytest.importorskip("triton")
    script = TRITON.format(cuda=cuda, before=before)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == str(expected)


MISSING = "sys.modules['drllm_fast._C'] = None"
BROKEN = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "drllm_fast._C":
            raise ImportError("undefined symbol: torch_new_thing", name=name, path="_C.so")
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("before", "why_not"),
    [(MISSING, "not compiled"), (BROKEN, "compiled, but it cannot be loaded: undefined symbol: torch_new_thing")],
    ids=["missing", "broken"],
)
def test_without_the_extension(before, why_not):
    """The reference runs, and the report says why."""
    script = f"""
import json, sys
{before}
import torch
from drllm_fast import ops
from drllm_fast.build_info import build_info, build_report
assert ops.gather_rows(torch.arange(6.).reshape(3, 2), torch.tensor([2])).tolist() == [[4, 5]]
from drllm_fast.planner import decode_plan
assert decode_plan([[1, 2]]).schedule == [((0,), ()), ((0,), (0,))]
assert {why_not!r} in build_report()
print(json.dumps(build_info()))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    info = json.loads(ran.stdout.splitlines()[-1])
    assert not info["extension"]["loaded"] and info["extension"]["why_not"] == why_not
    assert info["planner"] == {"implementation": "Python", "why": "the extension is not loaded"}
    for name in ROW_OPS:
        assert info["ops"][name]["cpu"] == {"implementation": "reference", "why": "the extension is not loaded"}
