# Everything runs from .venv, which these targets make and keep up to date. `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
PYTEST_FLAGS ?= -n 2 --dist worksteal
MODEL := smollm2-135m

VENV := .venv
BIN := $(VENV)/bin

# Keeps the working directory off sys.path: the folder `kernels` here would shadow Hugging Face's package.
export PYTHONSAFEPATH := 1

# An editable install links the files that exist when it is made, so the list of files decides, beside the requirements,
# whether there is anything to do. A stamp carries both keys in its name and is written last: whatever was interrupted,
# changed or moved has no stamp.
checksum = $(shell { $(1); } | cksum | cut -d ' ' -f 1)
HERE := $(call checksum,pwd)
REQUIREMENTS := $(call checksum,pwd; cat pyproject.toml constraints.txt)
FILES := $(call checksum,find steer kernels encoders experiments -name '*.py' -o -name '*.jsonl' -o -name py.typed | LC_ALL=C sort)

CREATED := $(VENV)/.created-$(HERE)
DEV := $(VENV)/.dev-$(REQUIREMENTS)-$(FILES)
# Where the development set is installed it serves as the run-time set too.
RUN := $(if $(wildcard $(VENV)/.dev-$(REQUIREMENTS)-*),$(DEV),$(VENV)/.run-$(REQUIREMENTS)-$(FILES))

# $(call install,KIND,EXTRAS): only relinks the files where the requirements of that kind are installed already.
define install
	@if [ -e $(DEV) ]; then exit 0; fi; \
	flags=; \
	if compgen -G '$(VENV)/.$(1)-$(REQUIREMENTS)-*' > /dev/null; then flags='--quiet --no-deps'; fi; \
	rm -f $(VENV)/.run-* $(VENV)/.dev-*; \
	$(BIN)/pip install $$flags --no-build-isolation --config-settings editable_mode=strict \
		-c constraints.txt -e '.[$(2)]'; \
	touch $@
endef

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: env
env: $(DEV) ## create .venv with everything needed to work on steer

.PHONY: demo
demo: $(RUN) ## personalize a small model for five people, on the CPU
	@$(BIN)/steer models pull $(MODEL)
	@$(BIN)/steer demo

.PHONY: test
test: $(DEV) ## run the tests, the slow ones left out
	@$(BIN)/steer models pull $(MODEL)
	@$(BIN)/pytest -m 'not full' $(PYTEST_FLAGS)

.PHONY: test-full
test-full: $(DEV) ## run all tests
	@$(BIN)/steer models pull $(MODEL)
	@$(BIN)/pytest $(PYTEST_FLAGS)

.PHONY: lint
lint: $(DEV) ## check style, format and types
	@status=0; \
	$(BIN)/ruff check || status=1; \
	$(BIN)/ruff format --check || status=1; \
	$(BIN)/mypy | sed -E 's#^build/__editable__[^/]*/steer/##' || status=1; \
	exit $$status

.PHONY: bench
bench: $(RUN) ## measure what personalization costs per token
	@$(BIN)/python -P benchmarks/latency.py

.PHONY: clean
clean: ## remove .venv, builds and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
		found=$$($(PYTHON) --version 2> /dev/null) || found='not found'; \
		echo "steer needs Python 3.11 or newer; '$(PYTHON)': $$found." >&2; \
		echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install --quiet -c constraints.txt setuptools
	@touch $@

$(DEV): | $(CREATED)
	$(call install,dev,dev)

$(filter-out $(DEV),$(RUN)): | $(CREATED)
	$(call install,run,demo)
