PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MIN_STAMP := .venv-min/.installed
# Accelerate gives each process one CPU thread unless told otherwise.
THREADS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count())")
# Spelled out, these keep `accelerate launch` from warning that nobody ran `accelerate config`.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS)

.PHONY: help quickstart compare cards bench conformance test test-min lint

help:
	@echo "make quickstart  train a small LLaVA from scratch and write its model card to runs/quickstart"
	@echo "make compare     train with and without DualSpeed and compare them"
	@echo "make cards       render the cards in model_cards anew, that of the quickstart from its last run"
	@echo "make bench       time training steps, their growth with the tokens, and batches of like length (1 to 2 hours)"
	@echo "make conformance check every model family and write docs/supported_models.md"
	@echo "make test        run the tests"
	@echo "make test-min    run them on the lowest versions that pyproject.toml allows"
	@echo "make lint        check style and formatting"

$(STAMP): constraints.txt
$(MIN_STAMP): constraints-min.txt
$(STAMP) $(MIN_STAMP): pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -c $(filter constraints%,$^) torch
	$(@D)/bin/pip install -c $(filter constraints%,$^) -e ".[test]"
	touch $@

quickstart: $(STAMP)
	$(LAUNCH) train.py --config trainer_configs/quickstart.yaml

compare: $(STAMP)
	$(BIN)/dualspeed compare --config trainer_configs/compare.yaml

CARD := model_cards/quickstart
cards: $(STAMP)
	mkdir -p $(CARD)
	if test -f runs/quickstart/results.json; then \
		cp runs/quickstart/results.json runs/quickstart/learning_curve.png $(CARD); fi
	$(BIN)/dualspeed card $(CARD)
	$(BIN)/dualspeed compare --render-only --card model_cards/compare

bench: $(STAMP)
	$(BIN)/dualspeed bench
	$(BIN)/dualspeed bench --profile
	$(BIN)/dualspeed bench --growth
	$(BIN)/dualspeed bench --lengths

conformance: $(STAMP)
	$(BIN)/python tests/supported_models.py

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-min: $(MIN_STAMP)
	.venv-min/bin/python -m pytest -m "not slow and not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
