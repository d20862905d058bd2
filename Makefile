# The commands of this project. `make demo` and `make test` need Python 3.11 or 3.12 and nothing else.
PYTHON ?= python3
PORT ?= 3000
DAGSTER_HOME ?= $(CURDIR)/demo-data/dagster_home
VENV := .venv
UPSTREAM := .venv-upstream
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: demo ui test soak lint docs screenshots wheels images clean

demo: $(VENV)/.worker  ## a small Census, planned, embedded and finished by Dagster
	$(BIN)/python -m census_tf_dagster demo

ui: $(VENV)/.worker  ## Dagster's web interface, on the demo unless DAGSTER_HOME says otherwise
	DAGSTER_HOME="$(DAGSTER_HOME)" $(BIN)/dagster dev -w workspace.yaml -p $(PORT)

test: $(VENV)/.dev $(UPSTREAM)/.ready lint  ## everything that CI runs
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder -m "not soak and not gpu" --upstream=$(UPSTREAM)/bin/transcriptformer tests

soak: $(VENV)/.dev $(UPSTREAM)/.ready  ## the long, seeded trials
	$(BIN)/python -m pytest -m soak --upstream=$(UPSTREAM)/bin/transcriptformer tests

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.worker  ## docs/configure.md from the schema
	$(BIN)/python -m census_tf_dagster.config_reference > docs/configure.md

screenshots: $(VENV)/.dev $(UPSTREAM)/.ready  ## the pictures of the web interface, from the browser test (Debian: chromium chromium-driver)
	CENSUS_TF_SCREENSHOTS=docs/images $(BIN)/python -m pytest -m soak \
	    --upstream=$(UPSTREAM)/bin/transcriptformer tests/repository/test_browser.py

wheels:  ## what benchmarks/gpu.sh needs on a machine without a network: .wheels/packages.tar.xz (55 MB, 4 minutes)
	rm -rf .wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	    $(addprefix --platform manylinux,_2_28_x86_64 _2_24_x86_64 _2_17_x86_64 2014_x86_64) \
	    -c constraints.txt -r benchmarks/gpu-packages.txt -d .wheels
	# Upstream's hydra needs this version, which has no wheel of its own.
	$(PYTHON) -m pip wheel --quiet --no-deps -w .wheels antlr4-python3-runtime==4.9.3
	for wheel in .wheels/*.whl; do $(PYTHON) -m zipfile -e $$wheel .wheels/packages || exit 1; done
	# One archive, and a dictionary that spans both copies of TileDB's library: two thirds of the wheels' size.
	tar -C .wheels/packages --sort=name --exclude=tests --exclude='*.pyi' -c . \
	    | xz --lzma2=preset=6,dict=192MiB > .wheels/packages.tar.xz

images:  ## census-tf-control and census-tf-worker, with buildah (docs/images.md)
	deploy/images/build.sh

clean:
	rm -rf $(VENV) $(UPSTREAM) .wheels demo-data

$(VENV)/.worker: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a few minutes, about 2.5 GB."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt -e '.[worker,ui]'
	touch $@

$(VENV)/.dev: $(VENV)/.worker
	$(BIN)/python $(PIP) -c constraints.txt -e '.[worker,ui,dev]'
	touch $@

$(UPSTREAM)/.ready: constraints-upstream.txt
	@echo "Setting up $(UPSTREAM), upstream's own package to compare with: a few minutes, about 6.5 GB."
	$(PYTHON) -m venv $(UPSTREAM)
	$(UPSTREAM)/bin/python $(PIP) -c constraints-upstream.txt transcriptformer==0.6.1
	touch $@
