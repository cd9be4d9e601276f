# make install        a virtual environment in .venv with everything for development; install-test adds the tests' extras
# make demo           the main job on unseen environments, with table and figures
# make demo-checkpoints  the demo's pre-trained models, from a fixed seed (over an hour)
# make test | test-slow | bench | lint
# make asan           the kernel tests under AddressSanitizer and UBSan, on every CPU capability
# make cuda-check     build against a CUDA build of torch and list the architectures (no GPU needed)
# make gpu-report     all tests and benches on a GPU, as one Markdown file

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_CUDA ?= torch==2.14.1
BENCH_JSON ?= runs/bench.json
ASSETS := python/csimodels/assets/lasco

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
CPP_FILES := $(wildcard $(foreach kind,h cpp cu cuh,csrc/*.$(kind) csrc/*/*.$(kind)))
TEST_CPP_FILES := $(wildcard tests/simulator/*.h tests/simulator/*.cpp)

.DELETE_ON_ERROR:
.PHONY: install install-test demo demo-checkpoints test test-slow bench lint asan cuda-check gpu-report

install: $(STAMP)
install-test: $(TEST_STAMP)

# Python sources need no new installation (it is editable); what setup.py reads does.
$(STAMP): pyproject.toml setup.py $(CPP_FILES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

# The tests also compare with Sionna, bitsandbytes and PEFT; without these extras they would skip. Whoever installs for
# the tests has installed for all else: the extension is compiled once.
$(TEST_STAMP): pyproject.toml setup.py $(CPP_FILES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev,llm,sionna]"
	touch $(STAMP) $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$@ -m pip install --quiet "$(TORCH)" "setuptools>=77" ninja

demo: $(STAMP)
	$(BIN)/csimodels demo

demo-checkpoints: $(STAMP)
	mkdir -p $(ASSETS)
	for model in base reference; do \
		$(BIN)/csimodels pretrain --model $$model --out runs/checkpoints/$$model/first && \
		$(BIN)/csimodels pretrain --model $$model --out runs/checkpoints/$$model \
			--initial runs/checkpoints/$$model/first/model.safetensors --epochs 8 --learning-rate 5e-4 && \
		cp runs/checkpoints/$$model/model.safetensors $(ASSETS)/$$model.safetensors && \
		cp runs/checkpoints/$$model/log.json $(ASSETS)/$$model.json && \
		cp runs/checkpoints/$$model/first/log.json $(ASSETS)/$$model-first.json || exit 1; \
	done

test: $(TEST_STAMP)
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(TEST_STAMP)
	$(BIN)/python -m pytest -q -m slow

bench: $(STAMP)
	@mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/python -m pytest benches -q --benchmark-only --benchmark-quiet --benchmark-json=$(BENCH_JSON)
	$(BIN)/python benches/table.py $(BENCH_JSON) --output $(dir $(BENCH_JSON))results

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES) $(TEST_CPP_FILES)
	$(BIN)/mypy

asan: $(TEST_STAMP)
	VENV=$(VENV) bash .ci/asan

cuda-check:
	TORCH_CUDA="$(TORCH_CUDA)" PYTHON="$(PYTHON)" bash .ci/cuda-check

gpu-report: $(STAMP)
	$(BIN)/python benches/gpu_report.py
