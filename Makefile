# `make demo` and `make test` do all the set-up they need, in .venv, and then their job. Run `make` for the list.
#
# Set-up is done once: stamps in .venv are written last, so an interrupted set-up is taken up again, and one that is
# complete is left alone until pyproject.toml, setup.py or csrc/ change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet

# The environment of a GPU user (torch with CUDA, torchvision, all of lmms-eval), or with CPU=1 a small one.
ENVIRONMENT := $(if $(filter-out 0,$(CPU)),cpu,gpu)
DEPENDENCIES := $(VENV)/.dependencies-$(ENVIRONMENT)
PACKAGE := $(VENV)/.package-$(ENVIRONMENT)

# CPU=1: torch 2.13 (where pip's default index only has it with CUDA, name an index of CPU wheels in
# PIP_EXTRA_INDEX_URL), and what lmms-eval needs once it goes in without its own dependencies: those would bring a
# torch with CUDA back in, and dozens of packages for other models and tasks.
TORCH_CPU := torch==2.13.0
LMMS_EVAL_NEEDS := datasets evaluate loguru pytablewriter pytz requests sacrebleu tenacity

DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

# deepspeed runs ninja from PATH, and would build into the user's home. One thread per process: several run at a time,
# and each would take all cores and wait for the others.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test bench lint gate sanitize wheel-check doctor install clean distclean

help:
	@echo "make demo         train and compare five routers on real images; report in runs/demo (DEMO_ARGS=--short: less)"
	@echo "make test         run the tests (PYTEST_ARGS=... are passed on)"
	@echo "make bench        measure the layers against other implementations (BENCH_ARGS=... are passed on)"
	@echo "make doctor       say what is installed and which backends work here"
	@echo "make lint         check the style of the Python files"
	@echo "make gate         compile the GPU kernels for four architectures, and count the bytes they move"
	@echo "make sanitize     run the op tests on the C++ library under address and undefined-behaviour sanitizer"
	@echo "make wheel-check  build one wheel and test it under torch 2.13 and under the torch in .venv"
	@echo "make install      only set up .venv and install the package there"
	@echo "make clean        remove build products; make distclean: the environments as well"
	@echo
	@echo "CPU=1 (for example: make CPU=1 demo) sets up a smaller environment, for machines without a GPU."
	@echo "PYTHON=python3.12 names another Python (3.10 or newer)."

demo: $(PACKAGE)
	$(BIN)/python -m libmoe_fast.train.demo $(DEMO_ARGS)

# Two workers, a file at a time: fixtures of a module are made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

# Twice, because interpreted and compiled Triton kernels cannot share a process. The kernel tests of the first run are
# those of a GPU, skipped where there is none.
test: $(PACKAGE)
	$(PYTEST) $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels $(PYTEST_ARGS)

# All cores: these sizes use them.
bench: $(PACKAGE)
	env -u OMP_NUM_THREADS $(BIN)/libmoe-fast bench $(BENCH_ARGS)

doctor: $(PACKAGE)
	$(BIN)/libmoe-fast doctor

lint: $(PACKAGE)
	$(BIN)/ruff check .

gate: $(PACKAGE)
	$(BIN)/python -m libmoe_fast.kernels.aot
	$(BIN)/python -m libmoe_fast.kernels.traffic

sanitize: $(PACKAGE)
	$(BIN)/python tests/sanitize.py $(PYTEST_ARGS)

wheel-check: $(PACKAGE)
	$(BIN)/python tests/abi/check.py

install: $(PACKAGE)

$(VENV)/environment:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	    { echo "libmoe_fast needs Python 3.10 or newer, and $(PYTHON) is older or missing."; \
	      echo "Name another, for example: make PYTHON=python3.12 demo"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) has no venv module."; \
	      echo "Install it (Debian, Ubuntu: apt install python3-venv) and run make again."; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo $(ENVIRONMENT) > $@

$(DEPENDENCIES): pyproject.toml Makefile | $(VENV)/environment
	@test "$$(cat $(VENV)/environment)" = $(ENVIRONMENT) || \
	    { echo "$(VENV) is a $$(cat $(VENV)/environment) environment, and this command asks for $(ENVIRONMENT)."; \
	      echo "Add or leave out CPU=1, or start afresh with: make distclean"; exit 1; }
	@$(PIP) --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip  # an upgrade of pip was interrupted
	$(PIP) --upgrade pip "setuptools>=77" wheel ninja
	$(MAKE) --no-print-directory dependencies-$(ENVIRONMENT)
	@touch $@

# torch first: deepspeed and this package are built against the torch that is there, hence without build isolation.
.PHONY: dependencies-gpu dependencies-cpu
dependencies-gpu:
	$(PIP) "torch>=2.13" torchvision
	LIBMOE_FAST_BUILD=0 $(PIP) --no-build-isolation --editable ".[all]"

dependencies-cpu:
	$(PIP) $(TORCH_CPU)
	LIBMOE_FAST_BUILD=0 $(PIP) --no-build-isolation --editable ".[train,report,bench,test]" $(LMMS_EVAL_NEEDS)
	$(PIP) --no-deps "lmms-eval>=0.7.3"

$(PACKAGE): setup.py $(wildcard csrc/* csrc/cuda/*) $(DEPENDENCIES)
	$(PIP) --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c 'from libmoe_fast.extension import load; s = load(); \
	    print("C++ extension:", "built" if s.loaded else f"{s.reason}; {s.hint}")'
	@touch $@

clean:
	rm -rf build dist *.egg-info libmoe_fast/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks $(VENV)/.package-*
	find . -path './$(VENV)' -prune -o -path './.abi-venv' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .abi-venv
