# make        lists the targets
# make test   makes .venv on first use (python3 >= 3.11 and a package index are all it needs)

PYTHON ?= python3
TIER ?= cpu
DEMO := runs/demo$(if $(filter-out cpu,$(TIER)),-$(TIER))
BIN := .venv/bin
READY := .venv/.ready
.DEFAULT_GOAL := help
.PHONY: help demo test book lab weights clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-7s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

$(READY): settings.ini setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "condgen needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e ".[dev]"
	@touch $@

demo: $(READY)  ## train CAGlow on handwritten digits and measure it (about three minutes; TIER=tiny: a minute)
	$(BIN)/python -m condgen reproduce caglow/digits --tier $(TIER) --jobs 2 --runs $(DEMO) --results $(DEMO)/metrics.json

test: $(READY)  ## run all tests, every notebook included
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

book: $(READY)  ## build the book into _build/html
	$(BIN)/python -m book.build

lab: $(READY)  ## open the notebooks in JupyterLab, as copies in plain Markdown; those you edit are kept
	$(BIN)/python -m book.plain
	$(BIN)/jupyter lab --notebook-dir _build/lab

weights: $(READY)  ## train the models that ship with the package anew
	$(BIN)/python -c "from condgen.reproduction import export_all; export_all()"

clean:  ## remove what the other targets made, except .venv, runs and the notebooks in _build/lab
	[ ! -d _build ] || find _build -mindepth 1 -maxdepth 1 ! -name lab -exec rm -rf {} +
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
