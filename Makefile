# `make demo` and `make test` do all the set-up they need, in .venv, and then their job. Run `make` for the list.
#
# Set-up (environments/install.py) takes the versions of a lock file. It is done once, step by step; an interrupted one is
# taken up again, and one that is complete takes no time until the lock, setup.py, pyproject.toml or csrc/ change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# The environment of a GPU user (torch with CUDA, torchvision, all of lmms-eval), or with CPU=1 a small one: a torch for
# CPUs (where pip's default index only has it with CUDA, name an index of CPU wheels in PIP_EXTRA_INDEX_URL), and of
# lmms-eval's own dependencies those that our benchmarks import.
ENVIRONMENT := $(if $(filter-out 0,$(CPU)),cpu,gpu)
LOCK ?= environments/$(ENVIRONMENT).lock

DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
GATE_ARGS ?=
GPU_ARGS ?=
CACHE_ARGS ?=
LOCK_ARGS ?=
MATRIX_ARGS ?=

# deepspeed runs ninja from PATH, and would build into the user's home. One thread per process: several run at a time,
# and each would take all cores and wait for the others.
export PATH := $(abspath $(BIN)):$(PATH)
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions
export OMP_NUM_THREADS ?= 1
# Byte code is compiled by the first process that imports a file, not again by each of some hundred.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test isa bench lint gate gpu gpu-cache sanitize wheel-check doctor install locked lock latest matrix clean distclean

help:
	@echo "make demo         train and compare five routers on real images; report in runs/demo (DEMO_ARGS=--short: less)"
	@echo "make test         run the tests (PYTEST_ARGS=... are passed on)"
	@echo "make isa          run the tests on the paths that other processors take through the CPU engine"
	@echo "make bench        measure the layers against other implementations (BENCH_ARGS=... are passed on)"
	@echo "make doctor       say what is installed and which backends work here"
	@echo "make lint         check the style of the Python files"
	@echo "make gate         compile the GPU kernels for four architectures, and count the bytes they move (GATE_ARGS=--short)"
	@echo "make gpu          judge the kernels on the GPU here, in nine minutes: right, and how near the limit"
	@echo "make gpu-cache    compile the kernels for such a GPU here, into runs/gpu-cache, to be carried to its machine"
	@echo "make sanitize     run the op tests on the C++ library under address and undefined-behaviour sanitizer"
	@echo "make wheel-check  build one wheel and test it under the oldest torch it is for and under the torch in .venv"
	@echo "make install      only set up .venv and install the package there"
	@echo "make locked       check that .venv holds exactly what its lock file says"
	@echo "make lock         move the lock files to the newest versions (LOCK_ARGS=--keep: only what has to move)"
	@echo "make latest       run tests and gate on the newest versions, in .latest, and list what moved since the lock"
	@echo "make matrix       run the tests on old and new versions of torch and transformers, each in an environment"
	@echo "make clean        remove build products; make distclean: the environments as well"
	@echo
	@echo "CPU=1 (for example: make CPU=1 demo) sets up a smaller environment, for machines without a GPU."
	@echo "PYTHON=python3.12 names another Python (3.10 or newer)."

demo: install
	$(BIN)/python -m libmoe_fast.train.demo $(DEMO_ARGS)

# Two workers, a file at a time: fixtures of a module are made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

# Twice, because interpreted and compiled Triton kernels cannot share a process. The kernel tests of the first run are
# those of a GPU, skipped where there is none.
test: install
	$(PYTEST) $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels $(PYTEST_ARGS)

# What other processors would run: one without AVX-512, and one without its bf16.
isa: install
	$(BIN)/python tests/other_processors.py $(PYTEST_ARGS)

# All cores: these sizes use them.
bench: install
	env -u OMP_NUM_THREADS $(BIN)/libmoe-fast bench $(BENCH_ARGS)

doctor: install
	$(BIN)/libmoe-fast doctor

lint: install
	$(BIN)/ruff check .

gate: install
	$(BIN)/python -m libmoe_fast.kernels.aot $(GATE_ARGS)
	$(BIN)/python -m libmoe_fast.kernels.traffic

gpu-cache: install
	$(BIN)/python -m libmoe_fast.kernels.cache $(CACHE_ARGS)

# Where nothing is installed: PYTHONPATH=. python -m libmoe_fast.kernels.device_check
gpu: install
	$(BIN)/python -m libmoe_fast.kernels.device_check $(GPU_ARGS)

sanitize: install
	$(BIN)/python tests/sanitize.py $(PYTEST_ARGS)

wheel-check: install
	$(BIN)/python tests/abi/check.py

install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	    { echo "libmoe_fast needs Python 3.10 or newer, and $(PYTHON) is older or missing."; \
	      echo "Name another, for example: make PYTHON=python3.12 demo"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) has no venv module."; \
	      echo "Install it (Debian, Ubuntu: apt install python3-venv) and run make again."; exit 1; }
	@$(PYTHON) environments/install.py $(ENVIRONMENT) --venv $(VENV) --lock $(LOCK)

locked: install
	$(BIN)/python environments/lock.py --check $(ENVIRONMENT)

# The locker, in an environment of its own: it has to work where .venv does not.
TOOLS := .tools/.installed
$(TOOLS): environments/tools.txt
	test -x .tools/bin/pip || $(PYTHON) -m venv .tools
	.tools/bin/python -m pip install --quiet --requirement $<
	@touch $@

lock: $(TOOLS)
	.tools/bin/python environments/lock.py $(LOCK_ARGS)

latest: $(TOOLS)
	.tools/bin/python environments/latest.py $(ENVIRONMENT)

matrix: $(TOOLS)
	.tools/bin/python environments/matrix.py $(MATRIX_ARGS)

clean:
	rm -rf build dist *.egg-info libmoe_fast/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -path './.*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .abi-venv .tools .latest .matrix
