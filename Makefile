PYTHON ?= python

.PHONY: check test test-gpu bench format

check:  ## style, types, C++ layout
	ruff format --check .
	ruff check .
	$(PYTHON) -m mypy
	clang-format --dry-run --Werror csrc/*.cpp csrc/*.cu csrc/*.h csrc/*.cuh

format:
	ruff format .
	ruff check --fix .
	clang-format -i csrc/*.cpp csrc/*.cu csrc/*.h csrc/*.cuh

test:  ## everything that runs without a GPU; Triton kernels in the interpreter and ahead of time
	$(PYTHON) -m pytest

test-gpu:  ## the same suite on a CUDA device
	$(PYTHON) -m pytest -m gpu

bench:
	$(PYTHON) -m pytest benchmarks/
