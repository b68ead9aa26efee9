# Every target sets up .venv first, from nothing but Python 3.11 or newer and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# What an editable install copies or compiles; other Python sources are used from where they are.
BUILT_FROM := pyproject.toml CMakeLists.txt constraints.txt $(shell find native -name '*.hpp' -o -name '*.cpp')

.PHONY: demo test check bench reference sanitize fuzz

demo: $(INSTALLED)
	$(BIN)/tulle demo -o demo

# One process per core; more threads inside each would only fight for the same cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto --maxprocesses=8

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# See benchmarks/README.md for DATA and PEER_PYTHON.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/compress_large.py --folder build/large
	$(if $(DATA),$(BIN)/python benchmarks/peer_tinystories.py --data $(DATA) --peer-python $(PEER_PYTHON))

reference: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,reference]'
	$(BIN)/tulle train recipes/reference.yaml -o build/reference

# The native kernels' own tests under the address and undefined-behaviour sanitizers.
sanitize: $(INSTALLED)
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DTULLE_NATIVE_TESTS=ON -DTULLE_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	build/sanitize/tulle_test_kernels
	build/sanitize/tulle_test_columns
	build/sanitize/tulle_test_linear
	build/sanitize/tulle_test_scaling
	build/sanitize/tulle_test_sparse_train

# Damaged models, made by a fuzzer, for SECONDS seconds.
SECONDS ?= 60
fuzz: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,fuzz]'
	$(BIN)/python fuzz/loader.py -max_total_time=$(SECONDS)

# torch first, alone: its version is settled before anything that merely depends on it.
$(INSTALLED): $(BUILT_FROM)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,export,data]'
	touch $@
