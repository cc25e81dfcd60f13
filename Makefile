# Two commands are all that a newcomer needs: `make demo` and `make test`. Every target does its own set-up.
#
#   make demo PYTHON=/path/to/python3.12    another interpreter (3.11 or 3.12)
#   make demo TORCH_INDEX=                  PyPI's torch, which on Linux brings CUDA (chosen by itself when
#                                           nvidia-smi finds a GPU); otherwise the much smaller CPU build
#   make up ARGS="--port 9000"              options of the command behind `demo` and `up`
#   make soak S=300                         five minutes of it, in place of an hour
#   make image IMAGE=ghcr.io/acme/tandem    another name for the images
#   make image BUILD_ARGS="--build-arg ..."  arguments of the Dockerfile, such as TORCH_CUDA_INDEX for older cards

PYTHON ?=
ARGS ?=
TORCH_INDEX ?= $(shell nvidia-smi -L >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)
IMAGE ?= tandem
S ?= 3600
BUILD_ARGS ?=
TAG ?= $(shell awk -F '"' '/^version = / {print $$2; exit}' pyproject.toml)
BIN = .venv/bin
QUICK = $(BIN)/python -m pytest -m 'not slow and not chaos and not gpu'
WHOLE = tests/cluster tests/chaos
SUITABLE = import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))

.DEFAULT_GOAL := help
.PHONY: help demo up test test-slow chart bench chaos soak gpu check image fix clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: .venv/.installed ## Start a server, make six pictures, show what happened
	@$(BIN)/tandem demo $(ARGS)

up: .venv/.installed ## Start the server on http://127.0.0.1:8000 until Ctrl-C
	@$(BIN)/tandem up $(ARGS)

# What starts whole servers has the machine to itself; the rest goes in two processes before it.
test: .venv/.installed ## Every test that is not slow: unit, Redis, S3, Ray, end to end
ifeq (,$(findstring tests/,$(ARGS)))
	HF_HUB_OFFLINE=1 $(QUICK) -n 2 --dist loadfile $(WHOLE:%=--ignore=%) $(ARGS); parts=$$?; \
	HF_HUB_OFFLINE=1 $(QUICK) $(WHOLE) $(ARGS) && exit $$parts
else
	HF_HUB_OFFLINE=1 $(QUICK) $(ARGS)
endif

test-slow: .venv/.installed ## The slow tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'slow and not chaos and not gpu' $(ARGS)

chart: .venv/.installed ## The Helm chart: lint, schemas, rules, what KubeRay and Ray make of it (a part of `test`)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/chart -m 'not slow' $(ARGS)

bench: .venv/.installed ## The short bench: Tandem over a lock around the stock pipeline, held to the ratio on record (two minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/cluster/test_bench_ratios.py -s $(ARGS)

chaos: .venv/.installed ## Kill, cut and stall every part, and write the table of docs/reliability.md (half an hour)
	@$(if $(ARGS),,rm -rf .pytest_cache/chaos)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/chaos -m chaos -s $(ARGS); code=$$?; \
	PYTHONPATH=tests $(BIN)/python -m support.chaos_report || exit 1; exit $$code

soak: .venv/.installed ## The executed chart under load and random kills for S seconds, an hour by default; its table in docs/reliability.md
	SOAK_S=$(S) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/cluster/test_soak.py -m chaos -s $(ARGS); code=$$?; \
	PYTHONPATH=tests $(BIN)/python -m support.soak_report || exit 1; exit $$code

gpu: .venv/.installed ## The tests that need a CUDA card: caps, memory by model and rung, running out of it (skipped without one)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/gpu $(ARGS)

check: .venv/.installed ## Lint, format, types, import contracts, generated docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/settings_table.py --check
	$(BIN)/python scripts/chart_schema.py --check
	$(BIN)/python scripts/chart_values.py --check
	$(BIN)/python scripts/monitoring.py --check
	$(BIN)/python scripts/plan_table.py --check
	$(BIN)/python scripts/render_k8s.py --check

fix: .venv/.installed ## Mend what `check` finds and a tool can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/python scripts/settings_table.py
	$(BIN)/python scripts/chart_schema.py
	$(BIN)/python scripts/chart_values.py
	$(BIN)/python scripts/monitoring.py
	$(BIN)/python scripts/plan_table.py
	$(BIN)/python scripts/render_k8s.py

image: ## Build the images tandem:VERSION-cpu and -cuda with Docker
	@docker buildx version >/dev/null 2>&1 || { \
	  echo "make: no docker with buildx here; CI builds the images (.github/workflows/image.yml)" >&2; \
	  exit 1; \
	}
	for target in cpu cuda; do \
	  docker buildx build --load --target $$target --tag $(IMAGE):$(TAG)-$$target --build-arg VERSION=$(TAG) \
	    --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null) $(BUILD_ARGS) . || exit 1; \
	done

clean: ## Remove the environment and all caches; .tandem, the server's data, stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@for python in $(if $(PYTHON),"$(PYTHON)",python3.12 python3.11 python3 python); do \
	  "$$python" -c '$(SUITABLE)' 2>/dev/null && found=$$python && break; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "make: no Python 3.11 or 3.12 with venv found$(if $(PYTHON), at $(PYTHON)); name one with PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi; \
	echo "Setting up .venv with $$("$$found" --version); the first time takes a few minutes."; \
	"$$found" -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --retries 1 --timeout 15 \
	  -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@
