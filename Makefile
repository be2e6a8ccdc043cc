# One environment, .venv, and every command of the project on it. `make demo` needs nothing but Python, make and pip.

PYTHON ?= python3
TEST_WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/installed-from-pyproject
SCRIPTS := .ci/run $(wildcard slurm/*.sh)

.PHONY: setup test test-slow test-soak lint docs demo bench bench-full gpu chaos

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev,docs,lite0,lite2]'
	touch $@

test: setup
	$(BIN)/python -m pytest -m "not slow and not soak" --numprocesses $(TEST_WORKERS) --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

# Needs a quiet machine, and slurmctld, slurmd and their client for the tests of slurm/.
test-soak: setup
	$(BIN)/python -m pytest -m soak

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/vermin --quiet --target=3.10- --violations --no-tips vqscale
	shellcheck $(SCRIPTS)

# The documents as a site, build/docs/index.html, which opens without a server and without a network.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Damages of every file format by the thousand, then kills and corruptions by the hundred (some 11 minutes).
chaos: setup
	$(BIN)/python tests/chaos/fuzz.py
	$(BIN)/python tests/chaos/campaign.py --json benchmarks/results/chaos-$(shell date +%F).json

# The whole pipeline on the embedded data set. Every line resumes, so that running it again ends quickly.
demo: setup
	$(BIN)/vqscale pack          configs/demo/pack.yaml
	$(BIN)/vqscale train_vqvae   configs/demo/train_vqvae.yaml
	$(BIN)/vqscale extract_codes configs/demo/extract_codes.yaml
	$(BIN)/vqscale train_prior   configs/demo/train_prior_top.yaml
	$(BIN)/vqscale train_prior   configs/demo/train_prior_bottom.yaml
	$(BIN)/vqscale sample        configs/demo/sample.yaml
	$(BIN)/vqscale evaluate      configs/demo/evaluate.yaml

# Every benchmark within 40 minutes on 2 cores, which nothing else should use; bench-full takes its time.
bench: setup
	$(BIN)/python benchmarks/run.py

bench-full: setup
	$(BIN)/python benchmarks/run.py --full

# What one GPU has to show, in at most nine minutes: `make gpu`, or `make gpu ARGUMENTS="--port DIR"`.
gpu: setup
	$(BIN)/python benchmarks/gpu.py $(ARGUMENTS)
