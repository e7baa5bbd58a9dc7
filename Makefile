# `make demo`: a real model in, verified artifacts and a report out. `make test`: every test.
# Both make their environment first; running them again is quick.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo-out
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# llama.cpp compiled with AMX crashes on CPUs that have it for any batch above one token (gcc 12):
# leave AMX out, keep AVX-512. Compilers that do not know the flags (Arm) get none.
NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
AMX_FLAGS := $(shell echo 'int main(){}' | $(CXX) $(NO_AMX) -x c++ -c -o /dev/null - 2>/dev/null && echo '$(NO_AMX)')

.DEFAULT_GOAL := help
.PHONY: help demo test support lint types fmt check wheel clean

help:
	@echo "make demo   prune, export, verify and measure a real model; report in $(OUT)/report.html"
	@echo "make test   run every test      make check  lint, types and tests"
	@echo "make support   write docs/support.md: which cuts of which models run where"
	@echo "make fmt    format the code     make wheel  build the wheel     make clean"

demo: $(VENV)/.demo
	$(BIN)/shortstack run demo -o $(OUT)

test: $(VENV)/.dev
	$(BIN)/python -m pytest

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
	rm -rf $(VENV) build dist demo-out src/*.egg-info

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
