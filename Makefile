PYTHON ?= python

.PHONY: check test test-all test-gpu bench docs format

check:  ## style, types, C++ layout
	ruff format --check .
	ruff check .
	$(PYTHON) -m mypy
	clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/hopper_on_host/*')

format:
	ruff format .
	ruff check --fix .
	clang-format -i $$(git ls-files 'csrc/*' 'tests/hopper_on_host/*')

test:  ## the default tier, on two workers: four minutes on two cores
	$(PYTHON) -m pytest

test-all:  ## also what is marked slow: wheel builds, kills, zoos
	$(PYTHON) -m pytest --slow

test-gpu:  ## the GPU tests, on a CUDA device
	$(PYTHON) -m pytest -m gpu

bench:
	$(PYTHON) -m pytest benchmarks/

docs:
	mkdocs build --strict
