# make demo: install and watch gamma and beta learn.   make test: install what the tests need and run them.
# make quick: the tests that need no browser, no processes and no compiling; a minute.
# make fuzz: spoiled runs, checkpoints and data files for an hour; the suite has half a minute of it.
# make sample: train, in minutes, what `batchnorm report --sample` shows.
# make docs: the documentation's site, in site/. It asks the network for nothing once the environment is installed.
# make check: format, lint, types, who imports whom, workflows.   make bench: measure.
# make wheel: the wheels of this platform, compiled and pure, audited, and tried with torch 2.10 and a new one (gigabytes).
# make sanitize: the operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer; compiling takes long.
# make clang: the operators' tests with what Clang compiles. Needs Debian's clang, or another clang++.
# make arm: what the operators compute, compiled for ARM and emulated, has this machine's bits. Needs Debian's packages
#   g++-aarch64-linux-gnu and qemu-user. make arm CPU=riscv64 does it for another CPU (g++-riscv64-linux-gnu).
# make zoo: public models converted, fused and folded beside torch, in an environment of their own (gigabytes).
# make gpu: what the operators take on this machine's GPU, beside torch's. Needs a python3 with torch for that GPU, and Triton.
# make triton TRITON=3.6.0: the GPU kernels by another release of Triton, interpreted and compiled. Needs no GPU.
# make compat TORCH=2.10.0: the tests with the wheel, as it was built, and another release of torch (gigabytes, with CUDA).

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
INSTALLED_BY := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo sample docs test quick check fuzz bench gpu zoo wheel sanitize clang arm compat triton clean

demo: $(VENV)/.demo
	$(BIN)/batchnorm train
	@echo 'The command is $(BIN)/batchnorm; after `source $(BIN)/activate` it is `batchnorm`.'

sample: $(VENV)/.demo
	$(BIN)/python benchmarks/sample.py

# Strict: a broken link, a missing anchor or a warning of the docstrings' parser fails.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site

# The page is tested in a browser: Chromium or Chrome on the path, or Playwright's. Without one these tests are skipped,
# and say so; with BATCHNORM_REQUIRE_BROWSER=1 they fail.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

quick: $(VENV)/.dev
	$(BIN)/python -m pytest tests --numprocesses=2 -m 'not (browser or processes or slow)'

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/jactionlint --profile correctness --shellcheck=

# A third of the time for each kind of file: runs, checkpoints, data. Another seed each day.
FUZZ_SECONDS := 3600
FUZZ_SEED = $(shell date +%Y%m%d)000000
fuzz: $(VENV)/.dev
	BATCHNORM_FUZZ_SECONDS=$$(( $(FUZZ_SECONDS) / 3 )) BATCHNORM_FUZZ_SEED=$(FUZZ_SEED) \
	$(BIN)/python -m pytest tests/fuzz --timeout=0

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/exact.py
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/model.py
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/record.py
	$(BIN)/python benchmarks/diagnose.py
	$(BIN)/python benchmarks/live.py

# Not in the environment of the tests, whose torch may be one for the CPU. Nothing is installed.
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py

# A torchvision goes with one torch. What is compiled here runs with that one too: see setup.py.
ZOO := build/zoo
ZOO_MODELS := timm==1.0.31 transformers==5.24.0 segmentation_models_pytorch==0.6.0 msgspec rich typer
zoo: $(VENV)/.demo $(ZOO)/.installed
	cd benchmarks && PYTHONPATH=../src ../$(ZOO)/bin/python -m zoo --rows ../$(ZOO)/rows.jsonl
	rm $(ZOO)/rows.jsonl

$(ZOO)/.installed:
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	$(ZOO)/bin/python -m pip install --quiet --disable-pip-version-check $(ZOO_MODELS)
	touch $@

# The binary finds torch's libraries in the process that loads it, so no wheel holds them.
TORCHES := 2.10.0 2.14.1
REPAIR = PATH=$(BIN):$$PATH auditwheel repair build/wheel/*.whl --exclude libc10.so --exclude libtorch_cpu.so --wheel-dir dist
ifneq ($(shell uname),Linux)
REPAIR = cp build/wheel/*.whl dist
endif
wheel: $(VENV)/.dev $(TORCHES:%=build/clean-%/.torch)
	rm -rf build/wheel build/lib* build/bdist* dist/*.whl
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel
	BATCHNORM_PURE=1 $(BIN)/python -m build --wheel --no-isolation --outdir dist
	$(REPAIR)
	$(BIN)/python tests/support/audit.py dist/*.whl
	for torch in $(TORCHES); do build/clean-$$torch/bin/python tests/support/installed.py dist/*.whl || exit 1; done
	$(BIN)/python benchmarks/install.py dist/*.whl

build/clean-%/.torch:
	@echo 'installing torch $* into build/clean-$*: gigabytes, if it comes with CUDA'
	$(PYTHON) -m venv build/clean-$*
	build/clean-$*/bin/python -m pip install --quiet --disable-pip-version-check torch==$*
	touch $@

# torch comes first: the operators are compiled with the torch that is installed.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing torch into $(VENV): the largest download, minutes without a copy in the cache'
	$(PIP) setuptools wheel ninja torch numpy
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(INSTALLED_BY)
	@echo 'compiling the operators, a minute or two, and installing what the lab and its page need'
	$(PIP) --no-build-isolation --editable '.[lab,report]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(INSTALLED_BY)
	@echo 'compiling the operators, a minute or two, and installing what the tests need'
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@ $(VENV)/.demo $(VENV)/.docs

# Nothing on the site runs the operators, so none are compiled for it.
$(VENV)/.docs: $(VENV)/.torch $(INSTALLED_BY)
	@echo 'installing what the documentation needs'
	BATCHNORM_PURE=1 $(PIP) --no-build-isolation --editable '.[docs]'
	touch $@

# In a copy of the package, so that what is installed stays as it is.
# Leaks are Python's own, and torch frees with one library what it allocated with another.
SANITIZED := $(CURDIR)/build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
RUNTIMES = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
UNDER_SANITIZERS = LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 \
	PYTHONPATH=$(SANITIZED)/lib $(BIN)/python

sanitize: $(VENV)/.dev
	CXXFLAGS="$(SANITIZERS) -fno-omit-frame-pointer -O1 -g1" LDFLAGS="$(SANITIZERS)" \
	$(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp
	$(UNDER_SANITIZERS) -c 'import batchnorm.ops.cpu; assert "$(SANITIZED)/lib/batchnorm/_C" in open("/proc/self/maps").read()'
	$(UNDER_SANITIZERS) -m pytest tests/ops

CLANG := $(CURDIR)/build/clang
BY_CLANG = PYTHONPATH=$(CLANG)/lib $(BIN)/python
clang: $(VENV)/.dev
	CC=clang CXX=clang++ $(BIN)/python setup.py --quiet build --build-lib $(CLANG)/lib --build-temp $(CLANG)/temp
	$(BY_CLANG) -c 'import batchnorm.ops.cpu; assert "$(CLANG)/lib/batchnorm/_C" in open("/proc/self/maps").read()'
	$(BY_CLANG) -m pytest tests/ops

# With the library's own flags, for those decide on bits; without torch, which the loops do not need.
CPU := aarch64
CROSS := build/$(CPU)
ALONE := $(addprefix $(CROSS)/,kernels_baseline.o batch_norm.o kernels.o cut.o driver.o)
arm: $(VENV)/.dev $(CROSS)/driver
	BATCHNORM_DRIVER="qemu-$(CPU) -L /usr/$(CPU)-linux-gnu $(CROSS)/driver" $(BIN)/python -m pytest tests/ops/test_other_cpu.py

$(CROSS)/driver: $(ALONE)
	$(CPU)-linux-gnu-g++ $^ -o $@

$(CROSS)/%.o: %.cpp $(wildcard csrc/*)
	@mkdir -p $(CROSS)
	$(CPU)-linux-gnu-g++ @csrc/flags -Wall -Wextra -DBATCHNORM_WITHOUT_TORCH -Icsrc -c $< -o $@

# The interpreter of Triton 3.6 needs an older NumPy.
TRITON := 3.6.0
WITH_TRITON := build/triton-$(TRITON)
triton: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(WITH_TRITON) \
	triton==$(TRITON) 'numpy<2.4'
	PYTHONPATH=$(WITH_TRITON) $(BIN)/python benchmarks/gpu_codegen.py --into $(WITH_TRITON)
	PYTHONPATH=$(WITH_TRITON) $(BIN)/batchnorm check-gpu --interpreted

vpath %.cpp csrc tests/ops
TORCH := 2.10.0
OTHER := build/torch-$(TORCH)
compat: $(VENV)/.dev
	BATCHNORM_PURE= $(BIN)/python -m build --wheel --no-isolation --outdir $(OTHER)-wheel
	$(PYTHON) -m venv $(OTHER)
	grep -vE '^(torch|torchvision)==' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OTHER)/constraints.txt \
	--force-reinstall --no-deps $(OTHER)-wheel/batchnorm-*.whl
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OTHER)/constraints.txt \
	torch==$(TORCH) 'batchnorm[dev]'
	$(OTHER)/bin/python -m pytest tests

clean:
	rm -rf $(VENV) build dist site src/*.egg-info src/batchnorm/_C*.so
