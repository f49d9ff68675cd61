# make demo   train SlotMamba on text and on recall, on this machine
# make test   all tests; make lint: formatting, lint and types; make soak: minutes of kills and restarts
#
# PYTHON=python3.12 chooses the interpreter of .venv. The stamps record what .venv was installed from: the demo needs the
# core packages only, everything else the dev extra, which includes them.

PYTEST = OMP_NUM_THREADS=1 .venv/bin/pytest
INPUTS = pyproject.toml constraints.txt scripts/install.sh

.DELETE_ON_ERROR:
.PHONY: venv demo test lint format soak docs constraints clean

venv: .venv/dev.stamp

.venv/core.stamp: $(INPUTS)
	scripts/install.sh
	touch $@

.venv/dev.stamp: $(INPUTS)
	scripts/install.sh dev
	touch .venv/core.stamp $@

demo: .venv/core.stamp
	.venv/bin/python -m slotmamba.demo

test: venv
	$(PYTEST) -n 2

soak: venv
	$(PYTEST) -m soak

lint: venv
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy

format: venv
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

docs: venv
	.venv/bin/python -m slotmamba.config.reference > docs/recipes.md
	.venv/bin/python -m slotmamba.estimate.sizes > docs/sizes.md

# After a full test run with newer versions in .venv: record them. The local version of torch
# (+cpu, +cu130) and what only its CUDA build needs are left out, so that one file serves all machines.
constraints:
	sed -n '/^#/p' constraints.txt > .venv/constraints.txt
	.venv/bin/pip freeze --all --exclude pip --exclude-editable | \
		grep -v -E '^(nvidia|cuda)-' | sed -E 's/\+[a-z0-9.]+$$//' >> .venv/constraints.txt
	mv .venv/constraints.txt constraints.txt

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
