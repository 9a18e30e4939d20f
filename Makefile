# Two commands:  `make demo`  shows what it does,  `make test`  checks that it works.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
BIN    := $(VENV)/bin

# Two test processes with one thread each are faster than one with two, and results do not depend on the machine.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE  ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint format types unit wheel clean
.DEFAULT_GOAL := test

demo: $(VENV)/.installed-all
	@$(BIN)/surgery demo --out demo-out

# Every check runs, so that one failure does not hide another; pytest's summary is the last thing printed.
test: $(VENV)/.installed-dev
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	$(MAKE) --no-print-directory types || status=1; \
	$(MAKE) --no-print-directory unit || status=1; \
	exit $$status

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check --output-format concise .
	@$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --output-format concise --fix .
	@$(BIN)/ruff format .

# adapters/ and scripts/ are packages inside `surgery` only once installed; mypy follows links, not import hooks.
types: $(VENV)/.installed-dev
	@rm -rf build/types && mkdir -p build/types/surgery
	@ln -s $(CURDIR)/surgery/* build/types/surgery/
	@ln -s $(CURDIR)/adapters $(CURDIR)/scripts build/types/surgery/
	@cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p surgery

unit: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -q -n $(JOBS)

wheel: $(VENV)/.installed-dev
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache demo-out

# The install is repeated only when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; torch is large) …"
	@$(BIN)/python -m pip install -qq --editable ".[$*]"
	@touch $@
