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

.PHONY: help quickstart demo chromium compare ablation ablation-deeper ablation-deeper-positions ablation-reading \
	ablation-objects ablation-objects-shallow ablation-cool-down ablation-budgets ablation-first-layers ablation-selection \
	ablation-selection-cost ablation-large ablation-estimate cards bench bench-gpu gpu memory conformance test test-min \
	test-deepspeed lint docs

help:
	@echo "make quickstart  train a small LLaVA from scratch and write its model card to runs/quickstart"
	@echo "make demo        ask the quickstart, and two runs of it without fast or slow steps, in the browser"
	@echo "make compare     train with and without DualSpeed and compare them"
	@echo "make ablation    measure what each part, ratio, pruner and schedule is worth (hours; rerun it to resume)"
	@echo "make ablation-GROUP one more of deeper, deeper-positions, reading, objects, objects-shallow, cool-down, budgets, first-layers, selection (hours each)"
	@echo "make ablation-estimate how long each of them would take here (minutes)"
	@echo "make ablation-selection-cost time what selects tokens, side by side (minutes)"
	@echo "make ablation-large full tokens, the paper's way and ours on one GPU of 80 GB; rerun it for the next seeds"
	@echo "make cards       render the cards in model_cards anew, that of the quickstart from its last run"
	@echo "make bench       time training steps, their growth with the tokens, and batches of like length (1 to 2 hours)"
	@echo "make bench-gpu   time training steps of 7 B parameters on a GPU of 80 GB, GPU=its name (minutes)"
	@echo "make gpu         all that one GPU of 80 GB shows, in nine minutes; rerun it to go on (OUTPUT=folder, WHEELS=folder)"
	@echo "make memory      estimate memory and batch sizes of known models, for docs/memory.md (rerun it to go on)"
	@echo "make conformance check every model family and write docs/supported_models.md"
	@echo "make test        run the tests"
	@echo "make test-min    run them on the lowest versions that pyproject.toml allows"
	@echo "make test-deepspeed installs DeepSpeed and tests ZeRO with two processes on a CPU (minutes)"
	@echo "make lint        check style and formatting"
	@echo "make docs        build the documentation as a site, into site/"

$(STAMP): constraints.txt
$(MIN_STAMP): constraints-min.txt
$(STAMP) $(MIN_STAMP): pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -c $(filter constraints%,$^) torch
	$(@D)/bin/pip install -c $(filter constraints%,$^) -e ".[test]"
	touch $@

quickstart: $(STAMP)
	$(LAUNCH) train.py --config trainer_configs/quickstart.yaml

# What the demo shows beside the quickstart: the same from all tokens alone, and from pruned ones alone.
PLAIN := --isolator_length 0 --distillation_weight 0
runs/quickstart/results.json: | $(STAMP)
	$(MAKE) quickstart
runs/quickstart_full/results.json: | $(STAMP)
	$(LAUNCH) train.py --config trainer_configs/quickstart.yaml --output_dir $(@D) --slow_mode_ratio 1 $(PLAIN)
runs/quickstart_pruned/results.json: | $(STAMP)
	$(LAUNCH) train.py --config trainer_configs/quickstart.yaml --output_dir $(@D) --slow_mode_ratio 0 $(PLAIN)

demo: $(STAMP) $(patsubst %,runs/quickstart%/results.json,_full _pruned) runs/quickstart/results.json
	$(BIN)/dualspeed demo

compare: $(STAMP)
	$(BIN)/python -m benchmarks.compare --config trainer_configs/compare.yaml

ABLATION := $(BIN)/python -m benchmarks.ablation --output docs/results/ablation
ablation: $(STAMP)
	$(ABLATION).json --groups parts
	$(ABLATION)_slow_ratios.json --groups "slow ratios"
	$(ABLATION)_equal_time.json --groups "equal time"
	$(ABLATION)_pruning.json --groups "pruning ratios" positions
	$(ABLATION)_pruners.json --groups pruners
	$(ABLATION)_schedules.json --groups schedules
	$(ABLATION)_longer.json --steps 800 --groups parts "equal time"

# One of the deeper, wider and harder groups: its name is the group's.
ablation-deeper ablation-deeper-positions ablation-reading ablation-objects ablation-objects-shallow ablation-cool-down ablation-budgets ablation-first-layers ablation-selection: $(STAMP)
	$(ABLATION)_$(@:ablation-%=%).json --groups $(@:ablation-%=%)

ablation-selection-cost: $(STAMP)
	$(BIN)/python -m benchmarks.ablation.selection_cost

ablation-estimate: $(STAMP)
	$(BIN)/python -m benchmarks.ablation.estimate

CARD := model_cards/quickstart
cards: $(STAMP)
	mkdir -p $(CARD)
	if test -f runs/quickstart/results.json; then \
		cp runs/quickstart/results.json runs/quickstart/*.png $(CARD); fi
	$(BIN)/dualspeed card $(CARD)
	$(BIN)/python -m benchmarks.compare --render-only --card model_cards/compare

BENCH_LENGTHS := $(BIN)/dualspeed bench --lengths --hidden-size 256 --layers 2 --image-size 112 --rounds 2 --threads 1
bench: $(STAMP)
	$(BIN)/dualspeed bench --rounds 3 --batch 3
	$(BIN)/dualspeed bench --shape llava-1.5 --rounds 4 --output docs/results/bench_batch8.json
	$(BIN)/dualspeed bench --shape llava-next --rounds 3 --output docs/results/bench_batch6.json
	$(BIN)/dualspeed bench --shape smolvlm --checkpointing off --rounds 3 --output docs/results/bench_smolvlm.json
	$(BIN)/dualspeed bench --profile
	$(BIN)/dualspeed bench --growth --rounds 3
	$(BIN)/dualspeed bench --lengths
	$(BENCH_LENGTHS) --steps 24 --output docs/results/bench_one_row.json
	$(BENCH_LENGTHS) --steps 8 --switches padding_free fast_length_multiple compile_regions \
		compile_regions+fast_length_multiple --output docs/results/bench_switches.json
	$(BIN)/dualspeed bench --selection --shape llava-next --scale full --layers 2 --batch 1 --rounds 2
	$(BIN)/dualspeed bench --loader

# LLaVA-NeXT without activation checkpointing fits in no larger batch.
GPU ?= h100
BENCH_GPU := $(BIN)/dualspeed bench --scale full --output docs/results/bench_$(GPU)
bench-gpu: $(STAMP)
	$(BENCH_GPU)_llava_1_5.json --shape llava-1.5 --rounds 6
	$(BENCH_GPU)_llava_next.json --shape llava-next --rounds 3 --checkpointing on --batch 3
	$(BENCH_GPU)_llava_next_off.json --shape llava-next --rounds 6 --checkpointing off --batch 2

# Installs nothing from outside: PY is a Python that has torch with CUDA, and WHEELS a folder with what else it lacks.
PY ?= $(firstword $(wildcard $(BIN)/python) $(PYTHON))
OUTPUT ?= docs/results
SITE := runs/gpu/site
gpu:
	$(if $(WHEELS),$(PY) -m pip install -q --no-index --no-deps --no-compile --upgrade --target $(SITE) $(WHEELS)/*.whl)
	PYTHONPATH=$(CURDIR):$(CURDIR)/$(SITE):$$PYTHONPATH $(PY) -m benchmarks.gpu --output $(OUTPUT) \
		$(if $(COMMIT),--commit $(COMMIT)) $(ARGS)

# Needs no files: pictures are drawn, and the tower is trained. SECONDS bounds a call.
SECONDS ?= 700
ablation-large:
	$(if $(WHEELS),$(PY) -m pip install -q --no-index --no-deps --no-compile --upgrade --target $(SITE) $(WHEELS)/*.whl)
	PYTHONPATH=$(CURDIR):$(CURDIR)/$(SITE):$$PYTHONPATH $(PY) -m benchmarks.gpu.packages
	PYTHONPATH=$(CURDIR):$(CURDIR)/$(SITE):$$PYTHONPATH $(PY) -m benchmarks.ablation.large --earlier $(OUTPUT) \
		--seconds $(SECONDS) $(ARGS)

MEMORY := docs/results/memory.json
memory: $(STAMP)
	$(BIN)/dualspeed estimate docs/results/configs/*.json --json $(MEMORY) --resume --page docs/memory.md

conformance: $(STAMP)
	$(BIN)/python tests/helpers/supported_models.py

# A process per core, but no more than memory bears; each takes whole files, whose fixtures are shared, in the order of
# tests/conftest.py.
WORKERS := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# For the browser tests, which are skipped without it.
chromium:
	@command -v chromium chromium-browser google-chrome > /dev/null || \
	{ test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq chromium fonts-dejavu-core; } || \
	echo "No Chromium for the browser tests, which are skipped. Install it: apt-get install chromium"

test: $(STAMP) chromium
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not gpu"

test-min: $(MIN_STAMP) chromium
	.venv-min/bin/python -m pytest $(WORKERS) -m "not slow and not gpu"

# On a CPU it needs none of the kernels that it could compile.
test-deepspeed: $(STAMP)
	DS_BUILD_OPS=0 $(BIN)/pip install -c constraints.txt -e ".[deepspeed]"
	$(BIN)/python -m pytest tests/trainer/test_deepspeed.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open site/index.html. With search: $(BIN)/python -m http.server -d site"
