# `make export` and `make test` do all the set-up that they need: Python >= 3.11 and make are enough.

PYTHON     ?= python3
VENV       ?= .venv
EXTRAS     ?= cpu,export,video,server,report,demo,dev
WORKERS    ?= 2

DEMO       := examples/receipts
TASK       := build/tasks/receipts
QUESTIONS  ?= 100
CHECKPOINT ?= $(DEMO)/checkpoint
PACKAGE    ?= build/packages/$(notdir $(patsubst %/checkpoint,%,$(abspath $(CHECKPOINT))))
RECIPES    ?= fp32 fp16 int8 int4
TARGET     ?= cpu
# How codes are found (rtn, hqq, awq, gptq, awq+gptq), and the pairs that the last three look at: the demo's are of its
# own training split, another checkpoint's are yours to give.
METHOD     ?=
CALIBRATION ?=
ifneq ($(filter awq gptq awq+gptq,$(METHOD)),)
ifeq ($(CHECKPOINT)$(CALIBRATION),$(DEMO)/checkpoint)
PAIRS      := build/calibration/receipts/samples.jsonl
CALIBRATION := $(dir $(PAIRS))
endif
endif
FINDING    := $(if $(METHOD),--method $(METHOD)) $(if $(CALIBRATION),--calibration $(CALIBRATION))
# A package under build/ is made anew; one elsewhere is replaced by nobody but you.
OVERWRITE  := $(if $(filter build/%,$(PACKAGE)),--overwrite)

BIN        := $(VENV)/bin
STAMP      := $(VENV)/.installed
PIP        := $(BIN)/python -m pip --disable-pip-version-check -qq install
VLMPORT    := $(BIN)/vlmport

.PHONY: help export validate bench bench-smoke bench-quant test test-slow test-gpu bench-gpu coverage lint readme format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | while IFS="$$(printf '\t')" read -r name text; do printf '%-11s %s\n' "$$name" "$$text"; done
	@echo
	@echo 'Variables: CHECKPOINT PACKAGE RECIPES="$(RECIPES)" TARGET=$(TARGET) METHOD= CALIBRATION= QUESTIONS=$(QUESTIONS) PYTHON VENV EXTRAS WORKERS'

# The stamp makes repeats instant. torch goes first and alone, at the version that constraints.txt names.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'make: vlmport needs Python 3.11 or later; name one: make PYTHON=/path/to/python' >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo 'make: installing into $(VENV), some minutes the first time'
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -c constraints.txt setuptools
	@$(PIP) -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

# What the export is for is done by then, and a gate that fails is a finding to read; `make validate` ends with its status.
IF_ONLY_A_GATE := { [ $$? -eq 1 ] && echo 'make: a gate failed: build/report/report.md says which, and by how much'; }

build/calibration/receipts/samples.jsonl: $(STAMP)
	$(BIN)/python $(DEMO)/receipts.py $(@D) --split train --num 64

export: $(STAMP) $(PAIRS) ## checkpoint -> package with RECIPES; the bundled demo is then validated on unseen receipts
	$(VLMPORT) export $(CHECKPOINT) -o $(PACKAGE) --recipe $(strip $(RECIPES) $(FINDING)) --target $(TARGET) $(OVERWRITE)
ifeq ($(CHECKPOINT),$(DEMO)/checkpoint)
	$(BIN)/python $(DEMO)/receipts.py $(TASK) --num $(QUESTIONS)
	$(VLMPORT) validate $(PACKAGE) --reference $(CHECKPOINT) --task $(TASK) --report build/report --no-insides --no-sweep || $(IF_ONLY_A_GATE)
else
	@echo 'make: now compare it with its reference: make validate CHECKPOINT=$(CHECKPOINT)'
endif

validate: $(STAMP) $(if $(filter $(DEMO)/checkpoint,$(CHECKPOINT)),build/calibration/receipts/samples.jsonl) ## compare PACKAGE with CHECKPOINT, stage by stage: the whole report, build/report/report.html
ifeq ($(CHECKPOINT),$(DEMO)/checkpoint)
	test -f $(PACKAGE)/vlmport.json || $(VLMPORT) export $(CHECKPOINT) -o $(PACKAGE) --recipe $(RECIPES) --target $(TARGET)
	test -f $(PACKAGE)/onnx/decoder_int4-mixed_gptq.onnx || $(VLMPORT) quantize $(PACKAGE) --recipe int4-mixed --method gptq --max-kl 0.001 \
		--calibration build/calibration/receipts --calibration-samples 48 --checkpoint $(CHECKPOINT)
	$(BIN)/python $(DEMO)/receipts.py $(TASK) --num $(QUESTIONS)
	$(VLMPORT) validate $(PACKAGE) --reference $(CHECKPOINT) --task $(TASK) --report build/report
else
	$(VLMPORT) validate $(PACKAGE) --reference $(CHECKPOINT) --report build/report
endif

bench: $(STAMP) ## time and memory of PACKAGE on this box; with SHAPE=3b or 7b, of that shape from export to decode
ifdef SHAPE
	$(BIN)/python -m benchmarks run $(SHAPE) $(PARTS)
else
	$(VLMPORT) bench $(PACKAGE)
endif

bench-smoke: $(STAMP) ## the same table of a shape of 100 million parameters, under a minute on 2 cores
	$(BIN)/python -m benchmarks run 100m --smoke

bench-quant: $(STAMP) ## recipes, methods and what others offer on held-out receipts; ARGS="--num 100 --rows int4 --groups demo"
	$(BIN)/python -m benchmarks.quant run $(ARGS)

test: $(STAMP) ## the tests: offline, on the CPU, under 10 minutes on 2 cores
	$(BIN)/python -m pytest -q -n $(WORKERS)

test-slow: $(STAMP) ## the tests that take minutes each
	$(BIN)/python -m pytest -q -m slow

test-gpu: $(STAMP) ## the tests that need a CUDA device: make test-gpu VENV=.venv-gpu EXTRAS=gpu,export,video,demo,dev
	$(BIN)/python -m pytest -q -m gpu

bench-gpu: $(STAMP) ## time and memory of CHECKPOINT for the cuda target, on a box with a CUDA device (VENV and EXTRAS as in test-gpu)
	$(VLMPORT) export $(CHECKPOINT) -o $(PACKAGE)-cuda --recipe fp16 int8 int4 --target cuda --overwrite
	$(VLMPORT) bench $(PACKAGE)-cuda

coverage: $(STAMP) ## the tests, with the lines that none of them reaches
	$(BIN)/coverage run -m pytest -q
	$(BIN)/coverage report --show-missing --skip-covered

lint: $(STAMP) ## ruff, basedpyright, and the ladder of imports
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/basedpyright --level error
	$(BIN)/python tests/layering.py

readme: $(STAMP) ## write the file tree of README.md anew
	$(BIN)/python tests/readme_tree.py

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .

clean: ## remove what was built; .venv stays
	rm -rf build .pytest_cache .ruff_cache .hypothesis .coverage
