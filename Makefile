# make demo, make sweep-demo: the embedded examples; make test, make test-slow, make test-long: the tests;
# make findings: docs/findings.md anew, in hours; make docs: the site. Each installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/installed

.PHONY: demo sweep-demo findings test test-slow test-long lint rooms docs clean

demo: $(READY)
	$(BIN)/python pipelines/gdbench.py --model shapes shapes-flow --clip shapes --data shapes --out out/demo

sweep-demo: $(READY)
	$(BIN)/python pipelines/sweep.py timesteps --config pipelines/sweeps/timesteps.yaml out=out/sweeps/timesteps
	$(BIN)/python pipelines/sweep.py lambda --config pipelines/sweeps/lambda.yaml out=out/sweeps/lambda
	$(BIN)/python pipelines/sweep.py lambda --config pipelines/sweeps/objectives.yaml out=out/sweeps/objectives
	$(BIN)/python pipelines/sweep.py recap-density --config pipelines/sweeps/recap-density.yaml out=out/sweeps/recap-density

findings: $(READY)
	$(BIN)/python -m benchmarks.findings out/findings --page docs/findings.md

test: lint
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m "slow and not long" --durations=20

test-long: $(READY)
	$(BIN)/python -m pytest -q -m long

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python tools/rooms.py --check

rooms: $(READY)
	$(BIN)/python tools/rooms.py --write

docs: $(READY)
	$(BIN)/mkdocs build

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffitm needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) out
