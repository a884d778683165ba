# make demo | test | check | lint | bench | gpu: each sets up what it needs first, in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PY = $(BIN)/python
export MAX_JOBS ?= 2
# waiting threads spin briefly and then sleep: long spinning starves a core that others share
export GOMP_SPINCOUNT ?= 20000
INSTALL = install --disable-pip-version-check -q

KERNELS = segkern/_C_cpu.abi3.so
SOURCES = setup.py $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: setup demo test check slow sanitize oldest gate lint bench gpu clean
setup: $(KERNELS)

# the constraints first, so that building against the installed torch needs no isolation
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip $(INSTALL) -c constraints.txt "setuptools>=77" torch torchvision pybind11 ninja
	$(BIN)/pip $(INSTALL) -c constraints.txt --no-build-isolation -e .[all]
	touch $@

$(KERNELS): $(SOURCES) | $(VENV)/installed
	$(PY) setup.py -q build_ext --inplace
	touch -c $@

demo: setup
	$(BIN)/segkern demo

test: setup
	$(BIN)/pytest tests -m "not slow and not gpu"

check: lint slow sanitize oldest gate

slow: setup
	$(BIN)/pytest tests -m "slow and not gpu"

OPS = $(patsubst segkern/ops/%.py,tests/test_%.py,$(filter-out segkern/ops/_%,$(wildcard segkern/ops/*.py)))

SANITIZED = PYTHONPATH=$(CURDIR)/build/sanitize/lib ASAN_OPTIONS=detect_leaks=0 \
  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)"

# the op tests on kernels built with the address and undefined behaviour sanitizers
sanitize: setup
	SEGKERN_SANITIZE=1 SEGKERN_NO_CUDA=1 $(PY) setup.py -q build --build-base build/sanitize \
	  --build-lib build/sanitize/lib
	cd build && $(SANITIZED) ../$(PY) -c "import segkern; assert 'sanitize' in segkern.__file__"
	$(SANITIZED) $(BIN)/pytest $(OPS) -m "not slow and not gpu" -k "not compile and not opcheck"

# the same binary under the oldest supported torch; Python 3.12 where it is found
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12) \
  $(shell command -v python3.12) $(PYTHON))
.venv-oldest/installed: tests/oldest.txt
	$(PYTHON312) -m venv .venv-oldest
	.venv-oldest/bin/pip $(INSTALL) -r tests/oldest.txt
	touch $@

oldest: setup .venv-oldest/installed
	PYTHONPATH=. .venv-oldest/bin/pytest $(OPS) -m "not slow and not gpu"

# the demo must have learned what it is there to show
gate: demo
	$(PY) -c "import json; m = json.load(open('demo/metrics.json')); \
	  assert m['pq'] >= 0.8 and m['class_accuracy'] >= 0.9, m; print('demo:', m)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

bench: setup
	for file in bench/bench_*.py; do $(PY) $$file --save || exit 1; done

# needs a CUDA device
gpu: setup
	$(PY) -c "import torch; torch.cuda.is_available() or exit('make gpu: torch finds no CUDA device')"
	$(BIN)/pytest tests -m gpu

clean:
	rm -rf build .venv .venv-oldest segkern/*.so segkern/_build_info.json *.egg-info
