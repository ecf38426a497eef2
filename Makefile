# Every target sets up what it needs by itself (.ci/setup): .venv, the pinned packages, FluidSynth and a soundfont.

.PHONY: help demo test bench-peers lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: ## train the shipped piano model on how it sounds; hear it in runs/demo/listen
	@bash .ci/setup demo
	.venv/bin/fastsmart train --preset demo --out runs/demo --resume=auto

test: ## run the tests; make test ARGS="-k decode" runs some
	@bash .ci/setup test
	.venv/bin/pytest $(ARGS)

# The tests' tensors are small: spread over many cores they only wait for each other.
test: export OMP_NUM_THREADS ?= 2
test: export MKL_NUM_THREADS ?= 2
test: export OPENBLAS_NUM_THREADS ?= 2
test: export NUMBA_NUM_THREADS ?= 2
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
