# The two commands that a fresh machine needs are `make demo` and `make test`; both make the environment first.
# It needs Python 3.11 or newer and, for the compiled kernels, a C++ compiler. PYTHON chooses the interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.refsam-installed
OUT ?= out
# One test process per core, each with one thread: faster and steadier than threads that share cores.
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-slow test-gpu sanitize bench gpu-report lint format libraries venv clean

demo: libraries
	$(BIN)/refsam demo --out $(OUT)/demo --overwrite

test: libraries
	$(PYTEST) -n $(WORKERS) --maxprocesses 8 -p no:benchmark $(TESTS)

# What the default run leaves out for its length: full-size parity, the CUDA build.
test-slow: libraries
	$(PYTEST) -m slow -p no:benchmark $(TESTS)

test-gpu: libraries
	$(BIN)/python -m pytest -m gpu -p no:benchmark

# The compiled CPU backends' tests under address and undefined behaviour sanitizers, which must be loaded before Python.
# Their own build, in build/sanitized, is used by nothing else.
SANITIZERS = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
sanitize: venv
	$(BIN)/python -P kernels/refsam_kernels/build.py --sanitize build/sanitized
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 REFSAM_LIBRARIES=build/sanitized OMP_NUM_THREADS=2 \
	  $(BIN)/python -m pytest -p no:benchmark -k "not cuda" \
	  tests/kernels/test_rel_pos_attention_compiled.py tests/kernels/test_mask_postprocess_compiled.py

bench: libraries
	$(BIN)/python -m benchmarks --out $(OUT)/bench

gpu-report: libraries
	$(BIN)/python -m benchmarks.gpu_report --out $(OUT)/gpu-report

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*/*
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*/*

# Compiles what changed; says in one line each what it left out and why.
libraries: venv
	$(BIN)/python -P kernels/refsam_kernels/build.py

venv: $(STAMP)

# torch comes first: the build of the kernel libraries finds its headers by path.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/metrics/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf build $(OUT) kernels/refsam_kernels/*.so kernels/refsam_kernels/_build.json
