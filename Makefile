# Everything runs in .venv, which the first target that needs it sets up from the pinned requirements.
PYTHON ?= python3
BIN := .venv/bin
# `mlflow run` starts `python` by name, so the environment's must come first.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY ?= true

.DEFAULT_GOAL := help
.PHONY: help setup doctor demo app test test-slow lint bench ui lock

help: ## list the targets
	@awk -F ':.*## ' '/^[a-zA-Z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready ## make .venv from requirements.lock, and the command skin-resnet in it

.venv/ready: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) -V); use make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

doctor: .venv/ready ## check device, package versions, disk and tracking store
	@$(BIN)/python -m skin_resnet doctor

demo: .venv/ready ## train and test a ResNet-50 on synthetic images (minutes on two CPU cores)
	@MLFLOW_LOGGING_LEVEL=WARNING mlflow run . --env-manager=local --experiment-name demo \
	  -P epochs=16 -P batch_size=32  # for its few images: more steps than by default

app: .venv/ready ## classify images in the browser, with the demo's latest model or MODEL=RUN_ID
	@model="$(MODEL)"; test -n "$$model" || model=$$($(BIN)/python -c 'import mlflow; print(*mlflow.search_runs( \
	  experiment_names=["demo"], filter_string="metrics.best_epoch > 0", max_results=1).get("run_id", []))'); \
	test -n "$$model" || { echo "the demo has not been trained; run make demo, or pass MODEL=RUN_ID" >&2; exit 2; }; \
	exec $(BIN)/python -m skin_resnet app "$$model"

test: .venv/ready ## run the tests (under six minutes on two CPU cores)
	$(BIN)/python -m pytest -q --numprocesses=logical --dist=loadfile --durations=15

test-slow: .venv/ready ## run the tests that take minutes each
	$(BIN)/python -m pytest -q -m slow --durations=20 --numprocesses=logical --dist=loadfile --no-loadscope-reorder

lint: .venv/ready ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/ready ## measure speeds as in docs/scale.md, on demo and drawn images
	for name in epoch store augment start growth inference memory coordination predict; do $(BIN)/python -m benchmarks.$$name || exit; done

ui: .venv/ready ## start the MLflow UI on http://127.0.0.1:5000, after links to the experiments in it
	@MLFLOW_TRACKING_URI=sqlite:///mlflow.db $(BIN)/python -m skin_resnet.tracking.links
	mlflow server --backend-store-uri sqlite:///mlflow.db --port 5000

lock: ## pin the newest versions that pyproject.toml allows (needs uv)
	uv pip compile --quiet --universal --python-version 3.11 --extra dev --extra export --no-annotate --no-header \
	  --no-emit-index-url pyproject.toml --output-file requirements.lock

MLproject: skin_resnet/config.py skin_resnet/commands/config.py skin_resnet/mlproject.py search/config.py .venv/ready ## write MLproject from the configs
	$(BIN)/python -m skin_resnet.mlproject > $@
