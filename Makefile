# One command each. Every target makes .venv and installs what is missing; versions are pinned in constraints.txt.
#
#   make up                                       the platform on this machine
#   make up ARGS="--model PATH_OR_HF_ID"          with another model
#   make screenshots OUT=DIRECTORY               every page of the console in both themes
#   make bench-serving ARGS="--publish"           servers side by side, the table into README
#   make test TORCH_INDEX=<index URL>             torch from that index (CPU or CUDA builds)

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help up demo test check format bench bench-serving screenshots install chromium clean

help:
	@echo "make up | demo | test | check | bench | bench-serving | screenshots   (README.md says what each does)"

up: $(STAMP)
	$(BIN)/whet up $(ARGS)

demo: $(STAMP)
	$(BIN)/python -m examples.demo $(ARGS)

# A file's tests share what it sets up, so they stay in one process.
test: $(STAMP) chromium
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	@for module in gateway engine_steps adapters prefix memory quality; do \
		echo "== $$module"; \
		$(BIN)/python -m benchmarks.$$module || exit 1; \
	done

screenshots: $(STAMP) chromium
	$(BIN)/python -m tests.browser.screenshots $(or $(OUT),out/screenshots) $(ARGS)

bench-serving: $(STAMP)
	$(BIN)/python -m benchmarks.serving $(ARGS)

install: $(STAMP)

# Torch first and alone, so that only its own line sees the index chosen for it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Whet needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
# The engine's CPU path is C++, compiled in a few seconds; without a system compiler a wheel brings one.
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[compiler]'
	@$(BIN)/python -m engine.native.build || true
	@touch $@

# The browser test drives the system's Chromium.
chromium:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif command -v apt-get >/dev/null 2>&1 && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else \
		echo "No Chromium here, which the browser test needs. Install it (Debian: sudo apt-get install chromium)."; exit 1; \
	fi

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
