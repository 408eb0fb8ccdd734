# Two commands for a fresh machine with Python 3.11 or newer:
#   make demo    fine-tune a real pretrained encoder with LoRA (about 5 minutes on two cores)
#   make test    the test suite
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
ARGS ?=
# The newest Python that runs, for the newest JAX: on the path, where pyenv leaves commands that only say that they cannot,
# or among those that pyenv has.
NEWEST ?= $(shell for python in python3.13 python3.12 $$(ls -d $$HOME/.pyenv/versions/3.1[23].*/bin/python 2>/dev/null | sort -rV); \
	do $$python -c "" 2>/dev/null && echo $$python && break; done)

.PHONY: demo demo-sharded compare compare-methods headlines assets test test-newest test-compiled run-compiled test-interop \
	test-gguf run-gguf test-mlx test-image test-site interop-models package environments lint format types architecture docs \
	docs-links clean

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
	$(RUN) -m pytest --numprocesses 2 --dist loadgroup --ignore-glob 'tests/interop_*' --ignore tests/compiled --ignore tests/package \
	--ignore tests/site $(ARGS)

test-newest:
	@python="$(NEWEST)"; if [ -z "$$python" ]; then \
	echo "test-newest is skipped: neither python3.13 nor python3.12 runs here; say which with: make NEWEST=... test-newest"; \
	else $(MAKE) --no-print-directory test PYTHON="$$python" VENV=.venv-newest; fi

test-interop: $(VENV)/.test-interop
	$(RUN) -m pytest --numprocesses 2 tests/interop_peft tests/interop_qwix $(ARGS)

# Builds llama.cpp: four minutes on two cores, and none once pip has what it built in its cache.
test-gguf:
	@if command -v c++ >/dev/null; then $(MAKE) --no-print-directory run-gguf; \
	else echo "test-gguf is skipped: there is no compiler for C++ here, c++, which builds llama.cpp"; fi

run-gguf: $(VENV)/.test-gguf
	$(RUN) -m pytest tests/interop_gguf $(ARGS)

# mlx has wheels for Linux, where it computes on the CPU, and for Apple's processors.
test-mlx: | $(RUN)
	@if $(RUN) -c 'import platform; exit((platform.system(), platform.machine()) not in [("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64")])'; \
	then $(MAKE) --no-print-directory $(VENV)/.test-mlx && $(RUN) -m pytest tests/interop_mlx $(ARGS); \
	else echo "test-mlx is skipped: mlx has no wheels for this system"; fi

test-image: $(VENV)/.test-image
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 tests/interop_image $(ARGS)

# Opens every page of the built site in the system's Chromium, or CHROMIUM=...; without one it reads the files only.
# ARGS="--screenshots FOLDER" writes pictures to be looked at.
test-site: $(VENV)/.test-site
	$(MAKE) --no-print-directory docs
	$(RUN) -m pytest --numprocesses 2 -c tests/site/pytest.ini tests/site --site docs/_build/html $(ARGS)

# Compiles for TPUs and GPUs that are not there: a quarter of an hour on two cores, and two minutes once .compiled_cache
# has what is compiled. Its conftest stands alone. Neighbours share programs, so each process begins with one half of the
# tests; one that is done takes over from the other, and finds in .compiled_cache what that has compiled.
test-compiled:
	@if [ -n "$(NEWEST)" ]; then $(MAKE) --no-print-directory run-compiled; \
	else echo "test-compiled is skipped: neither python3.13 nor python3.12 runs here; say which with: make NEWEST=... test-compiled"; fi

run-compiled: .venv-compiled/.done
	.venv-compiled/bin/python -m pytest --numprocesses 2 --dist worksteal -c tests/compiled/pytest.ini tests/compiled $(ARGS)

interop-models: $(VENV)/.interop-models
	$(RUN) -m pytest --numprocesses 2 tests/interop_models $(ARGS)

# Wheel and sdist in dist/, checked, and tried in empty environments. What checks them needs no JAX.
package: .venv-package/.done
	rm -rf dist
	.venv-package/bin/python -m build
	.venv-package/bin/python -m twine check --strict dist/*
	.venv-package/bin/python -m pytest -c tests/package/pytest.ini tests/package

# What test-newest and test-compiled need, where they run
environments:
	@if [ -n "$(NEWEST)" ]; then $(MAKE) --no-print-directory .venv-compiled/.done && \
	$(MAKE) --no-print-directory .venv-newest/.dev PYTHON="$(NEWEST)" VENV=.venv-newest; fi

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

# The site, in docs/_build/html, with its notebooks executed; what is said twice, leads nowhere or cannot be read is an error.
docs: $(VENV)/.docs
	$(RUN) -m sphinx --builder html --fail-on-warning --keep-going docs docs/_build/html

# Asks the other hosts whether links lead somewhere; CI does not.
docs-links: $(VENV)/.docs
	$(RUN) -m sphinx --builder linkcheck -D nb_execution_mode=off docs docs/_build/links $(ARGS)

clean:
	rm -rf docs/_build $(VENV) .venv-newest .venv-compiled .venv-package dist .compiled_cache .pytest_cache .mypy_cache .ruff_cache

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lora_jax needs Python 3.11 or newer; say which with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[examples]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	@touch $@ $(VENV)/.dev $(VENV)/.demo

$(VENV)/.test-interop: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[interop]'
	@touch $@ $(VENV)/.dev $(VENV)/.demo

$(VENV)/.test-gguf: pyproject.toml | $(RUN)
	CMAKE_BUILD_PARALLEL_LEVEL=2 CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAVA_BUILD=OFF" \
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev,interop-gguf]'
	@touch $@ $(VENV)/.dev $(VENV)/.demo

$(VENV)/.test-mlx: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev,interop-mlx]'
	@touch $@ $(VENV)/.dev $(VENV)/.demo

$(VENV)/.test-site: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[site-tests]'
	@touch $@

$(VENV)/.test-image: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[interop-image]'
	@touch $@ $(VENV)/.test-interop $(VENV)/.dev $(VENV)/.demo

.venv-compiled/.done: pyproject.toml
	$(NEWEST) -m venv .venv-compiled
	.venv-compiled/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[compiled]'
	@touch $@

.venv-package/.done: pyproject.toml | $(RUN)
	$(RUN) -m venv .venv-package
	.venv-package/bin/python -m pip install --quiet --disable-pip-version-check 'build>=1.2' 'pytest>=8.3' 'twine>=6.1'
	@touch $@

$(VENV)/.interop-models: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev,interop-models]'
	@touch $@ $(VENV)/.dev $(VENV)/.demo
