# The commands of this project. `make demo` and `make test` need only Python 3.11 or 3.12.
PYTHON ?= python3
PORT ?= 3000
DAGSTER_HOME ?= $(CURDIR)/demo-data/dagster_home
VENV := .venv
UPSTREAM := .venv-upstream
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: demo ui test test-fast soak lint docs site screenshots wheels images clean

demo: $(VENV)/.worker  ## take a small Census to finished arrays, with Dagster
	$(BIN)/census-tf-dagster demo

ui: $(VENV)/.worker  ## open Dagster's web interface, on the demo unless DAGSTER_HOME names another instance
	DAGSTER_HOME="$(DAGSTER_HOME)" $(BIN)/dagster dev -w workspace.yaml -p $(PORT)

test: $(VENV)/.dev $(UPSTREAM)/.ready lint  ## run everything that CI runs
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder -m "not soak" --upstream=$(UPSTREAM)/bin/transcriptformer tests

test-fast: $(VENV)/.dev  ## run the quick tests of the data plane
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not soak and not upstream and not takes" \
	    $(addprefix tests/,census inference io quality store)

soak: $(VENV)/.dev $(UPSTREAM)/.ready  ## run the long, seeded trials
	$(BIN)/python -m pytest -m soak --upstream=$(UPSTREAM)/bin/transcriptformer tests

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.worker  ## write docs/configure.md from the schema
	$(BIN)/python -m census_tf_dagster.config_reference > docs/configure.md

site: $(VENV)/.dev  ## build the documentation as a website, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

screenshots: $(VENV)/.dev $(UPSTREAM)/.ready  ## take the pictures of the web interface in the browser test (Debian: chromium chromium-driver)
	CENSUS_TF_SCREENSHOTS=docs/images $(BIN)/python -m pytest -m soak \
	    --upstream=$(UPSTREAM)/bin/transcriptformer tests/repository/test_browser.py

wheels:  ## fetch what benchmarks/gpu.sh needs on a machine without a network: .wheels/packages.tar.xz (55 MB, 4 minutes)
	rm -rf .wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	    $(addprefix --platform manylinux,_2_28_x86_64 _2_24_x86_64 _2_17_x86_64 2014_x86_64) \
	    -c constraints.txt -r benchmarks/gpu-packages.txt -d .wheels
	# Upstream's hydra needs this version. PyPI has no wheel of it.
	$(PYTHON) -m pip wheel --quiet --no-deps -w .wheels antlr4-python3-runtime==4.9.3
	for wheel in .wheels/*.whl; do $(PYTHON) -m zipfile -e $$wheel .wheels/packages || exit 1; done
	# One archive, with a dictionary that spans both copies of TileDB's library, has two thirds of the wheels' size.
	tar -C .wheels/packages --sort=name --exclude=tests --exclude='*.pyi' -c . \
	    | xz --lzma2=preset=6,dict=192MiB > .wheels/packages.tar.xz

images:  ## build census-tf-control and census-tf-worker with buildah (docs/images.md)
	deploy/images/build.sh

clean:
	rm -rf $(VENV) $(UPSTREAM) .wheels demo-data site

$(VENV)/.worker: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a few minutes, about 2.5 GB."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt -e '.[worker,ui]'
	touch $@

$(VENV)/.dev: $(VENV)/.worker
	$(BIN)/python $(PIP) -c constraints.txt -e '.[worker,ui,dev]'
	touch $@

$(UPSTREAM)/.ready: constraints-upstream.txt
	@echo "Setting up $(UPSTREAM) with upstream's own package, to compare with: a few minutes, about 6.5 GB."
	$(PYTHON) -m venv $(UPSTREAM)
	$(UPSTREAM)/bin/python $(PIP) -c constraints-upstream.txt transcriptformer==0.6.1
	touch $@
