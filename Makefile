PYTHON ?= python

.PHONY: check test test-gpu bench format

check:  ## style, types, C++ layout
	ruff format --check .
	ruff check .
	$(PYTHON) -m mypy
	clang-format --dry-run --Werror $$(git ls-files 'csrc/*')

format:
	ruff format .
	ruff check --fix .
	clang-format -i $$(git ls-files 'csrc/*')

test:  ## everything that runs without a GPU; Triton kernels in the interpreter and ahead of time
	$(PYTHON) -m pytest

test-gpu:  ## the same suite on a CUDA device
	$(PYTHON) -m pytest -m gpu

bench:
	$(PYTHON) -m pytest benchmarks/
