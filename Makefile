# The commands of this project. `make demo` and `make test` need Python 3.11 or 3.12 and nothing else.
PYTHON ?= python3
VENV := .venv
ORACLE := .venv-oracle
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: demo ui test soak lint clean

demo: $(VENV)/.worker  ## a small Census, planned, embedded and finished by Dagster
	$(BIN)/python -m census_tf_dagster demo

ui: $(VENV)/.worker  ## Dagster's web interface on the demo
	DAGSTER_HOME=$(CURDIR)/demo-data/dagster_home $(BIN)/dagster dev -w workspace.yaml

test: $(VENV)/.dev $(ORACLE)/.ready lint  ## everything that CI runs
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not soak and not gpu" --oracle=$(ORACLE)/bin/transcriptformer tests

soak: $(VENV)/.dev $(ORACLE)/.ready  ## the long, seeded trials
	$(BIN)/python -m pytest -m soak --oracle=$(ORACLE)/bin/transcriptformer tests

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(ORACLE) demo-data

$(VENV)/.worker: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a few minutes, about 2.5 GB."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt -e '.[worker,ui]'
	touch $@

$(VENV)/.dev: $(VENV)/.worker
	$(BIN)/python $(PIP) -c constraints.txt -e '.[worker,ui,dev]'
	touch $@

$(ORACLE)/.ready: constraints-oracle.txt
	@echo "Setting up $(ORACLE), upstream's own package to compare with: a few minutes, about 6.5 GB."
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/python $(PIP) -c constraints-oracle.txt transcriptformer==0.6.1
	touch $@
