# List of the targets: make help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
STATE ?= .finetune
# Processes of `make test`: one more than cores, since tests also wait for other processes.
WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 8 ? cores + 1 : 8)))
# The target whose tools `make tools` builds: test or e2e.
FOR ?= test
# TIMED "name" command…: run a command and print its duration.
TIMED := bash -c 'began=$$SECONDS; "$${@:1}" || exit; echo "[$$0: $$((SECONDS - began)) s]"'
# Python of `make gpu`: PYTHON if given, else that of the virtual environment.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON))
BENCHMARKS := tokens_per_second evaluation prepare packing plan_and_resume checkpoint_stall scaling gpu/training
STAGES := finetune_trainer.prepare.pipeline, finetune_trainer.train.process, finetune_trainer.train.worker, finetune_trainer.publish.pipeline
# If unset, tokenizers warns after a fork and disables its threads.
export TOKENIZERS_PARALLELISM ?= true

.PHONY: help install demo tools test test-all e2e chaos lint generate verify bench bench-operator gpu sbom lock clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | column -t -s $$'\t'

install: $(VENV)/.installed ## Create .venv with the three parts and all tools

$(VENV)/.installed: tests/requirements.txt crds/pyproject.toml operator/pyproject.toml trainer-image/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 install" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@echo "Installing (torch is large: a minute or two the first time)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r tests/requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e crds -e operator -e trainer-image
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c "import sys; from finetune_trainer.optional_packages import OPTIONAL; sys.modules.update(dict.fromkeys(OPTIONAL)); import $(STAGES)" # compile the bytecode once
	@touch $@

demo: install ## Fine-tune a small model on this machine, end to end, in a minute or two
	@$(BIN)/finetune quickstart $(STATE)/quickstart
	@$(BIN)/finetune run examples/quickstart.yaml --state-dir $(STATE) --local-storage

tools: install ## Build the binaries for the tests (Kubernetes, etcd, helm), once; FOR=e2e: those for make e2e
	@cd tests && ../$(BIN)/python -m cluster prepare $(FOR)

test: install tools lint verify ## All tests that need no root: unit, real S3, real kube-apiserver
	$(BIN)/python -m pytest tests -m "not e2e and not long" --numprocesses=$(WORKERS) --durations=15

test-all: install tools ## The tests of make test with further variants: before a release
	$(BIN)/python -m pytest tests -m "not e2e" --numprocesses=$(WORKERS) --durations=15

e2e: install ## End-to-end tests on a real cluster (root on Linux, or KUBECONFIG)
	@$(MAKE) --no-print-directory tools FOR=e2e
	$(BIN)/python -m pytest tests/cluster -m e2e
	$(BIN)/python -m pytest tests/e2e -m "e2e and not long" --durations=15

chaos: install ## Disturb runs on a real cluster in every way known, and print a table (root; two hours)
	@$(MAKE) --no-print-directory tools FOR=e2e
	FINETUNE_CHAOS=1 $(BIN)/python -m pytest tests/e2e/test_chaos.py -m e2e -s
	@cat .finetune/chaos/table.md

lint: install ## Check style, types, import layers
	@$(TIMED) "ruff" $(BIN)/ruff check .
	@$(TIMED) "ruff format" $(BIN)/ruff format --check .
	@$(TIMED) "mypy" $(BIN)/mypy crds/src operator/src trainer-image/src
	@$(TIMED) "import-linter" $(BIN)/lint-imports

generate: install ## Generate the CRD, the chart's copy and docs/reference.md from the models
	$(BIN)/python crds/generate.py

verify: install ## Fail if a generated file is stale
	@$(TIMED) "generated files" $(BIN)/python crds/generate.py --check

bench: install ## Run the benchmarks (training and TRL, prepare and datasets.map, resume, checkpoints); an hour
	@mkdir -p $(STATE); for one in $(BENCHMARKS); do \
	  printf '\n== %s\n' $$one; \
	  $(BIN)/python benchmarks/$$one.py 2> $(STATE)/bench.log || { cat $(STATE)/bench.log >&2; exit 1; }; \
	done

bench-operator: install tools ## Load the operator with jobs on a simulated cluster, 10 minutes (ARGS=--help: the loads)
	$(BIN)/python benchmarks/operator/run.py $(ARGS)

gpu: ## Run GPU tests and benchmarks in 8 minutes; JSON and a table (PYTHON=python3: with its packages)
	@$(GPU_PYTHON) benchmarks/gpu/run.py --out $(or $(OUT),$(STATE))/gpu

sbom: install ## Write a CycloneDX SBOM of each image (DPKG_STATUS=file: with its Debian packages)
	@$(BIN)/python release/sbom.py --out $(or $(OUT),$(STATE))/sbom $(if $(DPKG_STATUS),--dpkg-status $(DPKG_STATUS))

lock: ## Update the pinned dependencies (requirements.txt files)
	$(BIN)/uv pip compile --quiet --universal --no-emit-index-url --python-version 3.11 --no-annotate --no-emit-package finetune-api operator/pyproject.toml -o operator/requirements.txt
	$(BIN)/uv pip compile --quiet --universal --no-emit-index-url --python-version 3.11 --no-annotate --no-emit-package finetune-api trainer-image/pyproject.toml --extra gpu -o trainer-image/requirements.txt
	$(BIN)/uv pip compile --quiet --universal --no-emit-index-url --python-version 3.11 --no-annotate --no-emit-package finetune-api tests/requirements.in crds/pyproject.toml operator/pyproject.toml trainer-image/pyproject.toml -o tests/requirements.txt

clean: ## Remove the virtual environment and local state
	rm -rf $(VENV) $(STATE)
