# The two commands that matter: `make demo` and `make test`. Both install first if needed.
.POSIX:
.PHONY: install demo test test-slow lint format bench docs clean

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Cenacle needs Python 3.11 or later, found {v[0]}.{v[1]}; run: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@if pkg-config --exists tss2-esys tss2-mu tss2-rc tss2-tctildr 2>/dev/null; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[tpm]' \
	  || echo "tpm2-pytss could not be built: this machine's TPM will not be used"; fi
	touch $(STAMP)

demo: install
	$(BIN)/cenacle demo hospitals --dir demo-work

test: install
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m "not slow" \
		-n 4 --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks.sealing --json
	$(BIN)/python -m benchmarks.release --json
	$(BIN)/python -m benchmarks.offload --quick --json
	$(BIN)/python -m benchmarks.attestation --json
	$(BIN)/python -m benchmarks.tickets --quick --json
	$(BIN)/python -m benchmarks.serving --quick --json

docs: install
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
