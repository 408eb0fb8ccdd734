# Two commands for a fresh machine with Python 3.11 or newer:
#   make demo    fine-tune a real pretrained encoder with LoRA (about 5 minutes on two cores)
#   make test    the test suite
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
ARGS ?=
# The newest Python that runs, for the newest JAX. Version managers leave commands on PATH that only say that they cannot.
NEWEST ?= $(shell for python in python3.13 python3.12; do $$python -c "" 2>/dev/null && echo $$python && break; done)

.PHONY: demo demo-sharded compare compare-methods headlines assets test test-newest test-interop interop-models lint format types architecture clean

demo: $(VENV)/.demo
	$(RUN) examples/finetune_sentiment.py $(ARGS)

demo-sharded: $(VENV)/.demo
	$(RUN) examples/launch.py --local 2 --devices-per-process 4 examples/finetune_sharded.py --tiny $(ARGS)

compare: $(VENV)/.demo
	$(RUN) examples/finetune_sentiment.py --compare $(ARGS)

compare-methods: $(VENV)/.demo
	$(RUN) examples/compare_methods.py $(ARGS)

headlines: $(VENV)/.demo
	$(RUN) examples/finetune_decoder.py $(ARGS)

assets: $(VENV)/.demo
	$(RUN) examples/assets.py

test: $(VENV)/.dev
	$(RUN) -m pytest --numprocesses 2 --dist loadgroup --ignore tests/interop_models --ignore tests/interop_peft --ignore tests/interop_qwix $(ARGS)

test-newest:
	@python="$(NEWEST)"; if [ -z "$$python" ]; then \
	echo "test-newest is skipped: neither python3.13 nor python3.12 runs here; say which with: make NEWEST=... test-newest"; \
	else $(MAKE) --no-print-directory test PYTHON="$$python" VENV=.venv-newest; fi

test-interop: $(VENV)/.test-interop
	$(RUN) -m pytest --numprocesses 2 tests/interop_peft tests/interop_qwix $(ARGS)

interop-models: $(VENV)/.interop-models
	$(RUN) -m pytest --numprocesses 2 tests/interop_models $(ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(VENV)/.dev
	$(RUN) -m mypy

architecture: | $(RUN)
	$(RUN) docs/architecture.py $(ARGS)

clean:
	rm -rf $(VENV) .venv-newest .pytest_cache .mypy_cache .ruff_cache

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lora_jax needs Python 3.11 or newer; say which with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[examples]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.test-interop: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[interop]'
	@touch $@ $(VENV)/.dev $(VENV)/.demo

$(VENV)/.interop-models: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev,interop-models]'
	@touch $@ $(VENV)/.dev $(VENV)/.demo
