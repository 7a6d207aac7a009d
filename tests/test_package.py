"""The source distribution and the wheel hold what they should, with and without compiling."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import torch

from drllm_fast import ops

ROOT = Path(__file__).parents[1]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
NAME = f"drllm_fast-{VERSION}"
STALE = f"_C.cpython-{sys.version_info.major}{sys.version_info.minor}-x86_64-linux-gnu.so"


def python(*arguments, cwd, **environment):
    """Runs Python; all that it says is in stdout."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "DRLLM_FAST_BUILD": "auto", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def build(kind, source, to, **environment):
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(to)!r})"
    ran = python("-c", code, cwd=source, **environment)
    assert ran.returncode == 0, ran.stdout
    (built,) = to.iterdir()
    return built, ran.stdout


def files_of_package():
    tree = (p.relative_to(ROOT) for p in (ROOT / "drllm_fast").rglob("*") if p.is_file())
    return {p.as_posix() for p in tree if "__pycache__" not in p.parts and p.suffix != ".so"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Made from a copy of the checkout in which an extension was compiled in place, for another version perhaps."""
    copy = tmp_path_factory.mktemp("checkout") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so"))
    (copy / "drllm_fast" / STALE).touch()
    return build("sdist", copy, tmp_path_factory.mktemp("sdist"), DRLLM_FAST_BUILD="none")[0]


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / NAME


def test_sdist_is_complete(unpacked):
    held = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    wanted = files_of_package() | {
        *("pyproject.toml", "setup.py", "MANIFEST.in", "constraints.txt", "Makefile"),
        *("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"),
        *("csrc/ops.h", "csrc/ops.cpp", "csrc/cpu/rows.cpp", "csrc/plan.h", "csrc/plan_group.cpp"),
        *("tests/test_package.py", "benchmarks/conftest.py"),
    }
    assert wanted <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


@pytest.fixture(scope="module")
def pure_wheel(unpacked, tmp_path_factory):
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"), DRLLM_FAST_BUILD="none")[0]


def test_pure_wheel(pure_wheel):
    assert pure_wheel.name == f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(pure_wheel) as wheel:
        names = {n for n in wheel.namelist() if not n.startswith(f"{NAME}.dist-info/")}
        metadata = message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))
        entry_points = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode().split()
        assert f"{NAME}.dist-info/licenses/LICENSE" in wheel.namelist()
    assert names == files_of_package()
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == ("drllm-fast", VERSION, ">=3.10")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert entry_points == ["[console_scripts]", "drllm-fast", "=", "drllm_fast.cli:main"]
    needed = metadata.get_all("Requires-Dist")
    plain = {re.match(r"[\w-]+", n)[0].lower() for n in needed if "extra ==" not in n}
    expected = {"filelock", "torch", "transformers", "huggingface_hub", "safetensors", "numpy", "typer", "rich", "tqdm"}
    assert plain == expected
    assert not [n for n in needed if n.startswith("triton") and 'extra == "triton"' not in n]


def test_the_wheel_is_importable(pure_wheel, tmp_path):
    with zipfile.ZipFile(pure_wheel) as wheel:
        wheel.extractall(tmp_path)
    code = f"import drllm_fast; print(drllm_fast.__file__); assert drllm_fast.__version__ == {VERSION!r}"
    ran = python("-c", code, cwd=tmp_path)
    assert ran.returncode == 0 and str(tmp_path) in ran.stdout, ran.stdout


def test_without_torch_the_build_is_pure_python(unpacked, tmp_path):
    """So is an isolated build, which does not see the torch that is installed."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.py").write_text("raise ImportError('torch is hidden')")
    (tmp_path / "to").mkdir()
    wheel, said = build("wheel", unpacked, tmp_path / "to", PYTHONPATH=str(tmp_path / "path"))
    assert wheel.name == f"{NAME}-py3-none-any.whl"
    assert "building pure Python: torch cannot be imported by this build (torch is hidden)" in said
    assert "pip install --no-build-isolation ." in said


def test_without_pybind11_the_build_is_pure_python(unpacked, tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "pybind11.py").write_text("raise ImportError('pybind11 is hidden')")
    (tmp_path / "to").mkdir()
    wheel, said = build("wheel", unpacked, tmp_path / "to", PYTHONPATH=str(tmp_path / "path"))
    assert wheel.name == f"{NAME}-py3-none-any.whl"
    assert "building pure Python: pybind11 cannot be imported by this build (pybind11 is hidden)" in said
    assert "pip install 'pybind11>=3'" in said


@pytest.mark.skipif(os.name == "nt", reason="a compiler that fails is made from a shell command")
def test_a_failing_compiler_leaves_pure_python(unpacked, tmp_path):
    wheel, said = build("wheel", unpacked, tmp_path, CXX="false", CC="false")
    assert wheel.name == f"{NAME}-py3-none-any.whl"
    assert "building pure Python, since the extension did not compile" in said
    with zipfile.ZipFile(wheel) as archive:
        assert "Root-Is-Purelib: true" in archive.read(f"{NAME}.dist-info/WHEEL").decode()


@pytest.mark.skipif(ops.EXTENSION_ERROR is not None, reason="nothing is compiled here")
def test_compiled_wheel(unpacked, tmp_path):
    wheel, _ = build("wheel", unpacked, tmp_path, DRLLM_FAST_BUILD="cpu")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"{NAME}-{tag}-{tag}") and not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert len([n for n in archive.namelist() if n.startswith("drllm_fast/_C.")]) == 1
        assert "Root-Is-Purelib: false" in archive.read(f"{NAME}.dist-info/WHEEL").decode()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        pytest.param(
            {"DRLLM_FAST_BUILD": "cuda"},
            "DRLLM_FAST_BUILD=cuda: it needs a torch that is built for CUDA, and torch .* is not",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA"),
        ),
        ({"DRLLM_FAST_BUILD": "gpu"}, "DRLLM_FAST_BUILD=gpu is not one of auto, cpu, cuda, none"),
        ({"DRLLM_FAST_BUILD": "cpu", "CXX": "no-such-compiler"}, "no C.. compiler was found .*no-such-compiler"),
    ],
)
def test_what_cannot_be_built_is_said(environment, message):
    ran = python("setup.py", "--version", cwd=ROOT, **environment)
    assert ran.returncode != 0 and re.search(message, ran.stdout), ran.stdout


@pytest.mark.skipif(os.name == "nt", reason="a compiler that fails is made from a shell command")
def test_an_explicit_choice_fails_if_it_does_not_compile(unpacked, tmp_path):
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    ran = python("-c", code, cwd=unpacked, DRLLM_FAST_BUILD="cpu", CXX="false", CC="false")
    assert ran.returncode != 0 and not list(tmp_path.iterdir()), ran.stdout
