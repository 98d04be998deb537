# Every target sets up what it needs from a fresh clone: only python3 (3.11 or newer), its venv module, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
OLDEST_TESTS := tests
FAST := -m "not slow and not nightly and not peer"
BEFORE := HEAD
# One thread per process: two test workers share two cores, and fp32 sums stay the same from run to run.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
# mkdocs-material advertises on every build.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart demo recipes test nightly test-oldest check lint format docs peer same dist clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: $(VENV)/test.stamp  ## make .venv with this package in it, and do no more

quickstart: quickstart/run.yaml  ## set everything up, make a small model and pairs, and train a first model, offline
	$(BIN)/holdfast train $<

quickstart/run.yaml: | $(VENV)/test.stamp
	$(BIN)/holdfast quickstart quickstart

demo: $(VENV)/test.stamp  ## run the DPO paper's experiment in miniature, offline
	$(BIN)/holdfast demo

recipes: $(VENV)/test.stamp  ## run the recipes, and write their curves into docs/recipes: some minutes, offline
	$(BIN)/python examples/recipes/run.py

test: $(VENV)/test.stamp  ## run every kind of test; of the largest tables, the rows that stand for the rest
	$(BIN)/python -m pytest -n 2 --dist worksteal

nightly: $(VENV)/test.stamp  ## run every test that needs nothing but this package, and DeepSpeed where it can be installed
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,deepspeed]"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not peer"

test-oldest: $(OLDEST)/test.stamp  ## run the fast tests (or some: OLDEST_TESTS=...) on the oldest versions that are claimed
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal $(FAST) $(OLDEST_TESTS)

check: lint  ## format check, lint, types, docs build, fast tests
	$(BIN)/python -m pytest -n 2 --dist worksteal $(FAST)

lint: $(VENV)/dev.stamp  ## format check, lint, types, docs build
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/mkdocs build --strict --quiet

format: $(VENV)/dev.stamp  ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/dev.stamp  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

dist: $(VENV)/release.stamp  ## build the wheel and the source archive into dist/, and check them
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

peer: $(VENV)/peer.stamp  ## compare numbers with another trainer
	$(BIN)/python -m pytest -n 2 --dist worksteal -m peer

same: $(VENV)/test.stamp  ## compare what tiny runs compute, save and say with the commit BEFORE (default: HEAD), bit for bit
	$(BIN)/python dev/same_runs.py $(BEFORE)

clean:  ## remove the virtual environment and everything that was built
	rm -rf $(VENV) $(OLDEST) build dist site .pytest_cache .ruff_cache .hypothesis

%/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "holdfast needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $* || { rm -rf $*; exit 1; }

# torch goes first, and alone, so that a platform's own build of it is found before anything else can ask for one.
$(VENV)/torch.stamp: constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' $<)"
	@touch $@

$(OLDEST)/torch.stamp: constraints-oldest.txt | $(OLDEST)/bin/python
	$(OLDEST)/bin/python -m pip install --quiet "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' $<)"
	@touch $@

# test.stamp, dev.stamp, peer.stamp, release.stamp: the package with that extra; redone when what it depends on changes.
$(VENV)/%.stamp: pyproject.toml constraints.txt $(VENV)/torch.stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@

$(OLDEST)/test.stamp: pyproject.toml constraints-oldest.txt $(OLDEST)/torch.stamp
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[test]"
	@touch $@
