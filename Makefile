# Every target sets up what it needs by itself (.ci/setup): .venv, the pinned packages, FluidSynth and a soundfont.

.PHONY: help demo test bench bench-peers lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: ## train the shipped piano model on how it sounds; hear it in runs/demo/listen/index.html
	@bash .ci/setup demo
	.venv/bin/fastsmart train --preset demo --out runs/demo --resume=auto

test: ## run the tests, on up to four cores; make test ARGS="-k decode" runs some, ARGS="-n0" one after the other
	@bash .ci/setup test
	.venv/bin/pytest -n auto --dist worksteal $(ARGS)

bench: ## measure every stage on the CPU and compare with earlier runs; make bench ARGS=--accept keeps this one
	@bash .ci/setup demo
	.venv/bin/python bench/suite.py $(ARGS)

# Small tensors spread over many cores only wait for each other; what is large in a benchmark sets its own threads, and
# tests have a process for each core.
test: THREADS := 1
bench: THREADS := 2
test bench: export OMP_NUM_THREADS ?= $(THREADS)
test bench: export MKL_NUM_THREADS ?= $(THREADS)
test bench: export OPENBLAS_NUM_THREADS ?= $(THREADS)
test bench: export NUMBA_NUM_THREADS ?= $(THREADS)
test: export MPLBACKEND ?= Agg

bench-peers: ## install what bench/ measures against
	@bash .ci/setup test
	.venv/bin/python -P -m pip install -q --no-deps -r bench/peers/requirements.txt

lint: ## ruff and mypy
	@bash .ci/setup lint
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

clean: ## remove .venv and what the tools left behind; runs/ and .cache/ stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	find . \( -path ./.git -o -path ./runs -o -path ./.cache \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
