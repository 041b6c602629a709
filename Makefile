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
# An older torch, Triton and numpy under another Python, for the kernels alone: 5 GB, since PyPI has that torch only with CUDA.
VENV_OLDEST ?= .venv-oldest
PYTHON_OLDEST ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3) python3.12)

.PHONY: demo test test-oldest test-slow test-gpu sanitize compute-sanitizer bench gpu-report gpu-rehearsal gpu-parcel docs lint format libraries install-matrix venv venv-oldest clean

demo: libraries
	$(BIN)/refsam demo --out $(OUT)/demo --overwrite

test: libraries
	$(PYTEST) -n $(WORKERS) --maxprocesses 8 -p no:benchmark $(TESTS)

# The kernels' tests with an older torch, OPTIONS for pytest; the libraries are those that the newest torch built. An hour or more:
# benchmarks/gates/recorded_tests.py says how to run them in parts.
test-oldest: libraries venv-oldest
	PYTHONPATH=$(CURDIR)/kernels OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 -p no:benchmark \
	  $(OPTIONS) $(or $(TESTS),tests/kernels)

# Long tests that the default run leaves out: full-size parity, the CUDA build.
test-slow: libraries
	$(PYTEST) -m slow -p no:benchmark $(TESTS)

test-gpu: libraries
	$(BIN)/python -m pytest -m gpu -p no:benchmark

# The compiled backends' tests under address and undefined behaviour sanitizers, which must be loaded before Python: those of
# the CPU, and CUDA's kernels in their emulator. Their own builds, in build/, are used by nothing else.
SANITIZERS = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
SANITIZED = LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2
sanitize: venv
	$(BIN)/python -P kernels/refsam_kernels/build.py --sanitize build/sanitized
	$(SANITIZED) REFSAM_LIBRARIES=build/sanitized $(BIN)/python -m pytest -p no:benchmark \
	  tests/kernels/test_rel_pos_attention_compiled.py tests/kernels/test_rel_pos_attention.py::TestCpu \
	  tests/kernels/test_int8_linear.py tests/kernels/test_rel_pos_attention_int8.py tests/kernels/test_mask_postprocess.py::TestCpu tests/kernels/test_mask_postprocess.py::TestCpuLibrary
	$(BIN)/python -m tests.kernels.emulator --sanitize build/emulated_sanitized
	$(SANITIZED) REFSAM_LIBRARIES=build/emulated_sanitized $(BIN)/python -m pytest -p no:benchmark $(or $(TESTS),tests/kernels/cuda)

# The CUDA library's tests on a GPU under NVIDIA's sanitizer, which looks at our kernels only. Every tensor is an allocation of its
# own, so that what lies beside it is nobody's.
COMPUTE_SANITIZER ?= $(firstword $(shell command -v compute-sanitizer) $(wildcard $(or $(CUDA_HOME),/usr/local/cuda)/bin/compute-sanitizer))
compute-sanitizer: libraries
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "compute-sanitizer needs a CUDA device; there is none here, so nothing was checked")'
	@test -n "$(COMPUTE_SANITIZER)" || { echo "compute-sanitizer was not found; it comes with the CUDA toolkit (CUDA_HOME, or COMPUTE_SANITIZER=path)"; exit 1; }
	for tool in memcheck racecheck synccheck initcheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(COMPUTE_SANITIZER) --tool $$tool --kernel-regex kns=refsam --error-exitcode 1 \
	    $(BIN)/python -m pytest -m gpu -p no:benchmark $(or $(TESTS),tests/kernels/cuda) || exit 1; \
	done

bench: libraries
	$(BIN)/python -m benchmarks --out $(OUT)/bench

# Needs neither pip nor network: it runs with the interpreter that it is given, on what lies here. REPORT has more options.
REFSAM_PYTHON ?= $(firstword $(wildcard $(BIN)/python) $(PYTHON))
PARCEL = build/gpu-parcel
CARRIED = $(if $(wildcard $(PARCEL)/wheels),--wheels $(PARCEL)/wheels)
gpu-report:
	$(if $(wildcard $(PARCEL)/libraries),REFSAM_LIBRARIES=$(PARCEL)/libraries) \
	  $(REFSAM_PYTHON) -m benchmarks.gpu_report --out $(OUT)/gpu-report $(CARRIED) $(REPORT)

# The same stages, processes, limits and files in tiny sizes on stand-ins, with the oldest versions where they are installed: as
# they are, then with a failure and with a hang in every stage. SHORT=--short takes one task a stage, for CI.
REHEARSE = $(firstword $(wildcard $(VENV_OLDEST)/bin/python) $(BIN)/python) -m benchmarks.gpu_report --rehearse $(SHORT) --deadline 3600 --wheels $(PARCEL)/wheels
gpu-rehearsal: $(PARCEL)/wheels
	$(BIN)/python -m tests.kernels.emulator build/emulated
	$(REHEARSE) --out $(OUT)/gpu-rehearsal
	! $(REHEARSE) --out $(OUT)/gpu-rehearsal/fail --plant fail
	! $(REHEARSE) --out $(OUT)/gpu-rehearsal/hang --plant hang
	$(BIN)/python -m benchmarks.gpu_report.rehearsed $(OUT)/gpu-rehearsal $(SHORT) $(if $(RESULT),--out $(RESULT))

# Everything that a GPU machine without network lacks: wheels and libraries, in build/gpu-parcel, and the command line.
$(PARCEL)/wheels: constraints.txt
	$(BIN)/python -m benchmarks.gpu_report.parcel $(PARCEL) --wheels

gpu-parcel: venv
	$(BIN)/python -m benchmarks.gpu_report.parcel $(PARCEL)

SOURCES = csrc/*.h csrc/*/* tests/csrc/*.cu tests/csrc/*/*.h tests/csrc/*/*.cpp
# The site, in out/site; warnings are errors.
docs: venv
	$(BIN)/mkdocs build --strict --quiet

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# Compiles what changed; says in one line each what it left out and why.
libraries: venv
	$(BIN)/python -P kernels/refsam_kernels/build.py

venv: $(STAMP)

# torch comes first: the build of the kernel libraries finds its headers by path.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/metrics/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	# Without torchvision, which it needs but not for SAM, and which would bring another torch.
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps timm
	touch $(STAMP)

# Installs in Pythons, torches and places by the dozen, each in an environment of its own; hours and gigabytes. ROWS="NAME..." runs a
# part. Results: benchmarks/results/install_matrix.jsonl; `python -m benchmarks.report.tables` writes the table in docs/platforms.md.
install-matrix:
	$(or $(REFSAM_PYTHON),python3) -m benchmarks.gates.install_matrix $(ROWS)

venv-oldest: $(VENV_OLDEST)/.refsam-installed

$(VENV_OLDEST)/.refsam-installed: constraints-oldest.txt
	test -x $(VENV_OLDEST)/bin/python || $(PYTHON_OLDEST) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python -m pip install --quiet --requirement constraints-oldest.txt
	touch $@

clean:
	rm -rf build $(OUT) kernels/refsam_kernels/*.so kernels/refsam_kernels/*.outdated \
	  kernels/refsam_kernels/_build.json refsam/metrics/_native*.so
