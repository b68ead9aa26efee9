# Every target sets up .venv first, from nothing but Python 3.11 or newer and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# What an editable install copies or compiles; other Python sources are used from where they are.
BUILT_FROM := pyproject.toml CMakeLists.txt constraints.txt $(shell find native -type f) build/packages
# An editable install maps package names to folders: a package that comes or goes needs a new one.
$(shell mkdir -p build; find src/tulle -type d -not -name __pycache__ -not -path '*/.*' | sort > build/packages.now; \
	cmp -s build/packages.now build/packages || cp build/packages.now build/packages)

.PHONY: demo test check docs bench reference sanitize amx fuzz wheel browser

demo: $(INSTALLED)
	$(BIN)/tulle demo -o demo

# One process per core; more threads inside each would only fight for the same cores.
test: $(INSTALLED) browser
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto --maxprocesses=8

# A Chromium for the test of the server's page: the system's, else Debian's, else Playwright's own build. Where none can
# be had, that test says so.
browser: $(INSTALLED)
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
		|| { test "$$(id -u)" = 0 && apt-get update -qq \
			&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-liberation; } \
		|| $(BIN)/playwright install chromium || echo "no Chromium: apt-get install chromium"

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	if test -x $(BIN)/hadolint; then $(BIN)/hadolint deploy/Dockerfile; fi

# The documentation's site, in build/site; what comes from the code must be up to date, and links must lead somewhere.
docs: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt mkdocs-material  # the extra "docs"
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The wheel, and what a user gets of it in an empty environment: its size, and that it runs and serves.
wheel: $(INSTALLED)
	rm -rf build/wheel
	$(BIN)/python -m pip wheel -q --no-deps -w build/wheel .
	PYTHONPATH=tests/install $(BIN)/python tests/install/check_wheel.py build/wheel/tulle-*.whl build/wheel

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
	build/sanitize/tulle_test_attention
	build/sanitize/tulle_test_kernels
	build/sanitize/tulle_test_input_major
	build/sanitize/tulle_test_linear
	build/sanitize/tulle_test_pages
	build/sanitize/tulle_test_scaling
	build/sanitize/tulle_test_search
	build/sanitize/tulle_test_sparse_train

# The linears' test on an emulated CPU with AMX: see native/tests/emulate.py. BOCHS is a folder with the source of
# Bochs, 3.0 or newer; of the test's cases, every EVERY-th runs.
EVERY ?= 1
SYSTEM_FLAGS := -O2 -Wall -static -nostdlib -ffreestanding -fno-pie -fno-stack-protector -fcf-protection=none \
	-fno-asynchronous-unwind-tables -mno-red-zone -mgeneral-regs-only \
	-Wl,-n,-Ttext=0x8000,--section-start=.reset=0xffffff80,--build-id=none,--no-warn-rwx-segments
amx: $(INSTALLED) build/bochs/bochs
	$(BIN)/cmake -S . -B build/amx -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DTULLE_NATIVE_TESTS=ON \
		-DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON
	$(BIN)/cmake --build build/amx --target tulle_test_linear
	$(CC) $(SYSTEM_FLAGS) native/tests/emulate.c -o build/amx/system
	$(BIN)/python native/tests/emulate.py build/bochs/bochs build/amx/system build/amx/tulle_test_linear $(EVERY) amx

# Two faults of Bochs are mended: its tiles take signed bytes for unsigned ones (3.0 and after), and its expanding loads
# stop short at 31 bytes (after 3.0).
build/bochs/bochs:
	$(if $(BOCHS),,$(error Say where the source of Bochs lies: make amx BOCHS=FOLDER))
	mkdir -p build/bochs
	cp -r $(BOCHS)/. build/bochs
	sed -i 's/Bit32s(\([xy]byte\[[0-3]\]\))/Bit32s(Bit8s(\1))/g' build/bochs/cpu/avx/amx.cc
	sed -i 's/(1 << popcnt\([qd]\)(/(BX_CONST64(1) << popcnt\1(/' build/bochs/cpu/avx/avx512.cc
	cd build/bochs && ./configure --enable-x86-64 --enable-avx --enable-evex --enable-amx --enable-all-optimizations \
		--disable-docbook --with-nogui
	$(MAKE) -C build/bochs bochs

# Untrusted files, by fuzzers with coverage feedback, for SECONDS seconds: the engine's checks and kernels (libFuzzer,
# clang, under the sanitizers) and the Python readers (atheris). What they find is kept in build/fuzz.
SECONDS ?= 60
CLANG ?= clang++
fuzz: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,fuzz]'
	$(BIN)/cmake -S . -B build/fuzz-native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DCMAKE_CXX_COMPILER=$(CLANG) -DTULLE_FUZZ=ON -DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON
	$(BIN)/cmake --build build/fuzz-native --target tulle_fuzz
	$(BIN)/python fuzz/run.py --seconds $(SECONDS)

# torch first, alone: its version is settled before anything that merely depends on it.
$(INSTALLED): $(BUILT_FROM)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,train,export,data,uvloop]'
	touch $@
