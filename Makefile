# make demo | test | check | bench: each does all the set-up it needs, in .venv and a cache folder.
# Needs Python >= 3.11; `make test` also Docker, or Java >= 17 and Maven, and Go >= 1.26 for the tests of the chart and,
# where Prometheus and promtool are not on the PATH, of the rules; the image's targets Docker or Podman.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-chart test-cluster test-image image fuzz faults check format chart docs bench lock clean

VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
# Of its own: what makes the site is no part of what is tested.
DOCS_VENV := build/docs-venv
DOCS_STAMP := $(DOCS_VENV)/.installed
# The interpreter .venv is made with; found by itself unless given: make setup PYTHON=/usr/bin/python3.12
PYTHON ?=
# The image: make image IMAGE=registry/name:tag; docs/deployment.md has what each is for.
IMAGE ?=
BASE_IMAGE ?=
TORCH_INDEX_URL ?=
EXTRAS ?=
ENGINE ?=
IMAGE_ARGS ?=
# More arguments for the demo, pytest, the fuzzer, the faults and the benchmarks: make test PYTEST_ARGS='-k drain -x'
DEMO_ARGS ?=
PYTEST_ARGS ?=
FUZZ_ARGS ?=
FAULTS_ARGS ?=
BENCH_ARGS ?=

# The demo and the tests never ask a model hub for anything: the model is in a Python package.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP) ## make .venv with the package and everything it needs (once)

$(STAMP): pyproject.toml requirements/base.txt requirements/torch.txt requirements/dev.txt requirements/uv.txt
	@started=$$SECONDS
	python=
	for candidate in $${PYTHON:-$(PYTHON)} python3 python3.13 python3.12 python3.11; do
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
	    python=$$candidate
	    break
	  fi
	done
	if [ -z "$$python" ]; then
	  echo "setup: Python 3.11 or later is missing; install it (Debian 12: apt-get install python3 python3-venv) or give make PYTHON=/path/to/python3" >&2
	  exit 1
	fi
	echo "setup: $(VENV) with $$("$$python" -V) (about 6 GB: torch brings CUDA)"
	if uv --version >/dev/null 2>&1; then
	  uv=uv
	  # Kept if it is there, so that a changed requirement file costs only what changed.
	  [ -x $(BIN)/python ] || uv venv --quiet --python "$$("$$python" -c 'import sys; print(sys.executable)')" $(VENV)
	else
	  uv=$(BIN)/uv
	  if [ ! -x $(BIN)/python ] && ! "$$python" -m venv $(VENV) >/dev/null 2>&1; then
	    rm -rf $(VENV)
	    echo "setup: $$python cannot make a virtual environment; install its venv module (Debian: apt-get install python3-venv) or uv" >&2
	    exit 1
	  fi
	  echo "setup: uv into $(VENV) (there is none on the PATH)"
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	fi
	echo "setup: the pinned requirements"
	UV_PYTHON_DOWNLOADS=never "$$uv" pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements/dev.txt
	echo "setup: inferstream itself, editable"
	"$$uv" pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $(STAMP)
	echo "setup: done in $$((SECONDS - started)) s"

demo: setup ## a real model, an embedded broker, a worker killed in the middle: nothing is missing
	@$(BIN)/inferstream demo $(DEMO_ARGS)

test: setup ## the tests, on a real Apache Kafka; those of chart and rules where Go can build Helm and Prometheus (once, minutes)
	@$(BIN)/python -m tests.support.broker
	without=
	if ! $(BIN)/python -m tests.helm.tools; then
	  echo "test: the tests of the Helm chart are left out, and of the rules and dashboards those that need a promtool or a Prometheus that is not here"
	  without=--ignore=tests/helm
	fi
	# Most tests wait for a broker's clocks: two at a time, by files, so that what a file makes is made once.
	$(BIN)/python -m pytest -n 2 --dist worksteal $$without $(PYTEST_ARGS)

test-chart: setup ## the Helm chart alone: rendered by Helm and judged
	@$(BIN)/python -m tests.helm.tools
	$(BIN)/python -m pytest tests/helm $(PYTEST_ARGS)

test-cluster: setup ## the Helm chart on a real Kubernetes API server, built from its sources (once, minutes)
	@$(BIN)/python -m tests.helm.tools --cluster
	$(BIN)/python -m pytest -m cluster tests/helm $(PYTEST_ARGS)

image: ## the container image: IMAGE=NAME:TAG (BASE_IMAGE=… TORCH_INDEX_URL=… EXTRAS='demo accelerate' ENGINE=podman IMAGE_ARGS=…)
	@if [ -z "$(IMAGE)" ]; then
	  echo "image: it has no name yet; for example: make image IMAGE=inferstream:dev" >&2
	  exit 2
	fi
	engine="$(ENGINE)"
	for candidate in $${engine:-docker podman}; do
	  if "$$candidate" info >/dev/null 2>&1; then
	    found=$$candidate
	    break
	  fi
	done
	if [ -z "$${found:-}" ]; then
	  echo "image: no container engine answers ($${engine:-docker, podman}); install Docker 23 or later, or Podman (Debian: apt-get install podman)" >&2
	  exit 1
	fi
	arguments=(--build-arg VERSION="$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)")
	arguments+=(--build-arg REVISION="$$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)")
	[ -z "$(BASE_IMAGE)" ] || arguments+=(--build-arg BASE_IMAGE="$(BASE_IMAGE)")
	[ -z "$(TORCH_INDEX_URL)" ] || arguments+=(--build-arg TORCH_INDEX_URL="$(TORCH_INDEX_URL)")
	[ -z "$(EXTRAS)" ] || arguments+=(--build-arg EXTRAS="$(EXTRAS)")
	# Only Docker's own format has health checks, and Podman's default is the other.
	case "$$("$$found" --version)" in podman*) arguments+=(--format docker) ;; esac
	DOCKER_BUILDKIT=1 "$$found" build "$${arguments[@]}" $(IMAGE_ARGS) --tag "$(IMAGE)" .

test-image: setup ## the image, built with the extra demo and run as it would be in a cluster (same variables as image)
	@$(MAKE) --no-print-directory image IMAGE=$(or $(IMAGE),localhost/inferstream:test) EXTRAS='$(or $(EXTRAS),demo)'
	INFERSTREAM_TEST_IMAGE=$(or $(IMAGE),localhost/inferstream:test) INFERSTREAM_TEST_ENGINE='$(ENGINE)' \
	  $(BIN)/python -m pytest tests/image $(PYTEST_ARGS)

fuzz: setup ## 1,000,000 generated records, each with exactly one outcome (FUZZ_ARGS='--records 30000 --seed 7')
	@$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

faults: setup ## the fault matrix: 200 faults on a real Apache Kafka (half an hour; needs Java and Maven)
	@$(BIN)/python -m tests.faults $(FAULTS_ARGS)

check: setup ## format, lint, types
	@failed=0
	$(BIN)/ruff format --check . || failed=1
	$(BIN)/ruff check . || failed=1
	$(BIN)/mypy --strict service || failed=1
	exit $$failed

format: setup ## put the code into the format that `make check` asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

chart: setup ## write what is generated: dashboards, the table of metrics, the chart's schema, README.md and golden files
	@$(BIN)/python -m ops
	$(BIN)/python helm/schema.py
	"$$($(BIN)/python -m tests.helm.tools helm-docs)" --chart-search-root=helm/inferstream --log-level=warning
	INFERSTREAM_UPDATE_GOLDEN=1 $(BIN)/python -m pytest -q tests/helm/test_chart_renders.py -k golden
	git --no-pager diff --stat -- docs/operations.md ops/grafana helm tests/helm/golden

docs: $(DOCS_STAMP) ## the documentation as a site, in build/site; a link that leads nowhere fails
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --quiet --strict
	echo "docs: build/site/index.html"

$(DOCS_STAMP): requirements/docs.txt | setup
	@uv=$$(command -v uv || echo $(BIN)/uv)
	rm -rf $(DOCS_VENV)
	"$$uv" venv --quiet --python $(BIN)/python $(DOCS_VENV)
	"$$uv" pip install --quiet --python $(DOCS_VENV)/bin/python --require-hashes -r requirements/docs.txt
	touch $@

bench: setup ## the measured table (20 minutes at most on two cores; BENCH_ARGS=--short: a few)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

lock: ## pin the newest versions in requirements/ again
	@if uv --version >/dev/null 2>&1; then
	  uv=uv
	elif [ -x $(BIN)/uv ]; then
	  uv=$(BIN)/uv
	else
	  echo "lock: uv is missing; install it (pip install uv)" >&2
	  exit 1
	fi
	UV="$$(command -v "$$uv")" python3 requirements/lock.py

clean: ## remove .venv and what the tools leave in the checkout
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
