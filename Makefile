# make demo | test | check | lint | docs | bench | gpu: each sets up what it needs first, in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PY = $(BIN)/python
export MAX_JOBS ?= 2
# waiting threads spin briefly and then sleep: long spinning starves a core that others share
export GOMP_SPINCOUNT ?= 20000
# builds in this tree are for the GPUs at hand; for 9.0 where there are none
export TORCH_CUDA_ARCH_LIST ?= $(or $(shell nvidia-smi --query-gpu=compute_cap \
  --format=csv,noheader 2>/dev/null | grep -xE '[0-9]+\.[0-9]+' | sort -u | paste -sd ';' -),9.0)
INSTALL = install --disable-pip-version-check -q

KERNELS = segkern/_C_cpu.abi3.so
SOURCES = setup.py tools/toolchain.py $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: setup demo test check sdist slow long interpret avx2 sanitize emulate racecheck oldest gate lint docs bench gpu clean
setup: $(KERNELS)

# the constraints first, so that building against the installed torch needs no isolation
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip $(INSTALL) -c constraints.txt "setuptools>=77" torch torchvision pybind11 ninja
	$(BIN)/pip $(INSTALL) -c constraints.txt --no-build-isolation -e .[all]
	touch $@

# the installation before it has just built them
$(KERNELS): $(SOURCES) | $(VENV)/installed
	test -e $@ -a -z "$$(find $(SOURCES) -newer $@ 2>/dev/null)" || \
	  $(PY) setup.py -q build_ext --inplace
	touch -c $@

demo: setup
	$(BIN)/segkern demo

# a process a core: most tests are too small for a second thread to help
PARALLEL = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(MAX_JOBS)

test: setup
	$(PARALLEL) tests/ops -m "not slow and not gpu"
	$(PARALLEL) --dist loadscope tests --ignore tests/ops -m "not slow and not gpu"

# every stage, also after one that failed, and at the end what became of each
STAGES = lint sdist slow interpret avx2 sanitize emulate racecheck oldest gate
check: setup
	@report=""; status=0; for stage in $(STAGES); do \
	  start=$$(date +%s); echo "== make $$stage"; result=passed; \
	  $(MAKE) --no-print-directory $$stage || { result=FAILED; status=1; }; \
	  report="$$report$$(printf '  %-10s %s %5d s' $$stage $$result $$(($$(date +%s) - start)))\n"; \
	done; printf "== make check\n$$report"; exit $$status

# what a stranger does: the source distribution is built and used in a fresh environment, which
# sees the packages of this one, but not this tree
FRESH = build/sdist/venv/bin/python
SITE = -c "import sysconfig; print(sysconfig.get_path('purelib'))"
sdist: setup
	rm -rf build/sdist && mkdir -p build/sdist
	$(PY) setup.py -q egg_info --egg-base build/sdist sdist --dist-dir build/sdist
	$(PY) -m venv --without-pip build/sdist/venv
	$(PY) $(SITE) > "$$($(FRESH) $(SITE))/packages.pth"
	SEGKERN_NO_CUDA=1 $(FRESH) -m pip $(INSTALL) --no-build-isolation --no-deps --ignore-installed \
	  build/sdist/*.tar.gz
	cd build/sdist && venv/bin/python ../../tools/smoke.py && venv/bin/segkern info

# files of a few tests that take long come first, or a core would wait at the end
DEAR = tests/training tests/recipes tests/bench tests/deploy
REST = $(filter-out $(DEAR),$(patsubst %/,%,$(wildcard tests/*/ tests/test_*.py)))
slow: setup
	$(PARALLEL) tests/kernels/test_triton.py -m "slow and not long and not gpu"
	$(PARALLEL) --dist loadscope --no-loadscope-reorder $(DEAR) $(REST) --ignore tests/kernels/test_triton.py -m "slow and not long and not gpu"

# what takes minutes more: kernels compiled for every GPU, every model as a file of every form,
# compiled packages, every benchmark, more kills, all gates
long: setup
	$(PARALLEL) tests -m "long and not gpu"
	$(PY) tools/gate.py build/gate

tests_of = $(wildcard $(patsubst %,tests/*/test_%.py,$(basename $(notdir $(1)))))
OPS = $(call tests_of,$(filter-out segkern/ops/_%,$(wildcard segkern/ops/*.py)))
TRITON_OPS = $(call tests_of,$(wildcard segkern/kernels/*.py))
CUDA_OPS = $(call tests_of,$(wildcard csrc/cuda/*.cu))

# the Triton kernels in place of the C++ ones, in Triton's interpreter (its bfloat16 products are
# wrong); compiled kernels are in tests/kernels/test_triton.py. Left out is what takes minutes
# there: gradcheck, whose gradients are compared as well, and large maps
interpret: setup
	TRITON_INTERPRET=1 $(PARALLEL) $(TRITON_OPS) -m "not slow and not gpu and not cpu_only" -k "not bfloat16 and not float64 and not opcheck and not compile and not gradcheck and not larger_maps"

# $(call library,KIND,SETTINGS): builds a library of test kernels in build/KIND, and checks that it
# is the one that is loaded; $(PYTEST_KIND) runs tests on it
SANITIZER_address = libasan.so libubsan.so
SANITIZER_thread = libtsan.so
preload = $(foreach lib,$(SANITIZER_$(1)),$(shell gcc -print-file-name=$(lib)))
with = PYTHONPATH=$(CURDIR)/build/$(1)/lib ASAN_OPTIONS=detect_leaks=0 \
  TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1" LD_PRELOAD="$(call preload,$(2))"
define library
	$(3) SEGKERN_SANITIZE=$(2) SEGKERN_NO_CUDA=1 $(PY) setup.py -q build \
	  --build-base build/$(1) --build-lib build/$(1)/lib
	cd build && $(call with,$(1),$(2)) ../$(PY) -c "import segkern; assert '$(1)' in segkern.__file__"
endef

# The stages from here on but racecheck leave out half precision, whose code is float32's between conversions,
# and differences in float64 for gradients that are compared as well.

# the op tests as on a CPU without AVX-512: the libraries capped, and ours built without it
AVX2 = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
avx2: setup
	$(call library,avx2,,SEGKERN_AVX2=1)
	! objdump -d build/avx2/lib/segkern/_C_cpu.abi3.so | grep -q zmm
	$(AVX2) $(call with,avx2,) $(PARALLEL) $(OPS) --seed 1 -m "not slow and not gpu" -k "not compile and not opcheck and not gradcheck and not bad and not float16"

# the op tests on kernels built with the address and undefined behaviour sanitizers, on inputs that
# are others again; what float64 reads and writes is what float32 does. Loops are not disassembled
sanitize: setup
	$(call library,sanitize,address)
	$(call with,sanitize,address) $(BIN)/pytest -n $(MAX_JOBS) $(OPS) --seed 2 -m "not slow and not gpu" -k "not compile and not opcheck and not float16 and not float64 and not gradcheck and not hot_loops"

# the CUDA sources run on the host, a fibre a thread, with the same sanitizers
emulate: setup
	$(call library,emulate,address,SEGKERN_EMULATE=1)
	$(call with,emulate,address) $(PARALLEL) $(CUDA_OPS) -m "not slow and not gpu" -k "not compile and not opcheck and not gradcheck and not float16"

# and with the sanitizer of races, to which a fibre is a thread, in half precision too, of which the
# CUDA sources read more numbers at once; a race ends its worker, and its
# report is seen where that test runs without -n
racecheck: setup
	$(call library,racecheck,thread,SEGKERN_EMULATE=1)
	$(call with,racecheck,thread) $(PARALLEL) $(CUDA_OPS) -m "not slow and not gpu" -k "(forward or gradients or scipy) and not float64"

# the same binary under the oldest supported torch; Python 3.12 where it is found
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12) \
  $(shell command -v python3.12) $(PYTHON))
.venv-oldest/installed: tests/oldest.txt
	$(PYTHON312) -m venv .venv-oldest
	.venv-oldest/bin/pip $(INSTALL) -r tests/oldest.txt
	touch $@

oldest: setup .venv-oldest/installed
	PYTHONPATH=. OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -n $(MAX_JOBS) $(OPS) tests/kernels/test_triton.py -m "not slow and not gpu" -k "not gradcheck and not float16 and not float64"

# the demo's model and two small ones must have learned what they are there to show
gate: setup
	$(PY) tools/gate.py build/gate digits digits-segformer digits-seq2seg

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu')

# the reference of all Python names, as pages in build/docs; a warning is an error
docs: setup
	$(PY) tools/reference.py build/docs

# in turn with their peers; appends the rows to bench/results.csv
bench: setup
	mkdir -p build
	$(BIN)/pytest bench --save --benchmark-json=build/bench.json \
	  --benchmark-columns=median,iqr,rounds --benchmark-sort=name
	$(PY) bench/goals.py build/bench.json

# all that needs a CUDA device, in ten minutes; what came out is in $(OUT). With an interpreter of
# your own (PY=python3), or without .venv, nothing is set up: it uses what is installed and built
OUT ?= build/gpu
OWN = $(filter command environment,$(firstword $(origin PY)))
gpu: $(if $(OWN),,$(if $(wildcard $(VENV)),setup))
	$(if $(OWN)$(wildcard $(VENV)),$(PY),$(PYTHON)) tools/gpu.py $(OUT)

clean:
	rm -rf build .venv .venv-oldest segkern/*.so segkern/_build_info.json *.egg-info
