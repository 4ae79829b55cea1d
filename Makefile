# Everything runs from a bare clone; the first call makes .venv, later ones reuse it.
#   PYTHON=python3.12       the interpreter of the environment
#   TORCH=torch==2.12.0     another torch (any pip requirement, options included)
#   TORCH=                  the torch that PYTHON already has
#   TORCH= VENV=path        an environment that exists, with its torch
#   TEST_JOBS=1             how many tests make test runs at a time; as many as there are cores, up to 8, if not told
#   PYTEST_ARGS, BENCH_ARGS, DEMO_ARGS, CUBIN_ARGS, GPU_ARGS, PACK_ARGS, REHEARSE_ARGS, FUZZ_ARGS    handed on
#   PYTHONS='python3.10 path/to/python'    the interpreters that make wheel makes wheels for; those that are found, if not named
#   WHEEL_TORCH='torch==2.11.0 torch'       the torches (or pythons that have one) beside which make wheel-check tests the wheels
#   CUBIN_PYTHON=python     make cubin-triton by another interpreter, with its torch and Triton, where it is; the sources suffice
#   FUSED_RNN_CUDA=1, FUSED_RNN_CUDA_DEBUG, TORCH_CUDA_ARCH_LIST, MAX_JOBS    the CUDA kernels: see setup.py
#   OUT=build/gpu           where make gpu, gpu-first and gpu-next write
#   USES='text memory'      what make gallery runs; all, if not told

SHELL       := /bin/bash
PYTHON      ?= python3
TORCH       ?= torch==2.13.0
VENV        ?= .venv
TEST_JOBS   ?= $(shell cores=$$(nproc); echo $$((cores < 8 ? cores : 8)))
PYTEST_ARGS ?=
BENCH_ARGS  ?=
DEMO_ARGS   ?=
USES        ?= text speech translation sentiment prices memory
CUBIN_ARGS  ?=
CUBIN_PYTHON ?=
FUZZ_ARGS   ?=
GPU_ARGS    ?=
PACK_ARGS   ?=
REHEARSE_ARGS ?=
PYTHONS     ?=
WHEEL_TORCH ?= torch==2.11.0 torch
BIN         := $(VENV)/bin
PIP         := $(BIN)/python -m pip --disable-pip-version-check

# Stamps are named by the hash of what they stand for: a changed kernel, header or build script installs again, and so does a
# deleted one, which modification times would not show. Python files need nothing: the install is an editable one.
hash         = $(firstword $(shell $(1) | sha256sum))
SOURCES     := $(sort $(shell find csrc -type f 2>/dev/null)) setup.py pyproject.toml
ENV_STAMP   := $(VENV)/.env-$(call hash,echo '$(PYTHON)' '$(TORCH)')
BUILD_STAMP := $(VENV)/.build-$(call hash,{ cat $(SOURCES); echo '$(FUSED_RNN_CUDA) $(FUSED_RNN_CUDA_DEBUG) $(TORCH_CUDA_ARCH_LIST)'; })
# extra-NAME: what pyproject.toml's extra of that name asks for is there
EXTRA_STAMP  = $(VENV)/.extra-$(1)-$(call hash,cat pyproject.toml)

.PHONY: help install dev demo gallery check check-kernels check-rest test fuzz bench cubin cubin-triton cubin-cuda gpu gpu-build gpu-smoke gpu-test gpu-steps gpu-sanitize gpu-bench gpu-field gpu-profile gpu-pack gpu-rehearse gpu-first gpu-next lint format sanitize docs wheel wheel-check first-hour uninstalled clean

help:
	@echo 'make demo      train a character model with torch.nn and with fused_rnn, side by side'
	@echo 'make gallery   the six programs of examples/ in full, half an hour, and docs/gallery.md from what they reached'
	@echo 'make check     what to run before a commit, three minutes: lint, and of every room its quick tests, two cases of each'
	@echo 'make test      run all tests'
	@echo 'make fuzz      random calls, valid and broken, beside torch.nn; FUZZ_ARGS="--seconds 3600 --seed 1"'
	@echo 'make bench     measure against torch.nn, into bench-out/; BENCH_ARGS="--shape 128,32,80,256"'
	@echo 'make cubin     compile every Triton and CUDA kernel, with no GPU: registers, spills, shared memory'
	@echo '               (cubin-triton, cubin-cuda: one of them)'
	@echo 'make gpu       on a machine with a GPU: build, first launches, tests, sanitizers, bench, profile into build/gpu'
	@echo '               (gpu-build, -smoke, -test, -steps, -sanitize, -bench, -field, -profile: one of them; benchmarks/GPU.md)'
	@echo 'make gpu-pack  what a machine with a GPU is not to spend its minutes on: PACK_ARGS="--python ..." (scripts/gpu_pack.py)'
	@echo '               gpu-first, gpu-next: there, with it, the first visit in two commands of ten minutes'
	@echo 'make gpu-rehearse   both of them here, against a GPU that is none; REHEARSE_ARGS="--pack build/pack --python ..."'
	@echo 'make sanitize  the C++ core under AddressSanitizer and UBSan'
	@echo 'make docs      the documentation, as a site in build/docs; a warning is an error'
	@echo 'make wheel     dist/: the sdist and a wheel for every Python that is there; make wheel-check: their tests beside other torches'
	@echo 'make first-hour   every documented way to install, from a bare clone in fresh environments'
	@echo 'make lint      ruff, clang-format, mypy        make format  let the tools rewrite'
	@echo 'make install   only the environment and the build'
	@echo 'make clean     remove the environment and everything built'

# An environment that was not made here is used as it is, and never cleared.
$(ENV_STAMP):
	@if [ ! -x $(BIN)/python ] || [ -e $(VENV)/.made-here ]; then \
	  set -x; $(PYTHON) -m venv --clear $(if $(TORCH),,--system-site-packages) $(VENV) && touch $(VENV)/.made-here; fi
	$(PIP) install --quiet $(TORCH) 'setuptools>=77'
	@touch $@

# Who uninstalled it has it built again.
ifeq ($(and $(wildcard $(VENV)/lib/python3*/*-packages/fused_rnn-*.dist-info),$(wildcard fused_rnn/_C.*)),)
$(BUILD_STAMP): uninstalled
uninstalled: ;
endif

# The build uses the environment's own setuptools and torch, the one it will run with; hence no build isolation.
$(BUILD_STAMP): $(ENV_STAMP)
	@rm -f $(VENV)/.build-*
	@echo 'Installing and compiling: some two minutes on two cores, the first time'
	@PYTHONUNBUFFERED=1 $(PIP) install -v --no-build-isolation --editable '.[test,demo]' 2>&1 | tee $(VENV)/install.log \
	  | grep --line-buffered -oE '\[[0-9]+/[0-9]+\] .*'; test $${PIPESTATUS[0]} = 0 || { tail -n 40 $(VENV)/install.log; exit 1; }
	@touch $@

# By the name of what is installed already: a path would compile everything again.
$(call EXTRA_STAMP,%): $(BUILD_STAMP)
	$(PIP) install --quiet 'fused_rnn[$*]'
	@touch $@

install: $(BUILD_STAMP)

dev: $(call EXTRA_STAMP,dev)

demo: $(BUILD_STAMP)
	$(BIN)/python -m fused_rnn demo text --steps 300 $(DEMO_ARGS)

gallery: $(call EXTRA_STAMP,examples)
	for name in $(USES); do $(BIN)/python -m fused_rnn demo $$name --out build/gallery || exit 1; done
	$(BIN)/python scripts/gallery.py build/gallery

# --fast: tests/conftest.py says what it leaves out. Two jobs at a time, as many as most machines have cores.
KERNEL_ROOMS := $(addprefix tests/,cpu cuda emulator gpu ops triton)
check: $(call EXTRA_STAMP,lint)
	@$(MAKE) --no-print-directory --output-sync=recurse --jobs=2 lint check-kernels check-rest

check-kernels: $(BUILD_STAMP)
	$(BIN)/python -m pytest -q --fast $(KERNEL_ROOMS) $(PYTEST_ARGS)

check-rest: $(BUILD_STAMP)
	$(BIN)/python -m pytest -q --fast $(addprefix --ignore=,$(KERNEL_ROOMS)) $(PYTEST_ARGS)

# A file's tests stay together, for what they build once; tests/conftest.py says which files begin.
test: $(BUILD_STAMP)
	$(BIN)/python -m pytest --numprocesses=$(TEST_JOBS) --dist=loadfile --no-loadscope-reorder --benchmark-disable $(PYTEST_ARGS)

fuzz: $(BUILD_STAMP)
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

bench: $(BUILD_STAMP)
	$(BIN)/python -m fused_rnn bench $(BENCH_ARGS)
	@mkdir -p build
	$(if $(BENCH_ARGS),,$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=build/pytest-benchmark.json)

cubin: cubin-triton cubin-cuda

cubin-triton: $(if $(CUBIN_PYTHON),,$(BUILD_STAMP))
	$(or $(CUBIN_PYTHON),$(BIN)/python) -m fused_rnn.triton.cubin $(CUBIN_ARGS)

cubin-cuda: $(BUILD_STAMP)
	$(BIN)/python scripts/cubin.py $(CUBIN_ARGS)
	for narrow in bf16 int8; do $(BIN)/python scripts/cubin.py --narrow $$narrow $(CUBIN_ARGS) || exit 1; done

# In place, with an environment as it is: VENV's if it is there, else PYTHON itself. Nothing is installed.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(abspath $(BIN)/python),$(PYTHON))
gpu:
	$(GPU_PYTHON) scripts/gpu.py $(if $(OUT),--out '$(OUT)') $(GPU_ARGS)

gpu-build gpu-smoke gpu-test gpu-steps gpu-sanitize gpu-bench gpu-field gpu-profile gpu-first gpu-next:
	$(GPU_PYTHON) scripts/gpu.py $(@:gpu-%=%) $(if $(OUT),--out '$(OUT)') $(GPU_ARGS)

gpu-pack:
	$(PYTHON) scripts/gpu_pack.py $(PACK_ARGS)

gpu-rehearse: $(BUILD_STAMP)
	$(BIN)/python scripts/gpu_rehearse.py $(REHEARSE_ARGS)

# The sdist, and from what is in it a wheel for every interpreter.
# The tools are what pyproject.toml's extra asks for: the package itself is not installed, nor compiled for this Python.
wheel: $(ENV_STAMP)
	$(PIP) install --quiet $(shell sed -n 's/^dist = \[\(.*\)\]/\1/p' pyproject.toml | tr ',' ' ')
	$(BIN)/python scripts/wheels.py $(foreach python,$(PYTHONS),--python '$(python)')

wheel-check: wheel
	$(BIN)/python scripts/wheel_check.py dist/*.whl $(foreach torch,$(WHEEL_TORCH),--torch '$(torch)')

first-hour:
	PYTHON='$(PYTHON)' TORCH='$(TORCH)' bash scripts/first_hour.sh

docs: $(call EXTRA_STAMP,docs)
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html -d build/doctrees docs build/docs

sanitize: $(BUILD_STAMP)
	PYTHON=$(abspath $(BIN)/python) bash scripts/sanitize.sh

lint: $(call EXTRA_STAMP,lint)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

format: $(call EXTRA_STAMP,lint)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format -i

clean:
	rm -rf .venv build dist *.egg-info fused_rnn/*.so .pytest_cache .mypy_cache .ruff_cache demo-out bench-out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
